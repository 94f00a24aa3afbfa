/** What in an output may act in the page, where it came from, and whether it may: decided without a page. */
import type { IRenderMime } from '@jupyterlab/rendermime';
import type { KernelSpec } from '@jupyterlab/services';
import type { ReadonlyPartialJSONObject } from '@lumino/coreutils';

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
  'application/vnd.plotly.v1+json': 'plain', // data only: plotly.js takes no code and sanitises its texts
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

/**
 * A Vega chart that is drawn and nothing more. Options of the output's own are left out: with them it may write into
 * the page and into the window of “View Source”. Expressions are interpreted, and no code is made of them.
 */
export function tamed(model: IRenderMime.IMimeModel, mimeType: string): IRenderMime.IMimeModel {
  const spec = model.data[mimeType];
  const given = part(part(model.metadata[mimeType])['embed_options'])['renderer'];
  const renderer = given === 'svg' ? 'svg' : 'canvas';
  const actions = { export: true, source: false, compiled: false, editor: false };
  const own = { embed_options: { ast: true, actions, renderer } };
  // A text in a chart's place would be an address to load it from.
  const chart = Object.fromEntries(Object.entries(part(spec)).filter(([name]) => name !== 'usermeta'));
  return {
    trusted: false,
    data: { ...model.data, [mimeType]: chart },
    metadata: { ...model.metadata, [mimeType]: own },
    setData: ({ data }) => {
      // The renderer adds a picture of what it drew; the rest of the output is kept as it came.
      const picture = data?.['image/png'];
      if (picture !== undefined) {
        model.setData({ data: { ...model.data, 'image/png': picture } });
      }
    }
  };
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
    return { kind: kernel === null ? 'plain' : 'unknown' };
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
