/** The chip beside the kernel's name: what the notebook's sandbox does, what it uses, and a menu. */
import type { JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import type { ISessionContext } from '@jupyterlab/apputils';
import { IToolbarWidgetRegistry } from '@jupyterlab/apputils';
import type { NotebookPanel } from '@jupyterlab/notebook';
import type { Kernel } from '@jupyterlab/services';
import type { TranslationBundle } from '@jupyterlab/translation';
import { ITranslator, nullTranslator } from '@jupyterlab/translation';
import { caretDownEmptyThinIcon, ReactWidget } from '@jupyterlab/ui-components';
import type { CommandRegistry } from '@lumino/commands';
import type { IDisposable } from '@lumino/disposable';
import { DisposableDelegate } from '@lumino/disposable';
import { Menu, Widget } from '@lumino/widgets';
import * as React from 'react';

import type { Sandbox } from '../client';
import { CommandIDs, DOMAIN } from '../names';
import { ISandboxes } from '../tokens';
import { UsageCard } from '../usage-card';
import { used } from '../uses';
import type { View } from '../view';
import { view } from '../view';

export const chip: JupyterFrontEndPlugin<void> = {
  id: '@sandbox-gateway/labextension:chip',
  description: 'A chip in the notebook’s toolbar that shows the state of its sandbox.',
  autoStart: true,
  requires: [ISandboxes, IToolbarWidgetRegistry],
  optional: [ITranslator],
  activate: (
    app: JupyterFrontEnd,
    sandboxes: ISandboxes,
    toolbars: IToolbarWidgetRegistry,
    translator: ITranslator | null
  ): void => {
    const trans = (translator ?? nullTranslator).load(DOMAIN);
    toolbars.addFactory<NotebookPanel>('Notebook', 'sandbox', panel =>
      sandboxes.available
        ? new Chip({ session: panel.sessionContext, around: panel.node, sandboxes, commands: app.commands, trans })
        : hidden(new Widget())
    );
  }
};

const ENTRIES: readonly (string | null)[] = [
  CommandIDs.pause,
  CommandIDs.resume,
  CommandIDs.suspend,
  null,
  CommandIDs.fork,
  CommandIDs.forkSeveral,
  CommandIDs.saveState,
  CommandIDs.snapshot,
  null,
  CommandIDs.logs,
  CommandIDs.details,
  null,
  CommandIDs.restart,
  CommandIDs.restartClean
];
/** For how long the chip says that it was woken, in milliseconds. */
const NEWS = 5000;
/** For how long one has to point at it until it shows what is used, in milliseconds. */
const POINTED = 350;
/** From how many pixels of the notebook's width on there is room for all of the chip, and for its label. */
const WIDE = 946;
const NARROW = 780;

/** One notebook's chip; it hides where the kernel is in no sandbox. */
export class Chip extends ReactWidget {
  constructor(private readonly _options: Chip.IOptions) {
    super();
    const { session, sandboxes, around } = _options;
    this.addClass('sg-ChipHolder');
    this.hide();
    this._resized.observe(around);
    session.kernelChanged.connect(this._kernelChanged, this);
    session.statusChanged.connect(this._changed, this);
    sandboxes.changed.connect(this._changed, this);
    sandboxes.happened.connect(this._happened, this);
    this._kernelChanged();
  }

  override dispose(): void {
    if (this.isDisposed) {
      return;
    }
    const { session, sandboxes } = this._options;
    session.kernelChanged.disconnect(this._kernelChanged, this);
    session.statusChanged.disconnect(this._changed, this);
    sandboxes.changed.disconnect(this._changed, this);
    sandboxes.happened.disconnect(this._happened, this);
    window.clearTimeout(this._newsTimer);
    this._unpointed();
    this._listening?.dispose();
    this._resized.disconnect();
    this._watching?.dispose();
    this._menu?.dispose();
    super.dispose();
  }

  protected override render(): JSX.Element | null {
    const shown = this._view();
    if (shown === null) {
      return null;
    }
    const { trans } = this._options;
    const { look, label, detail, fraction, sentence } = shown;
    return (
      <>
        <button
          type="button"
          className="sg-Chip"
          data-look={look}
          data-full={fraction !== null && fraction > 0.9 ? 'true' : undefined}
          aria-label={sentence}
          aria-haspopup="menu"
          aria-expanded={this._menu?.isAttached === true}
          onClick={this._open}
          onKeyDown={this._pressed}
          onMouseEnter={this._pointed}
          onMouseLeave={this._unpointed}
          onFocus={this._focused}
          onBlur={this._unpointed}
        >
          <span className="sg-Dot" data-look={look} />
          <span className="sg-Chip-label">{label}</span>
          {detail !== '' && <span className="sg-Chip-detail">{detail}</span>}
          {fraction !== null && look !== 'changing' && (
            <span className="sg-Meter">
              <span style={{ width: `${Math.max(2, Math.round(100 * fraction))}%` }} />
            </span>
          )}
          <caretDownEmptyThinIcon.react tag="span" className="sg-Chip-caret" />
        </button>
        <span className="sg-Spoken" role="status">
          {this._news !== '' ? this._news : trans.__('Sandbox: %1', label)}
        </span>
      </>
    );
  }

  private _sandbox(): Sandbox | undefined {
    return this._id === null ? undefined : this._options.sandboxes.get(this._id);
  }

  private _view(memory = true): View | null {
    const found = this._sandbox();
    if (found === undefined) {
      return null;
    }
    const sandbox = memory ? found : { ...found, memory: null };
    const { session, sandboxes, trans } = this._options;
    const shown = view(
      {
        sandbox,
        busy: session.session?.kernel?.status === 'busy',
        operation: sandboxes.operation(sandbox.id),
        connection: sandboxes.connection,
        trouble: sandboxes.trouble
      },
      trans
    );
    if (this._news !== '' && (shown.look === 'running' || shown.look === 'busy')) {
      return { ...shown, detail: this._news };
    }
    return shown;
  }

  private _kernelChanged(): void {
    // A session that is lost (its kernel died for good) leaves the chip with the last one, which says why.
    this._id = this._options.session.session?.kernel?.id ?? this._id;
    this._watching?.dispose();
    this._watching = null;
    this._listen(this._options.session.session?.kernel ?? null);
    if (this._id !== null) {
      this._watching = this._options.sandboxes.watch({ id: this._id, visible: () => this.isVisible });
    }
    this._changed();
  }

  private _changed(): void {
    this.setHidden(this._sandbox() === undefined);
    this.update();
    this._card?.update();
  }

  /** A request that wakes a suspended sandbox: its state is looked at now, and not when it goes on. */
  private _listen(kernel: Kernel.IKernelConnection | null): void {
    this._listening?.dispose();
    this._listening = null;
    if (kernel === null) {
      return;
    }
    const heard = (_: unknown, { msg, direction }: Kernel.IAnyMessageArgs): void => {
      if (direction === 'send' && msg.header.msg_type === 'execute_request' && this._sandbox()?.state === 'suspended') {
        this._options.sandboxes.expect(kernel.id);
      }
    };
    kernel.anyMessage.connect(heard);
    this._listening = new DisposableDelegate(() => kernel.anyMessage.disconnect(heard));
  }

  private _happened(
    _: ISandboxes,
    event: { sandbox: string; kind: string; data: Readonly<Record<string, unknown>> }
  ): void {
    if (event.sandbox !== this._id || event.kind !== 'resumed') {
      return;
    }
    const { seconds } = event.data;
    const { trans } = this._options;
    this._news = typeof seconds === 'number' ? trans.__('resumed in %1 s', seconds.toFixed(1)) : trans.__('resumed');
    window.clearTimeout(this._newsTimer);
    this._newsTimer = window.setTimeout(() => {
      this._news = '';
      this.update();
    }, NEWS);
    this.update();
  }

  private readonly _pressed = (event: React.KeyboardEvent): void => {
    if (event.key === 'Escape') {
      this._unpointed();
    }
    if (event.key === 'ArrowDown') {
      event.preventDefault();
      event.stopPropagation();
      this._open(event);
    }
  };

  private readonly _pointed = (event: React.SyntheticEvent): void => {
    const anchor = event.currentTarget as HTMLElement;
    window.clearTimeout(this._cardTimer);
    this._cardTimer = window.setTimeout(() => {
      const { sandboxes, trans } = this._options;
      if (this._card === null && this._menu?.isAttached !== true && anchor.isConnected) {
        this._card = new UsageCard(
          anchor,
          () => {
            const sandbox = this._sandbox();
            const shown = this._view(false); // its memory has a line of its own
            return sandbox === undefined || shown === null
              ? null
              : { sentence: shown.sentence, uses: used(sandbox, sandboxes.uses(sandbox.id), trans) };
          },
          trans
        );
      }
    }, POINTED);
  };

  private readonly _focused = (event: React.FocusEvent<HTMLElement>): void => {
    if (event.currentTarget.matches(':focus-visible')) {
      this._pointed(event);
    }
  };

  private readonly _unpointed = (): void => {
    window.clearTimeout(this._cardTimer);
    this._card?.dispose();
    this._card = null;
  };

  private readonly _open = (event: React.SyntheticEvent): void => {
    this._unpointed();
    const button = event.currentTarget as HTMLElement;
    const { commands } = this._options;
    const id = this._id;
    if (id === null || this._menu?.isAttached === true) {
      return;
    }
    this._menu?.dispose();
    const menu = (this._menu = new Menu({ commands }));
    menu.addClass('sg-Menu');
    for (const command of ENTRIES) {
      if (command === null) {
        menu.addItem({ type: 'separator' });
      } else if (
        commands.hasCommand(command) &&
        (command !== CommandIDs.resume || commands.isEnabled(command, { id }))
      ) {
        menu.addItem({ command, args: { id, short: true } });
      }
    }
    if (!menu.items.some(item => item.type === 'command')) {
      return;
    }
    menu.aboutToClose.connect(() => {
      button.setAttribute('aria-expanded', 'false');
      // Where the menu opened no dialog, the focus goes back to where it was.
      requestAnimationFrame(() => {
        if (document.activeElement === null || document.activeElement === document.body) {
          button.focus();
        }
      });
    });
    const box = button.getBoundingClientRect();
    menu.open(box.left, box.bottom);
    button.setAttribute('aria-expanded', 'true');
    if (event.type === 'keydown' || (event as React.MouseEvent).detail === 0) {
      menu.activeIndex = menu.items.findIndex(item => item.isEnabled && item.type === 'command');
    }
  };

  private readonly _resized = new ResizeObserver(([entry]) => {
    const width = entry?.contentRect.width ?? WIDE;
    this.node.dataset['room'] = width >= WIDE ? 'wide' : width >= NARROW ? 'narrow' : 'tiny';
  });
  private _id: string | null = null;
  private _news = '';
  private _newsTimer = 0;
  private _menu: Menu | null = null;
  private _watching: IDisposable | null = null;
  private _listening: IDisposable | null = null;
  private _card: UsageCard | null = null;
  private _cardTimer = 0;
}

export namespace Chip {
  export interface IOptions {
    session: ISessionContext;
    /** What the toolbar is as wide as. */
    around: HTMLElement;
    sandboxes: ISandboxes;
    commands: CommandRegistry;
    trans: TranslationBundle;
  }
}

function hidden(widget: Widget): Widget {
  widget.hide();
  return widget;
}
