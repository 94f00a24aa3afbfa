/** "Fork this notebook": the kernel goes on twice, each with a notebook of its own. */
import type { JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import { Dialog, ICommandPalette, showDialog } from '@jupyterlab/apputils';
import { PathExt } from '@jupyterlab/coreutils';
import { IDocumentManager } from '@jupyterlab/docmanager';
import type { DocumentRegistry } from '@jupyterlab/docregistry';
import type { Contents, Session } from '@jupyterlab/services';
import type { TranslationBundle } from '@jupyterlab/translation';
import { ITranslator, nullTranslator } from '@jupyterlab/translation';
import type { ReadonlyPartialJSONObject } from '@lumino/coreutils';
import { Widget } from '@lumino/widgets';

import type { Sandbox } from '../client';
import { told } from '../progress';
import { explain } from '../dialogs';
import { attached, kernelOf, sessionOf } from '../find';
import { attach } from '../open';
import { Runs } from '../runs';
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
      execute: args => multiply(args, typeof args['count'] === 'number' ? args['count'] : 1),
      describedBy: {
        args: {
          type: 'object',
          properties: {
            id: { type: 'string', description: trans.__('The sandbox’s id; else the one in front') },
            count: { type: 'integer', description: trans.__('How many forks; one where it is not said') }
          }
        }
      }
    });
    app.commands.addCommand(CommandIDs.forkSeveral, {
      label: args =>
        args['short'] === true ? trans.__('Fork Several Times…') : trans.__('Fork Notebook and Sandbox Several Times…'),
      caption: trans.__('Several copies of the notebook beside it, each attached to a copy of its kernel'),
      isVisible: args => app.commands.isVisible(CommandIDs.fork, args),
      isEnabled: args => app.commands.isEnabled(CommandIDs.fork, args),
      execute: async args => {
        const sandbox = sandboxes.get(kernelOf(notebook(args)) ?? '');
        const count = sandbox === undefined ? null : await askForCount(sandbox, trans);
        if (count !== null) {
          await multiply(args, count);
        }
      },
      describedBy: {
        args: {
          type: 'object',
          properties: { id: { type: 'string', description: trans.__('The sandbox’s id; else the one in front') } }
        }
      }
    });

    const multiply = async (args: ReadonlyPartialJSONObject, count: number): Promise<void> => {
      const widget = notebook(args);
      const context = widget === null ? null : contextOf(documents, widget);
      const sandbox = sandboxes.get(kernelOf(widget) ?? '');
      if (widget === null || context === null || sandbox === undefined) {
        return;
      }
      try {
        const { paths, failures } = await told(
          forked({ sandboxes, documents, services: app.serviceManager, context, id: sandbox.id, widget, count }),
          trans._n('Forking “%2”…', 'Forking “%2” %1 times…', count, title(sandbox)),
          made => trans.__('Forked: %1', made.paths.map(path => `“${PathExt.basename(path)}”`).join(', '))
        );
        if (failures.length > 0) {
          const what = trans.__('%1 of %2 forks were made', paths.length, count);
          await explain(what, failures[0], trans);
        }
      } catch (error) {
        await explain(trans.__('The notebook could not be forked'), error, trans);
      }
    };

    palette?.addItem({ command: CommandIDs.fork, category: trans.__('Sandbox') });
    palette?.addItem({ command: CommandIDs.forkSeveral, category: trans.__('Sandbox') });
  }
};

/** More at once is asked for by a program, not by a person who wants to look at each. */
const MOST = 20;

/** Ask for the number of forks; null is no. */
async function askForCount(sandbox: Sandbox, trans: TranslationBundle): Promise<number | null> {
  const body = new CountField(trans);
  const result = await showDialog<number>({
    title: trans.__('Fork “%1” several times', title(sandbox)),
    body,
    focusNodeSelector: 'input',
    buttons: [Dialog.cancelButton(), Dialog.okButton({ label: trans.__('Fork') })]
  });
  return result.button.accept && body.valid ? result.value : null;
}

class CountField extends Widget implements Dialog.IBodyWidget<number> {
  constructor(trans: TranslationBundle) {
    super();
    const label = document.createElement('label');
    label.textContent = trans.__('How many copies, from 1 to %1; each is opened beside the notebook', MOST);
    this._input.className = 'jp-mod-styled';
    Object.assign(this._input, { type: 'number', required: true, min: '1', max: String(MOST), step: '1', value: '2' });
    label.append(this._input);
    this.node.append(label);
  }

  /** Whether the number is one that can be asked for. */
  get valid(): boolean {
    return this._input.validity.valid;
  }

  getValue(): number {
    return this._input.valueAsNumber;
  }

  private readonly _input = document.createElement('input');
}

interface IForking {
  sandboxes: ISandboxes;
  documents: IDocumentManager;
  services: { contents: Contents.IManager; sessions: Session.IManager; serverSettings: { baseUrl: string } };
  context: DocumentRegistry.Context;
  id: string;
  widget: Widget;
  count: number;
}

interface IMade {
  /** Of the copies. */
  paths: string[];
  /** Why there are not as many as were asked for. */
  failures: unknown[];
}

/** Fork the kernel, save the copies and open each attached to its child; rejects where there is none at all. */
async function forked(forking: IForking): Promise<IMade> {
  const { sandboxes, documents, services, context, id, widget, count } = forking;
  const runs = new Runs(window.localStorage, services.serverSettings.baseUrl);
  const content = context.model.toJSON(); // as it is at the fork, saved or not
  const name = sessionOf(widget)?.session?.kernel?.name ?? '';
  const { ids, failures } = await sandboxes.fork(id, count);
  const made: IMade = { paths: [], failures: [...failures] };
  for (const child of ids) {
    try {
      const path = await free(services.contents, context.path);
      await services.contents.save(path, { type: 'notebook', format: 'json', content });
      await sandboxes.rename(child, PathExt.basename(path));
      await attach(services.sessions, path, child);
      runs.copy(id, child); // the copy of a cell that runs goes on in the copy
      // The first beside the notebook, the others as tabs of the first.
      const first = made.paths[0] === undefined ? null : (documents.findWidget(made.paths[0], 'Notebook') ?? null);
      const place = first === null ? { mode: 'split-right', ref: widget.id } : { mode: 'tab-after', ref: first.id };
      documents.open(path, 'Notebook', { id: child, name }, place as DocumentRegistry.IOpenOptions);
      made.paths.push(path);
    } catch (error) {
      made.failures.push(error);
      await sandboxes.remove(child).catch((again: unknown) => made.failures.push(again)); // nobody would know of it
    }
  }
  if (made.paths.length === 0) {
    throw made.failures[0];
  }
  return made;
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
