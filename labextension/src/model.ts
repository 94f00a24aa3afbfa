/**
 * The state of the user's sandboxes in this page: events as they come, and a poll for what no event tells (memory) and
 * for events that were missed.
 */
import { Poll } from '@lumino/polling';
import type { ISignal } from '@lumino/signaling';
import { Signal } from '@lumino/signaling';
import type { IDisposable } from '@lumino/disposable';
import { DisposableDelegate } from '@lumino/disposable';

import type {
  Children,
  Client,
  LoggedEvent,
  Operation,
  Profile,
  Quota,
  Resources,
  Sandbox,
  Snapshot,
  State
} from './client';
import { Refused, Unreachable } from './client';
import { ENDED } from './states';
import { Uses } from './uses';
import type { OperationEvent, SandboxEvent } from './events';
import { parse } from './events';

/** How the page and the server stand. */
export type Connection =
  | 'absent'
  | 'connecting'
  | 'ok'
  | 'unreachable'
  | 'signed-out'
  /** The server's gateway does not accept the server's own credentials: signing in again is no help. */
  | 'turned-away';

/** A stream of events, as `ServiceManager.events.stream` is one. */
export type Stream = ISignal<unknown, unknown>;

/** Who looks at a sandbox's memory now; not asked for while `visible` says no. */
export interface Watcher {
  /** One sandbox's id; undefined for all of them. */
  id?: string;
  visible: () => boolean;
}

/** What the plugins share. Everything that changes a sandbox rejects with `Refused` or `Unreachable`. */
export interface ISandboxes {
  /** False for a server without our extension: there is nothing to show then, and nothing is asked. */
  readonly available: boolean;
  readonly connection: Connection;
  /** Why the connection is not well, where somebody says so; for people. */
  readonly trouble: string;
  /** Resolves when the first answer is there, or the first failure. */
  readonly ready: Promise<void>;
  /** Something of `get`, `all`, `snapshots`, `operation`, `history` or `connection` is not what it was. */
  readonly changed: ISignal<ISandboxes, void>;
  /** What happened, as it happens. */
  readonly happened: ISignal<ISandboxes, SandboxEvent>;
  /** How far what takes long is, as it goes on; also what has no sandbox yet. */
  readonly progressed: ISignal<ISandboxes, OperationEvent>;

  /** Those that have not ended, oldest first, and those that ended while this page was open. */
  all(): readonly Sandbox[];
  get(id: string): Sandbox | undefined;
  /** One's own, and those of others that everybody may start from. */
  snapshots(): readonly Snapshot[];
  /** What goes on with a sandbox now. */
  operation(id: string): OperationEvent | undefined;
  /** What it used at the last looks; undefined where nobody looked. */
  uses(id: string): Uses | undefined;
  /** What the user has of what he may have; null where the server cannot say. */
  quota(): Quota | null;
  watch(watcher: Watcher): IDisposable;
  refresh(): Promise<void>;
  /** Somebody asked its kernel for what wakes it: look at it at once. */
  expect(id: string): void;
  /** Resolves when what is being asked about a sandbox now is answered. */
  settled(id: string): Promise<void>;

  profiles(): Promise<Profile[]>;
  /** `path` is the notebook's, for a profile that opens its folder. */
  create(profile: string, resources: Resources, name: string, path?: string): Promise<Sandbox>;
  suspend(id: string, reason?: string): Promise<Sandbox>;
  resume(id: string): Promise<Sandbox>;
  pause(id: string): Promise<Sandbox>;
  /** Start its kernel anew; `clean` is with nothing of what is there, files included. */
  restart(id: string, clean?: boolean): Promise<Sandbox>;
  rename(id: string, name: string): Promise<Sandbox>;
  /** Have it count as used, so that it is not paused, suspended or ended for idleness now. */
  keep(id: string): Promise<void>;
  /** Rejects with the first error where no child runs. */
  fork(id: string, count?: number): Promise<Forked>;
  snapshot(id: string, name: string): Promise<Snapshot>;
  /** End it and forget it. */
  remove(id: string): Promise<void>;
  logs(id: string): Promise<string>;
  events(id: string): Promise<LoggedEvent[]>;
  startSnapshot(id: string): Promise<string>;
  removeSnapshot(id: string): Promise<void>;
}

