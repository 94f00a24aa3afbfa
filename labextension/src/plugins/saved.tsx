/** "Save state with notebook": a snapshot that the notebook names, and the offer to start from it. */
import type { JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import type { ISessionContext } from '@jupyterlab/apputils';
import { ICommandPalette } from '@jupyterlab/apputils';
import type { NotebookPanel } from '@jupyterlab/notebook';
import { INotebookTracker } from '@jupyterlab/notebook';
import type { TranslationBundle } from '@jupyterlab/translation';
import { ITranslator, nullTranslator } from '@jupyterlab/translation';
import { ReactWidget } from '@jupyterlab/ui-components';
import type { ReadonlyPartialJSONObject } from '@lumino/coreutils';
import { DisposableDelegate } from '@lumino/disposable';
import type { Widget } from '@lumino/widgets';
import * as React from 'react';

import type { Sandbox, Snapshot } from '../client';
import { askForName, explain } from '../dialogs';
import { moment } from '../format';
import { CommandIDs, DOMAIN } from '../names';
import { told } from '../progress';
import { readState, writeState } from '../remembered';
import { ISandboxes } from '../tokens';
import { possible, title } from '../view';

export const saved: JupyterFrontEndPlugin<void> = {
  id: '@sandbox-gateway/labextension:saved',
  description: 'Saves the state of a notebook’s sandbox with the notebook, and offers to start from it.',
  autoStart: true,
  requires: [ISandboxes, INotebookTracker],
  optional: [ICommandPalette, ITranslator],
  activate: (
    app: JupyterFrontEnd,
    sandboxes: ISandboxes,
    notebooks: INotebookTracker,
    palette: ICommandPalette | null,
    translator: ITranslator | null
  ): void => {
    if (!sandboxes.available) {
      return;
    }
    const trans = (translator ?? nullTranslator).load(DOMAIN);

    const chosen = (args: ReadonlyPartialJSONObject): { panel: NotebookPanel; sandbox: Sandbox } | null => {
      const { id } = args;
      const own = (panel: NotebookPanel) => panel.sessionContext.session?.kernel?.id ?? '';
      const current = app.shell.currentWidget === notebooks.currentWidget ? notebooks.currentWidget : null;
      const panel = typeof id !== 'string' || (current !== null && own(current) === id) ? current : find(id, own);
      const sandbox = panel === null ? undefined : sandboxes.get(own(panel));
      return panel === null || sandbox === undefined ? null : { panel, sandbox };
    };
    const find = (id: string, own: (panel: NotebookPanel) => string) =>
      notebooks.find(panel => own(panel) === id) ?? null;

    app.commands.addCommand(CommandIDs.saveState, {
      label: args =>
        args['short'] === true
          ? trans.__('Save State with Notebook…')
          : trans.__('Save State of Sandbox with Notebook…'),
      caption: trans.__('A snapshot that the notebook names: whoever opens it elsewhere is offered to start from it'),
      isVisible: args => chosen(args) !== null,
      isEnabled: args => {
        const found = chosen(args);
        return found !== null && sandboxes.connection === 'ok' && possible('snapshot', found.sandbox);
      },
      execute: async args => {
        const found = chosen(args);
        const name = found === null ? null : await askForName(found.sandbox, trans);
        if (found === null || name === null) {
          return;
        }
        try {
          await told(
            save(sandboxes, found.panel, found.sandbox, name),
            trans.__('Saving “%1”…', title(found.sandbox)),
            made => trans.__('Saved with the notebook as “%1”', made.name)
          );
        } catch (error) {
          await explain(trans.__('The state could not be saved with the notebook'), error, trans);
        }
      },
      describedBy: {
        args: {
          type: 'object',
          properties: { id: { type: 'string', description: trans.__('The sandbox’s id; else the one in front') } }
        }
      }
    });
    palette?.addItem({ command: CommandIDs.saveState, category: trans.__('Sandbox') });

    app.docRegistry.addWidgetExtension('Notebook', {
      createNew: (panel: NotebookPanel) => {
        void offer(sandboxes, panel, trans).catch((error: unknown) => {
          console.warn('sandbox_gateway: whether a notebook has a saved state could not be found out', error);
        });
        return new DisposableDelegate(() => undefined);
      }
    });
  }
};

async function save(sandboxes: ISandboxes, panel: NotebookPanel, sandbox: Sandbox, name: string): Promise<Snapshot> {
  const made = await sandboxes.snapshot(sandbox.id, name);
  if (panel.model !== null) {
    writeState(panel.model, { id: made.id, name: made.name, created: made.created });
    await panel.context.save();
  }
  return made;
}

/** Offer to start from what was saved, where the notebook is opened without a kernel that goes on. */
async function offer(sandboxes: ISandboxes, panel: NotebookPanel, trans: TranslationBundle): Promise<void> {
  const session = panel.sessionContext;
  if (panel.context.isReady || (session.kernelPreference.id ?? '') !== '') {
    return; // a second view of it, or one that was opened for its kernel
  }
  let fresh = false;
  const stock = session.startKernel.bind(session);
  session.startKernel = () => {
    fresh = true;
    return stock();
  };
  await panel.context.ready;
  await session.ready;
  const state = panel.isDisposed || panel.model === null ? null : readState(panel.model);
  if (state === null || !(fresh || session.hasNoKernel)) {
    return;
  }
  await sandboxes.ready;
  await sandboxes.refresh();
  if (sandboxes.connection !== 'ok' || panel.isDisposed) {
    return;
  }
  // The notebook may come from anybody: what it says of the snapshot is not shown where the server knows better.
  const found = sandboxes.snapshots().find(({ id }) => id === state.id);
  const bar: SavedBar = new SavedBar(found, state.name, trans, async () => {
    try {
      await start(sandboxes, session, state.id, trans);
      bar.dispose();
    } catch (error) {
      if (panel.isDisposed) {
        return; // who closed the notebook waits for nothing any more
      }
      bar.free();
      await explain(trans.__('It could not be started from what was saved'), error, trans);
    }
  });
  panel.contentHeader.addWidget(bar);
}

/** Give the session a child of the snapshot; there is none any more where it did not get it. */
async function start(
  sandboxes: ISandboxes,
  session: ISessionContext,
  snapshot: string,
  trans: TranslationBundle
): Promise<void> {
  const id = await told(sandboxes.startSnapshot(snapshot), trans.__('Starting from what was saved…'), () => '');
  try {
    await session.changeKernel({ id });
  } finally {
    if (session.isDisposed || session.session?.kernel?.id !== id) {
      void sandboxes.remove(id).catch(() => undefined); // the notebook was closed meanwhile: nobody would know of it
    }
  }
}

/** Below how many pixels the bar's buttons stand under its text. */
const NARROW = 560;

/** The bar above a notebook that offers its saved state, or says that it is gone. */
class SavedBar extends ReactWidget {
  constructor(
    private readonly _found: Snapshot | undefined,
    private readonly _said: string,
    private readonly _trans: TranslationBundle,
    private readonly _start: () => Promise<void>
  ) {
    super();
    this.addClass('sg-SavedBar');
    this.node.setAttribute('role', 'region');
    this.node.setAttribute('aria-label', _trans.__('Saved state of this notebook'));
  }

  /** It can be asked for again. */
  free(): void {
    this._busy = false;
    this.update();
  }

  protected override onResize(message: Widget.ResizeMessage): void {
    super.onResize(message);
    const narrow = message.width >= 0 && message.width < NARROW;
    if (narrow !== this.hasClass('sg-mod-narrow')) {
      this.toggleClass('sg-mod-narrow', narrow);
      this.parent?.fit(); // it needs another height now
    }
  }

  protected override render(): JSX.Element {
    const trans = this._trans;
    const found = this._found;
    return (
      <>
        <span className="sg-SavedBar-text" role="status">
          {found === undefined
            ? trans.__('The state “%1” that was saved with this notebook is gone, or not yours.', this._said)
            : trans.__(
                'A state was saved with this notebook: “%1”, %2.',
                found.name || found.id,
                moment(found.created)
              )}
        </span>
        {found !== undefined && (
          <button
            type="button"
            className="jp-mod-styled jp-mod-accept"
            disabled={this._busy}
            title={trans.__('Its kernel goes on from there; the one that it has now ends')}
            onClick={() => {
              this._busy = true;
              this.update();
              void this._start();
            }}
          >
            {trans.__('Start from It')}
          </button>
        )}
        <button type="button" className="jp-mod-styled jp-mod-reject" onClick={() => this.dispose()}>
          {found === undefined ? trans.__('Close') : trans.__('Not Now')}
        </button>
      </>
    );
  }

  private _busy = false;
}
