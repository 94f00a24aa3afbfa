/**
 * The gateway's REST API. All types come from its description (`openapi.ts` is generated); none is written by hand.
 */
import type { components, paths } from './openapi';

export type Sandbox = components['schemas']['Sandbox'];
export type State = components['schemas']['State'];
export type Snapshot = components['schemas']['Snapshot'];
export type Operation = components['schemas']['Operation'];
export type Profile = components['schemas']['Profile'];
export type Resources = components['schemas']['Resources'];
export type Problem = components['schemas']['Problem'];
export type LoggedEvent = components['schemas']['Event'];
export type Children = components['schemas']['Children'];
export type Usage = components['schemas']['Usage'];
export type Quota = components['schemas']['Quota'];

/** How a request is sent; the path is below the server's base URL, and has its query. */
export type Send = (path: string, init: RequestInit) => Promise<Response>;

type Method = 'get' | 'post' | 'patch' | 'delete';
type PathWith<M extends Method> = {
  [P in keyof paths]: paths[P][M] extends { responses: object } ? P : never;
}[keyof paths];
type Content<R> = R extends { content: infer C } ? C[keyof C] : undefined;
type Answer<O> = O extends { responses: infer R } ? Content<R[Extract<keyof R, 200 | 201 | 202 | 204>]> : never;
type PathOf<O> = O extends { parameters: { path: infer P } } ? { path: P } : { path?: undefined };
type QueryOf<O> = O extends { parameters: { query?: infer Q } } ? { query?: Q } : { query?: undefined };
type BodyOf<O> = O extends { requestBody?: { content: { 'application/json': infer B } } } ? { body?: B } : object;
type Options<O> = PathOf<O> & QueryOf<O> & BodyOf<O>;
type Given<O> = O extends { parameters: { path: unknown } } ? [options: Options<O>] : [options?: Options<O>];

/** The server refused, and said why. */
export class Refused extends Error {
  constructor(
    readonly status: number,
    readonly code: string,
    message: string,
    readonly hint: string,
    /** What of the request is wrong, dotted; empty where it is nothing of it. */
    readonly field = ''
  ) {
    super(message);
    this.name = 'Refused';
  }

  /** Whether the caller has to sign in again. */
  get signedOut(): boolean {
    return this.status === 401 || (this.status === 403 && ['unauthenticated', ''].includes(this.code));
  }

  /** Whether it is this server, not its user, whom the gateway does not accept. */
  get turnedAway(): boolean {
    return this.code === 'gateway_refused';
  }

  /** Whether the thing is not there any more. */
  get gone(): boolean {
    return this.status === 404 && this.code.startsWith('unknown_');
  }
}

/** The server did not answer, or another one in its place did (a proxy whose server is away). */
export class Unreachable extends Error {
  constructor(message: string) {
    super(message);
    this.name = 'Unreachable';
  }
}

/** The typed requests. Each raises `Refused` or `Unreachable`. */
export class Client {
  constructor(private readonly _send: Send) {}

  get<P extends PathWith<'get'>>(path: P, ...given: Given<paths[P]['get']>): Promise<Answer<paths[P]['get']>> {
    return this._ask('get', path, given[0]) as Promise<Answer<paths[P]['get']>>;
  }

  post<P extends PathWith<'post'>>(path: P, ...given: Given<paths[P]['post']>): Promise<Answer<paths[P]['post']>> {
    return this._ask('post', path, given[0]) as Promise<Answer<paths[P]['post']>>;
  }

  patch<P extends PathWith<'patch'>>(path: P, ...given: Given<paths[P]['patch']>): Promise<Answer<paths[P]['patch']>> {
    return this._ask('patch', path, given[0]) as Promise<Answer<paths[P]['patch']>>;
  }

  delete<P extends PathWith<'delete'>>(
    path: P,
    ...given: Given<paths[P]['delete']>
  ): Promise<Answer<paths[P]['delete']>> {
    return this._ask('delete', path, given[0]) as Promise<Answer<paths[P]['delete']>>;
  }

  private async _ask(
    method: Method,
    template: string,
    options: { path?: object; query?: object; body?: unknown } = {}
  ): Promise<unknown> {
    const filled = template.replace(/\{(\w+)\}/g, (_, name: string) =>
      encodeURIComponent(String((options.path as Record<string, unknown> | undefined)?.[name] ?? ''))
    );
    const query = new URLSearchParams();
    for (const [name, value] of Object.entries(options.query ?? {})) {
      if (value !== undefined) {
        query.append(name, String(value));
      }
    }
    const asked = query.size > 0 ? `?${query.toString()}` : '';
    const init: RequestInit = { method: method.toUpperCase() };
    if (options.body !== undefined) {
      init.body = JSON.stringify(options.body);
      init.headers = { 'Content-Type': 'application/json' };
    }
    let response: Response;
    try {
      response = await this._send(filled.replace(/^\//, '') + asked, init);
    } catch (error) {
      throw new Unreachable(error instanceof Error ? error.message : String(error));
    }
    if (!response.ok) {
      throw await refusal(response);
    }
    const kind = response.headers.get('Content-Type') ?? '';
    if (response.status === 204) {
      return undefined;
    }
    try {
      return await (kind.startsWith('application/json') ? response.json() : response.text());
    } catch (error) {
      throw new Unreachable(error instanceof Error ? error.message : String(error)); // it was cut off
    }
  }
}

async function refusal(response: Response): Promise<Refused | Unreachable> {
  const text = await response.text();
  let told: Partial<Problem> | null = null;
  try {
    told = JSON.parse(text) as Partial<Problem> | null;
  } catch {
    // Not from our handlers: a proxy's page, or Jupyter's.
  }
  const code = typeof told?.code === 'string' ? told.code : '';
  if (code === '' && [502, 503, 504].includes(response.status)) {
    return new Unreachable(`${response.status} ${response.statusText}`);
  }
  const message = typeof told?.message === 'string' ? told.message : `${response.status} ${response.statusText}`;
  const hint = typeof told?.hint === 'string' ? told.hint : '';
  return new Refused(response.status, code, message, hint, typeof told?.field === 'string' ? told.field : '');
}
