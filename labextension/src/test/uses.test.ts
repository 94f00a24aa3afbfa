import { describe, expect, it } from 'vitest';

import type { Quota, Sandbox } from '../client';
import { totals } from '../totals';
import { used, Uses } from '../uses';
import { view } from '../view';
import { sandbox, trans, usage } from './fake';

const MIB = 1 << 20;

describe('what a sandbox uses', () => {
  it('is told in cores: the difference of two looks', () => {
    const uses = new Uses();
    uses.look(usage({ cpu_seconds: 10 }), 0);
    expect(uses.now('cpu')).toBeNull();
    uses.look(usage({ cpu_seconds: 10.5 }), 500);
    expect(uses.now('cpu')).toBeNull(); // too soon after the other to tell
    uses.look(usage({ cpu_seconds: 25 }), 10_000);
    expect(uses.now('cpu')).toBe(1.5);
    expect(uses.history('cpu')).toEqual([1.5]);
  });

  it('begins anew with another incarnation, whose processor time counts from nothing', () => {
    const uses = new Uses();
    uses.look(usage({ cpu_seconds: 100 }), 0);
    uses.look(usage({ cpu_seconds: 110 }), 10_000);
    uses.look(usage({ cpu_seconds: 1 }), 20_000);
    expect(uses.now('cpu')).toBeNull();
    uses.look(usage({ cpu_seconds: 3 }), 30_000);
    expect(uses.history('cpu')).toEqual([1, 0.2]);
    uses.look(usage({ cpu_seconds: null }), 40_000);
    expect(uses.now('cpu')).toBeNull();
  });

  it('keeps a small history only', () => {
    const uses = new Uses();
    for (let look = 0; look < 100; look += 1) {
      uses.look(usage({ memory: look }), look * 10_000);
    }
    expect(uses.history('memory')).toHaveLength(40);
    expect(uses.history('memory').at(-1)).toBe(99);
  });

  it('is shown against its limits, a GPU only where there is one', () => {
    const uses = new Uses();
    uses.look(usage({ memory: 512 * MIB, cpu_seconds: 0, disk: MIB }), 0);
    uses.look(usage({ memory: 512 * MIB, cpu_seconds: 5, disk: MIB }), 10_000);
    const one = sandbox({ limits: { cpu: 2, memory: 1024 * MIB, disk: null, processes: null } });
    const texts = () => used(one, uses, trans).map(({ name, text, fraction }) => [name, text, fraction]);
    expect(texts()).toEqual([
      ['Memory', '512 MiB of 1 GiB', 0.5],
      ['Processors', '0.5 of 2 cores', 0.25],
      ['Disk', '1 MiB', null]
    ]);
    one.usage = usage({ gpu: { busy: 0.25, memory: 1024 * MIB, memory_limit: 2048 * MIB } });
    uses.look(one.usage, 20_000);
    expect(texts().slice(3)).toEqual([
      ['GPU', '25 %', 0.25],
      ['GPU memory', '1 GiB of 2 GiB', 0.5]
    ]);
  });

  it('says cores where there is no limit, and nothing where nothing is known', () => {
    const uses = new Uses();
    uses.look(usage({ memory: null, cpu_seconds: 0 }), 0);
    uses.look(usage({ memory: null, cpu_seconds: 0.3 }), 10_000);
    expect(used(sandbox(), uses, trans).map(({ text }) => text)).toEqual(['', '0.03 cores', '']);
    expect(used(sandbox(), undefined, trans).map(({ text }) => text)).toEqual(['', '', '']);
  });

  it('is what it is saved in while it is suspended, which is what has to be read when it resumes', () => {
    const uses = new Uses();
    uses.look(usage({ memory: 9 }), 0);
    const asleep = sandbox({ state: 'suspended', usage: usage({ memory: null, saved: 120 * MIB }) });
    expect(used(asleep, uses, trans).map(({ text }) => text)).toEqual(['', '', '', '120 MiB']);
    const about = { busy: false, connection: 'ok', trouble: '' } as const;
    expect(view({ ...about, sandbox: { ...asleep, state: 'resuming' } }, trans)).toMatchObject({
      look: 'changing',
      label: 'Resuming',
      detail: '120 MiB'
    });
  });
});

describe('totals', () => {
  const quota: Quota = {
    owner: 'me',
    live: { used: 2, limit: 4 },
    suspended: { used: 1, limit: null },
    memory: { used: 0, limit: 4096 * MIB },
    disk: { used: 0, limit: 100 * MIB },
    gpus: { used: 0, limit: null },
    creates_per_minute: { used: 0, limit: null }
  };
  const all: Sandbox[] = [
    sandbox({ id: 'a', memory: 70 * MIB }),
    sandbox({ id: 'b', memory: 30 * MIB, state: 'paused' }),
    sandbox({ id: 'c', state: 'suspended', snapshot: 's', usage: usage({ saved: 50 * MIB }) }),
    sandbox({ id: 'd', state: 'failed', memory: 99 })
  ];
  const snapshots = [{ id: 'x', owner: 'me', size: 10 * MIB }] as never;

  it('are what is in use where nothing is bounded', () => {
    const found = totals(all, snapshots, null, trans);
    expect(found.map(({ text }) => text)).toEqual(['2 live', '1 suspended', '100 MiB memory', '60 MiB saved']);
    expect(found.every(({ fraction }) => fraction === null)).toBe(true);
  });

  it('stand against the quota, of memory what the limits add up to', () => {
    const found = totals(all, snapshots, quota, trans);
    expect(found.map(({ text, fraction }) => [text, fraction])).toEqual([
      ['2 of 4 live', 0.5],
      ['1 suspended', null],
      ['2 GiB of 4 GiB memory reserved', 0.5],
      ['60 MiB of 100 MiB saved', 0.6]
    ]);
    const others = [{ id: 'y', owner: 'ann', published: true, size: 99 * MIB }] as never;
    expect(totals([], others, quota, trans).at(-1)?.text).toBe('0 B of 100 MiB saved');
    const gpus = totals([], [] as never, { ...quota, gpus: { used: 1, limit: 2 } }, trans);
    expect(gpus.at(-1)).toMatchObject({ text: '1 of 2 GPUs', fraction: 0.5 });
  });
});
