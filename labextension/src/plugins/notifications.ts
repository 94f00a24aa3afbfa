/** What the user has to know although he may look elsewhere: a death with its reason, an end that comes near. */
import type { JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import { Notification } from '@jupyterlab/apputils';
import { ITranslator, nullTranslator } from '@jupyterlab/translation';

import type { SandboxEvent } from '../events';
import { explain } from '../dialogs';
import { bytes, moment } from '../format';
import { moreMemory } from '../more';
import { CommandIDs, DOMAIN } from '../names';
import { ISandboxes } from '../tokens';
import { advice, title } from '../view';

export const notifications: JupyterFrontEndPlugin<void> = {
  id: '@sandbox-gateway/labextension:notifications',
  description: 'Tells of sandboxes that died, and of those that will end soon.',
  autoStart: true,
  requires: [ISandboxes],
  optional: [ITranslator],
  activate: (app: JupyterFrontEnd, sandboxes: ISandboxes, translator: ITranslator | null): void => {
    if (!sandboxes.available) {
      return;
    }
    const trans = (translator ?? nullTranslator).load(DOMAIN);
    /** The notification of each sandbox's end to come. */
    const warned = new Map<string, string>();

    const act = (label: string, command: string, id: string, memory?: number): Notification.IAction[] => {
      const args = memory === undefined ? { id } : { id, memory };
      return app.commands.hasCommand(command)
        ? [{ label, callback: () => void app.commands.execute(command, args) }]
        : [];
    };

    const died = async (event: SandboxEvent): Promise<void> => {
      await sandboxes.settled(event.sandbox); // its record says more than the event
      const sandbox = sandboxes.get(event.sandbox);
      if (sandbox === undefined) {
        return;
      }
      const why = sandbox.death?.reason ?? event.text; // one that was started anew has its death behind it
      const more = event.data['kind'] === 'out_of_memory' ? await moreMemory(sandboxes, sandbox) : null;
      const first = trans.__('“%1” died: %2.', title(sandbox), why.replace(/\.$/, ''));
      Notification.error(`${first} ${advice(String(event.data['kind'] ?? ''), sandbox, trans)}`, {
        autoClose: false,
        actions: [
          ...(more === null
            ? act(trans.__('Restart'), CommandIDs.restart, sandbox.id)
            : act(trans.__('Start with %1…', bytes(more)), CommandIDs.pick, sandbox.id, more)),
          ...act(trans.__('Show Log'), CommandIDs.logs, sandbox.id)
        ]
      });
    };

    const warn = (event: SandboxEvent): void => {
      const sandbox = sandboxes.get(event.sandbox);
      const { due } = event.data;
      if (sandbox === undefined || typeof due !== 'number') {
        return;
      }
      const keep: Notification.IAction = {
        label: trans.__('Keep'),
        caption: trans.__('Counts as use: its idle time begins anew'),
        displayType: 'accent',
        callback: () => {
          sandboxes
            .keep(event.sandbox)
            .catch((error: unknown) => explain(trans.__('It could not be kept'), error, trans));
        }
      };
      const text = trans.__('“%1” is not used, and is lost at %2.', title(sandbox), moment(due * 1000));
      forget(event.sandbox);
      warned.set(event.sandbox, Notification.warning(text, { autoClose: false, actions: [keep] }));
    };

    const forget = (id: string): void => {
      const notification = warned.get(id);
      if (notification !== undefined) {
        Notification.dismiss(notification);
        warned.delete(id);
      }
    };

    sandboxes.happened.connect((_, event) => {
      switch (event.kind) {
        case 'died':
        case 'expired':
          forget(event.sandbox);
          void died(event);
          break;
        case 'warned':
          warn(event);
          break;
        case 'stopped':
        case 'resumed':
          forget(event.sandbox);
          break;
      }
    });
  }
};
