import { Signal } from '@lumino/signaling';
import { beforeEach, describe, expect, it, vi } from 'vitest';

import { Replay } from '../replay';
import { Runs } from '../runs';
import { trans } from './fake';

/** A browser's storage. */
class Memory implements Storage {
  [name: string]: unknown;
  private readonly _items = new Map<string, string>();
  get length(): number {
    return this._items.size;
  }
  key(place: number): string | null {
    return [...this._items.keys()][place] ?? null;
  }
  getItem(key: string): string | null {
    return this._items.get(key) ?? null;
  }
  setItem(key: string, value: string): void {
    this._items.set(key, value);
  }
  removeItem(key: string): void {
    this._items.delete(key);
  }
  clear(): void {
    this._items.clear();
  }
}

describe('runs', () => {
  it('are kept by kernel until they have ended, one for each cell', () => {
    const storage = new Memory();
    const runs = new Runs(storage, 'http://one/');
    runs.add('k', 'first', 'a');
    runs.add('k', 'second', 'b');
    runs.add('k', 'third', 'a');
    expect([...new Runs(storage, 'http://one/').of('k')]).toEqual([
      ['second', 'b'],
      ['third', 'a']
    ]);
    expect(new Runs(storage, 'http://other/').of('k').size).toBe(0);
    runs.remove('k', 'second');
    runs.remove('k', 'never');
    runs.remove('k', 'third');
    expect(storage.length).toBe(0);
  });

  it('of a kernel are those of its fork, too', () => {
    const runs = new Runs(new Memory(), '/');
    runs.add('parent', 'request', 'cell');
    runs.copy('parent', 'child');
    runs.remove('parent', 'request');
    runs.copy('idle', 'other');
    expect([...runs.of('child'), ...runs.of('other')]).toEqual([['request', 'cell']]);
  });

  it('of a hundred kernels are remembered, those of the oldest not', () => {
    const storage = new Memory();
    const runs = new Runs(storage, '/');
    storage.setItem('another', 'program');
    for (let number = 0; number < 101; number += 1) {
      vi.setSystemTime(number);
      runs.add(`k${number}`, 'r', 'c');
    }
    vi.useRealTimers();
    expect(storage.length).toBe(101);
    expect(runs.of('k0').size).toBe(0);
    expect(runs.of('k1').size).toBe(1);
  });

  it('are none where a storage holds what is not ours, or takes nothing', () => {
    const storage = new Memory();
    const runs = new Runs(storage, '/');
    storage.setItem('sandbox-gateway:runs:/:k', '{"at": "now"}');
    expect(runs.of('k').size).toBe(0);
    storage.setItem = () => {
      throw new Error('full');
    };
    runs.add('k', 'r', 'c');
    expect(runs.of('k').size).toBe(0);
  });
});

describe('a replay', () => {
  let said: Signal<object, { msg: object; direction: string }>;
  let kernel: { isDisposed: boolean };
  let ended: string[];
  let cell: ReturnType<typeof made>;

  function made() {
    const outputs: object[] = ['of the file' as never];
    return {
      id: 'a',
      isDisposed: false,
      executionState: 'idle',
      executionCount: null as number | null,
      trusted: false,
      shown: outputs,
      outputs: {
        get length() {
          return outputs.length;
        },
        add: (output: object) => void outputs.push(output),
        set: (place: number, output: object) => void (outputs[place] = output),
        clear: () => void (outputs.length = 0)
      }
    };
  }

  function tell(kind: string, content: object, request = 'r', direction = 'recv'): void {
    const msg = { channel: 'iopub', header: { msg_type: kind }, parent_header: { msg_id: request }, content };
    said.emit({ msg, direction });
  }

  beforeEach(() => {
    vi.stubGlobal('window', globalThis);
    vi.useFakeTimers();
    said = new Signal({});
    ended = [];
    cell = made();
    const connection = {
      isDisposed: false,
      anyMessage: said,
      connectionStatus: 'connected',
      connectionStatusChanged: new Signal({}),
      dispose() {
        this.isDisposed = true;
      }
    };
    kernel = connection;
    new Replay(connection as never, new Map([['r', cell as never]]), request => ended.push(request), trans);
    return () => vi.useRealTimers();
  });

  it('makes a cell anew where its output is there from the beginning on', () => {
    tell('status', { execution_state: 'busy' });
    expect(cell.executionState).toBe('running');
    tell('stream', { name: 'stdout', text: 'of another' }, 'other');
    tell('execute_input', { execution_count: 7 });
    tell('display_data', { data: { 'text/plain': 'one' }, transient: { display_id: 'd' } });
    tell('update_display_data', { data: { 'text/plain': 'two' }, transient: { display_id: 'd' } });
    tell('update_display_data', { data: {}, transient: { display_id: 'unknown' } });
    tell('stream', { name: 'stdout', text: 'sent' }, 'r', 'send');
    tell('status', { execution_state: 'idle' });
    expect(cell.shown).toMatchObject([{ output_type: 'display_data', data: { 'text/plain': 'two' } }]);
    expect(cell).toMatchObject({ executionState: 'idle', executionCount: 7, trusted: true });
    expect(ended).toEqual(['r']);
    expect(kernel.isDisposed).toBe(true);
  });

  it('says where the beginning is missing that it may be, and keeps what the file has', () => {
    tell('stream', { name: 'stdout', text: '5\n' });
    tell('stream', { name: 'stdout', text: '6\n' });
    expect(cell.shown).toMatchObject(['of the file', { name: 'stderr' }, { text: '5\n' }, { text: '6\n' }]);
    expect(cell.trusted).toBe(false);
  });

  it('waits for as long as the kernel is busy, and not for what never comes', () => {
    tell('status', { execution_state: 'busy' }, 'other');
    vi.advanceTimersByTime(3_600_000);
    expect(ended).toEqual([]);
    tell('status', { execution_state: 'idle' }, 'other');
    vi.advanceTimersByTime(5_000);
    expect(ended).toEqual([]);
    vi.advanceTimersByTime(5_000);
    expect(ended).toEqual(['r']);
    expect(cell.shown).toEqual(['of the file']);
  });

  it('leaves a cell that is run again, or is gone', () => {
    cell.isDisposed = true;
    tell('stream', { name: 'stdout', text: '5\n' });
    expect(cell.shown).toEqual(['of the file']);
    expect(kernel.isDisposed).toBe(true);
  });
});
