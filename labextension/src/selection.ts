/** Which entries of a list are chosen, by click, with Ctrl, and with Shift. */
import type { ISignal } from '@lumino/signaling';
import { Signal } from '@lumino/signaling';

export class Selection {
  /** What is chosen is not what it was. */
  get changed(): ISignal<this, void> {
    return this._changed;
  }

  get size(): number {
    return this._ids.size;
  }

  has(id: string): boolean {
    return this._ids.has(id);
  }

  /** Choose one more, or one less. */
  toggle(id: string): void {
    this._ids = new Set(this._ids);
    if (!this._ids.delete(id)) {
      this._ids.add(id);
    }
    this._last = id;
    this._changed.emit();
  }

  /** Choose all from the one that was touched last to this one, as they stand in `order`. */
  extend(id: string, order: readonly string[]): void {
    const [one, other] = [order.indexOf(this._last), order.indexOf(id)];
    if (one < 0 || other < 0) {
      this.toggle(id);
      return;
    }
    this._ids = new Set([...this._ids, ...order.slice(Math.min(one, other), Math.max(one, other) + 1)]);
    this._changed.emit();
  }

  set(ids: Iterable<string>): void {
    this._ids = new Set(ids);
    this._changed.emit();
  }

  /** Forget what is not there any more. */
  keep(there: ReadonlySet<string>): void {
    const left = [...this._ids].filter(id => there.has(id));
    if (left.length < this._ids.size) {
      this.set(left);
    }
  }

  private _ids = new Set<string>();
  private _last = '';
  private readonly _changed = new Signal<this, void>(this);
}
