/** The plugins of this extension. Each stands alone on the core, and can be disabled by its id. */
import { chip } from './plugins/chip';
import { commands } from './plugins/commands';
import { core } from './plugins/core';
import { fork } from './plugins/fork';
import { notifications } from './plugins/notifications';
import { output } from './plugins/output';
import { panel } from './plugins/panel';
import { picker } from './plugins/picker';
import { remember } from './plugins/remember';
import { reattach } from './plugins/reattach';
import { rejoin } from './plugins/rejoin';
import { saved } from './plugins/saved';
import { starts } from './plugins/starts';

export { ISandboxes } from './tokens';
export default [
  core,
  commands,
  chip,
  panel,
  fork,
  notifications,
  picker,
  output,
  reattach,
  rejoin,
  remember,
  saved,
  starts
];
