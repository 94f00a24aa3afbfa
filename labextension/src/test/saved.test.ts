import type * as React from 'react';
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';

import type { SandboxesModel } from '../model';
import { saved } from '../plugins/saved';
import { json, problem, Server, settled } from './fake';

const { Bar, explained } = vi.hoisted(() => ({
  /** Of a widget what a bar needs where there is no page. */
  Bar: class {
    readonly node = { setAttribute: () => undefined };
    isDisposed = false;
    updates = 0;
    addClass(): void {}
    update(): void {
      this.updates += 1;
    }
    dispose(): void {
      this.isDisposed = true;
    }
  },
  explained: [] as unknown[]
}));

vi.mock('@jupyterlab/apputils', () => ({ ICommandPalette: null }));
vi.mock('@jupyterlab/notebook', () => ({ INotebookTracker: null }));
vi.mock('@jupyterlab/ui-components', () => ({ ReactWidget: Bar }));
vi.mock('../dialogs', () => ({ explain: (_what: string, error: unknown) => void explained.push(error) }));
vi.mock('../progress', () => ({ told: (promise: Promise<unknown>) => promise }));

type Shown = InstanceType<typeof Bar> & { render(): JSX.Element };

describe('a start from what was saved with a notebook', () => {
  const removed = 'DELETE api/sandboxes/child?forget=true';
  let server: Server;
  let model: SandboxesModel;
  let session: ReturnType<typeof made>;
  let panel: ReturnType<typeof opened>;
  let bar: Shown;

  function made() {
    return {
      isDisposed: false,
      ready: Promise.resolve(),
      hasNoKernel: true,
      kernelPreference: {},
      session: { kernel: { id: 'before' } } as { kernel: { id: string } } | null,
      startKernel: () => Promise.resolve(false),
      changeKernel({ id }: { id: string }): Promise<void> {
        if (this.isDisposed) {
          return Promise.reject(new Error('Disposed'));
        }
        this.session = { kernel: { id } };
        return Promise.resolve();
      }
    };
  }

  function opened() {
    const state = { id: 's', name: 'prepared', created: '2025-01-01T00:00:00Z' };
    return {
      isDisposed: false,
      sessionContext: session,
      context: { isReady: false, ready: Promise.resolve() },
      model: { getMetadata: () => ({ snapshot: state }) },
      contentHeader: { addWidget: (widget: Shown) => void (bar = widget) }
    };
  }

  function close(): void {
    panel.isDisposed = session.isDisposed = bar.isDisposed = true;
    session.session = null;
  }

  async function click(): Promise<void> {
    const { children } = bar.render().props as { children: React.ReactNode[] };
    (children[1] as JSX.Element).props.onClick();
    await settled();
  }

  beforeEach(async () => {
    explained.length = 0;
    server = new Server();
    server.snapshots = [{ id: 's', name: 'prepared', created: '2025-01-01T00:00:00Z' } as never];
    server.handlers.set('POST api/snapshots/s/start', () => json({ children: [{ id: 'child', error: null }] }));
    server.handlers.set('DELETE api/sandboxes/child', () => new Response(null, { status: 204 }));
    model = server.model();
    session = made();
    panel = opened();
    const app = {
      commands: { addCommand: () => undefined },
      docRegistry: {
        addWidgetExtension: (_: string, { createNew }: { createNew: (shown: unknown) => void }) => createNew(panel)
      }
    };
    void saved.activate(app as never, model, {}, null, null);
    await settled();
  });

  afterEach(() => model.dispose());

  it('gives the notebook its child, and the bar goes', async () => {
    await click();
    expect(session.session?.kernel.id).toBe('child');
    expect(server.asked).not.toContain(removed);
    expect(bar.isDisposed).toBe(true);
    expect(explained).toEqual([]);
  });

  it('removes the child of a notebook that was closed meanwhile, and says nothing', async () => {
    server.handlers.set('POST api/snapshots/s/start', () => {
      close();
      return json({ children: [{ id: 'child', error: null }] });
    });
    await click();
    expect(server.asked).toContain(removed);
    expect(bar.updates).toBe(1); // by the click
    expect(explained).toEqual([]);
  });

  it('removes the child of a notebook that is closed while it gets it', async () => {
    session.changeKernel = () => {
      close();
      return Promise.resolve();
    };
    await click();
    expect(server.asked).toContain(removed);
    expect(explained).toEqual([]);
  });

  it('removes each child that the notebook could not be given, says why and can be asked for again', async () => {
    const refused = new Error('refused');
    session.changeKernel = () => Promise.reject(refused);
    await click();
    await click();
    expect(server.asked.filter(asked => asked === removed)).toHaveLength(2);
    expect(explained).toEqual([refused, refused]);
    expect((bar.render().props.children[1] as JSX.Element).props.disabled).toBe(false);
  });

  it('that the server refuses is told, and there is nothing to remove', async () => {
    server.handlers.set('POST api/snapshots/s/start', () => problem(409, 'over_quota'));
    await click();
    expect(explained).toMatchObject([{ code: 'over_quota' }]);
    expect(server.asked).not.toContain(removed);
  });
});
