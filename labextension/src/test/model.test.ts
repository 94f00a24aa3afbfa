import { afterEach, describe, expect, it, vi } from 'vitest';

import { Refused, Unreachable } from '../client';
import type { SandboxEvent } from '../events';
import type { SandboxesModel } from '../model';
import { json, problem, sandbox, Server, settled, usage } from './fake';

const models: SandboxesModel[] = [];

function model(server: Server, options: object = {}): SandboxesModel {
  const made = server.model(options);
  models.push(made);
  return made;
}

afterEach(() => {
  models.splice(0).forEach(made => made.dispose());
});

describe('a server without our extension', () => {
  it('is asked nothing, and there is nothing to show', async () => {
    const server = new Server();
    const made = model(server, { available: false });
    await made.ready;
    await made.refresh();
    server.tell('created', 'one', 'running');
    await settled();
    expect(server.asked).toEqual([]);
    expect(made.connection).toBe('absent');
    expect(made.all()).toEqual([]);
  });
});

describe('the list', () => {
  it('is there when the model is ready, oldest first', async () => {
    const server = new Server();
    server.sandboxes = [sandbox({ id: 'new', created: '2025-01-02T00:00:00Z' }), sandbox({ id: 'old' })];
    const made = model(server);
    await made.ready;
    expect(made.connection).toBe('ok');
    expect(made.all().map(({ id }) => id)).toEqual(['old', 'new']);
  });

  it('is read to its last page', async () => {
    const server = new Server();
    server.handlers.set('GET api/sandboxes', query =>
      query.has('cursor')
        ? json({ sandboxes: [sandbox({ id: 'two' })], next: null })
        : json({ sandboxes: [sandbox({ id: 'one' })], next: 'more' })
    );
    const made = model(server);
    await made.ready;
    expect(made.all().map(({ id }) => id)).toEqual(['one', 'two']);
  });

  it('keeps one that ended while the page is open, with its reason, and drops one that was removed', async () => {
    const server = new Server();
    server.sandboxes = [sandbox({ id: 'dies' }), sandbox({ id: 'goes' })];
    const made = model(server);
    await made.ready;
    const death = { kind: 'out_of_memory', reason: 'out of memory at 1 GiB' } as const;
    server.sandboxes = [sandbox({ id: 'dies', state: 'failed', death })];
    await made.refresh();
    await settled();
    expect(made.get('dies')?.death?.reason).toBe('out of memory at 1 GiB');
    expect(made.get('goes')).toBeUndefined();
  });

  it('names what has no name as the page does', async () => {
    const server = new Server();
    server.sandboxes = [sandbox({ name: '' }), sandbox({ id: 'two', name: 'own' })];
    const made = model(server, { nameOf: () => 'far.ipynb' });
    await made.ready;
    expect(made.all().map(({ name }) => name)).toEqual(['far.ipynb', 'own']);
  });

  it('does not undo what an event told while it was on its way', async () => {
    const server = new Server();
    server.sandboxes = [sandbox()];
    const made = model(server);
    await made.ready;
    let answer: (response: Response) => void = () => undefined;
    server.handlers.set('GET api/sandboxes', () => new Promise<Response>(resolve => (answer = resolve)));
    const refreshed = made.refresh();
    await settled();
    server.sandboxes = [sandbox({ state: 'suspended' })];
    server.tell('suspended', 'one', 'suspended');
    answer(json({ sandboxes: [sandbox({ state: 'running' })], next: null }));
    await refreshed;
    await settled();
    expect(made.get('one')?.state).toBe('suspended');
  });
});

