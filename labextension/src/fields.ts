/** What a profile's JSON Schema lets a person choose, as fields of a form: decided without a page. */
import type { TranslationBundle } from '@jupyterlab/translation';

import type { Profile, Resources } from './client';

/** One thing that can be chosen for a sandbox. */
export interface Field {
  /** Where it stands in what the server takes: `memory`, `idle.suspend`. */
  name: string;
  label: string;
  /** What one of it is: bytes of a MiB, seconds of a minute. */
  unit: number;
  /** Whether parts of its unit make no sense. */
  whole: boolean;
  minimum: number;
  /** Null where there is no bound. */
  maximum: number | null;
  /** What the profile has; null where that is no limit. */
  preset: number | string | null;
  /** All there is to choose from, where it is no number. */
  options: readonly string[];
  /** Whether few people will want to change it. */
  rare: boolean;
}

/** What was chosen, in the fields' units. */
export type Chosen = ReadonlyMap<Field, number | string>;

type Schema = Readonly<Record<string, unknown>>;

const MEBIBYTE = 1 << 20;
const UNITS: Readonly<Record<string, number>> = { memory: MEBIBYTE, disk: MEBIBYTE };
const RARE: readonly string[] = ['processes', 'network', 'idle.pause', 'idle.expire'];
/** What people choose first comes first; what is not named here comes after these. */
const ORDER: readonly string[] = ['memory', 'cpu', 'gpu', 'image', 'disk', 'idle.suspend'];

/** The fields that a profile offers; what has one value only is none. */
export function fields(profile: Profile, trans: TranslationBundle): Field[] {
  const found = Object.entries(part(profile.choices, 'properties')).flatMap(([name, schema]) =>
    isSchema(schema) && schema['type'] === 'object'
      ? Object.entries(part(schema, 'properties')).map(
          ([tier, inner]) => [`${name}.${tier}`, inner, name === 'idle' ? 60 : 1] as const
        )
      : [[name, schema, UNITS[name] ?? 1] as const]
  );
  const place = (name: string) => (ORDER.includes(name) ? ORDER.indexOf(name) : ORDER.length);
  return found
    .flatMap(([name, schema, unit]) => (isSchema(schema) ? made(name, schema, unit, trans) : []))
    .sort((one, other) => place(one.name) - place(other.name));
}

function made(name: string, schema: Schema, unit: number, trans: TranslationBundle): Field[] {
  const label = labelled(name, schema, trans);
  const rare = RARE.includes(name);
  const preset = schema['default'];
  if (Array.isArray(schema['enum'])) {
    const options = schema['enum'].filter(option => typeof option === 'string');
    const own = typeof preset === 'string' ? preset : null;
    const none = { unit: 1, whole: false, minimum: 0, maximum: null };
    return options.length < 2 ? [] : [{ name, label, rare, options, preset: own, ...none }];
  }
  // Where there is no bound, a word can be chosen beside a number.
  const either = Array.isArray(schema['anyOf']) ? schema['anyOf'].filter(isSchema) : null;
  const rule = either?.find(one => 'minimum' in one) ?? schema;
  const { minimum, maximum } = rule;
  if (typeof minimum !== 'number' || (typeof maximum === 'number' && maximum <= minimum)) {
    return [];
  }
  return [
    {
      name,
      label,
      rare,
      unit,
      whole: rule['type'] === 'integer',
      minimum: unit === 1 ? minimum : Math.ceil(minimum / unit),
      maximum: either === null && typeof maximum === 'number' ? Math.floor((maximum / unit) * 100) / 100 : null,
      preset: typeof preset === 'number' ? preset / unit : null,
      options: []
    }
  ];
}

function labelled(name: string, schema: Schema, trans: TranslationBundle): string {
  switch (name) {
    case 'memory':
      return trans.__('Memory (MiB)');
    case 'cpu':
      return trans.__('Cores');
    case 'disk':
      return trans.__('Disk (MiB)');
    case 'gpu':
      return trans.__('GPUs');
    case 'image':
      return trans.__('Image');
    case 'processes':
      return trans.__('Processes');
    case 'network':
      return trans.__('Network');
    case 'idle.pause':
      return trans.__('Pause when idle for (min)');
    case 'idle.suspend':
      return trans.__('Suspend when idle for (min)');
    case 'idle.expire':
      return trans.__('End when idle for (min)');
    default:
      return typeof schema['title'] === 'string' ? schema['title'] : name;
  }
}

/** What is wrong with what was written into a field; empty where nothing is. */
export function wrong(field: Field, value: number | string, trans: TranslationBundle): string {
  if (field.options.length > 0) {
    return field.options.includes(String(value)) ? '' : trans.__('“%1” is not offered', String(value));
  }
  if (typeof value !== 'number' || !Number.isFinite(value)) {
    return trans.__('This is not a number');
  }
  if (value < field.minimum) {
    return trans.__('At least %1', field.minimum);
  }
  if (field.maximum !== null && value > field.maximum) {
    return trans.__('At most %1', field.maximum);
  }
  return field.whole && !Number.isInteger(value * field.unit) ? trans.__('A whole number') : '';
}

/** What was chosen, as the server takes it; what was not is as the profile has it. */
export function resources(chosen: Chosen): Resources {
  const wanted: Record<string, unknown> = {};
  for (const [field, value] of chosen) {
    const amount = typeof value === 'number' ? scaled(field, value) : value;
    const [name, inner] = field.name.split('.');
    if (name === undefined) {
      continue;
    }
    wanted[name] = inner === undefined ? amount : { ...(wanted[name] as object | undefined), [inner]: amount };
  }
  return wanted;
}

function scaled(field: Field, value: number): number {
  return field.whole && field.unit !== 1 ? Math.round(value * field.unit) : value * field.unit;
}

/** What was chosen once, in the fields that there are for it now. */
export function chosenOf(found: readonly Field[], wanted: Resources): Map<Field, number | string> {
  const chosen = new Map<Field, number | string>();
  for (const field of found) {
    const [name = '', inner] = field.name.split('.');
    const outer = (wanted as Schema)[name];
    const value = inner === undefined ? outer : isSchema(outer) ? outer[inner] : undefined;
    if (field.options.length > 0 && typeof value === 'string') {
      chosen.set(field, value);
    } else if (field.options.length === 0 && typeof value === 'number') {
      chosen.set(field, Math.round((value / field.unit) * 100) / 100);
    }
  }
  return chosen;
}

function isSchema(value: unknown): value is Schema {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}

function part(of: Schema, name: string): Schema {
  const found = of[name];
  return isSchema(found) ? found : {};
}
