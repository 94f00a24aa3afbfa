/** A server that was killed, or started anew, has forgotten its sessions: notebooks go on with the kernels they had. */
import type { JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import { Notification } from '@jupyterlab/apputils';
import type { NotebookPanel } from '@jupyterlab/notebook';
import { INotebookTracker } from '@jupyterlab/notebook';
import { ITranslator, nullTranslator } from '@jupyterlab/translation';

import { DOMAIN } from '../names';
import { ENDED } from '../states';
import { ISandboxes } from '../tokens';
import { title } from '../view';

export const reattach: JupyterFrontEndPlugin<void> = {
  id: '@sandbox-gateway/labextension:reattach',
  description: 'Attaches notebooks to their sandboxes again after the server was started anew.',
  autoStart: true,
  requires: [ISandboxes, INotebookTracker],
  optional: [ITranslator],
  activate: (
    _app: JupyterFrontEnd,
    sandboxes: ISandboxes,
    tracker: INotebookTracker,
    translator: ITranslator | null
  ): void => {
    if (!sandboxes.available) {
      return;
    }
    const trans = (translator ?? nullTranslator).load(DOMAIN);
    const back = async ({ sessionContext: session }: NotebookPanel, id: string): Promise<void> => {
      sandboxes.expect(id);
      await sandboxes.settled(id);
      const sandbox = sandboxes.get(id);
      // Who shuts a kernel down ends its sandbox, and is not given it back.
      const lives = sandbox !== undefined && !ENDED.includes(sandbox.state) && sandbox.state !== 'terminating';
      if (!lives || session.isDisposed || session.session !== null) {
        return;
      }
      try {
        await session.changeKernel({ id });
      } catch {
        return; // JupyterLab has told why
      }
      Notification.info(trans.__('“%1” goes on: the server was started anew, its sandbox was not.', title(sandbox)), {
        autoClose: 5000
      });
    };
    const follow = (panel: NotebookPanel): void => {
      const session = panel.sessionContext;
      let last = session.session?.kernel?.id ?? null;
      const note = (): void => {
        last = session.session?.kernel?.id ?? last;
      };
      session.kernelChanged.connect(note);
      session.sessionChanged.connect((_, { newValue }) => {
        note();
        if (newValue === null && last !== null && !panel.isDisposed) {
          void back(panel, last);
        }
      });
    };
    tracker.forEach(follow);
    tracker.widgetAdded.connect((_, panel) => follow(panel));
  }
};
