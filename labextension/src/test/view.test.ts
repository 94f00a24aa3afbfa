import { describe, expect, it } from 'vitest';

import { age, bytes } from '../format';
import { proposals } from '../proposals';
import type { About } from '../view';
import { advice, happened, possible, title, tree, view } from '../view';
import { sandbox, trans } from './fake';

function about(changes: Partial<About> = {}): About {
  return { sandbox: sandbox(), busy: false, connection: 'ok', trouble: '', ...changes };
}

const suspend = { type: 'operation', operation: '', phase: 'progress', sandbox: 'one', text: '', total: null } as const;

describe('a view', () => {
  it('says what runs and what it uses of its limit', () => {
    const shown = view(about({ sandbox: sandbox({ memory: 512 << 20 }) }), trans);
    expect(shown).toMatchObject({ look: 'running', label: 'Running', detail: '512 MiB of 1 GiB', fraction: 0.5 });
    expect(shown.sentence).toBe('Sandbox: Running; memory 512 MiB of 1 GiB');
  });

  it('tells busy from running by the kernel', () => {
    expect(view(about({ busy: true }), trans).label).toBe('Busy');
    expect(view(about({ busy: true, sandbox: sandbox({ state: 'suspended' }) }), trans).label).toBe('Suspended');
  });

  it('shows how far a suspend is', () => {
    const operation = { ...suspend, kind: 'suspend', done: 64 << 20 };
    expect(view(about({ operation }), trans)).toMatchObject({
      look: 'changing',
      label: 'Suspending',
      detail: '64 MiB'
    });
    const half = { ...operation, done: 5, total: 10 };
    expect(view(about({ operation: half }), trans).detail).toBe('50 %');
  });

  it('names the death', () => {
    const dead = sandbox({
      state: 'failed',
      memory: 5,
      death: { kind: 'out_of_memory', reason: 'out of memory at 1 GiB' }
    });
    const shown = view(about({ sandbox: dead }), trans);
    expect(shown).toMatchObject({ look: 'failed', label: 'Out of memory', detail: '', fraction: null });
    expect(shown.sentence).toContain('out of memory at 1 GiB');
    expect(advice('out_of_memory', dead, trans)).toMatch(/start one with more.*Restart it/);
    expect(advice('out_of_memory', sandbox(), trans)).toContain('started anew');
  });

  it('says when nobody knows any more', () => {
    expect(view(about({ connection: 'unreachable' }), trans)).toMatchObject({ look: 'unknown', label: 'Running' });
    expect(view(about({ connection: 'signed-out' }), trans).label).toBe('Signed out');
    expect(view(about({ connection: 'turned-away' }), trans)).toMatchObject({ look: 'unknown', label: 'No access' });
  });

  it('does not keep silent about a runtime that isolates nothing', () => {
    expect(view(about({ sandbox: sandbox({ isolated: false }) }), trans).sentence).toContain('not isolated');
  });

  it('takes a state that it does not know as it is', () => {
    expect(view(about({ sandbox: sandbox({ state: 'dreaming' as never }) }), trans)).toMatchObject({ look: 'unknown' });
  });
});

describe('deeds', () => {
  it('are offered where they make sense', () => {
    const offered = (state: 'running' | 'suspended' | 'failed') =>
      (['suspend', 'resume', 'pause', 'fork', 'restart'] as const).filter(deed => possible(deed, sandbox({ state })));
    expect(offered('running')).toEqual(['suspend', 'pause', 'fork', 'restart']);
    expect(offered('suspended')).toEqual(['resume', 'fork', 'restart']);
    expect(offered('failed')).toEqual(['restart']);
  });
});

describe('the tree', () => {
  it('has forks under their parents, and orphans at the top', () => {
    const branches = tree([
      sandbox({ id: 'a' }),
      sandbox({ id: 'b', parent: 'sandbox:a' }),
      sandbox({ id: 'c', parent: 'sandbox:b' }),
      sandbox({ id: 'd', parent: 'sandbox:gone' }),
      sandbox({ id: 'e', parent: 'template:x' })
    ]);
    expect(branches.map(branch => branch.sandbox.id)).toEqual(['a', 'd', 'e']);
    expect(branches[0]?.children[0]?.children[0]?.sandbox.id).toBe('c');
  });
});

describe('a snapshot of each of several', () => {
  it('has a name of its own', () => {
    const several = [
      sandbox({ id: '11112222', name: 'day.ipynb' }),
      sandbox({ id: '33334444', name: 'day.ipynb' }),
      sandbox({ id: '55556666', name: 'night.ipynb' })
    ];
    const now = new Date('2026-11-28T10:20:30Z');
    expect([...proposals(several, now).values()]).toEqual([
      'day-20261128-1020-1111',
      'day-20261128-1020-3333',
      'night-20261128-1020'
    ]);
  });
});

describe('words', () => {
  it('for what has happened, and for what a newer server tells', () => {
    expect(['woke', 'handed_over', 'levitated'].map(kind => happened(kind, trans))).toEqual([
      'woken',
      'handed over',
      'levitated'
    ]);
  });

  it('for sizes', () => {
    expect([0, 1023, 1536, 71 << 20, 8 * 2 ** 30, 1.5 * 2 ** 40].map(bytes)).toEqual([
      '0 B',
      '1023 B',
      '1.5 KiB',
      '71 MiB',
      '8 GiB',
      '1.5 TiB'
    ]);
  });

  it('for times', () => {
    const now = Date.parse('2025-01-10T00:00:00Z');
    const ago = (seconds: number) => age(new Date(now - seconds * 1000).toISOString(), now, trans);
    expect([5, 90, 7300, 3 * 86400, -10].map(ago)).toEqual(['5 s', '1 min', '2 h', '3 d', '0 s']);
  });

  it('for names: of a path the file, else profile and id', () => {
    expect(title(sandbox({ name: '/home/me/day.ipynb' }))).toBe('day.ipynb');
    expect(title(sandbox({ name: '', id: '123456789' }))).toBe('python3-gvisor 12345678');
  });
});
