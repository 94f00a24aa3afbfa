/** "Fork this notebook": the kernel goes on twice, each with a notebook of its own. */
import type { JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import { ICommandPalette } from '@jupyterlab/apputils';
import { PathExt } from '@jupyterlab/coreutils';
import { IDocumentManager } from '@jupyterlab/docmanager';
import type { DocumentRegistry } from '@jupyterlab/docregistry';
import type { Contents } from '@jupyterlab/services';
import { ITranslator, nullTranslator } from '@jupyterlab/translation';
import type { Widget } from '@lumino/widgets';

import { told } from '../progress';
import { explain } from '../dialogs';
import { attached, kernelOf, sessionOf } from '../find';
import { CommandIDs, DOMAIN } from '../names';
import { ISandboxes } from '../tokens';
import { possible, title } from '../view';

export const fork: JupyterFrontEndPlugin<void> = {
  id: '@sandbox-gateway/labextension:fork',
  description: 'Forks a notebook: a copy of it beside it, attached to a copy of its kernel.',
  autoStart: true,
  requires: [ISandboxes, IDocumentManager],
  optional: [ICommandPalette, ITranslator],
  activate: (
    app: JupyterFrontEnd,
    sandboxes: ISandboxes,
    documents: IDocumentManager,
    palette: ICommandPalette | null,
    translator: ITranslator | null
  ): void => {
    if (!sandboxes.available) {
      return;
    }
    const trans = (translator ?? nullTranslator).load(DOMAIN);
    const notebook = (args: { id?: unknown }): Widget | null => {
      const current = app.shell.currentWidget;
      if (typeof args.id === 'string' && kernelOf(current) !== args.id) {
        return attached(app, args.id).find(widget => contextOf(documents, widget) !== null) ?? null;
      }
      return current !== null && contextOf(documents, current) !== null ? current : null;
    };
    app.commands.addCommand(CommandIDs.fork, {
      label: args => (args['short'] === true ? trans.__('Fork This Notebook') : trans.__('Fork Notebook and Sandbox')),
      caption: trans.__('A copy of the notebook beside it, attached to a copy of its kernel: both go on by themselves'),
      isVisible: args => sandboxes.get(kernelOf(notebook(args)) ?? '') !== undefined,
      isEnabled: args => {
        const sandbox = sandboxes.get(kernelOf(notebook(args)) ?? '');
        return sandbox !== undefined && sandboxes.connection === 'ok' && possible('fork', sandbox);
      },
      execute: async args => {
        const widget = notebook(args);
        const context = widget === null ? null : contextOf(documents, widget);
        const sandbox = sandboxes.get(kernelOf(widget) ?? '');
        if (widget === null || context === null || sandbox === undefined) {
          return;
        }
        try {
          await told(
            forked(sandboxes, documents, app.serviceManager.contents, context, sandbox.id, widget),
            trans.__('Forking “%1”…', title(sandbox)),
            path => trans.__('Forked: “%1” goes on by itself', PathExt.basename(path))
          );
        } catch (error) {
          await explain(trans.__('The notebook could not be forked'), error, trans);
        }
      },
      describedBy: {
        args: {
          type: 'object',
          properties: { id: { type: 'string', description: trans.__('The sandbox’s id; else the one in front') } }
        }
      }
    });
    palette?.addItem({ command: CommandIDs.fork, category: trans.__('Sandbox') });
  }
};

/** Fork the kernel, save the copy and open it attached to the child; gives the copy's path. */
async function forked(
  sandboxes: ISandboxes,
  documents: IDocumentManager,
  contents: Contents.IManager,
  context: DocumentRegistry.Context,
  id: string,
  widget: Widget
): Promise<string> {
  const content = context.model.toJSON(); // as it is at the fork, saved or not
  const name = sessionOf(widget)?.session?.kernel?.name ?? '';
  const [child] = await sandboxes.fork(id);
  if (child === undefined) {
    throw new Error('the gateway made no child');
  }
  try {
    const path = await free(contents, context.path);
    await contents.save(path, { type: 'notebook', format: 'json', content });
    await sandboxes.rename(child, PathExt.basename(path));
    documents.open(path, 'Notebook', { id: child, name }, { mode: 'split-right', ref: widget.id });
    return path;
  } catch (error) {
    await sandboxes.remove(child); // nobody would know of it
    throw error;
  }
}

/** A path beside `path` that no file has: `day-fork1.ipynb`, `day-fork2.ipynb`... */
async function free(contents: Contents.IManager, path: string): Promise<string> {
  const folder = PathExt.dirname(path);
  const listed = (await contents.get(folder, { content: true })).content as Contents.IModel[];
  const taken = new Set(listed.map(entry => entry.name));
  const base = PathExt.basename(path, '.ipynb').replace(/-fork\d+$/, '');
  let number = 1;
  while (taken.has(`${base}-fork${number}.ipynb`)) {
    number += 1;
  }
  return PathExt.join(folder, `${base}-fork${number}.ipynb`);
}

function contextOf(documents: IDocumentManager, widget: Widget): DocumentRegistry.Context | null {
  const context = documents.contextForWidget(widget) ?? null;
  return context !== null && context.contentsModel?.type === 'notebook' ? context : null;
}
