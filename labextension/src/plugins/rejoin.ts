/** After a page was loaded anew, what its running cells print goes on in them: JupyterLab itself would drop it. */
import type { JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import type { ICodeCellModel } from '@jupyterlab/cells';
import type { NotebookPanel } from '@jupyterlab/notebook';
import { INotebookTracker } from '@jupyterlab/notebook';
import type { Kernel, ServerConnection } from '@jupyterlab/services';
import { KernelConnection } from '@jupyterlab/services';
import type { TranslationBundle } from '@jupyterlab/translation';
import { ITranslator, nullTranslator } from '@jupyterlab/translation';

import { DOMAIN } from '../names';
import { Replay } from '../replay';
import { Runs } from '../runs';
import { ISandboxes } from '../tokens';

export const rejoin: JupyterFrontEndPlugin<void> = {
  id: '@sandbox-gateway/labextension:rejoin',
  description: 'Puts the output of running cells back into them after the page was loaded anew.',
  autoStart: true,
  requires: [ISandboxes, INotebookTracker],
  optional: [ITranslator],
  activate: (
    app: JupyterFrontEnd,
    sandboxes: ISandboxes,
    tracker: INotebookTracker,
    translator: ITranslator | null
  ): void => {
    if (!sandboxes.available) {
      return;
    }
    const trans = (translator ?? nullTranslator).load(DOMAIN);
    const settings = app.serviceManager.serverSettings;
    const runs = new Runs(window.localStorage, settings.baseUrl);
    const follow = (panel: NotebookPanel) => void new Rejoin({ panel, sandboxes, runs, settings, trans });
    tracker.forEach(follow);
    tracker.widgetAdded.connect((_, panel) => follow(panel));
  }
};

/** One notebook: notes what runs in it, and goes on with what an earlier page ran. */
class Rejoin {
  constructor(private readonly _options: Rejoin.IOptions) {
    const { panel } = _options;
    panel.sessionContext.kernelChanged.connect(this._kernelChanged, this);
    panel.sessionContext.statusChanged.connect(this._statusChanged, this);
    panel.disposed.connect(this._leave, this);
    this._kernelChanged();
  }

  private get _kernel(): Kernel.IKernelConnection | null {
    return this._options.panel.sessionContext.session?.kernel ?? null;
  }

  private _kernelChanged(): void {
    const kernel = this._kernel;
    if (kernel === this._known) {
      return;
    }
    this._leave();
    this._known = kernel;
    if (kernel !== null) {
      kernel.anyMessage.connect(this._said, this);
      void this._come(kernel);
    }
  }

  /** A kernel that is started anew has forgotten what it ran. */
  private _statusChanged(_: unknown, status: Kernel.Status): void {
    if (['restarting', 'autorestarting', 'dead', 'terminating'].includes(status)) {
      const id = this._known?.id ?? '';
      this._replay?.stop();
      [...this._own].forEach(request => this._options.runs.remove(id, request));
      this._own.clear();
    }
  }

  private _leave(): void {
    this._known?.anyMessage.disconnect(this._said, this);
    this._known = null;
    this._replay?.dispose();
    this._replay = null;
    this._own.clear();
  }

  private async _come(kernel: Kernel.IKernelConnection): Promise<void> {
    const { panel, sandboxes, runs, settings, trans } = this._options;
    await Promise.all([panel.context.ready, sandboxes.ready]);
    if (panel.isDisposed || this._kernel !== kernel || sandboxes.get(kernel.id) === undefined) {
      return;
    }
    const cells = new Map<string, ICodeCellModel>();
    for (const [request, id] of runs.of(kernel.id)) {
      const cell = this._cell(id);
      if (cell !== null && !this._own.has(request)) {
        cells.set(request, cell);
      }
    }
    // With a shared document there are others that write it.
    if (cells.size === 0 || panel.model?.collaborative === true) {
      return;
    }
    const connection = new KernelConnection({
      model: { id: kernel.id, name: kernel.name },
      handleComms: false,
      serverSettings: { ...settings, WebSocket: withReplay(settings.WebSocket) }
    });
    this._replay = new Replay(connection, cells, request => runs.remove(kernel.id, request), trans);
  }

  private _said(kernel: Kernel.IKernelConnection, { msg, direction }: Kernel.IAnyMessageArgs): void {
    const { runs } = this._options;
    const { msg_type: kind, msg_id: id } = msg.header;
    if (direction === 'send') {
      const cell = (msg.metadata as { cellId?: unknown }).cellId;
      if (kind === 'execute_request' && typeof cell === 'string' && this._cell(cell) !== null) {
        this._own.add(id);
        this._replay?.leave(cell);
        runs.add(kernel.id, id, cell);
      }
      return;
    }
    const request = 'msg_id' in msg.parent_header ? msg.parent_header.msg_id : '';
    const { execution_state: state, status } = msg.content as { execution_state?: unknown; status?: unknown };
    const over = (kind === 'status' && state === 'idle') || (kind === 'execute_reply' && status === 'aborted');
    if (over && this._own.delete(request)) {
      runs.remove(kernel.id, request);
    }
  }

  private _cell(id: string): ICodeCellModel | null {
    for (const cell of this._options.panel.model?.cells ?? []) {
      if (cell.id === id && cell.type === 'code') {
        return cell as ICodeCellModel;
      }
    }
    return null;
  }

  private _known: Kernel.IKernelConnection | null = null;
  /** Requests of this page, which have a future of their own. */
  private readonly _own = new Set<string>();
  private _replay: Replay | null = null;
}

namespace Rejoin {
  export interface IOptions {
    panel: NotebookPanel;
    sandboxes: ISandboxes;
    runs: Runs;
    settings: ServerConnection.ISettings;
    trans: TranslationBundle;
  }
}

/** WebSockets that ask a gateway for the output that it has kept, too. */
function withReplay(Stock: typeof WebSocket): typeof WebSocket {
  return class extends Stock {
    constructor(url: string | URL, protocols?: string | string[]) {
      const asked = new URL(url);
      asked.searchParams.set('replay', '1');
      super(asked, protocols);
    }
  };
}
