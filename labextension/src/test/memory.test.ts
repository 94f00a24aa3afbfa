import { Signal } from '@lumino/signaling';
import { describe, expect, it } from 'vitest';

import { Memory } from '../memory';

/** What a server keeps for all pages of a user; each page has what it read last. */
class Store {
  kept: Record<string, unknown> = {};

  page(): Memory.Registry & { renamed: Signal<object, never> } {
    let read = { ...this.kept };
    const changed = new Signal<object, void>({});
    const settings = {
      changed,
      get composite() {
        return read as never;
      },
      set: async (key: string, value: unknown) => {
        this.kept = { ...read, [key]: value };
        read = { ...this.kept };
        changed.emit();
        await Promise.resolve();
      }
    };
    return {
      renamed: new Signal<object, never>({}),
      load: () => Promise.resolve(settings),
      reload: async () => {
        read = { ...this.kept };
        changed.emit();
        await Promise.resolve();
      }
    };
  }
}

async function memory(page: ReturnType<Store['page']>): Promise<Memory> {
  const made = new Memory(page, { fileChanged: page.renamed } as never, 'output');
  await made.ready;
  return made;
}

describe('what was said of notebooks', () => {
  it('by another page is not said again by this one', async () => {
    const store = new Store();
    const first = await memory(store.page());
    first.allow('a.ipynb', 'analysis');
    await first.stored;
    const second = await memory(store.page());
    second.allow('a.ipynb', null);
    await second.stored;
    first.allow('b.ipynb', 'analysis');
    await first.stored;
    expect([first.allowed('a.ipynb'), first.allowed('b.ipynb')]).toEqual([undefined, 'analysis']);
    expect(store.kept).toEqual({ allowed: { 'b.ipynb': 'analysis' } });
  });

  it('goes with a folder that is renamed, permissions and suspicions alike', async () => {
    const store = new Store();
    const page = store.page();
    const made = await memory(page);
    made.allow('sub/a.ipynb', 'analysis');
    made.note('sub/b.ipynb', 'analysis');
    await made.stored;
    page.renamed.emit({ type: 'rename', oldValue: { path: 'sub' }, newValue: { path: 'dir' } } as never);
    expect(made.suspect('dir/b.ipynb')).toBe('analysis');
    await made.stored;
    expect([made.allowed('dir/a.ipynb'), made.suspect('dir/b.ipynb')]).toEqual(['analysis', 'analysis']);
    expect(store.kept).toEqual({ allowed: { 'dir/a.ipynb': 'analysis' }, suspect: { 'dir/b.ipynb': 'analysis' } });
  });
});