/** What became of a fork: the ids of the children that run, and why the others do not. */
export interface Forked {
  ids: string[];
  failures: Refused[];
}

export { ENDED };

/** How often it is asked what no event tells, in milliseconds. */
const INTERVAL = 10_000;
/** One wait of a request for an operation's end, in seconds; proxies end what is silent for a minute. */
const PATIENCE = 30;
/** For how long an operation may say nothing until it is asked whether it goes on, in milliseconds. */
const SILENCE = 30_000;
/** Events that tell of the end of a sandbox that nobody ended. */
const DEATHS: readonly string[] = ['died', 'expired'];
/** Of those that left the list at once, how many are asked about one by one. */
const LEFT = 20;

export class SandboxesModel implements ISandboxes, IDisposable {
  constructor(options: SandboxesModel.IOptions) {
    this._client = options.client;
    this.available = options.available;
    this._stream = options.stream;
    this._nameOf = options.nameOf;
    this._remote = options.remote ?? false;
    if (!this.available) {
      this._connection = 'absent';
      this._becomeReady();
      return;
    }
    this._stream.connect(this._heard, this);
    this._poll = new Poll({
      name: 'sandbox-gateway:sandboxes',
      auto: false,
      factory: () => this._look(),
      frequency: { interval: options.interval ?? INTERVAL, backoff: true, max: 60_000 },
      standby: options.standby ?? 'when-hidden'
    });
    void this._poll.start();
  }

  readonly available: boolean;

  get connection(): Connection {
    return this._connection;
  }

  get trouble(): string {
    return this._trouble;
  }

  get ready(): Promise<void> {
    return this._ready;
  }

  get changed(): ISignal<this, void> {
    return this._changed;
  }

  get happened(): ISignal<this, SandboxEvent> {
    return this._happened;
  }

  get progressed(): ISignal<this, OperationEvent> {
    return this._progressed;
  }

  get isDisposed(): boolean {
    return this._isDisposed;
  }

  dispose(): void {
    if (this._isDisposed) {
      return;
    }
    this._isDisposed = true;
    this._stream.disconnect(this._heard, this);
    this._poll?.dispose();
    Signal.clearData(this);
  }

  all(): readonly Sandbox[] {
    return [...this._sandboxes.values()].sort((one, other) => one.created.localeCompare(other.created));
  }

  get(id: string): Sandbox | undefined {
    return this._sandboxes.get(id);
  }

  snapshots(): readonly Snapshot[] {
    return this._snapshots;
  }

  operation(id: string): OperationEvent | undefined {
    return this._operations.get(id);
  }

  uses(id: string): Uses | undefined {
    return this._uses.get(id);
  }

  quota(): Quota | null {
    return this._quota;
  }

  watch(watcher: Watcher): IDisposable {
    this._watchers.add(watcher);
    if (watcher.id !== undefined && this._sandboxes.get(watcher.id)?.usage === null) {
      void this._fetch(watcher.id);
    }
    return new DisposableDelegate(() => this._watchers.delete(watcher));
  }

  async refresh(): Promise<void> {
    if (this.available) {
      await this._poll?.refresh();
      await this._poll?.tick;
    }
  }

  expect(id: string): void {
    if (this.available) {
      void this._fetch(id);
    }
  }

  async settled(id: string): Promise<void> {
    await this._fetching.get(id);
  }

  async profiles(): Promise<Profile[]> {
    return (await this._asked(this._client.get('/api/profiles'))).profiles;
  }

  async create(profile: string, resources: Resources, name: string, path?: string): Promise<Sandbox> {
    const body = { profile, resources, name, ...(path === undefined ? {} : { path }) };
    return this._take(await this._finish(this._client.post('/api/sandboxes', { query: { wait: 0 }, body })));
  }

