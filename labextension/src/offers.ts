/** What a notebook can run on, in groups: decided without a page, shown by the kernel picker. */
import type { KernelSpec } from '@jupyterlab/services';
import type { TranslationBundle } from '@jupyterlab/translation';

import type { Profile, Resources, Sandbox, Snapshot } from './client';
import { age, bytes, moment } from './format';
import type { Field } from './fields';
import { fields } from './fields';
import { ENDED } from './model';
import { title, view } from './view';

export type Choice =
  | { kind: 'none' }
  /** A new kernel of this kernelspec; with resources, of a profile's sandbox. */
  | { kind: 'spec'; name: string; profile: string | null; resources: Resources }
  | { kind: 'kernel'; id: string }
  | { kind: 'snapshot'; id: string };

export interface Offer {
  key: string;
  text: string;
  /** One line below it. */
  detail: string;
  choice: Choice;
  /** What can be chosen for it. */
  fields: readonly Field[];
}

export interface Group {
  label: string;
  offers: Offer[];
}

export interface Stock {
  specs: KernelSpec.ISpecModels | null;
  profiles: readonly Profile[];
  sandboxes: readonly Sandbox[];
  snapshots: readonly Snapshot[];
  /** Kernels that run and are in no sandbox: id and name for people. */
  kernels: readonly { id: string; text: string }[];
  /** Ids of kernels to which a session is attached. */
  attached: ReadonlySet<string>;
  now: number;
}

interface Stanza {
  provisioner_name?: unknown;
  config?: { profile?: unknown; gateway?: unknown };
}

function stanzaOf(spec: KernelSpec.ISpecModel | undefined): Stanza | undefined {
  return spec?.metadata?.['kernel_provisioner'] as Stanza | undefined;
}

/** The profile of a kernelspec of ours; null for any other. */
export function profileOf(spec: KernelSpec.ISpecModel | undefined): string | null {
  const stanza = stanzaOf(spec);
  const profile = stanza?.config?.profile;
  return stanza?.provisioner_name === 'sandbox' && typeof profile === 'string' ? profile : null;
}

/** What to say of a kernelspec that starts a sandbox of which this server knows no profile; null for any other. */
function elsewhere(spec: KernelSpec.ISpecModel, trans: TranslationBundle): string | null {
  const stanza = stanzaOf(spec);
  if (stanza?.provisioner_name === 'sandbox-remote') {
    const { gateway } = stanza.config ?? {};
    return typeof gateway === 'string'
      ? trans.__('in a sandbox on the gateway %1', gateway)
      : trans.__('in a sandbox on a gateway');
  }
  return profileOf(spec) === null ? null : trans.__('in a sandbox; the server does not know its profile any more');
}

/** All that there is to choose from; groups without offers are left out. */
export function offers(stock: Stock, trans: TranslationBundle): Group[] {
  const inside: Offer[] = [];
  const plain: Offer[] = [];
  for (const spec of Object.values(stock.specs?.kernelspecs ?? {})) {
    if (spec === undefined) {
      continue;
    }
    const name = profileOf(spec);
    const profile = stock.profiles.find(one => one.name === name);
    const choice: Choice = { kind: 'spec', name: spec.name, profile: profile?.name ?? null, resources: {} };
    const offer = { key: `spec:${spec.name}`, text: spec.display_name, choice };
    if (profile !== undefined && profile.isolated) {
      inside.push({ ...offer, detail: described(profile, trans), fields: fields(profile, trans) });
      continue;
    }
    const far = profile === undefined ? elsewhere(spec, trans) : null;
    if (far !== null) {
      inside.push({ ...offer, detail: far, fields: [] });
    } else {
      plain.push({ ...offer, detail: trans.__('Runs on the server itself, with all that it can reach'), fields: [] });
    }
  }
  const free = stock.sandboxes.filter(({ id, state }) => !ENDED.includes(state) && !stock.attached.has(id));
  const asleep = free.map(sandbox => ({
    key: `kernel:${sandbox.id}`,
    text: title(sandbox),
    detail: [
      view({ sandbox, busy: false, connection: 'ok', trouble: '' }, trans).label,
      trans.__('since %1', age(sandbox.since, stock.now, trans)),
      sandbox.profile
    ].join(' · '),
    choice: { kind: 'kernel', id: sandbox.id } as const,
    fields: []
  }));
  const saved = stock.snapshots
    .filter(({ id }) => !stock.sandboxes.some(sandbox => sandbox.snapshot === id))
    .map(snapshot => ({
      key: `snapshot:${snapshot.id}`,
      text: snapshot.name || snapshot.id,
      detail: [bytes(snapshot.size), moment(snapshot.created), snapshot.profile].join(' · '),
      choice: { kind: 'snapshot', id: snapshot.id } as const,
      fields: []
    }));
  const running = stock.kernels.map(({ id, text }) => ({
    key: `kernel:${id}`,
    text,
    detail: '',
    choice: { kind: 'kernel', id } as const,
    fields: []
  }));
  const none: Offer = { key: 'none', text: trans.__('No kernel'), detail: '', choice: { kind: 'none' }, fields: [] };
  return [
    { label: trans.__('New sandbox'), offers: sorted(inside) },
    { label: trans.__('Go on with one of your sandboxes'), offers: asleep },
    { label: trans.__('Start from a snapshot'), offers: saved },
    { label: trans.__('Not in a sandbox'), offers: [...sorted(plain), ...running] },
    { label: '', offers: [none] }
  ].filter(group => group.offers.length > 0);
}

function sorted(found: Offer[]): Offer[] {
  return found.sort((one, other) => one.text.localeCompare(other.text));
}

/** A profile in one line: what isolates it, its image, its limits, its network, how long it takes to start. */
export function described(profile: Profile, trans: TranslationBundle): string {
  const { memory, cpu, disk } = profile.limits;
  return [
    trans.__('isolated by %1', profile.runtime === 'gvisor' ? 'gVisor' : profile.runtime),
    trans.__('image %1', profile.image),
    memory === null ? '' : bytes(memory),
    cpu === null ? '' : trans._n('%1 core', '%1 cores', cpu),
    disk === null ? '' : trans.__('%1 of files', bytes(disk)),
    profile.network === 'none' ? trans.__('no network') : profile.network,
    started(profile, trans),
    profile.workspace === 'none'
      ? trans.__('does not see your files')
      : profile.workspace === 'ro'
        ? trans.__('reads the notebook’s folder')
        : trans.__('reads and writes the notebook’s folder'),
    profile.description
  ]
    .filter(Boolean)
    .join(' · ');
}

function started({ start }: Profile, trans: TranslationBundle): string {
  if (!start.template) {
    return trans.__('its first start takes longer');
  }
  const { seconds } = start;
  return seconds === null ? trans.__('starts from a template') : trans.__('starts in %1 s', seconds.toFixed(1));
}
