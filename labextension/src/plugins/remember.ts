/** What was chosen for a notebook's kernel is remembered in the notebook, and holds when it is opened again. */
import type { JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import type { ISessionContext } from '@jupyterlab/apputils';
import { Notification } from '@jupyterlab/apputils';
import type { NotebookPanel } from '@jupyterlab/notebook';
import type { TranslationBundle } from '@jupyterlab/translation';
import { ITranslator, nullTranslator } from '@jupyterlab/translation';
import { DisposableDelegate } from '@lumino/disposable';

import { DOMAIN } from '../names';
import { profileOf } from '../offers';
import type { Choice } from '../remembered';
import { readChoice } from '../remembered';
import { ISandboxes } from '../tokens';

export const remember: JupyterFrontEndPlugin<void> = {
  id: '@sandbox-gateway/labextension:remember',
  description: 'Starts the kernel of a notebook that is opened with the resources that were chosen for it.',
  autoStart: true,
  requires: [ISandboxes],
  optional: [ITranslator],
  activate: (app: JupyterFrontEnd, sandboxes: ISandboxes, translator: ITranslator | null): void => {
    if (!sandboxes.available) {
      return;
    }
    const trans = (translator ?? nullTranslator).load(DOMAIN);
    const known = new WeakSet<ISessionContext>();
    app.docRegistry.addWidgetExtension('Notebook', {
      createNew: (panel: NotebookPanel) => {
        const session = panel.sessionContext;
        if (!known.has(session)) {
          known.add(session);
          const stock = session.startKernel.bind(session);
          // JupyterLab starts a kernel by its name alone, and has no other place to say with what.
          session.startKernel = async () => {
            const choice = wanted(session, panel);
            return choice === null ? stock() : started(sandboxes, session, choice, stock, trans);
          };
        }
        return new DisposableDelegate(() => undefined);
      }
    });
  }
};

/** What was chosen for the kernel that would start now; null where nothing was. */
function wanted(session: ISessionContext, panel: NotebookPanel): Choice | null {
  const { id, name, canStart, shouldStart, autoStartDefault } = session.kernelPreference;
  if ((id ?? '') !== '' || canStart === false || (shouldStart === false && autoStartDefault !== true)) {
    return null;
  }
  const choice = panel.model === null ? null : readChoice(panel.model);
  const spec = session.specsManager.specs?.kernelspecs[name ?? ''];
  return choice !== null && profileOf(spec) === choice.profile ? choice : null;
}

/** Start it with what was chosen, or, where the server does not allow that, as its profile has it. */
async function started(
  sandboxes: ISandboxes,
  session: ISessionContext,
  { profile, resources }: Choice,
  stock: () => Promise<boolean>,
  trans: TranslationBundle
): Promise<boolean> {
  let id: string;
  try {
    ({ id } = await sandboxes.create(profile, resources, session.name, session.path));
  } catch (error) {
    const why = error instanceof Error ? error.message : String(error);
    Notification.warning(trans.__('“%1” starts without what was chosen for it: %2', session.name, why), {
      autoClose: false
    });
    return stock();
  }
  session.kernelPreference = { ...session.kernelPreference, id };
  let ask = false;
  try {
    ask = await stock();
  } finally {
    if (!session.isDisposed) {
      const preference = { ...session.kernelPreference };
      delete preference.id;
      session.kernelPreference = preference;
    }
    if (session.isDisposed || session.session?.kernel?.id !== id) {
      void sandboxes.remove(id).catch(() => undefined); // the notebook was closed meanwhile: nobody would know of it
    }
  }
  return ask;
}