describe('events', () => {
  it('change a state at once, and have the sandbox looked at', async () => {
    const server = new Server();
    server.sandboxes = [sandbox()];
    const made = model(server);
    await made.ready;
    const heard: SandboxEvent[] = [];
    made.happened.connect((_, event) => heard.push(event));
    server.asked.length = 0;
    server.sandboxes = [sandbox({ state: 'paused' })];
    server.tell('paused', 'one', 'paused');
    expect(made.get('one')?.state).toBe('paused');
    expect(heard.map(({ kind }) => kind)).toEqual(['paused']);
    await settled();
    expect(server.asked).toEqual(['GET api/sandboxes/one?stats=false']);
  });

  it('bring a sandbox that was made elsewhere', async () => {
    const server = new Server();
    const made = model(server);
    await made.ready;
    server.sandboxes = [sandbox({ id: 'elsewhere' })];
    server.tell('created', 'elsewhere', 'creating');
    await settled();
    expect(made.get('elsewhere')?.state).toBe('running');
  });

  it('of a burst are one more look, not one for each', async () => {
    const server = new Server();
    server.sandboxes = [sandbox()];
    const made = model(server);
    await made.ready;
    server.asked.length = 0;
    for (let turn = 0; turn < 10; turn += 1) {
      server.tell('interrupted', 'one', 'running');
    }
    await settled();
    expect(server.asked.length).toBe(2);
  });

  it('of others and malformed ones are passed over', async () => {
    const server = new Server();
    const made = model(server);
    await made.ready;
    server.asked.length = 0;
    for (const told of [
      null,
      7,
      {},
      { schema_id: 'other' },
      { schema_id: 'https://events.jupyter.org/sandbox_gateway/sandbox/v1' }
    ]) {
      server.stream.emit(told);
    }
    await settled();
    expect(server.asked).toEqual([]);
  });

  it('show how far an operation is until it has ended', async () => {
    const server = new Server();
    server.sandboxes = [sandbox()];
    const made = model(server);
    await made.ready;
    const schema_id = 'https://events.jupyter.org/sandbox_gateway/operation/v1';
    const operation = { schema_id, operation: 'op', kind: 'suspend', owner: 'me', sandbox: 'one' };
    server.stream.emit({ ...operation, phase: 'progress', done: 5, total: 10 });
    expect(made.operation('one')).toMatchObject({ kind: 'suspend', done: 5, total: 10 });
    server.stream.emit({ ...operation, phase: 'succeeded' });
    expect(made.operation('one')).toBeUndefined();
  });
});

describe('memory', () => {
  it('is asked for only while somebody looks, and remembered', async () => {
    const server = new Server();
    server.sandboxes = [sandbox()];
    const made = model(server);
    await made.ready;
    expect(server.asked.some(path => path.includes('stats=true'))).toBe(false);
    let visible = true;
    const watching = made.watch({ id: 'one', visible: () => visible });
    server.sandboxes = [sandbox({ memory: 100, usage: usage({ memory: 100 }) })];
    await made.refresh();
    server.sandboxes = [sandbox({ memory: 200, usage: usage({ memory: 200, disk: 9 }) })];
    await made.refresh();
    await settled();
    expect(made.uses('one')?.history('memory')).toEqual([100, 200]);
    expect(made.uses('one')?.now('disk')).toBe(9);
    visible = false;
    server.asked.length = 0;
    server.sandboxes = [sandbox()];
    await made.refresh();
    expect(server.asked.some(path => path.includes('stats=true'))).toBe(false);
    expect(made.get('one')?.memory).toBe(200);
    watching.dispose();
  });
});

describe('a sandbox that is removed here', () => {
  it('is not asked for when its end is heard of, and comes back where it could not be removed', async () => {
    const server = new Server();
    server.sandboxes = [sandbox()];
    const made = model(server);
    await made.ready;
    server.handlers.set('DELETE api/sandboxes/one', () => problem(409, 'owned_elsewhere'));
    await expect(made.remove('one')).rejects.toThrow();
    await settled();
    expect(made.get('one')).toBeDefined();
    server.handlers.set('DELETE api/sandboxes/one', () => {
      server.sandboxes = [];
      server.tell('stopped', 'one', 'terminated');
      return new Response(null, { status: 204 });
    });
    server.asked.length = 0;
    await made.remove('one');
    server.tell('stopped', 'one', '');
    await settled();
    expect(made.get('one')).toBeUndefined();
    expect(server.asked).toEqual(['DELETE api/sandboxes/one?forget=true']);
  });
});

describe('a sandbox that is being woken', () => {
  it('is looked at when it is asked for what wakes it: no event tells before it goes on', async () => {
    const server = new Server();
    server.sandboxes = [sandbox({ state: 'suspended' })];
    const made = model(server);
    await made.ready;
    server.sandboxes = [sandbox({ state: 'resuming' })];
    made.expect('one');
    await made.settled('one');
    expect(made.get('one')?.state).toBe('resuming');
  });
});

describe('the quota', () => {
  const quota = { owner: 'me', live: { used: 1, limit: 4 } };

  it('is asked for once, and then only while somebody looks at all sandboxes', async () => {
    const server = new Server();
    server.handlers.set('GET api/quota', () => json(quota));
    const made = model(server);
    const times = () => server.asked.filter(path => path === 'GET api/quota').length;
    await made.ready;
    made.watch({ id: 'one', visible: () => true });
    await made.refresh();
    expect(times()).toBe(1);
    made.watch({ visible: () => true });
    await made.refresh();
    expect(times()).toBe(2);
    expect(made.quota()).toEqual(quota);
  });

  it('says whose sandboxes these are: an administrator, who is told of everybody’s, has his own here', async () => {
    const server = new Server();
    server.handlers.set('GET api/quota', () => json(quota));
    server.sandboxes = [sandbox(), sandbox({ id: 'other', owner: 'ann' })];
    const made = model(server);
    await made.ready;
    made.expect('other');
    await made.settled('other');
    expect(made.all().map(({ id }) => id)).toEqual(['one']);
  });

  it('is not asked for again where the server does not know of any', async () => {
    const server = new Server();
    server.handlers.set('GET api/quota', () => problem(404, 'not_found'));
    const made = model(server);
    made.watch({ visible: () => true });
    await made.ready;
    await made.refresh();
    expect(server.asked.filter(path => path === 'GET api/quota')).toHaveLength(1);
    expect([made.quota(), made.connection]).toEqual([null, 'ok']);
  });
});

