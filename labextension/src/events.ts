/**
 * What the server's event bus tells of sandboxes, held against what it is said to be: it comes as plain JSON.
 */

const SANDBOX = 'https://events.jupyter.org/sandbox_gateway/sandbox/v1';
const OPERATION = 'https://events.jupyter.org/sandbox_gateway/operation/v1';

/** Something happened to a sandbox; kinds and data are in the manual, "Events". */
export interface SandboxEvent {
  type: 'sandbox';
  kind: string;
  sandbox: string;
  /** Empty where it is not known any more. */
  state: string;
  /** Milliseconds since the epoch. */
  time: number;
  /** One line for people; parts of it may come from inside the sandbox. */
  text: string;
  data: Readonly<Record<string, unknown>>;
}

/** How far a long operation is. */
export interface OperationEvent {
  type: 'operation';
  operation: string;
  kind: string;
  phase: string;
  sandbox: string;
  text: string;
  done: number | null;
  total: number | null;
  /** The label of a sandbox that is being made. */
  name?: string;
  /** Why it failed. */
  error?: { code: string; message: string; hint: string } | null;
}

/** An event of ours, or null for anything else. */
export function parse(told: unknown): SandboxEvent | OperationEvent | null {
  if (typeof told !== 'object' || told === null) {
    return null;
  }
  const found = told as Record<string, unknown>;
  if (found.schema_id === SANDBOX && typeof found.sandbox === 'string' && typeof found.kind === 'string') {
    return {
      type: 'sandbox',
      kind: found.kind,
      sandbox: found.sandbox,
      state: text(found.state),
      time: typeof found.time === 'number' ? found.time * 1000 : Date.now(),
      text: text(found.text),
      data: typeof found.data === 'object' && found.data !== null ? (found.data as Record<string, unknown>) : {}
    };
  }
  if (found.schema_id === OPERATION && typeof found.operation === 'string') {
    return {
      type: 'operation',
      operation: found.operation,
      kind: text(found.kind),
      phase: text(found.phase),
      sandbox: text(found.sandbox),
      text: text(found.text),
      done: typeof found.done === 'number' ? found.done : null,
      total: typeof found.total === 'number' ? found.total : null,
      name: text(found.name),
      error: reason(found.error)
    };
  }
  return null;
}

function reason(value: unknown): { code: string; message: string; hint: string } | null {
  if (typeof value !== 'object' || value === null) {
    return null;
  }
  const found = value as Record<string, unknown>;
  return { code: text(found.code), message: text(found.message), hint: text(found.hint) };
}

function text(value: unknown): string {
  return typeof value === 'string' ? value : '';
}
