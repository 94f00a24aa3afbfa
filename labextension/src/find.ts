/** From what is on the screen to a sandbox, and back. */
import type { JupyterFrontEnd } from '@jupyterlab/application';
import type { ISessionContext } from '@jupyterlab/apputils';
import type { Widget } from '@lumino/widgets';

import type { Metadata } from './remembered';

/** The session of a notebook, a console or anything else that has one. */
export function sessionOf(widget: Widget | null): ISessionContext | null {
  const found = widget as (Widget & { sessionContext?: unknown; context?: { sessionContext?: unknown } }) | null;
  for (const candidate of [found?.sessionContext, found?.context?.sessionContext]) {
    if (typeof candidate === 'object' && candidate !== null && 'kernelChanged' in candidate) {
      return candidate as ISessionContext;
    }
  }
  return null;
}

/** The id of the kernel of a widget, which is its sandbox's where it has one. */
export function kernelOf(widget: Widget | null): string | null {
  return sessionOf(widget)?.session?.kernel?.id ?? null;
}

/** The widgets that are attached to a kernel. */
export function attached(app: JupyterFrontEnd, id: string): Widget[] {
  return [...app.shell.widgets('main')].filter(widget => kernelOf(widget) === id);
}

/** The metadata of the notebook that has a session; null for what is no notebook. */
export function metadataOf(app: JupyterFrontEnd, session: ISessionContext): Metadata | null {
  for (const widget of app.shell.widgets('main')) {
    const { model } = (widget as Widget & { context?: { model?: Partial<Metadata> } }).context ?? {};
    if (sessionOf(widget) === session && typeof model?.getMetadata === 'function') {
      return model as Metadata;
    }
  }
  return null;
}
