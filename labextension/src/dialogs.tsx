/** The questions and windows that are about one sandbox. */
import { Dialog, showDialog } from '@jupyterlab/apputils';
import { PageConfig } from '@jupyterlab/coreutils';
import type { TranslationBundle } from '@jupyterlab/translation';
import { ReactWidget, UseSignal } from '@jupyterlab/ui-components';
import { Widget } from '@lumino/widgets';
import * as React from 'react';

import type { LoggedEvent, Sandbox } from './client';
import { Refused, Unreachable } from './client';
import { bytes, moment, span } from './format';
import { Meter, Sparkline } from './meters';
import type { ISandboxes } from './model';
import { proposal } from './proposals';
import type { Use, Uses } from './uses';
import { used } from './uses';
import { called, happened as word, title } from './view';

/** Ask before a suspend; null is no, else whether to ask next time, too. */
export async function askToSuspend(sandbox: Sandbox, trans: TranslationBundle): Promise<{ askAgain: boolean } | null> {
  const points = [
    trans.__(
      'It is saved to disk, in the middle of a cell too, and its memory is released. Running a cell resumes it.'
    ),
    trans.__(
      'Files of the notebook’s folder are not saved with it. One that the kernel has open must not change meanwhile, ' +
        'or it cannot be resumed.'
    ),
    trans.__('Clocks go on: a timeout around some work may be over when it resumes.'),
    trans.__('It resumes on this machine only. Its memory is on the disk unencrypted, with any secrets in it.')
  ];
  const body = ReactWidget.create(
    <ul className="sg-Points">
      {points.map(point => (
        <li key={point}>{point}</li>
      ))}
    </ul>
  );
  const result = await showDialog({
    title: trans.__('Suspend “%1”?', title(sandbox)),
    body,
    checkbox: { label: trans.__('Do not ask again'), caption: trans.__('The settings of “Sandboxes” bring it back') },
    buttons: [Dialog.cancelButton(), Dialog.okButton({ label: trans.__('Suspend') })]
  });
  return result.button.accept ? { askAgain: result.isChecked !== true } : null;
}

/** Ask before what cannot be taken back (`warn`), or is much. */
export async function confirm(question: string, text: string, label: string, warn = true): Promise<boolean> {
  const result = await showDialog({
    title: question,
    body: lines(text),
    buttons: [Dialog.cancelButton(), warn ? Dialog.warnButton({ label }) : Dialog.okButton({ label })]
  });
  return result.button.accept;
}

/** Say why something was not done, and what to do next. */
export async function explain(what: string, error: unknown, trans: TranslationBundle): Promise<void> {
  let text = error instanceof Error ? error.message : String(error);
  if (error instanceof Unreachable) {
    text = trans.__('The server does not answer. Try again when it is back.');
  } else if (error instanceof Refused && error.signedOut) {
    text =
      PageConfig.getOption('sandboxGateway') === 'remote'
        ? trans.__('The gateway does not accept this server’s token any more. Start the server with a new one.')
        : trans.__('You are signed out. Reload the page to sign in again.');
  } else if (error instanceof Refused && error.hint !== '') {
    text = `${text}\n\n${error.hint}`;
  }
  await showDialog({ title: what, body: lines(text), buttons: [Dialog.cancelButton({ label: trans.__('Close') })] });
}

/** Text as it is, with its lines. */
function lines(text: string): Widget {
  const body = new Widget();
  body.addClass('sg-Lines');
  body.node.textContent = text;
  return body;
}

/** Ask for a snapshot's name; null is no. */
export async function askForName(sandbox: Sandbox, trans: TranslationBundle): Promise<string | null> {
  const body = new NameField(proposal(sandbox), trans);
  const result = await showDialog<string>({
    title: trans.__('Save a snapshot of “%1”', title(sandbox)),
    body,
    focusNodeSelector: 'input',
    buttons: [Dialog.cancelButton(), Dialog.okButton({ label: trans.__('Save') })]
  });
  return result.button.accept ? (result.value ?? '') : null;
}

class NameField extends Widget implements Dialog.IBodyWidget<string> {
  constructor(value: string, trans: TranslationBundle) {
    super();
    this.addClass('sg-Name');
    const label = document.createElement('label');
    label.textContent = trans.__('Name: letters, digits, dots, underscores and hyphens');
    this._input.className = 'jp-mod-styled';
    this._input.value = value;
    this._input.maxLength = 64;
    this._input.pattern = '[A-Za-z0-9._\\-]*';
    label.append(this._input);
    this.node.append(label);
  }

  getValue(): string {
    return this._input.value;
  }

  private readonly _input = document.createElement('input');
}

