import { describe, expect, it } from 'vitest';

import { readChoice, readState, writeChoice, writeState } from '../remembered';

function notebook(start?: unknown) {
  const metadata = new Map<string, unknown>(start === undefined ? [] : [['sandbox', start]]);
  return {
    getMetadata: (key: string) => metadata.get(key),
    setMetadata: (key: string, value: unknown) => void metadata.set(key, value),
    deleteMetadata: (key: string) => void metadata.delete(key)
  };
}

const choice = { profile: 'analysis', resources: { memory: 300 << 20, idle: { suspend: 60 } } };
const state = { id: 'a1', name: 'prepared', created: '2025-01-01T00:00:00Z' };

describe('what a notebook remembers', () => {
  it('is read as it was written, the choice and the state apart', () => {
    const model = notebook();
    expect([readChoice(model), readState(model)]).toEqual([null, null]);
    writeChoice(model, choice);
    writeState(model, state);
    expect([readChoice(model), readState(model)]).toEqual([choice, state]);
    writeChoice(model, null);
    expect([readChoice(model), readState(model)]).toEqual([null, state]);
    writeState(model, null);
    expect(model.getMetadata('sandbox')).toBeUndefined();
  });

  it('that comes from somebody else is held against what it is said to be', () => {
    const of = (found: unknown) => readChoice(notebook(found));
    expect(of('x')).toBeNull();
    expect(of({ profile: 5, resources: { memory: 1 } })).toBeNull();
    expect(of({ profile: 'analysis', resources: {} })).toBeNull();
    const resources = { memory: 5, cpu: 'all', image: 'x'.repeat(300), env: { A: 'b' }, idle: { pause: 'now' } };
    expect(of({ profile: 'analysis', resources })).toEqual({ profile: 'analysis', resources: { memory: 5 } });
    expect(readState(notebook({ snapshot: { id: 'a', name: {}, created: '' } }))).toBeNull();
  });

  it('of other programs stays', () => {
    const model = notebook({ theirs: 1 });
    writeChoice(model, choice);
    writeChoice(model, null);
    expect(model.getMetadata('sandbox')).toEqual({ theirs: 1 });
  });
});
