import { LabIcon } from '@jupyterlab/ui-components';

/** A box seen from above its corner; a snapshot is the box with a line below. */
const BOX =
  'M8 1.2 14 4.4v7.2L8 14.8 2 11.6V4.4L8 1.2Zm0 1.7L4.6 4.7 8 6.5l3.4-1.8L8 2.9ZM3.5 6v4.7l3.75 2V8L3.5 6Zm5.25 6.7 3.75-2V6L8.75 8v4.7Z';
const KEPT = 'M3 2h10v1.5H3V2Zm1.5 3h7v1.5h-7V5ZM2 8h12v6H2V8Zm1.5 1.5v3h9v-3h-9Zm3 .8h3v1.4h-3v-1.4Z';

const MOON = 'M6.2 1.6A6.6 6.6 0 1 0 14.4 9.8 5.6 5.6 0 0 1 6.2 1.6Z';

const BARS = 'M3.5 2.5h3.2v11H3.5v-11Zm5.8 0h3.2v11H9.3v-11Z';

function drawn(path: string): string {
  return `<svg xmlns="http://www.w3.org/2000/svg" width="16" height="16" viewBox="0 0 16 16"><path class="jp-icon3 jp-icon-selectable" fill="#616161" d="${path}"/></svg>`;
}

export const sandboxIcon = new LabIcon({ name: 'sandbox-gateway:sandbox', svgstr: drawn(BOX) });
export const snapshotIcon = new LabIcon({ name: 'sandbox-gateway:snapshot', svgstr: drawn(KEPT) });
export const pauseIcon = new LabIcon({ name: 'sandbox-gateway:pause', svgstr: drawn(BARS) });
export const suspendIcon = new LabIcon({ name: 'sandbox-gateway:suspend', svgstr: drawn(MOON) });
