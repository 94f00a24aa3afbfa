/** Renderers of output that may not act until it is allowed to. */
import type { IRenderMime, IRenderMimeRegistry } from '@jupyterlab/rendermime';
import type { TranslationBundle } from '@jupyterlab/translation';
import type { ISignal } from '@lumino/signaling';
import { Signal } from '@lumino/signaling';
import { Panel, Widget } from '@lumino/widgets';

import { acts, kindOf, tamed } from './output';

/** What is asked before each rendering. */
export interface Policy {
  readonly active: boolean;
  /** `active` is not what it was. */
  readonly changed: ISignal<unknown, void>;
  /** Something was held back. */
  held(): void;
}

type Model = IRenderMime.IMimeModel;
type Renderer = IRenderMime.IRenderer;

/**
 * Have everything that is rendered with `registry` obey `policy`. The registry itself is changed, and no copy made of
 * it: cells, views of outputs, the inspector and the log hold on to the one of their notebook.
 */
export function guard(registry: IRenderMimeRegistry, policy: Policy, trans: TranslationBundle): void {
  const stock = registry.createRenderer.bind(registry);
  const add = registry.addFactory.bind(registry);
  const added = new Signal<IRenderMimeRegistry, readonly string[]>(registry);
  registry.addFactory = (factory, rank) => {
    add(factory, rank);
    added.emit(factory.mimeTypes);
  };

  const confined = (mimeType: string, changes: Partial<IRenderMime.IRendererOptions>): Renderer => {
    const factory = registry.getFactory(mimeType);
    if (factory === undefined) {
      return stock(mimeType);
    }
    const { resolver, sanitizer, linkHandler, latexTypesetter, markdownParser, trustHandler, translator } =
      registry as IRenderMimeRegistry & Pick<IRenderMime.IRendererOptions, 'translator'>;
    const options = { resolver, sanitizer, linkHandler, latexTypesetter, markdownParser, trustHandler, translator };
    return factory.createRenderer({ mimeType, ...options, ...changes });
  };
  const sanitizer = withoutCommands(registry.sanitizer, policy);

  registry.createRenderer = mimeType => {
    const kind = kindOf(mimeType);
    if (kind === 'plain') {
      return stock(mimeType);
    }
    if (kind === 'sanitised') {
      return distrusting(confined(mimeType, { sanitizer }), mimeType, policy);
    }
    if (policy.active) {
      return refusing(stock(mimeType), policy);
    }
    return new Exchange(policy, added, mimeType, {
      active: () => stock(mimeType),
      passive: model => {
        const chart = kind === 'confined' ? tamed(model, mimeType) : null;
        if (chart !== null) {
          return [confined(mimeType, { resolver: closed(policy) }), chart];
        }
        policy.held();
        const other = registry.mimeTypes.find(
          one => one !== mimeType && one in model.data && kindOf(one) !== 'active' && registry.getFactory(one)
        );
        return [new Held(other === undefined ? null : registry.createRenderer(other), mimeType, trans), model];
      }
    });
  };
}

/** A renderer that sanitises, and again renders its last model when that may act, or no longer. */
function distrusting(renderer: Renderer, mimeType: string, policy: Policy): Renderer {
  const render = renderer.renderModel.bind(renderer);
  let last: Model | null = null;
  const show = async (model: Model): Promise<void> => {
    last = model;
    const { active } = policy;
    // What is positioned in it stays in it, so that nothing of it can lie over the page.
    renderer.toggleClass('sg-Confined', !active);
    if (!active && acts(text(model.data[mimeType]))) {
      policy.held();
    }
    await render(active ? model : distrusted(model));
  };
  renderer.renderModel = show;
  const again = (): void => {
    if (last !== null) {
      show(last).catch((error: unknown) => console.warn(error));
    }
  };
  policy.changed.connect(again);
  renderer.disposed.connect(() => policy.changed.disconnect(again));
  return renderer;
}

/** A renderer made while output might act: it is not given what comes when that is over. */
function refusing(renderer: Renderer, policy: Policy): Renderer {
  const render = renderer.renderModel.bind(renderer);
  renderer.renderModel = async model => {
    if (policy.active) {
      await render(model);
    } else {
      policy.held();
    }
  };
  return renderer;
}

