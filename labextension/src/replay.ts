/** The output of requests that another page sent, as a gateway keeps it and as it comes, put into their cells. */
import type { ICodeCellModel } from '@jupyterlab/cells';
import type * as nbformat from '@jupyterlab/nbformat';
import type { Kernel, KernelMessage } from '@jupyterlab/services';
import type { TranslationBundle } from '@jupyterlab/translation';

/** For how long a kernel has to have nothing to do until nothing more is waited for, in milliseconds. */
const QUIET = 10_000;

interface Run {
  cell: ICodeCellModel;
  /** Whether its output is known from its beginning on, or it was said that it is not. */
  begun: boolean;
  /** The outputs that a display's id names. */
  displays: Map<string, number[]>;
}

/** Follows requests until they have ended. */
export class Replay {
  /**
   * `kernel` is a connection that begins with what was printed before it was there; it is disposed with this.
   * `ended` is told of each request that has ended, and of those that never will.
   */
  constructor(
    private readonly _kernel: Kernel.IKernelConnection,
    cells: ReadonlyMap<string, ICodeCellModel>,
    private readonly _ended: (request: string) => void,
    private readonly _trans: TranslationBundle
  ) {
    for (const [request, cell] of cells) {
      this._runs.set(request, { cell, begun: false, displays: new Map() });
    }
    _kernel.anyMessage.connect(this._heard, this);
    _kernel.connectionStatusChanged.connect(this._connected, this);
    this._connected();
  }

  /** Leave the cells as they are; whoever comes later may go on. */
  dispose(): void {
    window.clearTimeout(this._timer);
    this._runs.clear();
    if (!this._kernel.isDisposed) {
      this._kernel.dispose();
    }
  }

  /** A cell is run again: its output is another's matter now. */
  leave(cell: string): void {
    for (const [request, run] of this._runs) {
      if (run.cell.id === cell) {
        this._runs.delete(request);
        this._ended(request);
      }
    }
    this._look();
  }

  /** Nothing more will come. */
  stop(): void {
    [...this._runs.keys()].forEach(request => this._end(request));
    this._look();
  }

  private _connected(): void {
    window.clearTimeout(this._timer);
    if (this._kernel.connectionStatus === 'connected') {
      // All that is kept comes again.
      for (const run of this._runs.values()) {
        run.begun = false;
        run.displays.clear();
      }
      this._wait();
    }
  }

  private _wait(): void {
    window.clearTimeout(this._timer);
    this._timer = window.setTimeout(() => this.stop(), QUIET);
  }

  private _heard(_: unknown, { msg, direction }: Kernel.IAnyMessageArgs): void {
    if (direction !== 'recv' || msg.channel !== 'iopub') {
      return;
    }
    const { parent_header: parent } = msg;
    const request = 'msg_id' in parent ? parent.msg_id : '';
    const run = this._runs.get(request);
    if (run?.cell.isDisposed === true) {
      this._runs.delete(request);
    } else if (run !== undefined) {
      this._put(run, msg as KernelMessage.IIOPubMessage);
    }
    if (msg.header.msg_type === 'status') {
      const idle = (msg.content as { execution_state?: unknown }).execution_state === 'idle';
      if (run !== undefined && idle) {
        this._end(request);
      }
      if (idle) {
        this._wait();
      } else {
        window.clearTimeout(this._timer);
      }
    }
    this._look();
  }

  /** What a running cell's own output area does with a message. */
  private _put(run: Run, msg: KernelMessage.IIOPubMessage): void {
    const { cell } = run;
    const kind = msg.header.msg_type;
    const content = msg.content as Record<string, unknown>;
    if (cell.executionState !== 'running') {
      cell.executionState = 'running';
    }
    if (kind === 'execute_input') {
      // All of it is here: what the file has of it, or of an earlier run, is not needed.
      run.begun = true;
      run.displays.clear();
      cell.outputs.clear();
      cell.trusted = true;
      cell.executionCount = typeof content['execution_count'] === 'number' ? content['execution_count'] : null;
      return;
    }
    if (kind === 'clear_output') {
      run.begun = true;
      run.displays.clear();
      cell.outputs.clear(content['wait'] === true);
      return;
    }
    if (kind !== 'stream' && kind !== 'display_data' && kind !== 'execute_result' && kind !== 'error') {
      if (kind === 'update_display_data') {
        for (const place of run.displays.get(displayOf(content)) ?? []) {
          cell.outputs.set(place, output(content, 'display_data'));
        }
      }
      return;
    }
    if (!run.begun) {
      run.begun = true;
      const text = this._trans.__('[sandbox] here some of the output may be missing, or come twice');
      cell.outputs.add({ output_type: 'stream', name: 'stderr', text: `${text}\n` });
    }
    cell.outputs.add(output(content, kind));
    const display = kind === 'display_data' ? displayOf(content) : '';
    if (display !== '') {
      run.displays.set(display, [...(run.displays.get(display) ?? []), cell.outputs.length - 1]);
    }
  }

  private _end(request: string): void {
    const run = this._runs.get(request);
    this._runs.delete(request);
    if (run !== undefined && !run.cell.isDisposed) {
      run.cell.executionState = 'idle';
    }
    this._ended(request);
  }

  private _look(): void {
    if (this._runs.size === 0) {
      this.dispose();
    }
  }

  private readonly _runs = new Map<string, Run>();
  private _timer = 0;
}

function output(content: Record<string, unknown>, kind: string): nbformat.IOutput {
  return { ...content, output_type: kind } as nbformat.IOutput;
}

function displayOf(content: Record<string, unknown>): string {
  const id = (content['transient'] as { display_id?: unknown } | undefined)?.display_id;
  return typeof id === 'string' ? id : '';
}
