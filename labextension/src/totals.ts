/** What all of a user's sandboxes come to, against what he may have. */
import type { TranslationBundle } from '@jupyterlab/translation';

import type { Quota, Sandbox, Snapshot } from './client';
import { bytes } from './format';
import { ENDED } from './states';

/** One part of the sum; `fraction` of its limit, null without one. */
export interface Total {
  key: string;
  text: string;
  fraction: number | null;
}

/** What counts as live: what has processes, or is about to have. */
function live(sandbox: Sandbox): boolean {
  return sandbox.state !== 'suspended' && !ENDED.includes(sandbox.state);
}

/** The sums. Memory is what is in use, and where it is bounded what the limits add up to, for those are counted. */
export function totals(
  sandboxes: readonly Sandbox[],
  snapshots: readonly Snapshot[],
  quota: Quota | null,
  trans: TranslationBundle
): Total[] {
  const awake = sandboxes.filter(live);
  const asleep = sandboxes.filter(({ state }) => state === 'suspended');
  const memory = awake.reduce((sum, sandbox) => sum + (sandbox.memory ?? 0), 0);
  const limits = awake.map(sandbox => sandbox.limits?.memory ?? null);
  const kept = new Set(asleep.map(({ snapshot }) => snapshot));
  const disk =
    asleep.reduce((sum, sandbox) => sum + (sandbox.usage?.saved ?? 0), 0) +
    snapshots
      .filter(({ owner }) => quota === null || owner === quota.owner) // others' are there to start from
      .reduce((sum, { id, size }) => sum + (kept.has(id) ? 0 : size), 0);
  const found: Total[] = [];
  const add = (
    key: string,
    value: number,
    limit: number | null | undefined,
    write: (value: number) => string,
    text: (value: string) => string
  ) => {
    const bound = limit ?? null;
    const shown = bound === null ? write(value) : trans.__('%1 of %2', write(value), write(bound));
    const fraction = bound === null ? null : bound > 0 ? Math.min(1, value / bound) : 1;
    found.push({ key, text: text(shown), fraction });
  };
  add('live', awake.length, quota?.live.limit, String, value => trans.__('%1 live', value));
  if (asleep.length > 0 || (quota?.suspended.limit ?? null) !== null) {
    add('suspended', asleep.length, quota?.suspended.limit, String, value => trans.__('%1 suspended', value));
  }
  if ((quota?.memory.limit ?? null) === null) {
    add('memory', memory, null, bytes, value => trans.__('%1 memory', value));
  } else {
    const reserved = limits.reduce<number>((sum, limit) => sum + (limit ?? quota?.memory.limit ?? 0), 0);
    add('memory', reserved, quota?.memory.limit, bytes, value => trans.__('%1 memory reserved', value));
  }
  if (disk > 0 || (quota?.disk.limit ?? null) !== null) {
    add('disk', Math.max(disk, 0), quota?.disk.limit, bytes, value => trans.__('%1 saved', value));
  }
  if (quota !== null && (quota.gpus.limit !== null || (quota.gpus.used ?? 0) > 0)) {
    add('gpus', quota.gpus.used ?? 0, quota.gpus.limit, String, value => trans.__('%1 GPUs', value));
  }
  return found;
}
