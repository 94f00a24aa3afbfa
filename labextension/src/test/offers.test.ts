import { describe, expect, it } from 'vitest';

import type { Stock } from '../offers';
import { offers, profileOf } from '../offers';
import { profile, sandbox, trans } from './fake';

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

  it('are in a sandbox on a gateway, too, or by a profile that is not known any more', () => {
    const stanza = (provisioner_name: string, config: object) => ({ kernel_provisioner: { provisioner_name, config } });
    const kernelspecs = {
      far: spec('far', stanza('sandbox-remote', { profile: 'analysis', gateway: 'http://127.0.0.1:1' })),
      gone: spec('gone', stanza('sandbox', { profile: 'gone' }))
    };
    const [inside, other] = offers(stock({ specs: { default: 'far', kernelspecs } }), trans);
    expect(inside?.offers.map(({ detail }) => detail)).toEqual([
      'in a sandbox on the gateway http://127.0.0.1:1',
      'in a sandbox; the server does not know its profile any more'
    ]);
    expect(other?.label).toBe('');
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

describe('a profile', () => {
  it('says how long its start took, or what there is to expect', () => {
    const told = (start: { template: boolean; seconds: number | null }) =>
      offers(stock({ profiles: [{ ...profile, start }] }), trans)[0]?.offers[0]?.detail;
    expect(told({ template: true, seconds: 0.234 })).toContain('starts in 0.2 s');
    expect(told({ template: false, seconds: 0.2 })).toContain('its first start takes longer');
    expect(told({ template: true, seconds: null })).toContain('starts from a template');
    expect(told({ template: false, seconds: null })).toContain('its first start takes longer');
  });
});
