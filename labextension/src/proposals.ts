/** Names for snapshots that nobody has named. */
import type { Sandbox } from './client';
import { title } from './view';

/** A name that the server takes, made from the label and the time. */
export function proposal(sandbox: Sandbox, now = new Date()): string {
  const base = title(sandbox)
    .replace(/\.ipynb$/, '')
    .replace(/[^A-Za-z0-9._-]+/g, '-')
    .replace(/^-+|-+$/g, '');
  const stamp = now.toISOString().slice(0, 16).replace(/[-:]/g, '').replace('T', '-');
  return `${base.slice(0, 48)}-${stamp}`;
}

/** Names for snapshots of each, no two of them the same. */
export function proposals(sandboxes: readonly Sandbox[], now = new Date()): ReadonlyMap<string, string> {
  const names = new Map(sandboxes.map(sandbox => [sandbox.id, proposal(sandbox, now)]));
  const taken = [...names.values()];
  const unique = (id: string, name: string) =>
    taken.indexOf(name) === taken.lastIndexOf(name) ? name : `${name}-${id.slice(0, 4)}`;
  return new Map([...names].map(([id, name]) => [id, unique(id, name)]));
}