  async suspend(id: string, reason = ''): Promise<Sandbox> {
    return this._take(
      await this._finish(this._client.post('/api/sandboxes/{id}/suspend', { path: { id }, body: { reason } }))
    );
  }

  async resume(id: string): Promise<Sandbox> {
    return this._take(await this._finish(this._client.post('/api/sandboxes/{id}/resume', { path: { id } })));
  }

  async pause(id: string): Promise<Sandbox> {
    return this._take(await this._asked(this._client.post('/api/sandboxes/{id}/pause', { path: { id } })));
  }

  async restart(id: string, clean = false): Promise<Sandbox> {
    const how = clean ? { path: { id }, body: { clean } } : { path: { id } };
    return this._take(await this._asked(this._client.post('/api/sandboxes/{id}/restart', how)));
  }

  async rename(id: string, name: string): Promise<Sandbox> {
    return this._take(await this._asked(this._client.patch('/api/sandboxes/{id}', { path: { id }, body: { name } })));
  }

  async keep(id: string): Promise<void> {
    if (['paused', 'suspended'].includes(this.get(id)?.state ?? '')) {
      await this.resume(id);
    } else {
      const body = { code: '', silent: true, stdin: false, timeout: 60 };
      await this._asked(this._client.post('/api/sandboxes/{id}/execute', { path: { id }, body }));
    }
  }

  async fork(id: string, count = 1): Promise<Forked> {
    const made = await this._finish(this._client.post('/api/sandboxes/{id}/fork', { path: { id }, body: { count } }));
    return this._children(made);
  }

  async snapshot(id: string, name: string): Promise<Snapshot> {
    const made = await this._finish(
      this._client.post('/api/sandboxes/{id}/snapshots', { path: { id }, body: { name } })
    );
    await this._lookAtSnapshots();
    return made;
  }

  async remove(id: string): Promise<void> {
    this._removed.add(id); // what is heard of its end is no reason to ask for it
    try {
      await this._asked(this._client.delete('/api/sandboxes/{id}', { path: { id }, query: { forget: true } }));
    } catch (error) {
      this._removed.delete(id);
      throw error;
    }
    this._drop(id);
  }

  async logs(id: string): Promise<string> {
    return this._asked(this._client.get('/api/sandboxes/{id}/logs', { path: { id } }));
  }

  async events(id: string): Promise<LoggedEvent[]> {
    const query = { limit: 1000, since: 0 };
    return (await this._asked(this._client.get('/api/sandboxes/{id}/events', { path: { id }, query }))).events;
  }

  async startSnapshot(id: string): Promise<string> {
    const asked = this._client.post('/api/snapshots/{snapshot}/start', { path: { snapshot: id }, body: { count: 1 } });
    const { ids } = await this._children(await this._finish(asked));
    return ids[0] ?? '';
  }

  async removeSnapshot(id: string): Promise<void> {
    await this._asked(this._client.delete('/api/snapshots/{snapshot}', { path: { snapshot: id } }));
    await this._lookAtSnapshots();
  }

  // What is asked

  /** Wait for the outcome of what may take long. */
  private async _finish<T>(asked: Promise<T | Operation>): Promise<Exclude<T, Operation>> {
    let answer: T | Operation = await this._asked(asked);
    while (isOperation(answer)) {
      if (answer.error !== null) {
        const { code, message, hint, field } = answer.error;
        throw new Refused(409, code, message, hint, field);
      }
      if (answer.state === 'succeeded') {
        answer = answer.result as T;
        break;
      }
      const path = { operation: answer.id };
      answer = await this._asked(this._client.get('/api/operations/{operation}', { path, query: { wait: PATIENCE } }));
    }
    return answer as Exclude<T, Operation>;
  }

  /** A request of a person's: what its failure tells of the connection, or of the sandbox's being gone, is shown. */
  private async _asked<T>(request: Promise<T>): Promise<T> {
    try {
      return await request;
    } catch (error) {
      if (error instanceof Refused && !error.signedOut && !error.turnedAway) {
        void this.refresh();
      } else {
        this._note(error);
      }
      throw error;
    }
  }

