/** With how much more memory a sandbox that had too little can be started. */
import type { Sandbox } from './client';
import { fields } from './fields';
import type { ISandboxes } from './model';

const plain = { __: (text: string) => text } as never;

/** Twice what it had, or the most that its profile allows; null where that is no more, or is not known. */
export async function moreMemory(sandboxes: ISandboxes, sandbox: Sandbox): Promise<number | null> {
  const limit = sandbox.limits?.memory;
  if (typeof limit !== 'number') {
    return null;
  }
  const profiles = await sandboxes.profiles().catch(() => []);
  const profile = profiles.find(({ name }) => name === sandbox.profile);
  const field = profile === undefined ? undefined : fields(profile, plain).find(({ name }) => name === 'memory');
  if (field === undefined) {
    return null;
  }
  const most = field.maximum === null ? 2 * limit : Math.floor(field.maximum * field.unit);
  const wanted = Math.min(2 * limit, most);
  return wanted > limit ? wanted : null;
}
