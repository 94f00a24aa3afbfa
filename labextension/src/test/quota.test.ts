import { describe, expect, it } from 'vitest';

import { named, reliefs } from '../quota';
import { sandbox } from './fake';

const all = [
  sandbox({ id: 'aaaa', name: 'a.ipynb' }),
  sandbox({ id: 'bbbb', name: 'b.ipynb', state: 'suspended' }),
  sandbox({ id: 'cccc', name: 'c.ipynb' })
];

describe('over quota', () => {
  it('has as relief what the server names, in its order: what lives is suspended, what sleeps ends', () => {
    const found = reliefs('Suspend or delete one of your 2: bbbb, aaaa.', all);
    expect(found.map(({ sandbox: { id }, deed }) => [id, deed])).toEqual([
      ['bbbb', 'end'],
      ['aaaa', 'suspend']
    ]);
    expect(reliefs('Ask for less memory.', all)).toEqual([]);
  });

  it('is told with names for people', () => {
    expect(named('Suspend cccc or aaaa.', all)).toBe('Suspend “c.ipynb” or “a.ipynb”.');
  });
});