describe('what nobody told', () => {
  it('is a death while the page or the server was away: it is told once, and again after a restart', async () => {
    const server = new Server();
    server.sandboxes = [sandbox()];
    const made = model(server);
    await made.ready;
    const heard: string[] = [];
    made.happened.connect((_, event) => heard.push(`${event.kind} ${String(event.data['kind'] ?? '')}`));
    const death = { kind: 'out_of_memory', reason: 'out of memory' } as never;
    const dead = sandbox({ state: 'failed', death });
    server.sandboxes = [dead];
    await made.refresh();
    expect(heard).toEqual(['died out_of_memory']);
    server.tell('died', 'one', 'failed', { kind: 'out_of_memory' });
    await settled();
    expect(heard).toHaveLength(1);
    server.sandboxes = [sandbox()];
    server.tell('restarted', 'one', 'running');
    await settled();
    server.sandboxes = [dead];
    server.tell('died', 'one', 'failed', { kind: 'out_of_memory' });
    await made.refresh();
    expect(heard.slice(1)).toEqual(['restarted ', 'died out_of_memory']);
  });

  it('is the end of an operation: one that is silent for long is asked for', async () => {
    const server = new Server();
    server.sandboxes = [sandbox()];
    const made = model(server);
    await made.ready;
    const schema_id = 'https://events.jupyter.org/sandbox_gateway/operation/v1';
    const event = { operation: 'op', kind: 'suspend', phase: 'started', sandbox: 'one', text: '' };
    server.stream.emit({ schema_id, ...event, done: null, total: null });
    await made.refresh();
    expect(made.operation('one')?.kind).toBe('suspend');
    expect(server.asked).not.toContain('GET api/operations/op');
    server.handlers.set('GET api/operations/op', () => json({ ended: '2025-01-01T00:00:00Z', progress: {} }));
    const now = vi.spyOn(Date, 'now').mockReturnValue(Date.now() + 60_000);
    await made.refresh();
    now.mockRestore();
    expect(made.operation('one')).toBeUndefined();
  });
});

describe('bad states', () => {
  it('a server that is away: what was known stays, and it is told', async () => {
    const server = new Server();
    server.sandboxes = [sandbox()];
    const made = model(server);
    await made.ready;
    server.down = new TypeError('Failed to fetch');
    await made.refresh().catch(() => undefined);
    await settled();
    expect(made.connection).toBe('unreachable');
    expect(made.get('one')?.state).toBe('running');
    await expect(made.suspend('one')).rejects.toBeInstanceOf(Unreachable);
    server.down = null;
    await made.refresh();
    expect(made.connection).toBe('ok');
  });

  it('a proxy whose server is away is no refusal', async () => {
    const server = new Server();
    server.handlers.set('GET api/sandboxes', () => new Response('<html>', { status: 502 }));
    const made = model(server);
    await made.ready;
    expect(made.connection).toBe('unreachable');
  });

  it('a token that has expired', async () => {
    const server = new Server();
    server.handlers.set('GET api/sandboxes', () => problem(401, 'unauthenticated'));
    const made = model(server);
    await made.ready;
    expect(made.connection).toBe('signed-out');
  });

  it('a sandbox that somebody deleted meanwhile is refused with the reason, and goes', async () => {
    const server = new Server();
    server.sandboxes = [sandbox()];
    const made = model(server);
    await made.ready;
    server.sandboxes = [];
    server.handlers.set('POST api/sandboxes/one/suspend', () =>
      problem(404, 'unknown_sandbox', 'there is none', 'List them.')
    );
    const refused = await made.suspend('one').catch((error: unknown) => error);
    expect(refused).toBeInstanceOf(Refused);
    expect(refused).toMatchObject({ message: 'there is none', hint: 'List them.' });
    await settled();
    expect(made.get('one')).toBeUndefined();
    expect(made.connection).toBe('ok');
  });
});

