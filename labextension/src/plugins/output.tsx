/** Holds scripts and widgets in the output of sandboxes back until the user, or the administrator, allows them. */
import type { JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import type { ISessionContext } from '@jupyterlab/apputils';
import { ICommandPalette } from '@jupyterlab/apputils';
import { IConsoleTracker } from '@jupyterlab/console';
import { INotebookTracker } from '@jupyterlab/notebook';
import type { IRenderMimeRegistry as Registry } from '@jupyterlab/rendermime';
import { IRenderMimeRegistry } from '@jupyterlab/rendermime';
import { ISettingRegistry } from '@jupyterlab/settingregistry';
import type { TranslationBundle } from '@jupyterlab/translation';
import { ITranslator, nullTranslator } from '@jupyterlab/translation';
import { ReactWidget } from '@jupyterlab/ui-components';
import type { ISignal } from '@lumino/signaling';
import { Signal } from '@lumino/signaling';
import type { Widget } from '@lumino/widgets';
import * as React from 'react';

import { CommGate } from '../comms';
import type { Policy } from '../guard';
import { guard } from '../guard';
import { CommandIDs, DOMAIN } from '../names';
import { Memory } from '../memory';
import type { Origin } from '../output';
import { mayAct, origin } from '../output';
import { markOf, writeMark } from '../remembered';
import { ISandboxes } from '../tokens';

const ID = '@sandbox-gateway/labextension:output';

export const output: JupyterFrontEndPlugin<void> = {
  id: ID,
  description: 'Holds scripts in the output of sandboxes back until they are allowed.',
  autoStart: true,
  requires: [ISandboxes, IRenderMimeRegistry],
  optional: [INotebookTracker, IConsoleTracker, ISettingRegistry, ICommandPalette, ITranslator],
  activate: async (
    app: JupyterFrontEnd,
    sandboxes: ISandboxes,
    rendermime: Registry,
    notebooks: INotebookTracker | null,
    consoles: IConsoleTracker | null,
    settings: ISettingRegistry | null,
    palette: ICommandPalette | null,
    translator: ITranslator | null
  ): Promise<void> => {
    const trans = (translator ?? nullTranslator).load(DOMAIN);
    const memory = new Memory(settings, app.serviceManager.contents, ID);
    const watch = new Watch(app, sandboxes, memory);

    // By the widget that shows it; a second view of a notebook shares its registry, and with it its document.
    const documents = new Map<Widget, Document>();
    const guarded = new Map<Registry, Document>();
    const adopt = (widget: Widget & { contentHeader: Header }, registry: Registry, options: Document.IOptions) => {
      let document = guarded.get(registry);
      if (document === undefined) {
        document = new Document(watch, memory, options);
        guard(registry, document, trans);
        guarded.set(registry, document);
        watch.add(document);
      }
      documents.set(widget, document);
      const views = [...documents.values()].filter(one => one === document).length;
      const bar = new Bar(document, views === 1, trans);
      widget.contentHeader.addWidget(bar);
      widget.disposed.connect(() => {
        documents.delete(widget);
        if (document !== undefined && ![...documents.values()].includes(document)) {
          guarded.delete(registry);
          watch.remove(document);
          document.dispose();
        }
      });
    };
    notebooks?.widgetAdded.connect((_, panel) => {
      const { context, content } = panel;
      adopt(panel, content.rendermime, {
        session: context.sessionContext,
        path: () => context.path,
        named: () => named(content.model?.getMetadata('kernelspec')),
        mark: () => (content.model === null ? undefined : markOf(content.model)),
        setMark: profile => content.model !== null && writeMark(content.model, profile),
        hasOutput: () =>
          content.widgets.some(({ model }) => {
            const { outputs } = model.toJSON();
            return Array.isArray(outputs) && outputs.length > 0;
          })
      });
    });
    consoles?.widgetAdded.connect((_, panel) => {
      const session = panel.console.sessionContext;
      adopt(panel, panel.console.rendermime, {
        session,
        path: () => null,
        named: () => session.kernelPreference.name ?? '',
        mark: () => undefined,
        setMark: () => undefined,
        hasOutput: () => false
      });
    });
    // What belongs to no notebook: tooltips in files, variables of a console, the log.
    guard(rendermime, watch, trans);

    const current = () => {
      const widget = app.shell.currentWidget;
      return widget === null ? undefined : documents.get(widget);
    };
    const add = (id: string, label: string, caption: string, shown: (document: Document) => boolean) => {
      app.commands.addCommand(id, {
        label,
        caption,
        isVisible: () => current() !== undefined,
        isEnabled: () => {
          const document = current();
          return document !== undefined && shown(document);
        },
        execute: () => current()?.allow(id === CommandIDs.allowOutput),
        describedBy: { args: { type: 'object', properties: {} } }
      });
      palette?.addItem({ command: id, category: trans.__('Sandbox') });
    };
    add(
      CommandIDs.allowOutput,
      trans.__('Allow Active Output for This Notebook'),
      trans.__('Scripts and widgets in its output run in this page, with your login'),
      document => !document.active
    );
    add(
      CommandIDs.stopOutput,
      trans.__('Stop Active Output of This Notebook'),
      trans.__('Hold scripts in its output back again; what has run already is gone when the page is loaded anew'),
      document => document.isAllowed
    );
    const update = () => {
      app.commands.notifyCommandChanged(CommandIDs.allowOutput);
      app.commands.notifyCommandChanged(CommandIDs.stopOutput);
    };
    watch.reconsidered.connect(update);
    app.shell.currentChanged?.connect(update);
    // The application opens nothing before this is done: no output is drawn before it is known what was said of it.
    await memory.ready;
  }
};

interface Header {
  addWidget(widget: Widget): void;
}

function named(kernelspec: unknown): string {
  const name = (kernelspec as { name?: unknown } | undefined)?.name;
  return typeof name === 'string' ? name : '';
}

/** All documents, and the kernels behind them. As a policy: whether everything in the page may act. */
class Watch implements Policy {
  constructor(
    private readonly _app: JupyterFrontEnd,
    private readonly _sandboxes: ISandboxes,
    memory: Memory
  ) {
    const { kernels, kernelspecs, sessions } = _app.serviceManager;
    this._gate = new CommGate(
      kernels,
      kernel => this.mayPass(kernel),
      id => this._documents.forEach(document => document.kernel?.id === id && document.held())
    );
    for (const signal of [memory.changed, kernelspecs.specsChanged, sessions.runningChanged, _sandboxes.changed]) {
      (signal as ISignal<unknown, unknown>).connect(this.reconsider, this);
    }
    _sandboxes.changed.connect(this._ask, this);
  }

  /** Profiles whose administrator lets output act. */
  get open(): ReadonlySet<string> {
    return this._open;
  }

  get active(): boolean {
    return this._active;
  }

  get changed(): ISignal<this, void> {
    return this._changed;
  }

  /** It was looked at all of them again. */
  get reconsidered(): ISignal<this, void> {
    return this._reconsidered;
  }

  held(): void {
    // What belongs to no notebook has no bar to say so.
  }

  origin(kernel: { readonly id: string; readonly name: string } | null, named: string): Origin {
    const sandbox = kernel === null ? undefined : this._sandboxes.get(kernel.id);
    return origin({ kernel, named, specs: this._app.serviceManager.kernelspecs.specs, sandbox });
  }

  /** The kernel of the session at a path, also before the page is connected to it. */
  running(path: string): { readonly id: string; readonly name: string } | null {
    return [...this._app.serviceManager.sessions.running()].find(one => one.path === path)?.kernel ?? null;
  }

  /** Whether what a kernel tells on comms may get into the page: where it does for one of its documents. */
  mayPass(kernel: { readonly id: string; readonly name: string }): boolean {
    return (
      mayAct(this.origin(kernel, ''), undefined, this._open) ||
      [...this._documents].some(document => document.kernel?.id === kernel.id && document.active)
    );
  }

  add(document: Document): void {
    this._documents.add(document);
    this.reconsider();
  }

  remove(document: Document): void {
    this._documents.delete(document);
  }

  reconsider(): void {
    this._documents.forEach(document => document.reconsider());
    const kernels = [...this._app.serviceManager.sessions.running()].map(session => session.kernel);
    const active = kernels.every(kernel => !kernel || this.mayPass(kernel));
    if (active !== this._active) {
      this._active = active;
      this._changed.emit();
    }
    this._gate.reconsider();
    this._reconsidered.emit();
  }

  /** Ask for the profiles, once, when there is an answer to be had. */
  private _ask(): void {
    if (this._sandboxes.connection === 'ok') {
      this._sandboxes.changed.disconnect(this._ask, this);
      void this._learn();
    }
  }

  private async _learn(): Promise<void> {
    try {
      const profiles = await this._sandboxes.profiles();
      this._open = new Set(profiles.filter(one => one.active_output).map(one => one.name));
      this.reconsider();
    } catch (error) {
      console.warn(error);
      this._sandboxes.changed.connect(this._ask, this); // nothing is open meanwhile, and the user can still allow it
    }
  }

  private readonly _gate: CommGate;
  private readonly _documents = new Set<Document>();
  private readonly _changed = new Signal<this, void>(this);
  private readonly _reconsidered = new Signal<this, void>(this);
  private _open: ReadonlySet<string> = new Set();
  private _active = true;
}

/** One notebook or console, and whether its output may act. */
class Document implements Policy {
  constructor(
    private readonly _watch: Watch,
    private readonly _memory: Memory,
    private readonly _options: Document.IOptions
  ) {
    _options.session.kernelChanged.connect(this._kernelChanged, this);
    this._wasActive = this.active;
  }

  dispose(): void {
    this._options.session.kernelChanged.disconnect(this._kernelChanged, this);
    Signal.clearData(this);
  }

  get kernel(): { readonly id: string; readonly name: string } | null {
    const path = this._options.path();
    return this._options.session.session?.kernel ?? (path === null ? null : this._watch.running(path));
  }

  /** Asked anew each time: a cell may be drawn before anybody tells that the kernel is another one. */
  get active(): boolean {
    return mayAct(this._origin(), this._permitted(), this._watch.open);
  }

  /** Whether it is a notebook, and what is said of it remembered. */
  get isFile(): boolean {
    return this._options.path() !== null;
  }

  /** Whether the user said so. */
  get isAllowed(): boolean {
    return this._permitted() !== undefined && this.active && this._origin().kind === 'sandbox';
  }

  get changed(): ISignal<this, void> {
    return this._changed;
  }

  /** Whether there is something to allow. */
  get isHeld(): boolean {
    return this._isHeld && !this.active;
  }

  get shown(): ISignal<this, void> {
    return this._shown;
  }

  held(): void {
    if (!this._isHeld) {
      this._isHeld = true;
      this._shown.emit();
    }
  }

  allow(yes: boolean): void {
    const from = this._origin();
    if (from.kind !== 'sandbox') {
      return;
    }
    const path = this._options.path();
    if (path === null) {
      this._own = yes ? from.profile : undefined;
      this._watch.reconsider();
    } else {
      this._memory.allow(path, yes ? from.profile : null);
    }
  }

  reconsider(): void {
    const { active } = this;
    if (active !== this._wasActive) {
      this._wasActive = active;
      this._changed.emit();
    }
    this._shown.emit();
  }

  private _permitted(): string | undefined {
    const path = this._options.path();
    return path === null ? this._own : this._memory.allowed(path);
  }

  private _origin(): Origin {
    const found = this._watch.origin(this.kernel, this._options.named());
    if (found.kind === 'sandbox') {
      this._last = found.profile;
      return found;
    }
    const path = this._options.path();
    const profile = this._last ?? (path === null ? undefined : this._memory.suspect(path)) ?? this._options.mark();
    return profile === undefined ? found : { kind: 'sandbox', profile };
  }

  /** What a sandbox left in a notebook is no more to be trusted when the next kernel is a plain one. */
  private _kernelChanged(): void {
    const path = this._options.path();
    const { kernel } = this;
    if (path !== null && kernel !== null && this._last !== null && this._options.hasOutput()) {
      if (this._watch.origin(kernel, '').kind === 'plain' && this._memory.suspect(path) !== this._last) {
        this._memory.note(path, this._last);
        this._options.setMark(this._last);
      }
    }
    this._watch.reconsider();
  }

  private readonly _changed = new Signal<this, void>(this);
  private readonly _shown = new Signal<this, void>(this);
  /** The profile of the last sandbox it had. */
  private _last: string | null = null;
  /** What was allowed to a document without a path of its own. */
  private _own: string | undefined;
  private _isHeld = false;
  private _wasActive: boolean;
}

namespace Document {
  export interface IOptions {
    session: ISessionContext;
    /** Null for what is not a file. */
    path: () => string | null;
    /** The kernelspec that it names. */
    named: () => string;
    hasOutput: () => boolean;
    /** The profile of the sandbox whose output is in it, as the document itself says; who wrote that is not known. */
    mark: () => string | undefined;
    /** Have the document say so: its copies, and who else opens it, know of it by this only. */
    setMark: (profile: string) => void;
  }
}

/** Says above the notebook that something is held back, and why. */
class Bar extends ReactWidget {
  constructor(
    private readonly _document: Document,
    private readonly _speaks: boolean,
    private readonly _trans: TranslationBundle
  ) {
    super();
    this.addClass('sg-BarHolder');
    this.hide();
    _document.shown.connect(this._show, this);
    this._show();
  }

  override dispose(): void {
    this._document.shown.disconnect(this._show, this);
    this._resized.disconnect();
    super.dispose();
  }

  protected override render(): JSX.Element | null {
    if (this.isHidden) {
      return null;
    }
    const trans = this._trans;
    return (
      <div className="sg-Bar" role="region" aria-label={trans.__('Active output')} ref={this._measure}>
        <span role={this._speaks ? 'status' : undefined}>
          {trans.__(
            'Scripts in the output are held back: this kernel’s sandbox is not trusted with your login, which they would have.'
          )}
        </span>
        <button type="button" className="jp-mod-styled" onClick={() => this._document.allow(true)}>
          {this._document.isFile
            ? trans.__('Allow active output for this notebook')
            : trans.__('Allow active output for this console')}
        </button>
        <button type="button" className="jp-mod-styled" onClick={this._dismiss}>
          {trans.__('Dismiss')}
        </button>
      </div>
    );
  }

  private readonly _dismiss = (): void => {
    this._isDismissed = true;
    this._show();
  };

  private _show(): void {
    const hidden = !this._document.isHeld || this._isDismissed;
    if (hidden !== this.isHidden) {
      this.setHidden(hidden);
      this.update();
    }
  }

  private readonly _measure = (bar: HTMLElement | null): void => {
    this._resized.disconnect();
    if (bar !== null) {
      this._resized.observe(bar);
    }
  };

  /** The header gives a widget the height that it asks for; how many lines it needs is known by its width. */
  private readonly _resized = new ResizeObserver(([entry]) => {
    const height = `${(entry?.target as HTMLElement | undefined)?.offsetHeight ?? 0}px`;
    if (this.node.style.minHeight !== height) {
      this.node.style.minHeight = height;
      this.parent?.fit();
    }
  });
  private _isDismissed = false;
}
