/** What in an output may act in the page, where it came from, and whether it may: decided without a page. */
import type { IRenderMime } from '@jupyterlab/rendermime';
import type { KernelSpec } from '@jupyterlab/services';
import type { ReadonlyPartialJSONArray, ReadonlyPartialJSONObject, ReadonlyPartialJSONValue } from '@lumino/coreutils';

import type { Sandbox } from './client';

/**
 * How a kind of output is shown where it may not act:
 * - `plain`: as ever. Its renderer makes text or images of it and runs nothing, trusted or not.
 * - `sanitised`: by JupyterLab's own sanitiser.
 * - `confined`: with all that reaches out of it taken away.
 * - `active`: not at all, but for another form of the same output.
 */
export type Kind = 'plain' | 'sanitised' | 'confined' | 'active';

const KINDS: Readonly<Record<string, Kind>> = {
  'text/plain': 'plain',
  'application/vnd.jupyter.stdout': 'plain',
  'application/vnd.jupyter.stderr': 'plain',
  'application/vnd.jupyter.error': 'plain',
  'text/latex': 'plain', // MathJax with its safe handler: no javascript: in \href, no \unicode, no styles that cover
  'image/png': 'plain',
  'image/jpeg': 'plain',
  'image/gif': 'plain',
  'image/bmp': 'plain',
  'image/webp': 'plain',
  'image/svg+xml': 'plain', // as the source of an <img>, in which no script runs and nothing is loaded
  'application/json': 'plain',
  'application/vnd.plotly.v1+json': 'confined',
  'text/html': 'sanitised',
  'text/markdown': 'sanitised',
  'application/vnd.vega.v5+json': 'confined',
  'application/vnd.vegalite.v3+json': 'confined',
  'application/vnd.vegalite.v4+json': 'confined',
  'application/vnd.vegalite.v5+json': 'confined'
};

/** What a MIME type is; one that is not known may do anything. */
export function kindOf(mimeType: string): Kind {
  return (Object.hasOwn(KINDS, mimeType) ? KINDS[mimeType] : undefined) ?? 'active';
}

