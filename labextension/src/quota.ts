/** What would free room where somebody is over quota: decided without a page. */
import type { Sandbox } from './client';
import { possible, title } from './view';

/** Something that can be done to have room. */
export interface Relief {
  sandbox: Sandbox;
  deed: 'suspend' | 'end';
}

/** How many are proposed. */
const PROPOSED = 2;

/** Those of one's sandboxes that the server's advice names, in its order, with what to do with each. */
export function reliefs(hint: string, sandboxes: readonly Sandbox[]): Relief[] {
  return sandboxes
    .filter(({ id }) => hint.includes(id))
    .sort((one, other) => hint.indexOf(one.id) - hint.indexOf(other.id))
    .slice(0, PROPOSED)
    .map(sandbox => ({ sandbox, deed: possible('suspend', sandbox) ? 'suspend' : 'end' }));
}

/** A text of the server's with names for people in place of ids. */
export function named(text: string, sandboxes: readonly Sandbox[]): string {
  return sandboxes.reduce((said, sandbox) => said.replaceAll(sandbox.id, `“${title(sandbox)}”`), text);
}
