/** Comms of kernels whose output may not act: by them widgets, and what widgets bring with them, get into the page. */
import type { Kernel, KernelMessage } from '@jupyterlab/services';

/** The target that takes what is held back, in place of the one that the kernel names. */
const HELD = 'sandbox-gateway:held';

/** Stands before each kernel connection of the page. */
export class CommGate {
  /**
   * @param _mayPass - Asked for each message that would open, or tell, something in the page.
   * @param _held - Told of a kernel of which something was held back.
   */
  constructor(
    kernels: Kernel.IManager,
    private readonly _mayPass: (kernel: { readonly id: string; readonly name: string }) => boolean,
    private readonly _held: (id: string) => void
  ) {
    const connect = kernels.connectTo.bind(kernels);
    kernels.connectTo = options => {
      const connection = connect(options);
      if (connection.handleComms) {
        this._watch(connection);
      }
      return connection;
    };
  }

  /** Some kernel's output may act now: widgets of it are looked for, as after the page was loaded. */
  reconsider(): void {
    for (const [kernel, comms] of this._shut) {
      if (kernel.isDisposed) {
        this._shut.delete(kernel);
      } else if (this._mayPass(kernel)) {
        this._shut.delete(kernel);
        comms.forEach(comm => comm.dispose()); // only here: the kernel keeps its own ends
        kernel.reconnect().catch((error: unknown) => console.warn(error));
      }
    }
  }

  private _watch(kernel: Kernel.IKernelConnection): void {
    kernel.registerCommTarget(HELD, comm => {
      this._shut.get(kernel)?.add(comm);
    });
    // A connection tells of a message before it handles it, which leaves time to change where it goes.
    kernel.anyMessage.connect((_, { msg, direction }) => {
      if (direction !== 'recv' || !isComm(msg) || this._mayPass(kernel)) {
        return;
      }
      const content = msg.content as { comm_id: string; target_name?: string; target_module?: string };
      if (msg.header.msg_type === 'comm_open') {
        this._shutOut(kernel);
        content.target_name = HELD;
        delete content.target_module; // a module that the page would load
      } else if (msg.header.msg_type === 'comm_msg') {
        content.comm_id = HELD;
      }
    });
    const create = kernel.createComm.bind(kernel);
    kernel.createComm = (name, id) => {
      if (!this._mayPass(kernel)) {
        this._shutOut(kernel, false);
        throw new Error('the output of this kernel may not act: no comm is opened to it');
      }
      return create(name, id);
    };
    const ask = kernel.requestCommInfo.bind(kernel);
    kernel.requestCommInfo = content => {
      if (!this._mayPass(kernel)) {
        this._shutOut(kernel, false);
        return Promise.reject(new Error('the output of this kernel may not act: its comms are not looked for'));
      }
      return ask(content);
    };
  }

  private _shutOut(kernel: Kernel.IKernelConnection, told = true): void {
    if (!this._shut.has(kernel)) {
      this._shut.set(kernel, new Set());
    }
    if (told) {
      this._held(kernel.id);
    }
  }

  /** Connections with something to make up for, and the comms that were opened from inside. */
  private readonly _shut = new Map<Kernel.IKernelConnection, Set<Kernel.IComm>>();
}

function isComm(msg: KernelMessage.IMessage): boolean {
  return msg.channel === 'iopub' && msg.header.msg_type.startsWith('comm_');
}
