/** What is shown of a sandbox, decided without a page: the chip, the panel and the notifications say the same. */
import type { TranslationBundle } from '@jupyterlab/translation';

import type { Sandbox } from './client';
import type { OperationEvent } from './events';
import { bytes } from './format';
import type { Connection } from './model';
import { ENDED } from './states';

/** How a sandbox looks: each has its colour and its sign. */
export type Look = 'running' | 'busy' | 'paused' | 'suspended' | 'changing' | 'failed' | 'ended' | 'unknown';

export interface View {
  look: Look;
  /** One or two words. */
  label: string;
  /** Memory in use, or what goes on; empty where there is nothing to say. */
  detail: string;
  /** Memory in use of its limit, from 0 to 1; null where one of them is not known. */
  fraction: number | null;
  /** All of it in one sentence, for screen readers and the tooltip. */
  sentence: string;
}

export interface About {
  sandbox: Sandbox;
  /** Whether its kernel runs a cell. */
  busy: boolean;
  operation?: OperationEvent | undefined;
  connection: Connection;
  trouble: string;
}

/** What to say of a sandbox. */
export function view(about: About, trans: TranslationBundle): View {
  const { sandbox, connection } = about;
  const [look, label] = state(about, trans);
  const lives = !ENDED.includes(sandbox.state);
  const limit = sandbox.limits?.memory ?? null;
  const memory = lives ? sandbox.memory : null;
  let detail = '';
  if (look === 'changing') {
    detail = progress(about.operation) || reading(sandbox);
  } else if (memory !== null && sandbox.state !== 'suspended') {
    detail = limit === null ? bytes(memory) : trans.__('%1 of %2', bytes(memory), bytes(limit));
  }
  const why = sandbox.death?.reason ?? '';
  const parts = [trans.__('Sandbox: %1', label)];
  if (!lives && why !== '') {
    parts.push(why);
  } else if (detail !== '') {
    parts.push(look === 'changing' ? detail : trans.__('memory %1', detail));
  }
  if (!sandbox.isolated) {
    parts.push(trans.__('not isolated'));
  }
  if (connection === 'unreachable') {
    const last = trans.__('this is the last that is known');
    parts.push(about.trouble === '' ? trans.__('the server does not answer') : about.trouble, last);
  } else if (connection === 'signed-out') {
    parts.push(trans.__('you are signed out; reload the page to sign in'));
  } else if (connection === 'turned-away') {
    parts.push(trans.__('the gateway does not accept this server’s token; start the server with a new one'));
  }
  return {
    look: connection === 'ok' || connection === 'connecting' ? look : 'unknown',
    label:
      connection === 'signed-out'
        ? trans.__('Signed out')
        : connection === 'turned-away'
          ? trans.__('No access')
          : label,
    detail,
    fraction: memory !== null && limit !== null && limit > 0 ? Math.min(1, memory / limit) : null,
    sentence: parts.join('; ')
  };
}

/** What the state is called. */
export function called(sandbox: Sandbox, trans: TranslationBundle): string {
  return state({ sandbox, busy: false, connection: 'ok', trouble: '' }, trans)[1];
}

/** What an event says that has happened; one of a newer server by its own name. */
export function happened(kind: string, trans: TranslationBundle): string {
  const words: Record<string, string> = {
    created: trans.__('made'),
    started: trans.__('started'),
    paused: trans.__('paused'),
    resumed: trans.__('resumed'),
    suspended: trans.__('suspended'),
    woke: trans.__('woken'),
    forked: trans.__('forked'),
    snapshot: trans.__('saved'),
    adopted: trans.__('taken over'),
    handed_over: trans.__('handed over'),
    restarted: trans.__('restarted'),
    warned: trans.__('warned'),
    interrupted: trans.__('interrupted'),
    expired: trans.__('expired'),
    died: trans.__('died'),
    stopped: trans.__('ended'),
    failed: trans.__('failed')
  };
  return words[kind] ?? kind;
}