const ACTS = [
  /<\s*(script|iframe|object|embed|applet|frame|frameset|form|base|meta|link|svg|math|portal)\b/i,
  /<\s*style\b(?!\s+scoped)/i, // pandas writes a scoped one above every table, which is not missed
  /[\s"'/]on[a-z]+\s*=/i,
  /(javascript|vbscript)\s*:/i,
  /\bsrcdoc\s*=/i,
  /data-commandlinker/i
];

/** Whether HTML has something that the sanitiser takes away. Only for telling so: nothing is decided by it. */
export function acts(html: string): boolean {
  return ACTS.some(pattern => pattern.test(html));
}

/** A chart or figure that is drawn and nothing more; null for one that cannot be shown so. */
export function tamed(model: IRenderMime.IMimeModel, mimeType: string): IRenderMime.IMimeModel | null {
  return mimeType === 'application/vnd.plotly.v1+json' ? figure(model, mimeType) : chart(model, mimeType);
}

/** What a chart may hear beyond itself: where the pointer goes that began to drag in it. No keys, no other elements. */
const EVENTS = {
  bind: 'none',
  selector: false,
  window: ['pointermove', 'pointerup', 'mousemove', 'mouseup', 'touchmove', 'touchend']
};

/**
 * A Vega chart. Options of the output's own are left out: with them it may write into the page and into the window of
 * “View Source”. So is what binds a signal to an element, which is any of the page by its selector, or a new one with
 * any attributes. Expressions are interpreted, and no code is made of them.
 */
function chart(model: IRenderMime.IMimeModel, mimeType: string): IRenderMime.IMimeModel {
  const spec = model.data[mimeType];
  const given = part(part(model.metadata[mimeType])['embed_options'])['renderer'];
  const renderer = given === 'svg' ? 'svg' : 'canvas';
  const actions = { export: true, source: false, compiled: false, editor: false };
  const own = { embed_options: { ast: true, actions, renderer } };
  // A text in a chart's place would be an address to load it from.
  const drawn = part(unbound(part(spec)));
  const config = { ...part(drawn['config']), events: EVENTS };
  const rest = Object.fromEntries(Object.entries(drawn).filter(([name]) => name !== 'usermeta'));
  return passive(model, { ...model.data, [mimeType]: { ...rest, config } }, { ...model.metadata, [mimeType]: own });
}

/** A binding to a scale or a legend is a word; what binds to an element says how. */
function unbound(value: ReadonlyPartialJSONValue | undefined): ReadonlyPartialJSONValue | undefined {
  if (isArray(value)) {
    return value.map(one => unbound(one) ?? null);
  }
  if (typeof value !== 'object' || value === null) {
    return value;
  }
  const kept = Object.entries(value).filter(([name, one]) => name !== 'bind' || typeof one === 'string');
  return Object.fromEntries(kept.map(([name, one]) => [name, unbound(one)]));
}

/** Traces of plotly that draw maps: their styles bring HTML, and are loaded from anywhere. */
const MAPS = /^(?:(?:scatter|density|choropleth)(?:map|mapbox|mapgl)|choropleth|scattergeo)$/;
/** What a figure may say of how it behaves. */
const BEHAVIOUR = ['responsive', 'displayModeBar', 'displaylogo', 'scrollZoom', 'staticPlot'];

/** A figure of plotly: data, of which no code is made and whose texts are sanitised. One with a map is held back. */
function figure(model: IRenderMime.IMimeModel, mimeType: string): IRenderMime.IMimeModel | null {
  const { data, layout, frames, config } = part(model.data[mimeType]);
  const { template, ...rest } = part(layout); // a template names every kind of trace, and makes none
  if ([data, rest, frames].some(found => says(found, MAPS))) {
    return null;
  }
  const behaviour = Object.entries(part(config)).filter(
    ([name, value]) => BEHAVIOUR.includes(name) && typeof value === 'boolean'
  );
  const drawn = {
    ...(data === undefined ? {} : { data }),
    layout: { ...rest, ...(template === undefined ? {} : { template }) },
    ...(frames === undefined ? {} : { frames }),
    config: Object.fromEntries(behaviour)
  };
  const shown = passive(model, { ...model.data, [mimeType]: drawn }, model.metadata);
  // Its renderer would add a picture, and show that in the figure's place when it is asked again.
  return { ...shown, setData: () => undefined };
}

/** Whether a text in it, at any depth, is like this. */
function says(value: ReadonlyPartialJSONValue | undefined, like: RegExp): boolean {
  if (typeof value === 'string') {
    return like.test(value);
  }
  return typeof value === 'object' && value !== null && Object.values(value).some(one => says(one, like));
}

function passive(
  model: IRenderMime.IMimeModel,
  data: ReadonlyPartialJSONObject,
  metadata: ReadonlyPartialJSONObject
): IRenderMime.IMimeModel {
  return {
    trusted: false,
    data,
    metadata,
    setData: ({ data }) => {
      // The renderer adds a picture of what it drew; the rest of the output is kept as it came.
      const picture = data?.['image/png'];
      if (picture !== undefined) {
        model.setData({ data: { ...model.data, 'image/png': picture } });
      }
    }
  };
}

function isArray(value: unknown): value is ReadonlyPartialJSONArray {
  return Array.isArray(value);
}

function part(value: unknown): ReadonlyPartialJSONObject {
  return typeof value === 'object' && value !== null && !Array.isArray(value)
    ? (value as ReadonlyPartialJSONObject)
    : {};
}

/** Where the output of a notebook or console comes from. */
export type Origin = { kind: 'plain' } | { kind: 'unknown' } | { kind: 'sandbox'; profile: string };

export interface Facts {
  kernel: { readonly id: string; readonly name: string } | null;
  /** The kernelspec that the document names; empty for none. */
  named: string;
  /** Null while they are not known. */
  specs: KernelSpec.ISpecModels | null;
  sandbox: Sandbox | undefined;
}

/** As far as it is known; a kernel of which nothing is known is no plain one. */
export function origin({ kernel, named, specs, sandbox }: Facts): Origin {
  if (sandbox !== undefined) {
    return { kind: 'sandbox', profile: sandbox.profile };
  }
  const name = kernel?.name ?? named;
  if (name === '' && kernel === null) {
    return { kind: 'plain' };
  }
  if (specs === null) {
    return { kind: 'unknown' };
  }
  const spec = specs.kernelspecs[name];
  if (spec === undefined) {
    // What a notebook shows of a kernelspec that is gone may well be a sandbox's; its user can allow it by that name.
    return kernel === null ? { kind: 'sandbox', profile: name } : { kind: 'unknown' };
  }
  const profile = profileIn(spec);
  return profile === null ? { kind: 'plain' } : { kind: 'sandbox', profile };
}

/** The profile of a kernelspec that starts a sandbox, here or on a gateway; null for any other. */
function profileIn(spec: KernelSpec.ISpecModel): string | null {
  const stanza = spec.metadata?.['kernel_provisioner'] as
    { provisioner_name?: unknown; config?: { profile?: unknown } } | undefined;
  if (stanza?.provisioner_name !== 'sandbox' && stanza?.provisioner_name !== 'sandbox-remote') {
    return null;
  }
  return typeof stanza.config?.profile === 'string' ? stanza.config.profile : spec.name;
}

/** By a document's path: the profile whose output may act in it. */
export type Permissions = Readonly<Record<string, string>>;

/** Whether output may act. `open` are the profiles whose administrator says so. */
export function mayAct(from: Origin, permitted: string | undefined, open: ReadonlySet<string>): boolean {
  switch (from.kind) {
    case 'plain':
      return true;
    case 'unknown':
      return false;
    case 'sandbox':
      return open.has(from.profile) || permitted === from.profile;
  }
}

/** What was said of paths, after a file or folder was renamed; null as its new name: it was removed. */
export function moved(said: Permissions, before: string, after: string | null): Permissions {
  const next: Record<string, string> = {};
  for (const [path, value] of Object.entries(said)) {
    if (path === after || (after !== null && path.startsWith(`${after}/`))) {
      continue; // what lay there is no more
    }
    if (path === before || path.startsWith(`${before}/`)) {
      if (after !== null) {
        next[after + path.slice(before.length)] = value;
      }
    } else {
      next[path] = value;
    }
  }
  return next;
}

/** Text by text, of what was stored: it may have been written by hand. */
export function permissions(stored: unknown): Permissions {
  if (typeof stored !== 'object' || stored === null) {
    return {};
  }
  return Object.fromEntries(Object.entries(stored).filter(([, value]) => typeof value === 'string')) as Permissions;
}
