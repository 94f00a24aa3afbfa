/** What a sandbox uses, look by look: a rate of what only grows, and the small history that is drawn. */
import type { TranslationBundle } from '@jupyterlab/translation';

import type { Sandbox, Usage } from './client';
import { bytes } from './format';
import { ENDED } from './states';

/** What is measured: `cpu` in cores, `gpu` from 0 to 1, all others in bytes. */
export type Kind = 'memory' | 'cpu' | 'disk' | 'gpu' | 'gpuMemory';

const KEPT = 40;
/** Between two looks at the processor time there have to be as many seconds, or the rate tells nothing. */
const SPAN = 2;

/** What was seen of one sandbox. */
export class Uses {
  /** Take down what a look at `time` (milliseconds) found. */
  look(usage: Usage, time: number): void {
    this._see('memory', usage.memory);
    this._see('disk', usage.disk);
    this._see('gpu', usage.gpu?.busy ?? null);
    this._see('gpuMemory', usage.gpu?.memory ?? null);
    this._count(usage.cpu_seconds, time / 1000);
  }

  /** At the last look; null is not known. */
  now(kind: Kind): number | null {
    return this._now.get(kind) ?? null;
  }

  /** At the last looks, oldest first. */
  history(kind: Kind): readonly number[] {
    return this._histories.get(kind) ?? [];
  }

  private _see(kind: Kind, value: number | null): void {
    this._now.set(kind, value);
    if (value !== null) {
      this._histories.set(kind, [...this.history(kind), value].slice(-KEPT));
    }
  }

  private _count(seconds: number | null, time: number): void {
    const before = this._counted;
    if (seconds === null) {
      this._counted = null;
      this._now.set('cpu', null);
    } else if (before === null || seconds < before.seconds) {
      // The first look, or another incarnation, which counts from its own beginning.
      this._counted = { seconds, time };
      this._now.set('cpu', null);
    } else if (time - before.time >= SPAN) {
      this._counted = { seconds, time };
      this._see('cpu', (seconds - before.seconds) / (time - before.time));
    }
  }

  private readonly _now = new Map<Kind, number | null>();
  private readonly _histories = new Map<Kind, readonly number[]>();
  private _counted: { seconds: number; time: number } | null = null;
}

/** One line of what is used. */
export interface Use {
  kind: Kind | 'saved';
  name: string;
  /** What is used, of its limit where there is one; empty where it is not known. */
  text: string;
  /** From 0 to 1; null where use or limit are not known. */
  fraction: number | null;
  history: readonly number[];
}

/** What there is to say of a sandbox's use; the GPU's line only where it has one. */
export function used(sandbox: Sandbox, uses: Uses | undefined, trans: TranslationBundle): Use[] {
  const { limits, usage } = sandbox;
  const lives = !ENDED.includes(sandbox.state) && sandbox.state !== 'suspended';
  const line = (
    kind: Kind,
    name: string,
    limit: number | null | undefined,
    write: (value: number) => string,
    within: (value: string, limit: string) => string = (value, bound) => trans.__('%1 of %2', value, bound)
  ): Use => {
    const value = lives ? (uses?.now(kind) ?? null) : null;
    const bound = limit ?? null;
    return {
      kind,
      name,
      text: value === null ? '' : bound === null ? write(value) : within(write(value), write(bound)),
      fraction: value === null || bound === null || bound <= 0 ? null : Math.min(1, value / bound),
      history: lives ? (uses?.history(kind) ?? []) : []
    };
  };
  const lines = [
    line('memory', trans.__('Memory'), limits?.memory, bytes),
    line('cpu', trans.__('Processors'), limits?.cpu, cores, (value, bound) => trans.__('%1 of %2 cores', value, bound)),
    line('disk', trans.__('Disk'), limits?.disk, bytes)
  ];
  const cpu = lines[1];
  if (cpu !== undefined && cpu.text !== '' && (limits?.cpu ?? null) === null) {
    cpu.text = trans.__('%1 cores', cpu.text);
  }
  const gpu = usage?.gpu ?? null;
  if (gpu !== null) {
    const busy = line('gpu', trans.__('GPU'), 1, percent, value => value);
    lines.push(busy, line('gpuMemory', trans.__('GPU memory'), gpu.memory_limit, bytes));
  }
  const saved = usage?.saved ?? null;
  const more: Use[] = [];
  if (saved !== null) {
    more.push({ kind: 'saved', name: trans.__('Saved'), text: bytes(saved), fraction: null, history: [] });
  }
  return [...lines, ...more];
}

/** `0.3`, `2`: cores that were busy. */
function cores(value: number): string {
  return value < 0.005 ? '0' : value < 0.095 ? value.toFixed(2) : String(Math.round(value * 10) / 10);
}

function percent(value: number): string {
  return `${Math.round(100 * value)} %`;
}
