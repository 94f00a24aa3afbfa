import type { State } from './client';

/** States in which nothing lives any more. */
export const ENDED: readonly State[] = ['expired', 'terminated', 'failed'];
