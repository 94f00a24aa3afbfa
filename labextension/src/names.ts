/** The domain of our strings for the translator. */
export const DOMAIN = 'sandbox_gateway';

/** Commands of this extension. */
export const CommandIDs = {
  suspend: 'sandboxes:suspend',
  resume: 'sandboxes:resume',
  pause: 'sandboxes:pause',
  fork: 'sandboxes:fork-notebook',
  snapshot: 'sandboxes:snapshot',
  restart: 'sandboxes:restart',
  logs: 'sandboxes:logs',
  details: 'sandboxes:details',
  end: 'sandboxes:end'
} as const;
