/**
 * What a notebook remembers of its sandbox, in its own metadata under `sandbox`. It may come from anybody: whatever is
 * read is held against what it is said to be, and the server allows only what its administrator does.
 */
import type { Resources } from './client';

export const KEY = 'sandbox';

/** Of a notebook's model, what is needed. */
export interface Metadata {
  getMetadata(key: string): unknown;
  setMetadata(key: string, value: unknown): void;
  deleteMetadata(key: string): void;
}

/** What was chosen for the notebook's kernel. */
export interface Choice {
  profile: string;
  resources: Resources;
}

/** The snapshot that was saved with the notebook. */
export interface SavedState {
  id: string;
  name: string;
  /** When it was saved, as the server tells it. */
  created: string;
}

const AMOUNTS = ['cpu', 'memory', 'disk', 'processes', 'gpu'] as const;
const NAMES = ['image', 'network'] as const;
const TIERS = ['pause', 'suspend', 'expire'] as const;
const LONGEST = 200;

/** What was chosen; null where nothing was, or where it makes no sense. */
export function readChoice(metadata: Metadata): Choice | null {
  const found = part(metadata.getMetadata(KEY));
  const { profile } = found;
  const resources = checked(part(found['resources']));
  return isText(profile) && Object.keys(resources).length > 0 ? { profile, resources } : null;
}

/** Remember what was chosen, or nothing. */
export function writeChoice(metadata: Metadata, choice: Choice | null): void {
  const others = without(metadata, 'profile', 'resources');
  put(metadata, choice === null ? others : { ...others, ...choice });
}

/** The snapshot; null where there is none. */
export function readState(metadata: Metadata): SavedState | null {
  const { id, name, created } = part(part(metadata.getMetadata(KEY))['snapshot']);
  return isText(id) && isText(name) && isText(created) ? { id, name, created } : null;
}

/** Remember a snapshot, or none. */
export function writeState(metadata: Metadata, state: SavedState | null): void {
  const others = without(metadata, 'snapshot');
  put(metadata, state === null ? others : { ...others, snapshot: { ...state } });
}

/** The profile of the sandbox whose output is in a notebook that has another kernel since. */
export function markOf(metadata: Metadata): string | undefined {
  const found = part(metadata.getMetadata(KEY))['output'];
  return isText(found) ? found : undefined;
}

/** Remember whose output is in it. */
export function writeMark(metadata: Metadata, profile: string): void {
  put(metadata, { ...without(metadata), output: profile });
}

function put(metadata: Metadata, value: object): void {
  if (Object.keys(value).length > 0) {
    metadata.setMetadata(KEY, value);
  } else if (metadata.getMetadata(KEY) !== undefined) {
    metadata.deleteMetadata(KEY);
  }
}

function without(metadata: Metadata, ...keys: string[]): object {
  const found = Object.entries(part(metadata.getMetadata(KEY)));
  return Object.fromEntries(found.filter(([key]) => !keys.includes(key)));
}

function checked(found: Readonly<Record<string, unknown>>): Resources {
  const kept: Record<string, unknown> = {};
  for (const name of AMOUNTS) {
    if (typeof found[name] === 'number') {
      kept[name] = found[name];
    }
  }
  for (const name of NAMES) {
    if (isText(found[name])) {
      kept[name] = found[name];
    }
  }
  const times = part(found['idle']);
  const idle = Object.fromEntries(
    TIERS.flatMap(tier => (typeof times[tier] === 'number' ? [[tier, times[tier]]] : []))
  );
  return Object.keys(idle).length > 0 ? { ...kept, idle } : kept;
}

function isText(value: unknown): value is string {
  return typeof value === 'string' && value !== '' && value.length <= LONGEST;
}

function part(value: unknown): Readonly<Record<string, unknown>> {
  return typeof value === 'object' && value !== null && !Array.isArray(value) ? (value as Record<string, unknown>) : {};
}
