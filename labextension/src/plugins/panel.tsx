/** The sandboxes and snapshots of the user, in the panel "Running". */
import type { JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import type { IRunningSessions } from '@jupyterlab/running';
import { IRunningSessionManagers, IRunningSessionSidebar } from '@jupyterlab/running';
import type { TranslationBundle } from '@jupyterlab/translation';
import { ITranslator, nullTranslator } from '@jupyterlab/translation';
import type { LabIcon } from '@jupyterlab/ui-components';
import { runIcon } from '@jupyterlab/ui-components';
import { MessageLoop } from '@lumino/messaging';
import { Throttler } from '@lumino/polling';
import { Signal } from '@lumino/signaling';
import { Widget } from '@lumino/widgets';
import * as React from 'react';

import type { Sandbox, Snapshot } from '../client';
import { confirm, explain } from '../dialogs';
import { attached } from '../find';
import { age, bytes, moment } from '../format';
import { sandboxIcon, snapshotIcon, suspendIcon } from '../icons';
import { ENDED } from '../model';
import { CommandIDs, DOMAIN } from '../names';
import { told } from '../progress';
import { ISandboxes } from '../tokens';
import type { Branch, View } from '../view';
import { title, tree, view } from '../view';

/** How often "since when" is counted on, in milliseconds. */
const AGES = 30_000;
/** Within what many changes are shown at once. */
const SOON = 200;
const LATE = 3000;

export const panel: JupyterFrontEndPlugin<void> = {
  id: '@sandbox-gateway/labextension:panel',
  description: 'Lists the user’s sandboxes and snapshots in the panel “Running”.',
  autoStart: true,
  requires: [ISandboxes, IRunningSessionManagers],
  optional: [IRunningSessionSidebar, ITranslator],
  activate: (
    app: JupyterFrontEnd,
    sandboxes: ISandboxes,
    running: IRunningSessionManagers,
    sidebar: IRunningSessionSidebar | null,
    translator: ITranslator | null
  ): void => {
    if (!sandboxes.available) {
      return;
    }
    const trans = (translator ?? nullTranslator).load(DOMAIN);
    const visible = () => !(sidebar instanceof Widget) || sidebar.isVisible;
    sandboxes.watch({ visible });
    const listed = new Sandboxes(app, sandboxes, trans);
    const saved = new Snapshots(app, sandboxes, trans);
    running.add(listed);
    running.add(saved);
    const show = () => {
      listed.runningChanged.emit();
      saved.runningChanged.emit();
    };
    // A list of hundreds takes a while to draw: one that nobody sees may wait. (Its sections may have been moved to
    // another place than the sidebar, so it is drawn all the same.)
    const soon = new Throttler(show, SOON);
    const late = new Throttler(show, { limit: LATE, edge: 'trailing' });
    const changed = { invoke: () => (visible() ? soon : late).invoke() };
    sandboxes.changed.connect(() => void changed.invoke());
    if (sidebar instanceof Widget) {
      MessageLoop.installMessageHook(sidebar, (_, message) => {
        if (message.type === 'after-show') {
          void soon.invoke();
        }
        return true;
      });
    }
    window.setInterval(() => visible() && void changed.invoke(), AGES);
  }
};

class Sandboxes implements IRunningSessions.IManager {
  constructor(
    private readonly _app: JupyterFrontEnd,
    private readonly _sandboxes: ISandboxes,
    private readonly _trans: TranslationBundle
  ) {
    this.name = _trans.__('Sandboxes');
    this.shutdownLabel = _trans.__('End this sandbox');
    this.shutdownAllLabel = _trans.__('End All');
    this.shutdownAllConfirmationText = () =>
      _trans.__(
        'All %1 sandboxes end, also those that are suspended. Their variables, and their files inside, are lost.',
        _sandboxes.all().length
      );
  }

  readonly name: string;
  readonly shutdownLabel: string;
  readonly shutdownAllLabel: string;
  readonly shutdownAllConfirmationText: () => string;
  readonly supportsMultipleViews = true;
  readonly runningChanged = new Signal<this, void>(this);

  running({ mode }: { mode: 'tree' | 'list' }): IRunningSessions.IRunningItem[] {
    const all = this._sandboxes.all();
    return mode === 'list'
      ? all.map(sandbox => this._item({ sandbox, children: [] }))
      : tree(all).map(branch => this._item(branch));
  }

  refreshRunning(): void {
    void this._sandboxes.refresh();
  }

  shutdownAll(): void {
    const ending = this._sandboxes.all().map(sandbox => this._sandboxes.remove(sandbox.id));
    Promise.all(ending).catch((error: unknown) =>
      explain(this._trans.__('Not all could be ended'), error, this._trans)
    );
  }

  private _item({ sandbox, children }: Branch): IRunningSessions.IRunningItem {
    const trans = this._trans;
    const shown = view(
      {
        sandbox,
        busy: sandbox.kernel?.execution_state === 'busy',
        operation: this._sandboxes.operation(sandbox.id),
        connection: this._sandboxes.connection,
        trouble: this._sandboxes.trouble
      },
      trans
    );
    const widgets = attached(this._app, sandbox.id);
    const item: IRunningSessions.IRunningItem = {
      className: 'sg-RunningItem',
      context: sandbox.id,
      icon: () => sandboxIcon,
      label: () => <Entry sandbox={sandbox} shown={shown} act={this._act} trans={trans} />,
      labelTitle: () =>
        [sandbox.name, shown.sentence, trans.__('since %1', moment(sandbox.since))].filter(Boolean).join('\n'),
      open: () => {
        if (widgets[0] !== undefined) {
          this._app.shell.activateById(widgets[0].id);
        } else if (!ENDED.includes(sandbox.state)) {
          void this._app.commands.execute('notebook:create-new', { kernelId: sandbox.id, kernelName: '' });
        }
      },
      shutdown: () => void this._app.commands.execute(CommandIDs.end, { id: sandbox.id })
    };
    if (children.length > 0) {
      item.children = children.map(child => this._item(child));
    }
    return item;
  }

  private readonly _act = (command: string, id: string): void => {
    if (this._app.commands.hasCommand(command)) {
      void this._app.commands.execute(command, { id });
    }
  };
}

interface IEntry {
  sandbox: Sandbox;
  shown: View;
  act: (command: string, id: string) => void;
  trans: TranslationBundle;
}

function Entry({ sandbox, shown, act, trans }: IEntry): JSX.Element {
  const asleep = sandbox.state === 'paused' || sandbox.state === 'suspended';
  const deed = asleep ? CommandIDs.resume : sandbox.state === 'running' ? CommandIDs.suspend : null;
  const said = asleep ? trans.__('Resume') : trans.__('Suspend');
  return (
    <span className="sg-Entry">
      <span className="sg-Entry-name">{title(sandbox)}</span>
      <span className="sg-Entry-state">
        <span className="sg-Dot" data-look={shown.look} />
        {[shown.label, age(sandbox.since, Date.now(), trans), shown.detail].filter(Boolean).join(' · ')}
      </span>
      {deed !== null && (
        <Act
          icon={asleep ? runIcon : suspendIcon}
          label={trans.__('%1 “%2”', said, title(sandbox))}
          act={() => act(deed, sandbox.id)}
        />
      )}
    </span>
  );
}

/** A small button at the end of an entry. */
function Act({ icon, label, act }: { icon: LabIcon; label: string; act: () => void }): JSX.Element {
  return (
    <button
      type="button"
      className="sg-Entry-act"
      title={label}
      aria-label={label}
      onClick={event => {
        event.stopPropagation();
        act();
      }}
    >
      <icon.react tag={null} />
    </button>
  );
}

class Snapshots implements IRunningSessions.IManager {
  constructor(
    private readonly _app: JupyterFrontEnd,
    private readonly _sandboxes: ISandboxes,
    private readonly _trans: TranslationBundle
  ) {
    this.name = _trans.__('Sandbox Snapshots');
    this.shutdownLabel = _trans.__('Remove this snapshot');
    this.shutdownAllLabel = _trans.__('Remove All');
    this.shutdownAllConfirmationText = () => _trans.__('All snapshots are removed. What was saved in them is lost.');
  }

  readonly name: string;
  readonly shutdownLabel: string;
  readonly shutdownAllLabel: string;
  readonly shutdownAllConfirmationText: () => string;
  readonly runningChanged = new Signal<this, void>(this);

  running(): IRunningSessions.IRunningItem[] {
    return this._own().map(snapshot => ({
      className: 'sg-SnapshotItem',
      icon: () => snapshotIcon,
      label: () => this._label(snapshot),
      labelTitle: () => `${snapshot.name || snapshot.id}\n${snapshot.profile}`,
      open: () => void this._start(snapshot),
      shutdown: () => void this._remove(snapshot)
    }));
  }

  refreshRunning(): void {
    void this._sandboxes.refresh();
  }

  shutdownAll(): void {
    const going = this._own().map(snapshot => this._sandboxes.removeSnapshot(snapshot.id));
    Promise.all(going).catch((error: unknown) => explain(this._trans.__('Not all were removed'), error, this._trans));
  }

  /** What a sandbox is suspended in goes and comes with it, and is no list's matter. */
  private _own(): Snapshot[] {
    const inUse = new Set(this._sandboxes.all().map(sandbox => sandbox.snapshot));
    return this._sandboxes.snapshots().filter(snapshot => !inUse.has(snapshot.id));
  }

  private _label(snapshot: Snapshot): JSX.Element {
    return (
      <span className="sg-Entry">
        <span className="sg-Entry-name">{snapshot.name || snapshot.id.slice(0, 8)}</span>
        <span className="sg-Entry-state">{[bytes(snapshot.size), moment(snapshot.created)].join(' · ')}</span>
        <Act
          icon={runIcon}
          label={this._trans.__('Start “%1”', snapshot.name)}
          act={() => void this._start(snapshot)}
        />
      </span>
    );
  }

  private async _start(snapshot: Snapshot): Promise<void> {
    const trans = this._trans;
    try {
      const id = await told(
        this._sandboxes.startSnapshot(snapshot.id),
        trans.__('Starting from “%1”…', snapshot.name),
        () => trans.__('Started from “%1”', snapshot.name)
      );
      await this._app.commands.execute('notebook:create-new', { kernelId: id, kernelName: '' });
    } catch (error) {
      await explain(trans.__('No sandbox could be started from it'), error, trans);
    }
  }

  private async _remove(snapshot: Snapshot): Promise<void> {
    const trans = this._trans;
    const question = trans.__('Remove “%1”?', snapshot.name || snapshot.id);
    if (await confirm(question, trans.__('What was saved in it is lost.'), trans.__('Remove'))) {
      try {
        await this._sandboxes.removeSnapshot(snapshot.id);
      } catch (error) {
        await explain(trans.__('It could not be removed'), error, trans);
      }
    }
  }
}