  private async _children(made: Children): Promise<Forked> {
    const ids = made.children.filter(child => child.error === null).map(child => child.id);
    const failures = made.children.flatMap(({ error }) =>
      error === null ? [] : [new Refused(409, error.code, error.message, error.hint)]
    );
    if (ids.length === 0 && failures[0] !== undefined) {
      throw failures[0];
    }
    await Promise.all(ids.map(id => this._fetch(id)));
    return { ids, failures };
  }

  /** Everything once; the poll's factory. It fails where the next look should wait longer. */
  private async _look(): Promise<void> {
    try {
      if (this._owner === null) {
        await this._lookAtQuota(); // it says who we are
      }
      await this._list();
      await this._lookAtSnapshots();
      if (this._looked(undefined)) {
        await this._lookAtQuota();
      }
      this._note(null);
    } catch (error) {
      this._note(error);
      throw error;
    } finally {
      this._becomeReady();
    }
  }

  private async _list(): Promise<void> {
    const begun = this._clock;
    const stats = this._looked(undefined);
    const found = new Map<string, Sandbox>();
    let cursor: string | null = null;
    do {
      const query: { limit: number; stats: boolean; cursor?: string } = { limit: 1000, stats };
      if (cursor !== null) {
        query.cursor = cursor;
      }
      const page = await this._client.get('/api/sandboxes', { query });
      for (const sandbox of page.sandboxes) {
        found.set(sandbox.id, sandbox);
      }
      cursor = page.next;
    } while (cursor !== null);
    const left: string[] = [];
    for (const [id, known] of this._sandboxes) {
      if (!found.has(id) && !this._newer(id, begun) && !ENDED.includes(known.state)) {
        left.push(id);
      }
    }
    for (const [id, sandbox] of found) {
      if (!this._newer(id, begun)) {
        this._put(sandbox);
      }
    }
    await Promise.all(left.map((id, place) => (place < LEFT ? this._fetch(id) : this._drop(id))));
    const alone = [...found.keys()].filter(id => !stats && this._looked(id));
    await Promise.all(alone.map(id => this._fetch(id)));
    const silent = [...this._operations.values()].filter(({ sandbox }) => this._isSilent(sandbox));
    await Promise.all(silent.map(event => this._check(event)));
    this._tell();
  }

  private _isSilent(id: string): boolean {
    return Date.now() - (this._heardAt.get(id) ?? 0) > SILENCE;
  }

  /** An operation whose end nobody told, since the server or the page was away. */
  private async _check({ operation, sandbox }: OperationEvent): Promise<void> {
    try {
      const { ended } = await this._client.get('/api/operations/{operation}', { path: { operation } });
      if (ended === null) {
        return;
      }
    } catch (error) {
      if (!(error instanceof Refused && error.gone)) {
        throw error;
      }
    }
    if (this._operations.get(sandbox)?.operation === operation) {
      this._operations.delete(sandbox);
    }
  }

  private async _lookAtSnapshots(): Promise<void> {
    const { snapshots } = await this._client.get('/api/snapshots');
    this._snapshots = snapshots;
    this._tell();
  }

  private async _lookAtQuota(): Promise<void> {
    if (!this._countable) {
      return;
    }
    try {
      this._quota = await this._client.get('/api/quota');
      this._owner = this._quota.owner;
      this._tell();
    } catch (error) {
      if (!(error instanceof Refused) || error.status !== 404) {
        throw error;
      }
      this._countable = false; // an older gateway
    }
  }

  /** Look at one; several wishes while one is under way are one more look. */
  private async _fetch(id: string): Promise<void> {
    if (this._removed.has(id)) {
      return;
    }
    const running = this._fetching.get(id);
    if (running !== undefined) {
      this._again.add(id);
      return running;
    }
    const looking = this._fetchNow(id).finally(() => this._fetching.delete(id));
    this._fetching.set(id, looking);
    await looking;
    if (this._again.delete(id)) {
      await this._fetch(id);
    }
  }

