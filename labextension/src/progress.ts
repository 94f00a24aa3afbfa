import { Notification } from '@jupyterlab/apputils';

/** After how long it is worth saying that something goes on, in milliseconds: most is done by then. */
const SOON = 1000;
/** For how long a notification stays as it is: one that changes while JupyterLab puts it up would stay so for good. */
const STILL = 1000;

/** Says that something goes on, unless it is over soon, and how it ended. */
export class Pending {
  /** `wanted` says, when it is time, whether to say it at all. */
  constructor(
    private _text: string,
    private readonly _wanted: () => boolean = () => true
  ) {}

  /** How far it is. */
  tell(text: string): void {
    this._text = text;
    this._later(() => this._over || Notification.update({ id: this._id, message: this._text }));
  }

  /** It is over; an empty text is nothing worth saying. */
  end(message = ''): void {
    this._over = true;
    window.clearTimeout(this._timer);
    if (this._id === '' && message !== '') {
      Notification.success(message, { autoClose: 4000 });
    }
    this._later(() => {
      if (message === '') {
        Notification.dismiss(this._id);
      } else {
        Notification.update({ id: this._id, message, type: 'success', autoClose: 4000 });
      }
    });
  }

  private _later(change: () => void): void {
    if (this._id !== '') {
      window.setTimeout(change, Math.max(0, this._since + STILL - Date.now()));
    }
  }

  private _id = '';
  private _since = 0;
  private _over = false;
  private readonly _timer = window.setTimeout(() => {
    if (this._wanted()) {
      this._since = Date.now();
      this._id = Notification.emit(this._text, 'in-progress', { autoClose: false });
    }
  }, SOON);
}

/** Say that something goes on, and how it ended; a failure is for the caller to explain. */
export async function told<T>(promise: Promise<T>, pending: string, done: (value: T) => string): Promise<T> {
  const shown = new Pending(pending);
  try {
    const value = await promise;
    shown.end(done(value));
    return value;
  } catch (error) {
    shown.end();
    throw error;
  }
}
