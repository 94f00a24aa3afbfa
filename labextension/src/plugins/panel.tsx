/** The sandboxes and snapshots of the user, in the panel "Running". */
import type { JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import { IDocumentManager } from '@jupyterlab/docmanager';
import type { IRunningSessions } from '@jupyterlab/running';
import { IRunningSessionManagers, IRunningSessionSidebar } from '@jupyterlab/running';
import type { TranslationBundle } from '@jupyterlab/translation';
import { ITranslator, nullTranslator } from '@jupyterlab/translation';
import type { LabIcon } from '@jupyterlab/ui-components';
import { runIcon, SidePanel } from '@jupyterlab/ui-components';
import { MessageLoop } from '@lumino/messaging';
import { Throttler } from '@lumino/polling';
import { Signal } from '@lumino/signaling';
import { Panel, Widget } from '@lumino/widgets';
import * as React from 'react';

import { each, failures } from '../batch';
import type { Sandbox, Snapshot } from '../client';
import { confirm, explain } from '../dialogs';
import { attached } from '../find';
import { age, bytes, moment } from '../format';
import { sandboxIcon, snapshotIcon, suspendIcon } from '../icons';
import { ENDED } from '../model';
import { CommandIDs, DOMAIN } from '../names';
import { openFor } from '../open';
import { Head } from '../panel-head';
import { told } from '../progress';
import { Selection } from '../selection';
import { ISandboxes } from '../tokens';
import type { Use } from '../uses';
import { used } from '../uses';
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
  requires: [ISandboxes],
  optional: [IRunningSessionManagers, IDocumentManager, IRunningSessionSidebar, ITranslator],
  activate: (
    app: JupyterFrontEnd,
    sandboxes: ISandboxes,
    running: IRunningSessionManagers | null,
    documents: IDocumentManager | null,
    sidebar: IRunningSessionSidebar | null,
    translator: ITranslator | null
  ): void => {
    // A notebook's page in Notebook 7 has no such list.
    if (!sandboxes.available || running === null) {
      return;
    }
    const trans = (translator ?? nullTranslator).load(DOMAIN);
    const visible = () => !(sidebar instanceof Widget) || sidebar.isVisible;
    sandboxes.watch({ visible });
    const selection = new Selection();
    const listed = new Sandboxes(app, sandboxes, selection, documents, trans);
    const saved = new Snapshots(app, sandboxes, documents, trans);
    running.add(listed);
    running.add(saved);
    // Above the list where there is a sidebar of JupyterLab's; Notebook's page has no place for it.
    const section = sidebar instanceof SidePanel ? sidebar.widgets.find(one => one.title.label === listed.name) : null;
    const head = section instanceof Panel ? new Head({ sandboxes, selection, trans }) : null;
    if (head !== null) {
      (section as Panel).insertWidget(0, head);
      listed.selectable = true;
    }
    const show = () => {
      selection.keep(new Set(sandboxes.all().map(({ id }) => id)));
      listed.refresh();
      saved.runningChanged.emit();
      head?.update();
    };
    selection.changed.connect(() => listed.refresh());
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
          void sandboxes.refresh(); // what is used, and what may be, was not asked for meanwhile
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
    private readonly _selection: Selection,
    private readonly _documents: IDocumentManager | null,
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

  /** Whether entries can be chosen. */
  selectable = false;

  /** Have it drawn anew. */
  refresh(): void {
    this._made.clear();
    this.runningChanged.emit();
  }

  /** JupyterLab asks several times for each change. */
  running({ mode }: { mode: 'tree' | 'list' }): IRunningSessions.IRunningItem[] {
    let items = this._made.get(mode);
    if (items === undefined) {
      const all = this._sandboxes.all();
      const branches = mode === 'list' ? all.map(sandbox => ({ sandbox, children: [] })) : tree(all);
      this._order = flat(branches).map(({ sandbox }) => sandbox.id);
      const notebooks = this._notebooks();
      items = branches.map(branch => this._item(branch, notebooks));
      this._made.set(mode, items);
    }
    return items;
  }

  refreshRunning(): void {
    void this._sandboxes.refresh();
  }

  shutdownAll(): void {
    void each(this._sandboxes.all(), id => this._sandboxes.remove(id)).then(async outcome => {
      if (outcome.failed.length > 0) {
        const text = failures(outcome, this._trans);
        await explain(this._trans.__('Not all could be ended'), new Error(text), this._trans);
      }
    });
  }

  /** The paths of what has a session with each sandbox, by its id. */
  private _notebooks(): ReadonlyMap<string, readonly string[]> {
    const found = new Map<string, string[]>();
    for (const { kernel, path } of this._app.serviceManager.sessions.running()) {
      if (kernel !== null) {
        found.set(kernel.id, [...(found.get(kernel.id) ?? []), path]);
      }
    }
    return found;
  }

  private _item(
    { sandbox, children }: Branch,
    notebooks: ReadonlyMap<string, readonly string[]>
  ): IRunningSessions.IRunningItem {
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
    const paths = notebooks.get(sandbox.id) ?? [];
    const uses = used(sandbox, this._sandboxes.uses(sandbox.id), trans).filter(use => use.text !== '');
    const item: IRunningSessions.IRunningItem = {
      className: 'sg-RunningItem',
      context: sandbox.id,
      icon: () => sandboxIcon,
      label: () => (
        <Entry
          sandbox={sandbox}
          shown={shown}
          notebooks={paths}
          uses={uses}
          choice={this.selectable ? this._choice(sandbox.id) : null}
          act={this._act}
          trans={trans}
        >
          {/* What JupyterLab's own search looks through. */}
          {[title(sandbox), shown.label, sandbox.profile, ...paths]}
        </Entry>
      ),
      labelTitle: () =>
        [
          sandbox.name,
          paths.length > 0 ? trans.__('Notebook: %1', paths.join(', ')) : trans.__('No notebook is attached to it'),
          shown.sentence,
          trans.__('since %1', moment(sandbox.since)),
          ...uses.filter(use => use.kind !== 'memory').map(use => trans.__('%1: %2', use.name, use.text))
        ]
          .filter(Boolean)
          .join('\n'),
      open: () => {
        const widgets = attached(this._app, sandbox.id);
        if (widgets[0] !== undefined) {
          this._app.shell.activateById(widgets[0].id);
        } else if (!ENDED.includes(sandbox.state)) {
          openFor(this._app, this._documents, sandbox.id).catch((error: unknown) =>
            explain(trans.__('Its notebook could not be opened'), error, trans)
          );
        }
      },
      shutdown: () => void this._app.commands.execute(CommandIDs.end, { id: sandbox.id })
    };
    if (children.length > 0) {
      item.children = children.map(child => this._item(child, notebooks));
    }
    return item;
  }

  private _choice(id: string): Choice {
    return {
      chosen: this._selection.has(id),
      any: this._selection.size > 0,
      toggle: () => this._selection.toggle(id),
      extend: () => this._selection.extend(id, this._order)
    };
  }

  private readonly _act = (command: string, id: string): void => {
    if (this._app.commands.hasCommand(command)) {
      void this._app.commands.execute(command, { id });
    }
  };
  private readonly _made = new Map<string, IRunningSessions.IRunningItem[]>();
  private _order: readonly string[] = [];
}

/** All that stands in a tree, from top to bottom. */
function flat(branches: readonly Branch[]): Branch[] {
  return branches.flatMap(branch => [branch, ...flat(branch.children)]);
}

/** Whether an entry is chosen, and how that changes. */
interface Choice {
  chosen: boolean;
  /** Whether any is. */
  any: boolean;
  toggle: () => void;
  extend: () => void;
}

interface IEntry {
  sandbox: Sandbox;
  shown: View;
  /** Paths of what is attached to it. */
  notebooks: readonly string[];
  uses: readonly Use[];
  /** Null where it cannot be chosen. */
  choice: Choice | null;
  act: (command: string, id: string) => void;
  trans: TranslationBundle;
  children: React.ReactNode;
}

function Entry({ sandbox, shown, notebooks, uses, choice, act, trans }: IEntry): JSX.Element {
  const asleep = sandbox.state === 'paused' || sandbox.state === 'suspended';
  const deed = asleep ? CommandIDs.resume : sandbox.state === 'running' ? CommandIDs.suspend : null;
  const said = asleep ? trans.__('Resume') : trans.__('Suspend');
  const disk = uses.find(({ kind }) => kind === 'disk' || kind === 'saved')?.text ?? '';
  const names = notebooks.map(path => path.replace(/^.*\//, '')).filter(name => name !== title(sandbox));
  const where = notebooks.length > 0 ? names.join(', ') : ENDED.includes(sandbox.state) ? '' : trans.__('no notebook');
  return (
    <span
      className="sg-Entry"
      data-chosen={choice?.chosen}
      ref={keepKeys}
      onClick={event => {
        if (choice !== null && (event.ctrlKey || event.metaKey || event.shiftKey)) {
          event.stopPropagation();
          (event.shiftKey ? choice.extend : choice.toggle)();
        }
      }}
    >
      {choice !== null && (
        <input
          type="checkbox"
          className="sg-Entry-choice"
          data-any={choice.any}
          checked={choice.chosen}
          aria-label={trans.__('Choose “%1”', title(sandbox))}
          onClick={event => {
            event.stopPropagation();
            if (event.shiftKey) {
              choice.extend();
            }
          }}
          onChange={event => {
            if (!(event.nativeEvent as MouseEvent).shiftKey) {
              choice.toggle();
            }
          }}
        />
      )}
      <span className="sg-Entry-name">
        {title(sandbox)}
        {where !== '' && <span className="sg-Entry-notebook"> {where}</span>}
      </span>
      <span className="sg-Entry-state">
        <span className="sg-Dot" data-look={shown.look} />
        {[
          shown.label,
          age(sandbox.since, Date.now(), trans),
          shown.detail,
          disk === '' ? '' : sandbox.state === 'suspended' ? disk : trans.__('disk %1', disk)
        ]
          .filter(Boolean)
          .join(' · ')}
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

/** Enter and Space on what stands in an entry are its own: the list would take them for itself. */
function keepKeys(node: HTMLElement | null): void {
  node?.addEventListener('keydown', event => {
    if (event.key === 'Enter' || event.key === ' ') {
      event.stopPropagation();
    }
  });
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

interface IKept {
  snapshot: Snapshot;
  start: () => void;
  trans: TranslationBundle;
  children: React.ReactNode;
}

function Kept({ snapshot, start, trans }: IKept): JSX.Element {
  return (
    <span className="sg-Entry" ref={keepKeys}>
      <span className="sg-Entry-name">{snapshot.name || snapshot.id.slice(0, 8)}</span>
      <span className="sg-Entry-state">{[bytes(snapshot.size), moment(snapshot.created)].join(' · ')}</span>
      <Act icon={runIcon} label={trans.__('Start “%1”', snapshot.name)} act={start} />
    </span>
  );
}

class Snapshots implements IRunningSessions.IManager {
  constructor(
    private readonly _app: JupyterFrontEnd,
    private readonly _sandboxes: ISandboxes,
    private readonly _documents: IDocumentManager | null,
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
      label: () => (
        <Kept snapshot={snapshot} start={() => void this._start(snapshot)} trans={this._trans}>
          {[snapshot.name || snapshot.id, snapshot.profile]}
        </Kept>
      ),
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
    const me = this._sandboxes.quota()?.owner;
    return this._sandboxes.snapshots().filter(({ id, owner }) => !inUse.has(id) && (me === undefined || owner === me));
  }

  private async _start(snapshot: Snapshot): Promise<void> {
    const trans = this._trans;
    try {
      const id = await told(
        this._sandboxes.startSnapshot(snapshot.id),
        trans.__('Starting from “%1”…', snapshot.name),
        () => trans.__('Started from “%1”', snapshot.name)
      );
      await openFor(this._app, this._documents, id);
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
