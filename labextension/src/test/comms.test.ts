import { Signal } from '@lumino/signaling';
import { describe, expect, it } from 'vitest';

import { CommGate } from '../comms';

/** A connection that knows comms as JupyterLab's does: a message is told first and handled after. */
class Connection {
  readonly id = 'one';
  readonly name = 'ours';
  readonly handleComms: boolean = true;
  readonly anyMessage = new Signal<object, { msg: unknown; direction: string }>(this);
  readonly opened: string[] = [];
  readonly targets = new Map<string, (comm: { dispose: () => void }) => void>();
  isDisposed = false;
  disposed = 0;
  reconnected = 0;

  registerCommTarget(name: string, callback: (comm: { dispose: () => void }) => void): void {
    this.targets.set(name, callback);
  }

  createComm(name: string): string {
    return name;
  }

  requestCommInfo(): Promise<string> {
    return Promise.resolve('all');
  }

  reconnect(): Promise<void> {
    this.reconnected += 1;
    return Promise.resolve();
  }

  receive(type: string, content: Record<string, string>): Record<string, string> {
    const msg = { channel: 'iopub', header: { msg_type: type }, content };
    this.anyMessage.emit({ msg, direction: 'recv' });
    const target = this.targets.get(content['target_name'] ?? '');
    target?.({ dispose: () => (this.disposed += 1) });
    return content;
  }
}

function start(may: { pass: boolean }) {
  const connection = new Connection();
  const manager = { connectTo: () => connection };
  const held: string[] = [];
  const found = new CommGate(
    manager as never,
    () => may.pass,
    id => held.push(id)
  );
  manager.connectTo();
  connection.registerCommTarget('jupyter.widget', () => connection.opened.push('widget'));
  return { connection, held, gate: found };
}

const open = () => ({ comm_id: '1', target_name: 'jupyter.widget', target_module: 'data:text/javascript,evil()' });

describe('a kernel whose output may not act', () => {
  it('opens no comm in the page, and names no module to load', () => {
    const { connection, held } = start({ pass: false });
    expect(connection.receive('comm_open', open())).not.toHaveProperty('target_module');
    expect(connection.opened).toEqual([]);
    expect(held).toEqual(['one']);
  });

  it('tells nothing on comms that were opened before', () => {
    const { connection } = start({ pass: false });
    expect(connection.receive('comm_msg', { comm_id: '1' })['comm_id']).not.toBe('1');
  });

  it('is not asked for what widgets it has', async () => {
    const { connection } = start({ pass: false });
    expect(() => connection.createComm('jupyter.widget.control')).toThrow('may not act');
    await expect(connection.requestCommInfo()).rejects.toThrow('may not act');
  });

  it('is connected anew when it may, without what was opened meanwhile', () => {
    const may = { pass: false };
    const { connection, gate } = start(may);
    connection.receive('comm_open', open());
    gate.reconsider();
    expect(connection.reconnected).toBe(0);
    may.pass = true;
    gate.reconsider();
    gate.reconsider();
    expect([connection.reconnected, connection.disposed]).toEqual([1, 1]);
    expect(connection.createComm('jupyter.widget')).toBe('jupyter.widget');
  });
});

describe('a kernel whose output may act', () => {
  it('has its comms as ever, and is never connected anew', async () => {
    const { connection, held, gate } = start({ pass: true });
    const content = connection.receive('comm_open', open());
    expect(content).toEqual(open());
    expect(connection.receive('comm_msg', { comm_id: '1' })).toEqual({ comm_id: '1' });
    expect(await connection.requestCommInfo()).toBe('all');
    gate.reconsider();
    expect([connection.opened, held, connection.reconnected]).toEqual([['widget'], [], 0]);
  });
});
