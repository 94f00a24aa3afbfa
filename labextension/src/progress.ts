import { Notification } from '@jupyterlab/apputils';

function dismiss(id: string): void {
  if (id !== '') {
    Notification.dismiss(id);
  }
}

/** After how long it is worth saying that something goes on, in milliseconds: most is done by then. */
export const SOON = 1000;

/**
 * Say that something goes on, unless it is done at once, and how it ended (an empty text is nothing worth saying); a
 * failure is for the caller to explain.
 */
export async function told<T>(promise: Promise<T>, pending: string, done: (value: T) => string): Promise<T> {
  let id = '';
  const timer = window.setTimeout(() => {
    id = Notification.emit(pending, 'in-progress', { autoClose: false });
  }, SOON);
  try {
    const value = await promise;
    const message = done(value);
    if (message === '') {
      dismiss(id);
    } else if (id === '') {
      Notification.success(message, { autoClose: 4000 });
    } else {
      Notification.update({ id, message, type: 'success', autoClose: 4000 });
    }
    return value;
  } catch (error) {
    dismiss(id);
    throw error;
  } finally {
    window.clearTimeout(timer);
  }
}
