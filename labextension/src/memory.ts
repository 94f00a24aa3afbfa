/** What the user said of the output of notebooks, by their paths: in the settings, and so with the user. */
import type { Contents } from '@jupyterlab/services';
import type { ISettingRegistry } from '@jupyterlab/settingregistry';
import type { ISignal } from '@lumino/signaling';
import { Signal } from '@lumino/signaling';

import type { Permissions } from './output';
import { moved, permissions } from './output';

interface Said {
  /** Notebooks whose output may act, each with the profile for which that was said. */
  readonly allowed: Permissions;
  /** Notebooks with output of a sandbox and another kernel since, each with that sandbox's profile. */
  readonly suspect: Permissions;
}

/** A change of what was said; made here at once, and to what is stored by then: other pages write there, too. */
type Edit = (said: Said) => Said;

export class Memory {
  constructor(
    private readonly _registry: Memory.Registry | null,
    contents: Pick<Contents.IManager, 'fileChanged'>,
    private readonly _plugin: string
  ) {
    this.ready = this._load();
    contents.fileChanged.connect((_, change) => {
      const before = change.oldValue?.path;
      if ((change.type === 'rename' || change.type === 'delete') && before !== undefined) {
        const after = change.type === 'rename' ? (change.newValue?.path ?? null) : null;
        this._edit(({ allowed, suspect }) => ({
          allowed: moved(allowed, before, after),
          suspect: moved(suspect, before, after)
        }));
      }
    });
  }

  /** Resolves when it is known what the user said. */
  readonly ready: Promise<void>;

  get changed(): ISignal<this, void> {
    return this._changed;
  }

  /** Resolves when all that was said is stored. */
  get stored(): Promise<void> {
    return this._storing;
  }

  allowed(path: string): string | undefined {
    return this._said.allowed[path];
  }

  allow(path: string, profile: string | null): void {
    this._edit(said => ({ ...said, allowed: put(said.allowed, path, profile) }));
  }

  suspect(path: string): string | undefined {
    return this._said.suspect[path];
  }

  /** Its output is a sandbox's, whatever kernel it has now. */
  note(path: string, profile: string): void {
    this._edit(said => ({ ...said, suspect: put(said.suspect, path, profile) }));
  }

  private async _load(): Promise<void> {
    try {
      this._settings = (await this._registry?.load(this._plugin)) ?? null;
      this._settings?.changed.connect(this._read, this);
    } catch (error) {
      console.warn(error);
    }
    this._read();
  }

  /** What is stored, as long as nothing of this page's is on its way there. */
  private _read(): void {
    if (this._pending === 0) {
      this._said = this._kept();
      this._changed.emit();
    }
  }

  private _kept(): Said {
    const { allowed, suspect } = this._settings?.composite ?? {};
    return { allowed: permissions(allowed), suspect: permissions(suspect) };
  }

  private _edit(edit: Edit): void {
    this._said = edit(this._said);
    this._changed.emit();
    if (this._settings !== null) {
      this._pending += 1;
      this._storing = this._storing.then(() => this._store(edit));
    }
  }

  private async _store(edit: Edit): Promise<void> {
    try {
      await this._registry?.reload(this._plugin);
      const before = this._kept();
      const after = edit(before);
      for (const key of ['allowed', 'suspect'] as const) {
        if (JSON.stringify(before[key]) !== JSON.stringify(after[key])) {
          await this._settings?.set(key, { ...after[key] });
        }
      }
    } catch (error) {
      console.warn(error);
    } finally {
      this._pending -= 1;
    }
    this._read();
  }

  private readonly _changed = new Signal<this, void>(this);
  private _settings: Memory.Settings | null = null;
  private _said: Said = { allowed: {}, suspect: {} };
  private _storing: Promise<void> = Promise.resolve();
  /** Changes that are not stored yet. */
  private _pending = 0;
}

export namespace Memory {
  /** Of the settings of a plugin, what is needed. */
  export type Settings = Pick<ISettingRegistry.ISettings, 'composite' | 'set'> & { changed: ISignal<unknown, void> };
  export interface Registry {
    load(plugin: string): Promise<Settings>;
    reload(plugin: string): Promise<unknown>;
  }
}

function put(of: Permissions, path: string, profile: string | null): Permissions {
  const rest = Object.fromEntries(Object.entries(of).filter(([name]) => name !== path));
  return profile === null ? rest : { ...rest, [path]: profile };
}
