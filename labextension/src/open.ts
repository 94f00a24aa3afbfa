/** Opening notebooks for kernels that run. */
import type { JupyterFrontEnd } from '@jupyterlab/application';
import { PathExt } from '@jupyterlab/coreutils';
import type { IDocumentManager } from '@jupyterlab/docmanager';
import type { Contents, Kernel, Session } from '@jupyterlab/services';

/**
 * Attach the notebook at `path` to a kernel, before it is opened: Notebook 7 opens it in a page of its own, which knows
 * of the kernel by this only.
 */
export async function attach(sessions: Session.IManager, path: string, kernel: string): Promise<void> {
  const session = await sessions.startNew({
    path,
    name: PathExt.basename(path),
    type: 'notebook',
    kernel: { id: kernel } as Partial<Kernel.IModel>
  });
  session.dispose(); // the connection; the session stays
}

/** Open the notebook that a kernel has, or a new one for it. */
export async function openFor(app: JupyterFrontEnd, documents: IDocumentManager | null, id: string): Promise<void> {
  const { sessions } = app.serviceManager;
  const session = [...sessions.running()].find(one => one.kernel?.id === id && one.type === 'notebook');
  if (session !== undefined && documents !== null) {
    documents.openOrReveal(session.path);
  } else if (app.name === 'JupyterLab' || documents === null) {
    // In the folder that the file browser shows.
    await app.commands.execute('notebook:create-new', { kernelId: id, kernelName: '' });
  } else {
    const made = (await app.commands.execute('docmanager:new-untitled', { type: 'notebook' })) as Contents.IModel;
    await attach(sessions, made.path, id);
    documents.open(made.path);
  }
}
