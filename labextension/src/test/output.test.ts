import { describe, expect, it } from 'vitest';

import type { Facts } from '../output';
import { acts, kindOf, mayAct, moved, origin, permissions, tamed } from '../output';
import { sandbox } from './fake';

describe('a kind of output', () => {
  it('is active where it is not known to run nothing', () => {
    const kinds = [
      'application/javascript',
      'text/javascript',
      'application/vnd.jupyter.widget-view+json',
      'application/vnd.bokehjs_exec.v0+json',
      'application/geo+json',
      'application/pdf',
      'text/vnd.anything',
      'constructor',
      '__proto__',
      ''
    ];
    expect(kinds.map(kindOf)).toEqual(kinds.map(() => 'active'));
  });

  it('is plain where it is text or a picture', () => {
    const kinds = ['text/plain', 'image/png', 'image/svg+xml', 'application/json'];
    expect(kinds.map(kindOf)).toEqual(kinds.map(() => 'plain'));
  });

  it('is sanitised where it is HTML, and confined where it is a chart that can load data', () => {
    expect(['text/html', 'text/markdown'].map(kindOf)).toEqual(['sanitised', 'sanitised']);
    expect(
      ['application/vnd.vega.v5+json', 'application/vnd.vegalite.v5+json', 'application/vnd.plotly.v1+json'].map(kindOf)
    ).toEqual(['confined', 'confined', 'confined']);
  });
});

describe('HTML', () => {
  it.each([
    '<script>1</script>',
    '<ScRiPt src=x>',
    '<img src=x onerror=1>',
    '<img src=x/onerror=1>',
    '<svg onload=1>',
    '<iframe srcdoc="x">',
    '<a href="javascript:1">',
    '<form action="/logout">',
    '<style>body { display: none }</style>',
    '<button data-commandlinker-command="x">'
  ])('acts by %s', html => {
    expect(acts(html)).toBe(true);
  });

  it('of a table does not act, though pandas writes a style above it', () => {
    expect(
      acts('<div>\n<style scoped>\n.dataframe td {}\n</style>\n<table border="1"><td>one=1</td></table></div>')
    ).toBe(false);
  });
});

function spec(name: string, provisioner?: string, profile?: string) {
  const stanza = provisioner === undefined ? {} : { provisioner_name: provisioner, config: { profile } };
  return { name, metadata: { kernel_provisioner: stanza } } as never;
}

const specs: Facts['specs'] = {
  default: 'plain',
  kernelspecs: {
    plain: spec('plain'),
    ours: spec('ours', 'sandbox', 'analysis'),
    unnamed: spec('unnamed', 'sandbox'),
    far: spec('far', 'sandbox-remote', 'gpu')
  }
};
const facts: Facts = { kernel: null, named: '', specs, sandbox: undefined };
const kernel = (name: string) => ({ id: 'one', name });

describe('the origin of output', () => {
  it('is a sandbox by the kernelspec, here or on a gateway, running or only named', () => {
    expect(origin({ ...facts, kernel: kernel('ours') })).toEqual({ kind: 'sandbox', profile: 'analysis' });
    expect(origin({ ...facts, kernel: kernel('unnamed') })).toEqual({ kind: 'sandbox', profile: 'unnamed' });
    expect(origin({ ...facts, kernel: kernel('far') })).toEqual({ kind: 'sandbox', profile: 'gpu' });
    expect(origin({ ...facts, named: 'ours' })).toEqual({ kind: 'sandbox', profile: 'analysis' });
  });

  it('is a sandbox that the server lists, whatever its kernelspec', () => {
    const found = origin({ ...facts, kernel: kernel('plain'), sandbox: sandbox({ profile: 'tight' }) });
    expect(found).toEqual({ kind: 'sandbox', profile: 'tight' });
  });

  it('is plain for a plain kernel, and by the kernel there is rather than the one that is named', () => {
    expect(origin({ ...facts, kernel: kernel('plain'), named: 'ours' })).toEqual({ kind: 'plain' });
    expect(origin({ ...facts, named: 'plain' })).toEqual({ kind: 'plain' });
    expect(origin(facts)).toEqual({ kind: 'plain' });
  });

  it('is a sandbox’s where a notebook names a kernelspec that is gone', () => {
    expect(origin({ ...facts, named: 'elsewhere' })).toEqual({ kind: 'sandbox', profile: 'elsewhere' });
  });

  it('is unknown while kernelspecs are, and for a kernel that none of them is of', () => {
    expect(origin({ ...facts, specs: null, named: 'plain' })).toEqual({ kind: 'unknown' });
    expect(origin({ ...facts, kernel: kernel('elsewhere') })).toEqual({ kind: 'unknown' });
    expect(origin({ ...facts, kernel: kernel('') })).toEqual({ kind: 'unknown' });
  });
});

