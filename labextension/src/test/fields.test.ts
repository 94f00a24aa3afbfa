import { describe, expect, it } from 'vitest';

import type { Field } from '../fields';
import { chosenOf, fields, resources, wrong } from '../fields';
import { moreMemory } from '../more';
import { json, profile, sandbox, Server, trans } from './fake';

const found = fields(profile, trans);

function field(name: string): Field {
  const one = found.find(each => each.name === name);
  if (one === undefined) {
    throw new Error(`there is no field ${name}`);
  }
  return one;
}

describe('the fields of a profile', () => {
  it('are what its schema lets one choose, with its bounds, the most wanted first', () => {
    expect(found.map(({ name, minimum, maximum, preset }) => [name, minimum, maximum, preset])).toEqual([
      ['memory', 64, 1024, 1024],
      ['cpu', 0.1, null, null],
      ['image', 0, null, 'host'],
      ['idle.suspend', 1, 60, 10],
      ['processes', 16, 256, 256],
      ['idle.expire', 1, null, null],
      ['licence', 1, 3, 1]
    ]);
    expect(found.filter(({ rare }) => rare).map(({ name }) => name)).toEqual(['processes', 'idle.expire']);
    expect(field('image').options).toEqual(['host', 'oci:lab']);
    expect(field('licence').label).toBe('Licence');
  });

  it('are none where there is one value only, or no schema', () => {
    expect(found.map(({ name }) => name)).not.toContain('gpu');
    expect(fields({ ...profile, choices: {} }, trans)).toEqual([]);
    expect(fields({ ...profile, choices: { properties: { cpu: 7, idle: null } } as never }, trans)).toEqual([]);
  });

  it('become what the server takes, and back', () => {
    const chosen = new Map<Field, number | string>([
      [field('memory'), 300],
      [field('cpu'), 1.5],
      [field('image'), 'oci:lab'],
      [field('idle.suspend'), 5],
      [field('idle.expire'), 90]
    ]);
    const wanted = { memory: 300 << 20, cpu: 1.5, image: 'oci:lab', idle: { suspend: 300, expire: 5400 } };
    expect(resources(chosen)).toEqual(wanted);
    expect(chosenOf(found, wanted)).toEqual(chosen);
    expect(resources(new Map())).toEqual({});
  });

  it('say what is wrong with what was written', () => {
    expect(wrong(field('memory'), 300, trans)).toBe('');
    expect(wrong(field('memory'), 1, trans)).toBe('At least 64');
    expect(wrong(field('memory'), 4096, trans)).toBe('At most 1024');
    expect(wrong(field('memory'), Number.NaN, trans)).toBe('This is not a number');
    expect(wrong(field('processes'), 16.5, trans)).toBe('A whole number');
    expect(wrong(field('cpu'), 64, trans)).toBe('');
    expect(wrong(field('image'), 'mine', trans)).toBe('“mine” is not offered');
  });

  it('take nothing of what makes no sense', () => {
    expect(chosenOf(found, { memory: 'all', cpu: null, image: 4, idle: [] } as never).size).toBe(0);
  });
});

describe('more memory', () => {
  const died = (memory: number | null) =>
    sandbox({ profile: 'analysis', limits: { cpu: null, memory, disk: null, processes: null } });

  it('is twice what there was, within what the profile allows', async () => {
    const server = new Server();
    server.handlers.set('GET api/profiles', () => json({ profiles: [profile] }));
    const model = server.model();
    expect(await moreMemory(model, died(300 << 20))).toBe(600 << 20);
    expect(await moreMemory(model, died(700 << 20))).toBe(1 << 30);
    expect(await moreMemory(model, died(1 << 30))).toBeNull();
    expect(await moreMemory(model, died(null))).toBeNull();
    model.dispose();
  });
});