interface Faces {
  active: () => Renderer;
  passive: (model: Model) => [Renderer, Model];
}

/** One of two renderers, changed for the other when the policy does. */
class Exchange extends Panel implements IRenderMime.IRenderer {
  constructor(
    private readonly _policy: Policy,
    private readonly _added: ISignal<unknown, readonly string[]>,
    private readonly _mimeType: string,
    private readonly _faces: Faces
  ) {
    super();
    _policy.changed.connect(this._change, this);
    _added.connect(this._replaced, this);
  }

  override dispose(): void {
    this._policy.changed.disconnect(this._change, this);
    this._added.disconnect(this._replaced, this);
    super.dispose();
  }

  async renderModel(model: Model): Promise<void> {
    this._model = model;
    if (this._policy.active) {
      if (!this._isActive) {
        this._put(this._faces.active());
      }
      this._isActive = true;
      await this._shown?.renderModel(model);
    } else {
      const [renderer, shown] = this._faces.passive(model);
      this._put(renderer);
      this._isActive = false;
      await renderer.renderModel(shown);
    }
  }

  private _put(renderer: Renderer): void {
    this._shown?.dispose();
    this._shown = renderer;
    this.addWidget(renderer);
  }

  private _change(): void {
    if (this._model !== null) {
      this.renderModel(this._model).catch((error: unknown) => console.warn(error));
    }
  }

  /** Widgets' renderers are replaced when their manager is there: those made before know none. */
  private _replaced(_: unknown, mimeTypes: readonly string[]): void {
    if (this._isActive && mimeTypes.includes(this._mimeType)) {
      this._isActive = false;
      this._change();
    }
  }

  private _shown: Renderer | null = null;
  private _model: Model | null = null;
  private _isActive = false;
}

/** What stands for an output that is held back: a line that says so, and the output's other form. */
class Held extends Panel implements IRenderMime.IRenderer {
  constructor(
    private readonly _other: Renderer | null,
    mimeType: string,
    trans: TranslationBundle
  ) {
    super();
    const line = document.createElement('p');
    line.className = 'sg-Held';
    line.textContent =
      mimeType === 'application/vnd.jupyter.widget-view+json'
        ? trans.__('An interactive widget is held back.')
        : trans.__('Active output is held back: %1', mimeType);
    this.addWidget(new Widget({ node: line }));
    if (_other !== null) {
      this.addWidget(_other);
    }
  }

  async renderModel(model: Model): Promise<void> {
    await this._other?.renderModel(model);
  }
}

function distrusted(model: Model): Model {
  return {
    trusted: false,
    data: model.data,
    metadata: model.metadata,
    setData: options => model.setData(options)
  };
}

/** Finds nothing: a chart that loads data reads, with the page's login, whatever the server has, and can pass it on. */
function closed(policy: Policy): IRenderMime.IResolver {
  const refuse = (url: string): Promise<string> => {
    policy.held();
    return Promise.reject(new Error(`held back: ${url}`));
  };
  return { isLocal: url => !/^data:/i.test(url), resolveUrl: refuse, getDownloadUrl: refuse };
}

/** JupyterLab's sanitiser leaves buttons that run commands of the application when they are clicked on. */
function withoutCommands(stock: IRenderMime.ISanitizer, policy: Policy): IRenderMime.ISanitizer {
  const own = Object.create(stock) as IRenderMime.ISanitizer;
  own.sanitize = (dirty, options) => {
    const clean = stock.sanitize(dirty, options);
    if (policy.active || !clean.includes('data-commandlinker')) {
      return clean;
    }
    const { body } = new DOMParser().parseFromString(clean, 'text/html');
    for (const node of body.querySelectorAll('[data-commandlinker-command], [data-commandlinker-args]')) {
      node.removeAttribute('data-commandlinker-command');
      node.removeAttribute('data-commandlinker-args');
    }
    return body.innerHTML;
  };
  return own;
}

function text(value: unknown): string {
  return Array.isArray(value) ? value.join('') : String(value ?? '');
}