describe('output', () => {
  const from = { kind: 'sandbox', profile: 'analysis' } as const;

  it('of a sandbox may act where its user, or the administrator, said so of this profile', () => {
    expect(mayAct(from, undefined, new Set())).toBe(false);
    expect(mayAct(from, 'other', new Set(['other']))).toBe(false);
    expect(mayAct(from, 'analysis', new Set())).toBe(true);
    expect(mayAct(from, undefined, new Set(['analysis']))).toBe(true);
  });

  it('of a plain kernel may always act, and of an unknown one never', () => {
    expect(mayAct({ kind: 'plain' }, undefined, new Set())).toBe(true);
    expect(mayAct({ kind: 'unknown' }, 'analysis', new Set(['analysis']))).toBe(false);
  });
});

describe('a permission', () => {
  const said = { 'a.ipynb': 'x', 'sub/b.ipynb': 'y', 'sub2/c.ipynb': 'z' };

  it('goes with a notebook or folder that is renamed', () => {
    expect(moved(said, 'a.ipynb', 'new.ipynb')).toEqual({ ...said, 'a.ipynb': undefined, 'new.ipynb': 'x' });
    expect(moved(said, 'sub', 'other')).toEqual({ 'a.ipynb': 'x', 'other/b.ipynb': 'y', 'sub2/c.ipynb': 'z' });
  });

  it('is never inherited by what comes to its place', () => {
    expect(moved(said, 'unknown.ipynb', 'a.ipynb')).toEqual({ 'sub/b.ipynb': 'y', 'sub2/c.ipynb': 'z' });
    expect(moved(said, 'a.ipynb', null)).toEqual({ 'sub/b.ipynb': 'y', 'sub2/c.ipynb': 'z' });
  });

  it('is read from settings that may hold anything', () => {
    expect(permissions({ 'a.ipynb': 'x', 'b.ipynb': 1 })).toEqual({ 'a.ipynb': 'x' });
    expect(permissions(null)).toEqual({});
  });
});

describe('a chart', () => {
  const type = 'application/vnd.vega.v5+json';
  const model = (chart: unknown, metadata: object = {}) =>
    ({ trusted: true, data: { [type]: chart, 'text/plain': 'words' }, metadata, setData: () => undefined }) as never;

  it('is drawn without options of its own, and without code', () => {
    const options = { sourceHeader: '<script>', renderer: 'svg', loader: { baseURL: 'x' } };
    const shown = tamed(
      model({ marks: [], usermeta: { embedOptions: {} } }, { [type]: { embed_options: options } }),
      type
    );
    expect(shown?.data[type]).toMatchObject({ marks: [] });
    expect(shown?.data[type]).not.toHaveProperty('usermeta');
    expect(shown?.trusted).toBe(false);
    expect(shown?.metadata[type]).toEqual({
      embed_options: {
        ast: true,
        actions: { export: true, source: false, compiled: false, editor: false },
        renderer: 'svg'
      }
    });
  });

  it('is never an address to load one from', () => {
    expect(Object.keys(tamed(model('/lab'), type)?.data[type] as object)).toEqual(['config']);
  });

  it('binds nothing to an element of the page, and hears no keys and nothing of elements', () => {
    const bound = { element: '.xterm-helper-textarea', event: 'compositionend' };
    const spec = {
      config: { events: { selector: true }, axis: { grid: true } },
      signals: [
        { name: 'typed', bind: bound },
        { name: 'scale', bind: 'scales' }
      ],
      marks: [{ signals: [{ name: 'deeper', bind: { input: 'text', onfocus: 'alert(1)' } }] }],
      layer: [[{ params: [{ bind: { legend: 'keydown' } }] }]]
    };
    const shown = tamed(model(spec), type)?.data[type] as Record<string, object>;
    expect(JSON.stringify(shown)).not.toMatch(/element|onfocus|keydown/);
    expect(shown['signals']).toEqual([{ name: 'typed' }, { name: 'scale', bind: 'scales' }]);
    expect(shown['config']).toMatchObject({ axis: { grid: true }, events: { bind: 'none', selector: false } });
  });
});

describe('a figure of plotly', () => {
  const type = 'application/vnd.plotly.v1+json';
  const shown = (figure: unknown) => tamed({ data: { [type]: figure }, metadata: {} } as never, type);
  const template = { data: { scattermap: [{ type: 'scattermap' }] }, layout: { mapbox: { style: 'light' } } };

  it('is drawn where it is data, with what it says of its behaviour', () => {
    const config = { responsive: true, plotlyServerURL: 'https://x', scrollZoom: 'yes' };
    const figure = { data: [{ type: 'bar' }], layout: { title: 'a', template }, config };
    expect(shown(figure)?.data[type]).toEqual({ ...figure, config: { responsive: true } });
  });

  it('is held back where it is a map, or could become one', () => {
    expect(shown({ data: [{ type: 'choroplethmapbox' }] })).toBeNull();
    expect(shown({ data: [], frames: [{ data: [{ type: 'scattergeo' }] }] })).toBeNull();
    const buttons = [{ method: 'restyle', args: [{ type: ['scattermap'] }] }];
    expect(shown({ data: [{}], layout: { updatemenus: [{ buttons }] } })).toBeNull();
    expect(shown('not a figure')?.data[type]).toEqual({ layout: {}, config: {} });
  });
});