describe('long operations', () => {
  const operation = {
    id: 'op',
    kind: 'fork',
    sandbox: 'one',
    progress: { message: '', done: null, total: null },
    created: ''
  };

  it('are waited for, however long they take', async () => {
    const server = new Server();
    server.sandboxes = [sandbox(), sandbox({ id: 'child', parent: 'sandbox:one' })];
    const made = model(server);
    await made.ready;
    const running = { ...operation, state: 'running', result: null, error: null, ended: null };
    const result = { children: [{ id: 'child', error: null }] };
    let looks = 0;
    server.handlers.set('POST api/sandboxes/one/fork', () => json(running, 202));
    server.handlers.set('GET api/operations/op', () =>
      (looks += 1) < 3 ? json(running) : json({ ...running, state: 'succeeded', result, ended: '' })
    );
    expect(await made.fork('one')).toEqual({ ids: ['child'], failures: [] });
    expect(looks).toBe(3);
    expect(made.get('child')?.parent).toBe('sandbox:one');
  });

  it('that fail say why', async () => {
    const server = new Server();
    server.sandboxes = [sandbox()];
    const made = model(server);
    await made.ready;
    const error = { code: 'disk_full', message: 'no room', hint: 'Remove snapshots.' };
    server.handlers.set('POST api/sandboxes/one/suspend', () =>
      json({ ...operation, state: 'failed', result: null, error, ended: '' }, 202)
    );
    await expect(made.suspend('one')).rejects.toMatchObject({ code: 'disk_full', hint: 'Remove snapshots.' });
  });

  it('a fork of which some children run has those, and why the others do not', async () => {
    const server = new Server();
    server.sandboxes = [sandbox(), sandbox({ id: 'child', parent: 'sandbox:one' })];
    const made = model(server);
    await made.ready;
    const error = { code: 'over_quota', message: 'too many', hint: '' };
    const children = [
      { id: 'child', error: null },
      { id: 'x', error }
    ];
    server.handlers.set('POST api/sandboxes/one/fork', () => json({ children }, 201));
    const { ids, failures } = await made.fork('one', 2);
    expect(ids).toEqual(['child']);
    expect(failures.map(({ message }) => message)).toEqual(['too many']);
  });

  it('that are refused name the field that is wrong', async () => {
    const server = new Server();
    const made = model(server);
    await made.ready;
    const error = { code: 'invalid_request', message: 'too much', hint: '', field: 'resources.memory' };
    server.handlers.set('POST api/sandboxes', () =>
      json({ ...operation, kind: 'create', state: 'failed', result: null, error, ended: '' }, 202)
    );
    await expect(made.create('p', { memory: 5 }, 'x')).rejects.toMatchObject({ field: 'resources.memory' });
  });

  it('are told as they go on, also before there is a sandbox', async () => {
    const server = new Server();
    const made = model(server);
    await made.ready;
    const heard: unknown[] = [];
    made.progressed.connect((_, { phase, name, error }) => heard.push([phase, name, error?.code]));
    const schema_id = 'https://events.jupyter.org/sandbox_gateway/operation/v1';
    const event = { schema_id, operation: 'op', kind: 'create', owner: 'me', name: 'report.ipynb' };
    server.stream.emit({ ...event, phase: 'started' });
    const error = { code: 'over_quota', message: 'too many', hint: '' };
    server.stream.emit({ ...event, phase: 'failed', error });
    expect(heard).toEqual([
      ['started', 'report.ipynb', undefined],
      ['failed', 'report.ipynb', 'over_quota']
    ]);
  });

  it('a fork of which no child runs is refused with the first reason', async () => {
    const server = new Server();
    server.sandboxes = [sandbox()];
    const made = model(server);
    await made.ready;
    const error = { code: 'over_quota', message: 'too many', hint: '' };
    server.handlers.set('POST api/sandboxes/one/fork', () => json({ children: [{ id: 'x', error }] }, 201));
    await expect(made.fork('one')).rejects.toMatchObject({ code: 'over_quota' });
  });
});

describe('keep', () => {
  it('wakes what sleeps, and else runs nothing at all', async () => {
    const server = new Server();
    server.sandboxes = [sandbox({ id: 'asleep', state: 'suspended' }), sandbox()];
    const made = model(server);
    await made.ready;
    server.asked.length = 0;
    server.handlers.set('POST api/sandboxes/asleep/resume', () => json(sandbox({ id: 'asleep' })));
    server.handlers.set('POST api/sandboxes/one/execute', (_, init) => {
      expect(JSON.parse(String(init.body))).toMatchObject({ code: '', silent: true });
      return new Response('{"type":"end","status":"ok","count":null}\n');
    });
    await made.keep('asleep');
    await made.keep('one');
    expect(server.asked).toEqual(['POST api/sandboxes/asleep/resume', 'POST api/sandboxes/one/execute']);
  });
});
