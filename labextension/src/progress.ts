import { Notification } from '@jupyterlab/apputils';

/** Say that something goes on, and how it ended; a failure is for the caller to explain. */
export async function told<T>(promise: Promise<T>, pending: string, done: (value: T) => string): Promise<T> {
  const id = Notification.emit(pending, 'in-progress', { autoClose: false });
  try {
    const value = await promise;
    Notification.update({ id, message: done(value), type: 'success', autoClose: 4000 });
    return value;
  } catch (error) {
    Notification.dismiss(id);
    throw error;
  }
}
