/** The domain of our strings for the translator. */
export const DOMAIN = 'sandbox_gateway';

/** Commands of this extension. */
export const CommandIDs = {
  suspend: 'sandboxes:suspend',
  resume: 'sandboxes:resume',
  pause: 'sandboxes:pause',
  fork: 'sandboxes:fork-notebook',
  forkSeveral: 'sandboxes:fork-several',
  snapshot: 'sandboxes:snapshot',
  saveState: 'sandboxes:save-state',
  pick: 'sandboxes:pick-kernel',
  restart: 'sandboxes:restart',
  restartClean: 'sandboxes:restart-clean',
  logs: 'sandboxes:logs',
  details: 'sandboxes:details',
  end: 'sandboxes:end',
  allowOutput: 'sandboxes:allow-output',
  stopOutput: 'sandboxes:stop-output'
} as const;
