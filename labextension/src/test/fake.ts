/** A server that answers from memory, and a bus that tests speak on. */
import { Signal } from '@lumino/signaling';

import type { Profile, Sandbox, Snapshot, Usage } from '../client';
import { Client } from '../client';
import { SandboxesModel } from '../model';

/** A sandbox as the server shows it. */
export function sandbox(changes: Partial<Sandbox> = {}): Sandbox {
  return {
    id: 'one',
    state: 'running',
    profile: 'python3-gvisor',
    owner: 'me',
    name: 'report.ipynb',
    runtime: 'gvisor',
    isolated: true,
    created: '2025-01-01T12:00:00.000Z',
    since: '2025-01-01T12:00:00.000Z',
    memory: null,
    usage: null,
    limits: { cpu: null, memory: 1 << 30, disk: null, processes: null },
    idle: null,
    parent: null,
    snapshot: null,
    on_owner_exit: 'keep',
    death: null,
    notes: [],
    kernel: null,
    ...changes
  };
}

/** An offer that lets one choose some of its limits. */
export const profile: Profile = {
  name: 'analysis',
  display_name: 'Analysis',
  description: '',
  language: 'python',
  interrupt_mode: 'signal',
  runtime: 'gvisor',
  isolated: true,
  image: 'host',
  workspace: 'none',
  limits: { cpu: 2, memory: 1 << 30, disk: null, processes: null },
  idle: { pause: null, suspend: null, expire: null },
  network: 'none',
  start: { template: true, seconds: null },
  client_environment: [],
  active_output: false,
  choices: {
    properties: {
      processes: { type: 'integer', minimum: 16, maximum: 256, default: 256 },
      image: { title: 'Image', enum: ['host', 'oci:lab'], default: 'host' },
      network: { title: 'Network', enum: ['none'], default: 'none' },
      gpu: { title: 'GPUs', type: 'integer', minimum: 0, maximum: 0, default: 0 },
      memory: { type: 'integer', minimum: 64 << 20, maximum: 1 << 30, default: 1 << 30 },
      cpu: { anyOf: [{ type: 'number', minimum: 0.1, maximum: 4096 }, { const: 'none' }], default: 'none' },
      disk: { type: 'integer', minimum: 5, maximum: 5, default: 5 },
      idle: {
        type: 'object',
        properties: {
          suspend: { type: 'number', minimum: 1, maximum: 3600, default: 600 },
          expire: { anyOf: [{ type: 'number', minimum: 1, maximum: 1e9 }, { const: 'never' }], default: 'never' }
        }
      },
      licence: { title: 'Licence', type: 'integer', minimum: 1, maximum: 3, default: 1 }
    }
  } as never
};

/** What a sandbox uses as the server tells it. */
export function usage(changes: Partial<Usage> = {}): Usage {
  return { memory: 5, cpu_seconds: null, disk: null, saved: null, gpu: null, ...changes };
}

/** Strings as they are, with what belongs into them. */
export const trans = {
  __: filled,
  _n: (one: string, many: string, count: number) => filled(count === 1 ? one : many, count)
} as never;

function filled(text: string, ...values: unknown[]): string {
  return text.replace(/%(\d)/g, (_, place: string) => String(values[+place - 1]));
}

type Handler = (query: URLSearchParams, init: RequestInit) => Response | Promise<Response>;

export class Server {
  sandboxes: Sandbox[] = [];
  snapshots: Snapshot[] = [];
  /** Answers of one's own, by method and path. */
  readonly handlers = new Map<string, Handler>();
  /** What was asked: method and path, with the query. */
  readonly asked: string[] = [];
  readonly stream = new Signal<object, unknown>({});
  /** Set where nothing answers. */
  down: Error | null = null;

  readonly client = new Client(async (path, init) => {
    this.asked.push(`${init.method ?? ''} ${path}`);
    if (this.down !== null) {
      throw this.down;
    }
    const [place = '', query = ''] = path.split('?');
    const own = this.handlers.get(`${init.method ?? ''} ${place}`);
    if (own !== undefined) {
      return own(new URLSearchParams(query), init);
    }
    // Memory is told only where it is asked for, as by the server.
    const told = (one: Sandbox) => (query.includes('stats=true') ? one : { ...one, memory: null, usage: null });
    if (place === 'api/sandboxes') {
      const living = this.sandboxes.filter(({ state }) => !['failed', 'terminated'].includes(state));
      return json({ sandboxes: living.map(told), next: null });
    }
    if (place === 'api/snapshots') {
      return json({ snapshots: this.snapshots });
    }
    const found = this.sandboxes.find(({ id }) => place === `api/sandboxes/${id}`);
    return found === undefined ? problem(404, 'unknown_sandbox') : json(told(found));
  });

  /** A model of this server. */
  model(options: Partial<SandboxesModel.IOptions> = {}): SandboxesModel {
    const { client, stream } = this;
    return new SandboxesModel({ client, stream, available: true, standby: 'never', ...options });
  }

  /** Tell an event of a sandbox. */
  tell(kind: string, id: string, state: string, data: object = {}): void {
    const schema_id = 'https://events.jupyter.org/sandbox_gateway/sandbox/v1';
    this.stream.emit({ schema_id, kind, sandbox: id, state, time: 1_800_000_000, text: '', data });
  }
}

export function json(body: unknown, status = 200): Response {
  return new Response(JSON.stringify(body), { status, headers: { 'Content-Type': 'application/json' } });
}

export function problem(status: number, code: string, message = code, hint = ''): Response {
  const headers = { 'Content-Type': 'application/problem+json' };
  return new Response(JSON.stringify({ code, message, hint }), { status, headers });
}

/** Let everything that is under way come to its end. */
export async function settled(): Promise<void> {
  for (let turn = 0; turn < 20; turn += 1) {
    await new Promise(resolve => setTimeout(resolve, 0));
  }
}
