/** What a sandbox uses, drawn. */
import * as React from 'react';

import type { Use } from './uses';

/** A small curve, from 0 to its largest value. */
export function Sparkline({ values, label }: { values: readonly number[]; label: string }): JSX.Element | null {
  if (values.length < 2) {
    return null;
  }
  const top = Math.max(...values);
  const height = (value: number) => (top > 0 ? 15 - (14 * value) / top : 15);
  const points = values.map((value, place) => `${(60 * place) / (values.length - 1)},${height(value)}`);
  return (
    <svg className="sg-Sparkline" viewBox="0 0 60 16" role="img" aria-label={label}>
      <polyline points={points.join(' ')} />
    </svg>
  );
}

/** How much of a limit is used. */
export function Meter({ fraction }: { fraction: number }): JSX.Element {
  return (
    <span className="sg-Meter" data-full={fraction > 0.9 ? 'true' : undefined}>
      <span style={{ width: `${Math.max(2, Math.round(100 * fraction))}%` }} />
    </span>
  );
}

/** Each thing in use with its limit, its meter and its small history, as rows of a table; nothing of what is not known. */
export function Meters({ uses, label }: { uses: readonly Use[]; label: (name: string) => string }): JSX.Element | null {
  const known = uses.filter(use => use.text !== '');
  if (known.length === 0) {
    return null;
  }
  return (
    <table className="sg-Meters">
      <tbody>
        {known.map(({ kind, name, text, fraction, history }) => (
          <tr key={kind} data-kind={kind}>
            <th scope="row">{name}</th>
            <td>{text}</td>
            <td>{fraction !== null && <Meter fraction={fraction} />}</td>
            <td>
              <Sparkline values={history} label={label(name)} />
            </td>
          </tr>
        ))}
      </tbody>
    </table>
  );
}