  private async _fetchNow(id: string): Promise<void> {
    const begun = this._clock;
    try {
      const sandbox = await this._client.get('/api/sandboxes/{id}', {
        path: { id },
        query: { stats: this._looked(id) }
      });
      if (!this._newer(id, begun)) {
        this._put(sandbox);
      }
      this._tell();
    } catch (error) {
      if (error instanceof Refused && error.gone) {
        this._drop(id);
      } else if (error instanceof Refused && error.status >= 500 && !error.turnedAway) {
        void this._poll?.refresh(); // it may be this one's trouble alone
      } else if (!this._isDisposed) {
        this._note(error);
      }
    }
  }

  // What is heard

  private _heard(_: unknown, told: unknown): void {
    const event = parse(told);
    if (event === null) {
      return;
    }
    if (this._connection === 'unreachable') {
      void this._poll?.refresh();
    }
    if (event.type === 'operation') {
      this._follow(event);
    } else if (event.sandbox !== '') {
      this._learn(event);
    }
  }

  private _follow(event: OperationEvent): void {
    this._progressed.emit(event);
    if (event.sandbox === '') {
      return;
    }
    if (event.phase === 'succeeded' || event.phase === 'failed') {
      this._operations.delete(event.sandbox);
      if (event.kind === 'create' && event.phase === 'failed') {
        this._drop(event.sandbox); // nothing is left of it
      } else {
        void this._fetch(event.sandbox);
      }
    } else {
      this._operations.set(event.sandbox, event);
      this._heardAt.set(event.sandbox, Date.now());
    }
    this._tell();
  }

  private _learn(event: SandboxEvent): void {
    const known = this._sandboxes.get(event.sandbox);
    if (known !== undefined && event.state !== '' && event.state !== known.state) {
      this._touched.set(event.sandbox, ++this._clock);
      const since = new Date(event.time).toISOString();
      this._sandboxes.set(event.sandbox, { ...known, state: event.state as State, since });
      this._tell();
    }
    void this._fetch(event.sandbox);
    if (DEATHS.includes(event.kind)) {
      if (this._deaths.has(event.sandbox)) {
        return; // seen already
      }
      this._deaths.add(event.sandbox);
    }
    this._happened.emit(event);
    if (event.kind === 'snapshot') {
      this._lookAtSnapshots().catch((error: unknown) => this._note(error));
    }
  }

  // What is known

  private _take(sandbox: Sandbox): Sandbox {
    this._touched.set(sandbox.id, ++this._clock);
    this._put(sandbox);
    this._tell();
    return sandbox;
  }

  private _put(sandbox: Sandbox): void {
    if (this._removed.has(sandbox.id)) {
      return; // of an answer that was under way
    }
    if (this._owner !== null && sandbox.owner !== this._owner) {
      return; // an administrator is told of everybody's, and has his own work here
    }
    const before = this._sandboxes.get(sandbox.id);
    const name = sandbox.name === '' ? (this._nameOf?.(sandbox.id) ?? '') : sandbox.name;
    let { memory, usage } = sandbox;
    if (usage !== null) {
      const uses = this._uses.get(sandbox.id) ?? new Uses();
      this._uses.set(sandbox.id, uses);
      uses.look(usage, Date.now());
    } else {
      usage = before?.usage ?? null; // this answer was not asked for it
    }
    if (memory === null && ['running', 'paused'].includes(sandbox.state)) {
      memory = before?.memory ?? null;
    }
    this._sandboxes.set(sandbox.id, { ...sandbox, name, memory, usage });
    this._notice(before, sandbox);
  }

  /** A death that no event told, since nobody could: the page or the server was away. */
  private _notice(before: Sandbox | undefined, { id, state, death, since }: Sandbox): void {
    if (!ENDED.includes(state)) {
      this._deaths.delete(id);
    } else if (before !== undefined && !ENDED.includes(before.state) && state !== 'terminated') {
      if (!this._deaths.has(id)) {
        this._deaths.add(id);
        const kind = state === 'expired' ? 'expired' : 'died';
        const data = { kind: death?.kind ?? '' };
        const text = death?.reason ?? '';
        this._happened.emit({ type: 'sandbox', kind, sandbox: id, state, time: Date.parse(since), text, data });
      }
    }
  }

