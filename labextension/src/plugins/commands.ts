/** What can be done with a sandbox, for the palette, the menus, the chip and the panel. */
import type { JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import type { ISessionContextDialogs as Dialogs } from '@jupyterlab/apputils';
import { ICommandPalette, ISessionContextDialogs } from '@jupyterlab/apputils';
import { ISettingRegistry } from '@jupyterlab/settingregistry';
import { ITranslator, nullTranslator } from '@jupyterlab/translation';
import type { ReadonlyPartialJSONObject } from '@lumino/coreutils';

import type { Sandbox } from '../client';
import { askForName, askToSuspend, confirm, explain, showDetails, showLog } from '../dialogs';
import { attached, kernelOf, sessionOf } from '../find';
import { CommandIDs, DOMAIN } from '../names';
import { told } from '../progress';
import { ISandboxes } from '../tokens';
import type { Deed } from '../view';
import { possible, title } from '../view';

const ID = '@sandbox-gateway/labextension:commands';

export const commands: JupyterFrontEndPlugin<void> = {
  id: ID,
  description: 'Commands for sandboxes, in the palette and the menus.',
  autoStart: true,
  requires: [ISandboxes],
  optional: [ICommandPalette, ISettingRegistry, ISessionContextDialogs, ITranslator],
  activate: (
    app: JupyterFrontEnd,
    sandboxes: ISandboxes,
    palette: ICommandPalette | null,
    registry: ISettingRegistry | null,
    dialogs: Dialogs | null,
    translator: ITranslator | null
  ): void => {
    if (!sandboxes.available) {
      return;
    }
    const trans = (translator ?? nullTranslator).load(DOMAIN);
    const settings = registry?.load(ID).catch(() => null) ?? Promise.resolve(null);
    const add = (id: string, command: ICommand) => {
      app.commands.addCommand(id, {
        // In the chip's menu and in the panel it is plain what a command is about.
        label: args => (args['short'] === true ? command.short : command.label),
        caption: command.caption,
        isVisible: args => chosen(app, sandboxes, args) !== null,
        isEnabled: args => {
          const sandbox = chosen(app, sandboxes, args);
          return sandbox !== null && sandboxes.connection === 'ok' && possible_(command.deed, sandbox);
        },
        execute: async args => {
          const sandbox = chosen(app, sandboxes, args);
          if (sandbox === null) {
            return;
          }
          try {
            await command.execute(sandbox, args);
          } catch (error) {
            await explain(command.failed, error, trans);
          }
        },
        describedBy: {
          args: {
            type: 'object',
            properties: { id: { type: 'string', description: trans.__('The sandbox’s id; else the one in front') } }
          }
        }
      });
      palette?.addItem({ command: id, category: trans.__('Sandbox') });
    };

    add(CommandIDs.suspend, {
      deed: 'suspend',
      label: trans.__('Suspend Sandbox…'),
      short: trans.__('Suspend…'),
      caption: trans.__('Save it to disk and release its memory; running a cell resumes it'),
      failed: trans.__('It could not be suspended'),
      execute: async sandbox => {
        const kept = await settings;
        if (kept === null || kept.composite['confirmSuspend'] !== false) {
          const answer = await askToSuspend(sandbox, trans);
          if (answer === null) {
            return;
          }
          if (!answer.askAgain) {
            await kept?.set('confirmSuspend', false);
          }
        }
        await sandboxes.suspend(sandbox.id, 'by its user');
      }
    });
    add(CommandIDs.resume, {
      deed: 'resume',
      label: trans.__('Resume Sandbox'),
      short: trans.__('Resume'),
      caption: trans.__('Let it go on where it was'),
      failed: trans.__('It could not be resumed'),
      execute: async sandbox => void (await sandboxes.resume(sandbox.id))
    });
    add(CommandIDs.pause, {
      deed: 'pause',
      label: trans.__('Pause Sandbox'),
      short: trans.__('Pause'),
      caption: trans.__('Freeze it; its memory stays, and it goes on in milliseconds'),
      failed: trans.__('It could not be paused'),
      execute: async sandbox => void (await sandboxes.pause(sandbox.id))
    });
    add(CommandIDs.snapshot, {
      deed: 'snapshot',
      label: trans.__('Save Snapshot of Sandbox…'),
      short: trans.__('Save Snapshot…'),
      caption: trans.__('Save its memory and files under a name, to start from later'),
      failed: trans.__('No snapshot could be saved'),
      execute: async sandbox => {
        const name = await askForName(sandbox, trans);
        if (name !== null) {
          const saved = sandboxes.snapshot(sandbox.id, name);
          await told(saved, trans.__('Saving “%1”…', title(sandbox)), made => trans.__('Saved as “%1”', made.name));
        }
      }
    });
    add(CommandIDs.restart, {
      deed: 'restart',
      label: trans.__('Restart Sandbox…'),
      short: trans.__('Restart…'),
      caption: trans.__('Start its kernel anew: files stay, variables go'),
      failed: trans.__('It could not be restarted'),
      execute: async sandbox => {
        const session = sessionOf(attached(app, sandbox.id)[0] ?? null);
        if (session !== null && dialogs !== null) {
          await dialogs.restart(session); // the page's own way, so that the notebook knows
          return;
        }
        const text = trans.__('Its variables are lost. Files stay, unless the whole sandbox died.');
        if (await confirm(trans.__('Restart “%1”?', title(sandbox)), text, trans.__('Restart'))) {
          await sandboxes.restart(sandbox.id);
        }
      }
    });
    add(CommandIDs.restartClean, {
      deed: 'restart',
      label: trans.__('Restart Sandbox Clean…'),
      short: trans.__('Restart Clean…'),
      caption: trans.__('Put a new sandbox of the same profile and limits in its place: variables and files go'),
      failed: trans.__('It could not be restarted'),
      execute: async sandbox => {
        const text = trans.__(
          'A new sandbox of the same profile and limits takes its place. Its variables are lost, and so are all files ' +
            'inside the sandbox and what was installed there. Files of the notebook’s folder and snapshots stay.'
        );
        if (await confirm(trans.__('Restart “%1” clean?', title(sandbox)), text, trans.__('Restart Clean'))) {
          await sandboxes.restart(sandbox.id, true);
        }
      }
    });
    add(CommandIDs.end, {
      deed: 'end',
      label: trans.__('End Sandbox…'),
      short: trans.__('End…'),
      caption: trans.__('End it; memory and files go'),
      failed: trans.__('It could not be ended'),
      execute: async sandbox => {
        const text = trans.__('Its variables, and its files inside the sandbox, are lost.');
        if (await confirm(trans.__('End “%1”?', title(sandbox)), text, trans.__('End'))) {
          await sandboxes.remove(sandbox.id);
        }
      }
    });
    add(CommandIDs.logs, {
      label: trans.__('Show Log of Sandbox'),
      short: trans.__('Show Log'),
      caption: trans.__('What the kernel wrote past Jupyter'),
      failed: trans.__('There is no log'),
      execute: async sandbox => showLog(sandbox, await sandboxes.logs(sandbox.id), trans)
    });
    add(CommandIDs.details, {
      label: trans.__('Details of Sandbox'),
      short: trans.__('Details'),
      caption: trans.__('Limits, origin, and what happened to it'),
      failed: trans.__('There are no details'),
      execute: async sandbox => showDetails(sandboxes, sandbox, await sandboxes.events(sandbox.id), trans)
    });

    const update = () => {
      Object.values(CommandIDs)
        .filter(id => app.commands.hasCommand(id))
        .forEach(id => app.commands.notifyCommandChanged(id));
    };
    sandboxes.changed.connect(update);
    app.shell.currentChanged?.connect(update);
  }
};

interface ICommand {
  deed?: Deed;
  label: string;
  /** The label where it is plain that it is about a sandbox. */
  short: string;
  caption: string;
  /** The title of the message when it fails. */
  failed: string;
  execute: (sandbox: Sandbox, args: ReadonlyPartialJSONObject) => Promise<void>;
}

function possible_(deed: Deed | undefined, sandbox: Sandbox): boolean {
  return deed === undefined || possible(deed, sandbox);
}

/** The sandbox that a command is about: the one named, the one under the context menu, or the one in front. */
function chosen(app: JupyterFrontEnd, sandboxes: ISandboxes, args: ReadonlyPartialJSONObject): Sandbox | null {
  const hit =
    args['context'] === true ? app.contextMenuHitTest(node => node.dataset['context'] !== undefined) : undefined;
  const id =
    typeof args['id'] === 'string' ? args['id'] : (hit?.dataset['context'] ?? kernelOf(app.shell.currentWidget));
  return (id === null ? undefined : sandboxes.get(id)) ?? null;
}
