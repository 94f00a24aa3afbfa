/** What a sandbox uses, beside its chip while somebody points at it. */
import type { TranslationBundle } from '@jupyterlab/translation';
import { ReactWidget } from '@jupyterlab/ui-components';
import { Widget } from '@lumino/widgets';
import * as React from 'react';

import { Meters } from './meters';
import type { Use } from './uses';

/** Shows itself below `anchor` until it is disposed. */
export class UsageCard extends ReactWidget {
  constructor(
    private readonly _anchor: HTMLElement,
    private readonly _look: () => { sentence: string; uses: readonly Use[] } | null,
    private readonly _trans: TranslationBundle
  ) {
    super();
    this.addClass('sg-Card');
    this.node.setAttribute('role', 'tooltip');
    Widget.attach(this, document.body);
    void this.renderPromise?.then(() => this.update());
  }

  protected override render(): JSX.Element | null {
    const shown = this._look();
    if (shown === null) {
      return null;
    }
    const box = this._anchor.getBoundingClientRect();
    this.node.style.top = `${box.bottom + 4}px`;
    // Never beyond the window's edge; how wide it is, is known when it was drawn once.
    this.node.style.left = `max(4px, min(${box.left}px, 100vw - ${this.node.offsetWidth + 4}px))`;
    return (
      <>
        <p>{shown.sentence}</p>
        <Meters uses={shown.uses} label={name => this._trans.__('%1 in the last minutes', name)} />
      </>
    );
  }
}
