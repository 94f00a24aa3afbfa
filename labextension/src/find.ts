/** From what is on the screen to a sandbox, and back. */
import type { JupyterFrontEnd } from '@jupyterlab/application';
import type { ISessionContext } from '@jupyterlab/apputils';
import type { Widget } from '@lumino/widgets';

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
