/** What is said of a start that takes a while, by its phase, and of one that was refused for one's quota. */
import type { JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import { Notification } from '@jupyterlab/apputils';
import type { TranslationBundle } from '@jupyterlab/translation';
import { ITranslator, nullTranslator } from '@jupyterlab/translation';

import type { OperationEvent } from '../events';
import { CommandIDs, DOMAIN } from '../names';
import { Pending } from '../progress';
import { named, reliefs } from '../quota';
import { ISandboxes } from '../tokens';
import { progress, title } from '../view';

export const starts: JupyterFrontEndPlugin<void> = {
  id: '@sandbox-gateway/labextension:starts',
  description: 'Tells how far the start of a sandbox is, and what would free room where one is over quota.',
  autoStart: true,
  requires: [ISandboxes],
  optional: [ITranslator],
  activate: (app: JupyterFrontEnd, sandboxes: ISandboxes, translator: ITranslator | null): void => {
    if (!sandboxes.available) {
      return;
    }
    const trans = (translator ?? nullTranslator).load(DOMAIN);
    const shown = new Map<string, Pending>();
    let refused = '';
    sandboxes.progressed.connect((_, event) => {
      const ended = event.phase === 'succeeded' || event.phase === 'failed';
      if (event.kind === 'create' && !ended) {
        const start = shown.get(event.operation);
        if (start === undefined) {
          // Another page of the same user has its own starts to tell of.
          const visible = () => document.visibilityState === 'visible';
          shown.set(event.operation, new Pending(saying(event, trans), visible));
        } else {
          start.tell(saying(event, trans));
        }
      } else if (ended) {
        shown.get(event.operation)?.end();
        shown.delete(event.operation);
      }
      if (event.error?.code === 'over_quota') {
        if (refused !== '') {
          Notification.dismiss(refused); // the last one tells what there is to free now
        }
        refused = overQuota(app, sandboxes, event.error, trans);
      }
    });
  }
};

/** What is said of one start. */
function saying(event: OperationEvent, trans: TranslationBundle): string {
  const name = event.name ? `“${event.name.replace(/^.*\//, '')}”` : trans.__('a sandbox');
  const first = trans.__('Starting %1', name);
  return [first, phase(event.text, trans), progress(event)].filter(Boolean).join(' · ');
}

/** The server's word for a phase, in the user's language where it is a known one. */
function phase(text: string, trans: TranslationBundle): string {
  switch (text) {
    case 'restoring it from its template':
      return trans.__('restoring it from its template');
    case 'starting it without a template':
      return trans.__('without a template, which is built after it');
    default:
      return text;
  }
}

function overQuota(
  app: JupyterFrontEnd,
  sandboxes: ISandboxes,
  error: { message: string; hint: string },
  trans: TranslationBundle
): string {
  const found = sandboxes.all();
  const labels = { suspend: trans.__('Suspend'), end: trans.__('End') };
  const commands = { suspend: CommandIDs.suspend, end: CommandIDs.end };
  const actions: Notification.IAction[] = reliefs(error.hint, found)
    .filter(({ deed }) => app.commands.hasCommand(commands[deed]))
    .map(({ sandbox, deed }) => ({
      label: trans.__('%1 “%2”', labels[deed], title(sandbox)),
      callback: () => void app.commands.execute(commands[deed], { id: sandbox.id })
    }));
  actions.push({ label: trans.__('Show All'), callback: () => app.shell.activateById('jp-running-sessions') });
  return Notification.error(trans.__('Over quota: %1.', named(error.message, found)), { autoClose: false, actions });
}