  private _drop(id: string): void {
    this._sandboxes.delete(id);
    this._uses.delete(id);
    this._operations.delete(id);
    this._heardAt.delete(id);
    this._touched.delete(id);
    this._tell();
  }

  private _newer(id: string, begun: number): boolean {
    return (this._touched.get(id) ?? 0) > begun;
  }

  private _looked(id: string | undefined): boolean {
    return [...this._watchers].some(watcher => (watcher.id === undefined || watcher.id === id) && watcher.visible());
  }

  /** Take down how a request ended; null is well. */
  private _note(error: unknown): void {
    let next: Connection = 'ok';
    let trouble = '';
    if (error instanceof Refused && (error.signedOut || error.turnedAway)) {
      next = this._remote || error.turnedAway ? 'turned-away' : 'signed-out';
      trouble = error.message;
    } else if (error instanceof Unreachable || (error instanceof Refused && error.status >= 500)) {
      next = 'unreachable';
      trouble = error instanceof Refused ? error.message : ''; // what a browser says of a network helps nobody
    } else if (error !== null && !(error instanceof Refused)) {
      throw error;
    }
    if (next !== this._connection || trouble !== this._trouble) {
      this._connection = next;
      this._trouble = trouble;
      this._tell();
    }
  }

  private _tell(): void {
    if (!this._isDisposed) {
      this._changed.emit();
    }
  }

  private readonly _client: Client;
  private readonly _stream: Stream;
  private readonly _nameOf: ((id: string) => string | undefined) | undefined;
  private readonly _remote: boolean;
  private readonly _poll: Poll | undefined;
  private readonly _changed = new Signal<this, void>(this);
  private readonly _happened = new Signal<this, SandboxEvent>(this);
  private readonly _progressed = new Signal<this, OperationEvent>(this);
  private readonly _sandboxes = new Map<string, Sandbox>();
  private readonly _uses = new Map<string, Uses>();
  private readonly _operations = new Map<string, OperationEvent>();
  /** When something was told of each operation last, in milliseconds since the epoch. */
  private readonly _heardAt = new Map<string, number>();
  private readonly _watchers = new Set<Watcher>();
  private readonly _fetching = new Map<string, Promise<void>>();
  private readonly _again = new Set<string>();
  /** What this page removed, or is about to. */
  private readonly _removed = new Set<string>();
  /** Those whose death was told. */
  private readonly _deaths = new Set<string>();
  /** When something newer than any answer under way was learnt of a sandbox, by `_clock`. */
  private readonly _touched = new Map<string, number>();
  private _clock = 0;
  private _snapshots: Snapshot[] = [];
  private _quota: Quota | null = null;
  /** Whose sandboxes these are; null while that is not known. */
  private _owner: string | null = null;
  /** Whether the server may have quotas. */
  private _countable = true;
  private _connection: Connection = 'connecting';
  private _trouble = '';
  private _isDisposed = false;
  private _becomeReady: () => void = () => undefined;
  private readonly _ready = new Promise<void>(resolve => {
    this._becomeReady = resolve;
  });
}

export namespace SandboxesModel {
  export interface IOptions {
    client: Client;
    /** The server's events. */
    stream: Stream;
    /** Whether the server has our extension. */
    available: boolean;
    /** What the page knows as the name of a sandbox that has none of its own: a gateway is told no notebook. */
    nameOf?: (id: string) => string | undefined;
    /** Whether the kernels are on a gateway, and the server passes our routes on to that. */
    remote?: boolean;
    /** Milliseconds between two looks. */
    interval?: number;
    standby?: Poll.Standby;
  }
}

function isOperation(answer: unknown): answer is Operation {
  return typeof answer === 'object' && answer !== null && 'progress' in answer && 'ended' in answer;
}
