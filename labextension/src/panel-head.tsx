/** Above the list of sandboxes: what they come to, and what to do with those that are chosen. */
import type { TranslationBundle } from '@jupyterlab/translation';
import type { LabIcon } from '@jupyterlab/ui-components';
import { closeIcon, ReactWidget, runIcon } from '@jupyterlab/ui-components';
import * as React from 'react';

import { each, failures } from './batch';
import type { Sandbox } from './client';
import { confirm, explain } from './dialogs';
import { pauseIcon, snapshotIcon, suspendIcon } from './icons';
import { Meter } from './meters';
import type { ISandboxes } from './model';
import { told } from './progress';
import { proposals } from './proposals';
import type { Selection } from './selection';
import { totals } from './totals';
import type { Deed } from './view';
import { possible, title } from './view';

/** As many names are told before it is asked. */
const NAMED = 8;

export class Head extends ReactWidget {
  constructor(private readonly _options: Head.IOptions) {
    super();
    this.addClass('sg-Head');
    _options.selection.changed.connect(this.update, this);
  }

  override dispose(): void {
    this._options.selection.changed.disconnect(this.update, this);
    super.dispose();
  }

  protected override render(): JSX.Element | null {
    const { sandboxes, selection, trans } = this._options;
    const all = sandboxes.all();
    if (all.length === 0 && sandboxes.quota() === null) {
      return null;
    }
    const chosen = all.filter(({ id }) => selection.has(id));
    return (
      <>
        {chosen.length === 0 && (
          <ul className="sg-Totals" aria-label={trans.__('All sandboxes together')}>
            {totals(all, sandboxes.snapshots(), sandboxes.quota(), trans).map(({ key, text, fraction }) => (
              <li key={key}>
                {text}
                {fraction !== null && <Meter fraction={fraction} />}
              </li>
            ))}
          </ul>
        )}
        <span className="sg-Spoken" role="status">
          {chosen.length > 0 ? trans._n('%1 sandbox chosen', '%1 sandboxes chosen', chosen.length) : ''}
        </span>
        {chosen.length > 0 && (
          <div className="sg-Chosen" role="toolbar" aria-label={trans.__('Chosen sandboxes')}>
            <label>
              <input
                type="checkbox"
                checked={chosen.length === all.length}
                aria-label={trans.__('Choose all sandboxes')}
                ref={box => {
                  if (box !== null) {
                    box.indeterminate = chosen.length < all.length;
                  }
                }}
                onChange={event => selection.set(event.target.checked ? all.map(({ id }) => id) : [])}
              />
              {trans.__('%1 chosen', chosen.length)}
            </label>
            {this._button('pause', pauseIcon, trans.__('Pause'), chosen)}
            {this._button('suspend', suspendIcon, trans.__('Suspend'), chosen)}
            {this._button('resume', runIcon, trans.__('Resume'), chosen)}
            {this._button('snapshot', snapshotIcon, trans.__('Save Snapshots'), chosen)}
            {this._button('end', closeIcon, trans.__('End'), chosen)}
          </div>
        )}
      </>
    );
  }

  private _button(deed: Deed, icon: LabIcon, label: string, chosen: readonly Sandbox[]): JSX.Element {
    const able = chosen.filter(sandbox => possible(deed, sandbox));
    return (
      <button
        type="button"
        title={label}
        aria-label={label}
        disabled={able.length === 0 || this._options.sandboxes.connection !== 'ok'}
        onClick={() => void this._act(deed, able, chosen.length - able.length)}
      >
        <icon.react tag={null} />
      </button>
    );
  }

  private async _act(deed: Deed, able: readonly Sandbox[], others: number): Promise<void> {
    const { sandboxes, selection, trans } = this._options;
    const count = able.length;
    const names = able.slice(0, NAMED).map(title);
    if (count > NAMED) {
      names.push(trans.__('and %1 others', count - NAMED));
    }
    const rest = others > 0 ? trans.__('%1 more are left as they are: it is not possible with them now.', others) : '';
    const text = (what: string) => [what, names.join(', '), rest].filter(part => part !== '').join('\n\n');
    switch (deed) {
      case 'suspend': {
        const question = trans._n('Suspend %1 sandbox?', 'Suspend %1 sandboxes?', count);
        const what = trans.__(
          'They are saved to disk, also in the middle of a cell. Files of notebooks’ folders are not saved with them; one ' +
            'that a kernel has open must not change meanwhile.'
        );
        if (!(await confirm(question, text(what), trans.__('Suspend'), false))) {
          return;
        }
        break;
      }
      case 'end': {
        const question = trans._n('End %1 sandbox?', 'End %1 sandboxes?', count);
        const what = trans.__('Their variables, and their files inside, are lost.');
        if (!(await confirm(question, text(what), trans.__('End')))) {
          return;
        }
        break;
      }
    }
    const saved = proposals(able);
    const deeds: Partial<Record<Deed, [(id: string) => Promise<unknown>, string, string]>> = {
      pause: [
        id => sandboxes.pause(id),
        trans._n('Pausing %1 sandbox…', 'Pausing %1 sandboxes…', count),
        trans.__('Not all could be paused')
      ],
      snapshot: [
        id => sandboxes.snapshot(id, saved.get(id) ?? ''),
        trans._n('Saving %1 snapshot…', 'Saving %1 snapshots…', count),
        trans.__('Not all could be saved')
      ],
      suspend: [
        id => sandboxes.suspend(id, 'by its user'),
        trans._n('Suspending %1 sandbox…', 'Suspending %1 sandboxes…', count),
        trans.__('Not all could be suspended')
      ],
      resume: [
        id => sandboxes.resume(id),
        trans._n('Resuming %1 sandbox…', 'Resuming %1 sandboxes…', count),
        trans.__('Not all could be resumed')
      ],
      end: [
        id => sandboxes.remove(id),
        trans._n('Ending %1 sandbox…', 'Ending %1 sandboxes…', count),
        trans.__('Not all could be ended')
      ]
    };
    const found = deeds[deed];
    if (found === undefined) {
      return;
    }
    const [act, pending, failed] = found;
    const outcome = await told(each(able, act), pending, ({ done }) => trans.__('%1 of %2 done', done, count));
    // What failed stays chosen, to be tried again.
    selection.set(outcome.failed.map(([sandbox]) => sandbox.id));
    if (outcome.failed.length > 0) {
      await explain(failed, new Error(failures(outcome, trans)), trans);
    }
  }
}

export namespace Head {
  export interface IOptions {
    sandboxes: ISandboxes;
    selection: Selection;
    trans: TranslationBundle;
  }
}
