/** Sizes and times for people. */
import type { TranslationBundle } from '@jupyterlab/translation';

const UNITS = ['B', 'KiB', 'MiB', 'GiB', 'TiB'];

/** `71 MiB`, `1.5 GiB`. */
export function bytes(count: number): string {
  let unit = 0;
  let value = count;
  while (value >= 1023.5 && unit < UNITS.length - 1) {
    value /= 1024;
    unit += 1;
  }
  const digits = unit > 0 && value < 9.95 && !Number.isInteger(value) ? 1 : 0;
  return `${value.toFixed(digits)} ${UNITS[unit] ?? ''}`;
}

/** How long ago that was: `12 s`, `3 min`, `2 h`, `5 d`. */
export function age(time: string, now: number, trans: TranslationBundle): string {
  const seconds = Math.max(0, Math.round((now - Date.parse(time)) / 1000));
  if (seconds < 60) {
    return trans.__('%1 s', seconds);
  }
  if (seconds < 3600) {
    return trans.__('%1 min', Math.floor(seconds / 60));
  }
  if (seconds < 48 * 3600) {
    return trans.__('%1 h', Math.floor(seconds / 3600));
  }
  return trans.__('%1 d', Math.floor(seconds / 86400));
}

/** A span of time that somebody chose: `90 s`, `10 min`, `1.5 h`. */
export function span(seconds: number, trans: TranslationBundle): string {
  const round = (value: number) => Math.round(value * 10) / 10;
  if (seconds < 120) {
    return trans.__('%1 s', round(seconds));
  }
  return seconds < 7200 ? trans.__('%1 min', round(seconds / 60)) : trans.__('%1 h', round(seconds / 3600));
}

/** A moment in the user's own way of writing it. */
export function moment(time: string | number): string {
  return new Date(time).toLocaleString();
}

/** What is enough of an id for people. */
export function brief(id: string): string {
  return id.slice(0, 8);
}
