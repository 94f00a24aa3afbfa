import { Token } from '@lumino/coreutils';

import type { ISandboxes as Interface } from './model';

export type ISandboxes = Interface;

/** The user's sandboxes, for the plugins of this extension and of others. */
export const ISandboxes = new Token<ISandboxes>(
  '@sandbox-gateway/labextension:ISandboxes',
  'The sandboxes of the user: their state as it changes, and what can be done with them.'
);
