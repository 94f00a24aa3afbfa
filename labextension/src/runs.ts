/** Which request runs in which cell of a kernel's notebook: kept on the user's side, so that a page that comes later knows. */

const PREFIX = 'sandbox-gateway:runs:';
/** Kernels that are remembered at most; beyond that the one whose cell was run longest ago is forgotten. */
const KERNELS = 100;

interface Kept {
  /** When a cell was run last, in milliseconds since the epoch. */
  at: number;
  /** Requests (the ids of their messages) and the ids of their cells. */
  cells: Record<string, string>;
}

/** What is kept in `storage`; where that is full or forbidden, nothing is. */
export class Runs {
  constructor(
    private readonly _storage: Storage,
    base: string
  ) {
    this._prefix = `${PREFIX}${base}:`;
  }

  /** The requests of a kernel that were not seen to end, and their cells, in the order in which they were sent. */
  of(kernel: string): ReadonlyMap<string, string> {
    return new Map(Object.entries(this._read(this._prefix + kernel)?.cells ?? {}));
  }

  /** A fork of a kernel runs what that runs. */
  copy(kernel: string, child: string): void {
    const cells = this._read(this._prefix + kernel)?.cells;
    if (cells !== undefined) {
      this._write(child, cells);
    }
  }

  add(kernel: string, request: string, cell: string): void {
    const cells = Object.entries(this._read(this._prefix + kernel)?.cells ?? {}).filter(([, other]) => other !== cell);
    this._write(kernel, Object.fromEntries([...cells, [request, cell]]));
  }

  remove(kernel: string, request: string): void {
    const cells = this._read(this._prefix + kernel)?.cells;
    if (cells !== undefined && request in cells) {
      this._write(kernel, Object.fromEntries(Object.entries(cells).filter(([other]) => other !== request)));
    }
  }

  private _read(key: string): Kept | null {
    try {
      const kept = JSON.parse(this._storage.getItem(key) ?? 'null') as Partial<Kept> | null;
      return typeof kept?.at === 'number' && typeof kept.cells === 'object' ? (kept as Kept) : null;
    } catch {
      return null;
    }
  }

  private _write(kernel: string, cells: Record<string, string>): void {
    const key = this._prefix + kernel;
    try {
      if (Object.keys(cells).length === 0) {
        this._storage.removeItem(key);
      } else {
        this._storage.setItem(key, JSON.stringify({ at: Date.now(), cells }));
        this._prune();
      }
    } catch {
      // The storage is full, or the browser was told to have none.
    }
  }

  private _prune(): void {
    const keys = Array.from({ length: this._storage.length }, (_, place) => this._storage.key(place) ?? '');
    const own = keys.filter(key => key.startsWith(PREFIX));
    if (own.length > KERNELS) {
      own.sort((one, other) => (this._read(one)?.at ?? 0) - (this._read(other)?.at ?? 0));
      own.slice(0, own.length - KERNELS).forEach(key => this._storage.removeItem(key));
    }
  }

  private readonly _prefix: string;
}
