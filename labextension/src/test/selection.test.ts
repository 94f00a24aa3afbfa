import { describe, expect, it } from 'vitest';

import { each, failures } from '../batch';
import { Refused } from '../client';
import { Selection } from '../selection';
import { sandbox, trans } from './fake';

const ORDER = ['a', 'b', 'c', 'd'];

describe('a selection', () => {
  const chosen = (selection: Selection) => ORDER.filter(id => selection.has(id)).join('');

  it('takes one more or less, and all from the last to this one', () => {
    const selection = new Selection();
    let told = 0;
    selection.changed.connect(() => (told += 1));
    selection.toggle('b');
    selection.extend('d', ORDER);
    expect(chosen(selection)).toBe('bcd');
    selection.toggle('c');
    expect(chosen(selection)).toBe('bd');
    selection.extend('a', ORDER);
    expect(chosen(selection)).toBe('abcd');
    expect(told).toBe(4);
  });

  it('begins with the first where there is no last one', () => {
    const selection = new Selection();
    selection.extend('c', ORDER);
    expect(chosen(selection)).toBe('c');
  });

  it('forgets what is not there any more, and says so once', () => {
    const selection = new Selection();
    selection.set(['a', 'b']);
    let told = 0;
    selection.changed.connect(() => (told += 1));
    selection.keep(new Set(['b']));
    selection.keep(new Set(['b']));
    expect([chosen(selection), told]).toEqual(['b', 1]);
  });
});

describe('one thing done with many', () => {
  const many = Array.from({ length: 10 }, (_, place) => sandbox({ id: `${place}`, name: `${place}.ipynb` }));

  it('goes on past those that fail, a few at a time, and what is gone needs nothing done', async () => {
    let now = 0;
    let most = 0;
    const outcome = await each(many, async id => {
      most = Math.max(most, (now += 1));
      await new Promise(resolve => setTimeout(resolve, 1));
      now -= 1;
      if (id === '3') {
        throw new Refused(403, 'over_quota', 'you have 2 of at most 2', 'Delete one.');
      }
      if (id === '4') {
        throw new Refused(404, 'unknown_sandbox', 'there is none', '');
      }
    });
    expect(most).toBe(4);
    expect(outcome.done).toBe(9);
    expect(failures(outcome, trans)).toBe('1 of 10 failed.\n\n3.ipynb: you have 2 of at most 2\n\nDelete one.');
  });

  it('tells some of many failures', async () => {
    const outcome = await each(many, () => Promise.reject(new Error('no')));
    expect(failures(outcome, trans)).toContain('and 5 others');
  });
});
