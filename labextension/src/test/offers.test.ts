import { describe, expect, it } from 'vitest';

import type { Profile } from '../client';
import type { Stock } from '../offers';
import { fields, offers, profileOf, resources } from '../offers';
import { sandbox, trans } from './fake';

const profile: Profile = {
  name: 'analysis',
  display_name: 'Analysis',
  description: '',
  language: 'python',
  interrupt_mode: 'signal',
  runtime: 'gvisor',
  isolated: true,
  image: 'host',
  workspace: 'none',
  limits: { cpu: 2, memory: 1 << 30, disk: null, processes: null },
  idle: { pause: null, suspend: null, expire: null },
  network: 'none',
  client_environment: [],
  choices: {
    properties: {
      memory: { type: 'integer', minimum: 64 << 20, maximum: 1 << 30, default: 1 << 30 },
      cpu: { anyOf: [{ type: 'number', minimum: 0.1, maximum: 4096 }, { const: 'none' }], default: 'none' },
      disk: { type: 'integer', minimum: 5, maximum: 5, default: 5 },
      idle: { properties: { suspend: { type: 'number', minimum: 1, maximum: 3600, default: 600 } } }
    }
  } as never
};

function spec(name: string, metadata: object = {}) {
  return { name, language: 'python', argv: [], display_name: name, resources: {}, metadata } as never;
}

const ours = spec('ours', { kernel_provisioner: { provisioner_name: 'sandbox', config: { profile: 'analysis' } } });

function stock(changes: Partial<Stock> = {}): Stock {
  const specs = { default: 'plain', kernelspecs: { plain: spec('plain'), ours } };
  return {
    specs,
    profiles: [profile],
    sandboxes: [],
    snapshots: [],
    kernels: [],
    attached: new Set(),
    now: 0,
    ...changes
  };
}

describe('offers', () => {
  it('keep kernels in sandboxes apart from those on the server itself', () => {
    const groups = offers(stock(), trans);
    expect(groups.map(group => group.offers.map(offer => offer.key))).toEqual([
      ['spec:ours'],
      ['spec:plain'],
      ['none']
    ]);
    expect(groups[0]?.offers[0]?.detail).toContain('isolated by gVisor');
  });

  it('never count a runtime that isolates nothing as a sandbox', () => {
    const groups = offers(stock({ profiles: [{ ...profile, isolated: false, runtime: 'fake' }] }), trans);
    expect(groups.map(group => group.label)).toEqual(['Not in a sandbox', '']);
  });

  it('are one’s sandboxes that no session has, and that live', () => {
    const sandboxes = [
      sandbox({ id: 'asleep', state: 'suspended' }),
      sandbox({ id: 'used' }),
      sandbox({ id: 'dead', state: 'failed' })
    ];
    const groups = offers(stock({ sandboxes, attached: new Set(['used']) }), trans);
    const found = groups.find(group => group.label.startsWith('Go on'));
    expect(found?.offers.map(offer => offer.choice)).toEqual([{ kind: 'kernel', id: 'asleep' }]);
  });

  it('are snapshots, but not what a sandbox is suspended in', () => {
    const kept = {
      name: '',
      owner: 'me',
      published: false,
      sandbox: 'one',
      profile: 'p',
      runtime: 'gvisor',
      parent: null,
      created: '2025-01-01T00:00:00Z',
      size: 5
    };
    const snapshots = [
      { ...kept, id: 'own' },
      { ...kept, id: 'saved', name: 'prepared' }
    ];
    const groups = offers(stock({ snapshots, sandboxes: [sandbox({ state: 'suspended', snapshot: 'own' })] }), trans);
    const found = groups.find(group => group.label.startsWith('Start'));
    expect(found?.offers.map(offer => offer.text)).toEqual(['prepared']);
  });
});

describe('a kernelspec', () => {
  it('is ours by its provisioner alone', () => {
    expect(profileOf(ours)).toBe('analysis');
    expect(profileOf(spec('other', { kernel_provisioner: { provisioner_name: 'local' } }))).toBeNull();
    expect(profileOf(spec('plain'))).toBeNull();
  });
});

describe('fields', () => {
  const found = fields(profile, trans);

  it('are what the profile lets one choose, with its bounds', () => {
    expect(found.map(({ name, minimum, maximum, preset }) => [name, minimum, maximum, preset])).toEqual([
      ['memory', 64, 1024, 1024],
      ['cpu', 0.1, null, null],
      ['suspend', 1, 60, 10]
    ]);
  });

  it('become what the server takes', () => {
    const [memory, cpu, suspend] = found;
    if (memory && cpu && suspend) {
      const wanted = resources(
        new Map([
          [memory, 300],
          [cpu, 1.5],
          [suspend, 5]
        ])
      );
      expect(wanted).toEqual({ memory: 300 << 20, cpu: 1.5, idle: { suspend: 300 } });
    }
    expect(resources(new Map())).toEqual({});
  });
});