/** Show all that is known of a sandbox; what it uses goes on being measured meanwhile. */
export async function showDetails(
  sandboxes: ISandboxes,
  sandbox: Sandbox,
  happened: readonly LoggedEvent[],
  trans: TranslationBundle
): Promise<void> {
  const watching = sandboxes.watch({ id: sandbox.id, visible: () => true });
  const body = ReactWidget.create(
    <UseSignal signal={sandboxes.changed}>
      {() => (
        <Details
          sandbox={sandboxes.get(sandbox.id) ?? sandbox}
          uses={sandboxes.uses(sandbox.id)}
          {...{ happened, trans }}
        />
      )}
    </UseSignal>
  );
  body.addClass('sg-Details');
  try {
    await showDialog({ title: title(sandbox), body, buttons: [Dialog.okButton({ label: trans.__('Close') })] });
  } finally {
    watching.dispose();
  }
}

/** Show a log; it comes from inside the sandbox, and is shown as text only. */
export async function showLog(sandbox: Sandbox, log: string, trans: TranslationBundle): Promise<void> {
  const body = new Widget({ node: document.createElement('pre') });
  body.addClass('sg-Log');
  body.node.tabIndex = 0;
  body.node.textContent = log === '' ? trans.__('Nothing was written past Jupyter.') : log;
  const closed = showDialog({
    title: trans.__('Log of “%1”', title(sandbox)),
    body,
    buttons: [Dialog.okButton({ label: trans.__('Close') })]
  });
  requestAnimationFrame(() => (body.node.scrollTop = body.node.scrollHeight));
  await closed;
}

interface IDetails {
  sandbox: Sandbox;
  happened: readonly LoggedEvent[];
  uses: Uses | undefined;
  trans: TranslationBundle;
}

function Details({ sandbox, happened, uses, trans }: IDetails): JSX.Element {
  const { limits, idle } = sandbox;
  const bounds: Partial<Record<Use['kind'], number | null>> = {
    memory: limits?.memory ?? null,
    disk: limits?.disk ?? null,
    cpu: limits?.cpu ?? null
  };
  const bound = (kind: Use['kind']) => {
    const value = bounds[kind];
    if (value === undefined) {
      return '';
    }
    return value === null ? trans.__('no limit') : trans.__('limit %1', kind === 'cpu' ? value : bytes(value));
  };
  const rows: [string, React.ReactNode][] = [
    [trans.__('Id'), <code key="id">{sandbox.id}</code>],
    [trans.__('State'), `${called(sandbox, trans)}, ${moment(sandbox.since)}`],
    [trans.__('Profile'), sandbox.profile],
    [trans.__('Runtime'), sandbox.isolated ? sandbox.runtime : trans.__('%1 (not isolated)', sandbox.runtime)],
    ...used(sandbox, uses, trans).map((use): [string, React.ReactNode] => [
      use.name,
      <span key={use.kind} className="sg-Use" data-kind={use.kind}>
        {use.fraction !== null ? use.text : [use.text, bound(use.kind)].filter(Boolean).join(', ')}
        {use.fraction !== null && <Meter fraction={use.fraction} />}
        <Sparkline values={use.history} label={trans.__('%1 in the last minutes', use.name)} />
      </span>
    ]),
    [trans.__('Processes'), limits?.processes == null ? trans.__('no limit') : trans.__('limit %1', limits.processes)],
    [trans.__('Made'), [moment(sandbox.created), sandbox.parent ?? ''].filter(Boolean).join(', ')]
  ];
  if (idle !== null) {
    const tiers: [string, number | null][] = [
      [trans.__('paused'), idle.pause],
      [trans.__('suspended'), idle.suspend],
      [trans.__('ended'), idle.expire]
    ];
    const told = tiers.flatMap(([name, after]) => (after === null ? [] : [`${name}: ${span(after, trans)}`]));
    rows.push([trans.__('When idle'), told.join(', ') || trans.__('nothing')]);
  }
  if (sandbox.death !== null) {
    rows.push([trans.__('End'), sandbox.death.reason]);
  }
  for (const note of sandbox.notes) {
    rows.push([trans.__('Note'), note]);
  }
  return (
    <>
      <table>
        <tbody>
          {rows.map(([name, value], place) => (
            <tr key={place}>
              <th scope="row">{name}</th>
              <td>{value}</td>
            </tr>
          ))}
        </tbody>
      </table>
      {happened.length > 0 && (
        <>
          <h3>{trans.__('What happened')}</h3>
          <ol className="sg-Happened">
            {[...happened].reverse().map(event => (
              <li key={event.id}>
                <time dateTime={event.time}>{moment(event.time)}</time> <b>{word(event.kind, trans)}</b> {event.text}
              </li>
            ))}
          </ol>
        </>
      )}
    </>
  );
}