function state(about: About, trans: TranslationBundle): [Look, string] {
  const { sandbox, busy, operation } = about;
  if (operation?.kind === 'suspend' && sandbox.state !== 'suspended') {
    return ['changing', trans.__('Suspending')];
  }
  if (operation?.kind === 'resume' && sandbox.state !== 'running') {
    return ['changing', trans.__('Resuming')];
  }
  switch (sandbox.state) {
    case 'creating':
      return ['changing', trans.__('Starting')];
    case 'running':
      if (operation?.kind === 'snapshot') {
        return ['changing', trans.__('Saving')];
      }
      if (operation?.kind === 'fork') {
        return ['changing', trans.__('Forking')];
      }
      return busy ? ['busy', trans.__('Busy')] : ['running', trans.__('Running')];
    case 'paused':
      return ['paused', trans.__('Paused')];
    case 'suspending':
      return ['changing', trans.__('Suspending')];
    case 'suspended':
      return ['suspended', trans.__('Suspended')];
    case 'resuming':
      return ['changing', trans.__('Resuming')];
    case 'restarting':
      return ['changing', trans.__('Restarting')];
    case 'terminating':
      return ['changing', trans.__('Ending')];
    case 'expired':
      return ['ended', trans.__('Expired')];
    case 'terminated':
      return ['ended', trans.__('Ended')];
    case 'failed':
      return ['failed', sandbox.death?.kind === 'out_of_memory' ? trans.__('Out of memory') : trans.__('Failed')];
    default:
      return ['unknown', sandbox.state];
  }
}

/** How far an operation is: in percent, or how much is done. */
export function progress(operation: OperationEvent | undefined): string {
  if (operation === undefined) {
    return '';
  }
  const { done, total } = operation;
  if (done !== null && total !== null && total > 0) {
    return `${Math.round((100 * done) / total)} %`;
  }
  return done !== null && done > 4096 ? bytes(done) : '';
}

/** What has to be read until it goes on. */
function reading(sandbox: Sandbox): string {
  const saved = sandbox.usage?.saved ?? null;
  return sandbox.state === 'resuming' && saved !== null ? bytes(saved) : '';
}

/** What may be done with a sandbox in its state. */
export type Deed = 'suspend' | 'resume' | 'pause' | 'fork' | 'snapshot' | 'restart' | 'end';

/** Whether a deed makes sense now. */
export function possible(deed: Deed, sandbox: Sandbox): boolean {
  const { state: now } = sandbox;
  switch (deed) {
    case 'suspend':
      return now === 'running' || now === 'paused';
    case 'resume':
      return now === 'paused' || now === 'suspended';
    case 'pause':
      return now === 'running';
    case 'fork':
      return now === 'running' || now === 'paused' || now === 'suspended';
    case 'snapshot':
      return now === 'running' || now === 'paused' || now === 'suspended';
    case 'restart':
      return now === 'running' || now === 'suspended' || now === 'paused' || ENDED.includes(now);
    case 'end':
      return now !== 'terminating';
  }
}

/** What to do about a death of this kind, shortly: JupyterLab cuts notifications off at 140 characters. */
export function advice(kind: string, sandbox: Sandbox, trans: TranslationBundle): string {
  const again = ENDED.includes(sandbox.state) ? trans.__('Restart it to go on.') : trans.__('It was started anew.');
  return kind === 'out_of_memory' ? `${trans.__('Hold less at once, or start one with more.')} ${again}` : again;
}

/** Forks below what they were made from, oldest first; a child whose parent is not there stands at the top. */
export interface Branch {
  sandbox: Sandbox;
  children: Branch[];
}

/** Sandboxes as a tree. */
export function tree(sandboxes: readonly Sandbox[]): Branch[] {
  const branches = new Map<string, Branch>(sandboxes.map(sandbox => [sandbox.id, { sandbox, children: [] }]));
  const top: Branch[] = [];
  for (const branch of branches.values()) {
    const { parent } = branch.sandbox;
    const above = parent?.startsWith('sandbox:') ? branches.get(parent.slice('sandbox:'.length)) : undefined;
    if (above !== undefined && above !== branch) {
      above.children.push(branch);
    } else {
      top.push(branch);
    }
  }
  return top;
}

/** What a person calls it: its label (of a path, the file's name), else its profile and the beginning of its id. */
export function title(sandbox: Sandbox): string {
  const name = sandbox.name.replace(/\/+$/, '').replace(/^.*\//, '');
  return name === '' ? `${sandbox.profile} ${sandbox.id.slice(0, 8)}` : name;
}
