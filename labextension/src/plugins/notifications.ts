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

interface Warned {
  /** The notification's. */
  id: string;
  /** Whether it ends because it is not used. */
  idle: boolean;
  /** When it was told, in milliseconds since the epoch. */
  since: number;
}

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
    /** What was told of each sandbox's end to come. */
    const warned = new Map<string, Warned>();

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
          ...(more !== null && app.commands.isEnabled(CommandIDs.pick, { id: sandbox.id })
            ? act(trans.__('Start with %1…', bytes(more)), CommandIDs.pick, sandbox.id, more)
            : act(trans.__('Restart'), CommandIDs.restart, sandbox.id)),
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
      // The end of its longest life comes however it is used.
      const idle = event.data['idle'] !== false;
      const text = idle
        ? trans.__('“%1” is not used, and is lost at %2.', title(sandbox), moment(due * 1000))
        : trans.__(
            '“%1” is lost at %2: its longest life is over. Save what you need.',
            title(sandbox),
            moment(due * 1000)
          );
      forget(event.sandbox);
      const id = Notification.warning(text, { autoClose: false, actions: idle ? [keep] : [] });
      warned.set(event.sandbox, { id, idle, since: event.time });
    };

    const forget = (id: string): void => {
      const warning = warned.get(id);
      if (warning !== undefined) {
        Notification.dismiss(warning.id);
        warned.delete(id);
      }
    };

    /** It is not lost for not being used, then; when its longest life is over, it is. */
    const used = (id: string, when = Infinity): void => {
      const warning = warned.get(id);
      if (warning?.idle === true && when > warning.since) {
        forget(id);
      }
    };

    // By whoever it is used, in this page or another.
    app.serviceManager.kernels.runningChanged.connect((_, kernels) => {
      kernels.forEach(({ id, last_activity: last }) => used(id, Date.parse(last ?? '')));
    });

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
          forget(event.sandbox);
          break;
        case 'resumed':
        case 'restarted':
          used(event.sandbox);
          break;
      }
    });
  }
};
