/** The kernel picker: profiles with what they give, one's sandboxes to go on with, snapshots to start from. */
import type { JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import type { ISessionContext, ISessionContextDialogs as Dialogs } from '@jupyterlab/apputils';
import { Dialog, ISessionContextDialogs } from '@jupyterlab/apputils';
import { PathExt } from '@jupyterlab/coreutils';
import type { TranslationBundle } from '@jupyterlab/translation';
import { ITranslator, nullTranslator } from '@jupyterlab/translation';
import { ReactWidget } from '@jupyterlab/ui-components';
import * as React from 'react';

import type { Resources } from '../client';
import { Refused } from '../client';
import { explain } from '../dialogs';
import { CommandIDs, DOMAIN } from '../names';
import type { Field } from '../fields';
import { chosenOf, resources, wrong } from '../fields';
import { attached, metadataOf, sessionOf } from '../find';
import type { Choice, Group, Offer } from '../offers';
import { offers, profileOf } from '../offers';
import { told } from '../progress';
import { named } from '../quota';
import type { Choice as Remembered } from '../remembered';
import { readChoice, writeChoice } from '../remembered';
import { ISandboxes } from '../tokens';

export const picker: JupyterFrontEndPlugin<void> = {
  id: '@sandbox-gateway/labextension:picker',
  description: 'Shows in the kernel picker what sandboxes there are, and lets limits be chosen.',
  autoStart: true,
  requires: [ISandboxes, ISessionContextDialogs],
  optional: [ITranslator],
  activate: (app: JupyterFrontEnd, sandboxes: ISandboxes, dialogs: Dialogs, translator: ITranslator | null): void => {
    if (!sandboxes.available) {
      return;
    }
    const trans = (translator ?? nullTranslator).load(DOMAIN);
    const stock = dialogs.selectKernel.bind(dialogs);
    // Not a service of our own in JupyterLab's place: that would have to be disabled by our package, and a user who
    // disables this plugin, or whose server lacks our extension, would have no picker at all.
    const select = async (session: ISessionContext, proposed?: Resources): Promise<void> => {
      const specs = session.specsManager.specs?.kernelspecs ?? {};
      if (sandboxes.connection !== 'ok' || !Object.values(specs).some(spec => profileOf(spec) !== null)) {
        return stock(session);
      }
      try {
        await pick(app, sandboxes, session, trans, proposed);
      } catch (error) {
        await explain(trans.__('The kernel could not be changed'), readable(error, sandboxes), trans);
      }
    };
    dialogs.selectKernel = session => select(session);

    app.commands.addCommand(CommandIDs.pick, {
      label: trans.__('Choose Kernel and Resources…'),
      caption: trans.__('The kernel picker, with what is proposed for the notebook of a sandbox'),
      isEnabled: args => owner(app, args['id']) !== null,
      execute: async args => {
        const session = owner(app, args['id']);
        if (session !== null) {
          await select(session, typeof args['memory'] === 'number' ? { memory: args['memory'] } : undefined);
        }
      },
      describedBy: {
        args: {
          type: 'object',
          properties: {
            id: { type: 'string', description: trans.__('The sandbox’s id; else the one in front') },
            memory: { type: 'integer', description: trans.__('The memory that is proposed, in bytes') }
          }
        }
      }
    });
  }
};

/** The session that a command is about: of the widget that has this sandbox, or of the one in front. */
function owner(app: JupyterFrontEnd, id: unknown): ISessionContext | null {
  return sessionOf(typeof id === 'string' ? (attached(app, id)[0] ?? null) : app.shell.currentWidget);
}

/** A refusal with names for people in place of ids. */
function readable(error: unknown, sandboxes: ISandboxes): unknown {
  if (!(error instanceof Refused)) {
    return error;
  }
  const { status, code, message, hint, field } = error;
  const all = sandboxes.all();
  return new Refused(status, code, named(message, all), named(hint, all), field);
}

async function pick(
  app: JupyterFrontEnd,
  sandboxes: ISandboxes,
  session: ISessionContext,
  trans: TranslationBundle,
  proposed: Resources | undefined
): Promise<void> {
  if (session.isDisposed) {
    return;
  }
  const metadata = metadataOf(app, session);
  const profiles = await sandboxes.profiles();
  const sessions = [...session.sessionManager.running()];
  const own = session.session?.kernel?.id;
  const names = new Map(sessions.map(one => [one.kernel?.id, one.name]));
  const kernels = [...app.serviceManager.kernels.running()]
    .filter(({ id }) => id !== own && sandboxes.get(id) === undefined)
    .map(({ id, name }) => ({ id, text: `${names.get(id) ?? name} (${id.slice(0, 8)})` }));
  const groups = offers(
    {
      specs: session.specsManager.specs,
      profiles,
      sandboxes: sandboxes.all(),
      snapshots: sandboxes.snapshots(),
      kernels,
      attached: new Set(sessions.flatMap(one => (one.kernel ? [one.kernel.id] : []))),
      now: Date.now()
    },
    trans
  );
  const before = session.session?.kernel?.name ?? session.kernelPreference.name ?? session.specsManager.specs?.default;
  let preferred = `spec:${before ?? ''}`;
  let remembered = metadata === null ? null : readChoice(metadata);
  if (proposed !== undefined) {
    const profile = profileOf(session.specsManager.specs?.kernelspecs[before ?? '']);
    const kept = remembered?.profile === profile ? remembered?.resources : {};
    remembered = profile === null ? null : { profile, resources: { ...kept, ...proposed } };
  }
  let refused: Refused | null = null;
  for (;;) {
    const choice = await ask(session, new Picker(groups, preferred, remembered, refused, trans), trans);
    if (choice === null || session.isDisposed) {
      return;
    }
    try {
      if (!(await take(sandboxes, session, choice, trans))) {
        return;
      }
    } catch (error) {
      if (choice.kind === 'spec' && choice.profile !== null && isOfField(error)) {
        preferred = `spec:${choice.name}`;
        remembered = { profile: choice.profile, resources: choice.resources };
        refused = error;
        continue; // what was wrong is told where it was written
      }
      throw error;
    }
    if (metadata !== null && choice.kind === 'spec') {
      const { profile, resources: chosen } = choice;
      const some = profile !== null && Object.keys(chosen).length > 0;
      writeChoice(metadata, some ? { profile, resources: chosen } : null);
    }
    return;
  }
}

function isOfField(error: unknown): error is Refused {
  return error instanceof Refused && error.field.startsWith('resources.');
}

/** Show the picker; null is no. */
async function ask(session: ISessionContext, body: Picker, trans: TranslationBundle): Promise<Choice | null> {
  const auto = session.kernelPreference.autoStartDefault;
  const dialog = new PickerDialog(body, {
    title: trans.__('Select a kernel for “%1”', session.name),
    body,
    focusNodeSelector: body.refused ? '[aria-invalid=true]' : 'input:checked',
    buttons: [Dialog.cancelButton(), Dialog.okButton({ label: trans.__('Select') })],
    checkbox:
      typeof auto === 'boolean'
        ? { label: trans.__('Always start the preferred kernel'), caption: '', checked: auto }
        : null
  });
  const result = await dialog.launch();
  if (!result.button.accept || result.value === null || session.isDisposed) {
    return null;
  }
  if (typeof auto === 'boolean' && result.isChecked !== null) {
    session.kernelPreference = { ...session.kernelPreference, autoStartDefault: result.isChecked };
  }
  return result.value;
}

/** Is not accepted, by key or button, while something in it is wrong. */
class PickerDialog extends Dialog<Choice> {
  constructor(
    private readonly _picker: Picker,
    options: Partial<Dialog.IOptions<Choice>>
  ) {
    super(options);
    this._buttonsOf = options.buttons ?? [];
  }

  override resolve(index?: number): void {
    const accepts = this._buttonsOf[index ?? this._buttonsOf.length - 1]?.accept === true;
    if (!accepts || this._picker.well()) {
      super.resolve(index);
    }
  }

  private readonly _buttonsOf: readonly Dialog.IButton[];
}

/** Whether the session has what was chosen; false where JupyterLab has told already why not. */
async function take(
  sandboxes: ISandboxes,
  session: ISessionContext,
  choice: Choice,
  trans: TranslationBundle
): Promise<boolean> {
  const change = async (model: { id: string } | { name: string }): Promise<boolean> => {
    try {
      await session.changeKernel(model);
      return true;
    } catch {
      return false;
    }
  };
  const use = async (made: string): Promise<boolean> => {
    const used = await change({ id: made });
    if (!used || session.session?.kernel?.id !== made) {
      void sandboxes.remove(made).catch(() => undefined); // the notebook was closed meanwhile: nobody would know of it
    }
    return used;
  };
  switch (choice.kind) {
    case 'none':
      if (!session.hasNoKernel) {
        await session.shutdown();
      }
      return true;
    case 'kernel':
      return change({ id: choice.id });
    case 'snapshot': {
      const started = sandboxes.startSnapshot(choice.id);
      return use(await told(started, trans.__('Starting from a snapshot…'), () => ''));
    }
    case 'spec': {
      if (choice.profile === null || Object.keys(choice.resources).length === 0) {
        return change({ name: choice.name });
      }
      const name = PathExt.basename(session.path);
      return use((await sandboxes.create(choice.profile, choice.resources, name, session.path)).id);
    }
  }
}

class Picker extends ReactWidget implements Dialog.IBodyWidget<Choice> {
  constructor(
    private readonly _groups: readonly Group[],
    preferred: string,
    private readonly _remembered: Remembered | null,
    private readonly _refused: Refused | null,
    private readonly _trans: TranslationBundle
  ) {
    super();
    this.addClass('sg-Picker');
    const all = _groups.flatMap(group => group.offers);
    this._choose(all.find(offer => offer.key === preferred) ?? all[0]);
  }

  getValue(): Choice {
    const choice = this._chosen?.choice ?? { kind: 'none' };
    return choice.kind === 'spec' ? { ...choice, resources: resources(this._written) } : choice;
  }

  /** Whether it is shown again, because the server refused what was written. */
  get refused(): boolean {
    return this._refused !== null;
  }

  /** Whether nothing is wrong; else it is shown, and the first wrong field has the focus. */
  well(): boolean {
    const bad = [...this._written].find(([field, value]) => wrong(field, value, this._trans) !== '')?.[0];
    if (bad === undefined) {
      return true;
    }
    this._rare = this._rare || bad.rare;
    this.update();
    void this.renderPromise?.then(() => {
      this.node.querySelector<HTMLElement>(`[data-field="${bad.name}"]`)?.focus();
    });
    return false;
  }

  protected override render(): JSX.Element {
    return (
      <>
        {this._groups.map((group, place) => (
          <fieldset key={place}>
            {group.label !== '' && <legend>{group.label}</legend>}
            {group.offers.map(offer => this._offer(offer))}
          </fieldset>
        ))}
      </>
    );
  }

  private _choose(offer: Offer | undefined): void {
    this._chosen = offer;
    const { choice, fields = [] } = offer ?? {};
    const known = choice?.kind === 'spec' && choice.profile !== null && choice.profile === this._remembered?.profile;
    this._written = known ? chosenOf(fields, this._remembered?.resources ?? {}) : new Map<Field, number | string>();
    const { field = '' } = this._refused ?? {};
    this._rare = fields.some(one => one.rare && (this._written.has(one) || field === `resources.${one.name}`));
  }

  private _offer(offer: Offer): JSX.Element {
    const chosen = offer.key === this._chosen?.key;
    return (
      <div key={offer.key} className="sg-Offer" data-chosen={chosen}>
        <label>
          <input
            type="radio"
            name="sg-offer"
            checked={chosen}
            onChange={() => {
              this._choose(offer);
              this._touched = true;
              this.update();
            }}
          />
          <span>
            <span className="sg-Offer-text">{offer.text}</span>
            {offer.detail !== '' && <span className="sg-Offer-detail">{offer.detail}</span>}
          </span>
        </label>
        {chosen && offer.fields.length > 0 && this._fields(offer.fields)}
      </div>
    );
  }

  private _fields(fields: readonly Field[]): JSX.Element {
    const rare = fields.filter(field => field.rare);
    return (
      <div className="sg-Fields">
        {fields.filter(field => !field.rare).map(field => this._field(field))}
        {rare.length > 0 && (
          <details
            open={this._rare}
            onToggle={event => {
              this._rare = event.currentTarget.open;
            }}
          >
            <summary>{this._trans.__('More')}</summary>
            <div>{rare.map(field => this._field(field))}</div>
          </details>
        )}
      </div>
    );
  }

  private _field(field: Field): JSX.Element {
    const value = this._written.get(field);
    const ours = value === undefined ? '' : wrong(field, value, this._trans);
    // What the server found wrong holds until something else is written there.
    const place = `resources.${field.name}`;
    const theirs =
      this._refused?.field === place && !this._touched ? this._refused.message.replace(`${place}: `, '') : '';
    const bad = ours || theirs;
    const about = `sg-field-${field.name}`;
    const shared = {
      'data-field': field.name,
      'aria-invalid': bad !== '',
      'aria-describedby': bad === '' ? undefined : about,
      className: 'jp-mod-styled'
    };
    return (
      <label key={field.name}>
        {field.label}
        {field.options.length > 0 ? (
          <select
            {...shared}
            value={value === undefined ? '' : String(value)}
            onChange={event => this._write(field, event.target.value === '' ? null : event.target.value)}
          >
            <option value="">{this._trans.__('%1 (as the profile has it)', field.preset ?? '')}</option>
            {field.options
              .filter(option => option !== field.preset)
              .map(option => (
                <option key={option} value={option}>
                  {option}
                </option>
              ))}
          </select>
        ) : (
          <input
            {...shared}
            type="number"
            title={this._bounds(field)}
            step="any"
            defaultValue={value}
            placeholder={this._preset(field)}
            onChange={event => {
              const { valueAsNumber, validity } = event.target;
              this._write(field, Number.isFinite(valueAsNumber) || validity.badInput ? valueAsNumber : null);
            }}
          />
        )}
        {bad !== '' && (
          <span id={about} className="sg-Wrong" role="alert">
            {bad}
          </span>
        )}
      </label>
    );
  }

  private _write(field: Field, value: number | string | null): void {
    if (value === null) {
      this._written.delete(field);
    } else {
      this._written.set(field, value);
    }
    this._touched = true;
    this.update();
  }

  private _bounds({ minimum, maximum }: Field): string {
    return maximum === null
      ? this._trans.__('at least %1', minimum)
      : this._trans.__('from %1 to %2', minimum, maximum);
  }

  private _preset({ preset }: Field): string {
    return typeof preset === 'number' ? String(Math.round(preset * 10) / 10) : this._trans.__('none');
  }

  private _chosen: Offer | undefined;
  private _written = new Map<Field, number | string>();
  /** Whether the fields are shown that few people need. */
  private _rare = false;
  private _touched = false;
}
