/** One thing done with many sandboxes: a few at a time, and told in one message what failed. */
import type { TranslationBundle } from '@jupyterlab/translation';

import type { Sandbox } from './client';
import { Refused } from './client';
import { title } from './view';

/** As many at a time: each suspend and each end is work for the server's disk. */
const AT_ONCE = 4;
/** As many failures are told one by one. */
const TOLD = 5;

export interface Outcome {
  done: number;
  failed: readonly (readonly [Sandbox, unknown])[];
}

/** Do it with each; one that fails does not stop the others, and one that is gone needs nothing done. */
export async function each(sandboxes: readonly Sandbox[], act: (id: string) => Promise<unknown>): Promise<Outcome> {
  const failed: [Sandbox, unknown][] = [];
  const left = [...sandboxes];
  const work = async (): Promise<void> => {
    for (let sandbox = left.shift(); sandbox !== undefined; sandbox = left.shift()) {
      try {
        await act(sandbox.id);
      } catch (error) {
        if (!(error instanceof Refused && error.gone)) {
          failed.push([sandbox, error]);
        }
      }
    }
  };
  await Promise.all(Array.from({ length: AT_ONCE }, work));
  return { done: sandboxes.length - failed.length, failed };
}

/** What failed and why, for one message. */
export function failures({ done, failed }: Outcome, trans: TranslationBundle): string {
  const lines = failed
    .slice(0, TOLD)
    .map(([sandbox, error]) => `${title(sandbox)}: ${error instanceof Error ? error.message : String(error)}`);
  if (failed.length > TOLD) {
    lines.push(trans.__('and %1 others', failed.length - TOLD));
  }
  const hint = failed.map(([, error]) => (error instanceof Refused ? error.hint : '')).find(text => text !== '');
  const first = trans.__('%1 of %2 failed.', failed.length, done + failed.length);
  return [first, lines.join('\n'), hint ?? ''].filter(part => part !== '').join('\n\n');
}
