/** The kernel picker: profiles with what they give, one's sandboxes to go on with, snapshots to start from. */
import type { JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import type { ISessionContext, ISessionContextDialogs as Dialogs } from '@jupyterlab/apputils';
import { Dialog, ISessionContextDialogs } from '@jupyterlab/apputils';
import { PathExt } from '@jupyterlab/coreutils';
import type { TranslationBundle } from '@jupyterlab/translation';
import { ITranslator, nullTranslator } from '@jupyterlab/translation';
import { ReactWidget } from '@jupyterlab/ui-components';
import * as React from 'react';

import { explain } from '../dialogs';
import { DOMAIN } from '../names';
import type { Choice, Field, Group, Offer } from '../offers';
import { offers, profileOf, resources } from '../offers';
import { told } from '../progress';
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
    dialogs.selectKernel = async session => {
      const specs = session.specsManager.specs?.kernelspecs ?? {};
      if (sandboxes.connection !== 'ok' || !Object.values(specs).some(spec => profileOf(spec) !== null)) {
        return stock(session);
      }
      try {
        await pick(app, sandboxes, session, trans);
      } catch (error) {
        await explain(trans.__('The kernel could not be changed'), error, trans);
      }
    };
  }
};

async function pick(
  app: JupyterFrontEnd,
  sandboxes: ISandboxes,
  session: ISessionContext,
  trans: TranslationBundle
): Promise<void> {
  if (session.isDisposed) {
    return;
  }
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
  const body = new Picker(groups, `spec:${before ?? ''}`, trans);
  const auto = session.kernelPreference.autoStartDefault;
  const dialog = new Dialog<Choice>({
    title: trans.__('Select a kernel for “%1”', session.name),
    body,
    focusNodeSelector: 'input:checked',
    buttons: [Dialog.cancelButton(), Dialog.okButton({ label: trans.__('Select') })],
    checkbox:
      typeof auto === 'boolean'
        ? { label: trans.__('Always start the preferred kernel'), caption: '', checked: auto }
        : null
  });
  const result = await dialog.launch();
  if (!result.button.accept || result.value === null || session.isDisposed) {
    return;
  }
  if (typeof auto === 'boolean' && result.isChecked !== null) {
    session.kernelPreference = { ...session.kernelPreference, autoStartDefault: result.isChecked };
  }
  await take(sandboxes, session, result.value, trans);
}

async function take(
  sandboxes: ISandboxes,
  session: ISessionContext,
  choice: Choice,
  trans: TranslationBundle
): Promise<void> {
  switch (choice.kind) {
    case 'none':
      if (!session.hasNoKernel) {
        await session.shutdown();
      }
      return;
    case 'kernel':
      await session.changeKernel({ id: choice.id });
      return;
    case 'snapshot': {
      const started = sandboxes.startSnapshot(choice.id);
      const id = await told(started, trans.__('Starting from a snapshot…'), () => trans.__('Started'));
      await session.changeKernel({ id });
      return;
    }
    case 'spec': {
      if (choice.profile === null || Object.keys(choice.resources).length === 0) {
        await session.changeKernel({ name: choice.name });
        return;
      }
      const made = sandboxes.create(choice.profile, choice.resources, PathExt.basename(session.path));
      const { id } = await told(made, trans.__('Starting a sandbox…'), () => trans.__('Started'));
      await session.changeKernel({ id });
    }
  }
}

class Picker extends ReactWidget implements Dialog.IBodyWidget<Choice> {
  constructor(
    private readonly _groups: readonly Group[],
    preferred: string,
    private readonly _trans: TranslationBundle
  ) {
    super();
    this.addClass('sg-Picker');
    const all = _groups.flatMap(group => group.offers);
    this._chosen = all.find(offer => offer.key === preferred) ?? all[0];
  }

  getValue(): Choice {
    const choice = this._chosen?.choice ?? { kind: 'none' };
    return choice.kind === 'spec' ? { ...choice, resources: resources(this._written) } : choice;
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
              this._chosen = offer;
              this._written.clear();
              this.update();
            }}
          />
          <span>
            <span className="sg-Offer-text">{offer.text}</span>
            {offer.detail !== '' && <span className="sg-Offer-detail">{offer.detail}</span>}
          </span>
        </label>
        {chosen && offer.fields.length > 0 && (
          <div className="sg-Fields">{offer.fields.map(field => this._field(field))}</div>
        )}
      </div>
    );
  }

  private _field(field: Field): JSX.Element {
    const bound =
      field.maximum === null ? this._trans.__('no bound') : this._trans.__('at most %1', String(field.maximum));
    return (
      <label key={field.name} title={bound}>
        {field.label}
        <input
          type="number"
          className="jp-mod-styled"
          data-field={field.name}
          min={field.minimum}
          max={field.maximum ?? undefined}
          step={field.name === 'cpu' ? 0.1 : 1}
          placeholder={field.preset === null ? this._trans.__('none') : String(Math.round(field.preset * 10) / 10)}
          onChange={event => {
            const value = event.target.valueAsNumber;
            if (Number.isFinite(value)) {
              this._written.set(field, value);
            } else {
              this._written.delete(field);
            }
          }}
        />
      </label>
    );
  }

  private _chosen: Offer | undefined;
  private readonly _written = new Map<Field, number>();
}
