"use strict";(self.rspackChunk_sandbox_gateway_labextension=self.rspackChunk_sandbox_gateway_labextension||[]).push([[1],{28(r,o,e){var t=e(29),a=e.n(t),i=e(30),n=(e.n(i))()(a());n.push([r.id,`/* Colours come from JupyterLab's themes. Each look has its form, too, so that no colour has to be told apart. */

.sg-ChipHolder {
  display: flex;
  align-items: center;
}

.sg-Chip {
  display: inline-flex;
  align-items: center;
  gap: 5px;
  height: 22px;
  margin: 0 4px;
  padding: 0 6px;
  border: var(--jp-border-width) solid var(--jp-border-color1);
  border-radius: var(--jp-border-radius);
  background: var(--jp-layout-color1);
  color: var(--jp-ui-font-color1);
  font-family: var(--jp-ui-font-family);
  font-size: var(--jp-ui-font-size1);
  line-height: 1;
  white-space: nowrap;
  cursor: pointer;
}

.sg-Chip:hover {
  background: var(--jp-layout-color2);
}

.sg-Chip:focus-visible {
  outline: 2px solid var(--jp-brand-color1);
  outline-offset: -1px;
}

.sg-Chip-detail {
  max-width: 18ch;
  overflow: hidden;
  text-overflow: ellipsis;
  white-space: nowrap;
  color: var(--jp-ui-font-color2);
  font-variant-numeric: tabular-nums;
}

.sg-Chip-caret {
  display: inline-flex;
}

.sg-Chip-caret svg {
  width: 10px;
  height: 10px;
}

.sg-Chip[data-look='failed'] .sg-Chip-label {
  color: var(--jp-error-color0);
}

.sg-Chip[data-look='unknown'] {
  opacity: 0.6;
}

.sg-Dot {
  --sg-color: var(--jp-ui-font-color3);

  box-sizing: border-box;
  flex: none;
  width: 9px;
  height: 9px;
  border: 2px solid var(--sg-color);
  border-radius: 50%;
  background: var(--sg-color);
}

.sg-Dot[data-look='running'] {
  --sg-color: var(--jp-success-color1);
}

.sg-Dot[data-look='busy'] {
  --sg-color: var(--jp-success-color1);

  background: linear-gradient(90deg, var(--sg-color) 50%, transparent 50%);
}

.sg-Dot[data-look='paused'] {
  --sg-color: var(--jp-warn-color1);

  border-width: 0 3px;
  border-radius: 0;
  background: transparent;
}

.sg-Dot[data-look='suspended'] {
  --sg-color: var(--jp-brand-color1);

  background: transparent;
}

.sg-Dot[data-look='changing'] {
  --sg-color: var(--jp-brand-color1);

  border-right-color: transparent;
  background: transparent;
  animation: sg-turn 1s linear infinite;
}

.sg-Dot[data-look='failed'] {
  --sg-color: var(--jp-error-color1);

  border-radius: 1px;
  transform: rotate(45deg);
}

.sg-Dot[data-look='ended'] {
  border-radius: 1px;
}

.sg-Dot[data-look='unknown'] {
  background: transparent;
  border-style: dotted;
}

@keyframes sg-turn {
  to {
    transform: rotate(1turn);
  }
}

@media (prefers-reduced-motion: reduce) {
  .sg-Dot[data-look='changing'] {
    animation: none;
  }
}

.sg-Meter {
  display: inline-block;
  width: 32px;
  height: 4px;
  overflow: hidden;
  border-radius: 2px;
  background: var(--jp-layout-color3);
}

.sg-Meter > span {
  display: block;
  height: 100%;
  background: var(--jp-brand-color1);
}

.sg-Chip[data-full='true'] .sg-Meter > span,
.sg-Meter[data-full='true'] > span {
  background: var(--jp-error-color1);
}

/* Where the notebook is narrow, the details go first. */
.sg-ChipHolder[data-room='narrow'] .sg-Chip-detail,
.sg-ChipHolder[data-room='narrow'] .sg-Meter,
.sg-ChipHolder[data-room='tiny'] .sg-Chip-detail,
.sg-ChipHolder[data-room='tiny'] .sg-Meter,
.sg-ChipHolder[data-room='tiny'] .sg-Chip-label {
  display: none;
}

.sg-Spoken {
  position: absolute;
  width: 1px;
  height: 1px;
  overflow: hidden;
  clip-path: inset(50%);
  white-space: nowrap;
}

.sg-Lines {
  max-width: 46em;
  white-space: pre-line;
}

.sg-Points {
  max-width: 46em;
  margin: 0;
  padding-left: 1.4em;
}

.sg-Points li + li {
  margin-top: 0.5em;
}

.sg-Name label {
  display: grid;
  gap: 4px;
}

.sg-Details {
  max-width: 60em;
}

.sg-Details th {
  padding: 2px 16px 2px 0;
  color: var(--jp-ui-font-color2);
  font-weight: normal;
  text-align: left;
  vertical-align: top;
}

.sg-Details td {
  padding: 2px 0;
}

.sg-Details h3 {
  margin: 1em 0 0.4em;
  font-size: var(--jp-ui-font-size1);
}

.sg-Happened {
  margin: 0;
  padding: 0;
  list-style: none;
}

.sg-Happened li {
  line-height: 1.5;
}

.sg-Happened time {
  color: var(--jp-ui-font-color2);
  font-variant-numeric: tabular-nums;
}

.sg-Sparkline {
  width: 60px;
  height: 16px;
  margin-left: 8px;
  vertical-align: middle;
}

.sg-Sparkline polyline {
  fill: none;
  stroke: var(--jp-brand-color1);
  stroke-width: 1.2;
}

.sg-Log {
  min-width: 30em;
  max-width: 70em;
  max-height: 60vh;
  margin: 0;
  padding: 8px;
  overflow: auto;
  background: var(--jp-layout-color2);
  color: var(--jp-content-font-color1);
  font-family: var(--jp-code-font-family);
  font-size: var(--jp-code-font-size);
  white-space: pre-wrap;
}

.sg-RunningItem::part(positioning-region),
.sg-RunningItem::part(content-region),
.sg-SnapshotItem::part(positioning-region),
.sg-SnapshotItem::part(content-region) {
  height: 42px;
}

.sg-Entry {
  display: grid;
  grid-template-columns: minmax(0, 1fr) auto;
  align-items: center;
  column-gap: 6px;
  line-height: 1.35;
}

.sg-Entry-choice {
  position: absolute;
  left: -2px;
  width: 14px;
  height: 14px;
  margin: 0;
  opacity: 0;
}

.sg-Entry:hover > .sg-Entry-choice,
.sg-Entry-choice:focus-visible,
.sg-Entry-choice:checked,
.sg-Entry-choice[data-any='true'] {
  opacity: 1;
}

.sg-Entry:has(> .sg-Entry-choice) {
  position: relative;
  user-select: none;
  padding-left: 16px;
}

.jp-SearchableSessions .sg-Entry-choice {
  display: none;
}

.sg-Entry-notebook {
  color: var(--jp-ui-font-color2);
  font-size: var(--jp-ui-font-size0);
}

.sg-Entry-name,
.sg-Entry-state {
  overflow: hidden;
  text-overflow: ellipsis;
  white-space: nowrap;
}

.sg-Entry-state {
  grid-row: 2;
  color: var(--jp-ui-font-color2);
  font-size: var(--jp-ui-font-size0);
  font-variant-numeric: tabular-nums;
}

.sg-Entry-state .sg-Dot {
  display: inline-block;
  width: 8px;
  height: 8px;
  margin-right: 5px;
}

.sg-Entry-act {
  display: inline-flex;
  grid-row: 1 / span 2;
  grid-column: 2;
  align-items: center;
  justify-content: center;
  width: 24px;
  height: 24px;
  padding: 0;
  border: 0;
  border-radius: var(--jp-border-radius);
  background: transparent;
  cursor: pointer;
}

.sg-Entry-act:hover {
  background: var(--jp-layout-color3);
}

.sg-Entry-act:focus-visible {
  outline: 2px solid var(--jp-brand-color1);
}

.sg-Entry-act svg {
  width: 14px;
  height: 14px;
}

.sg-Picker {
  min-width: min(38em, 80vw);
  max-height: 60vh;
  overflow: auto;
}

.sg-Picker fieldset {
  margin: 0 0 10px;
  padding: 0;
  border: 0;
}

.sg-Picker legend {
  padding: 0 0 2px;
  color: var(--jp-ui-font-color2);
  font-size: var(--jp-ui-font-size0);
  font-weight: 600;
  letter-spacing: 0.5px;
  text-transform: uppercase;
}

.sg-Offer {
  padding: 4px 6px;
  border-radius: var(--jp-border-radius);
}

.sg-Offer[data-chosen='true'] {
  background: var(--jp-layout-color2);
}

.sg-Offer > label {
  display: flex;
  align-items: flex-start;
  gap: 6px;
  cursor: pointer;
}

.sg-Offer-text,
.sg-Offer-detail {
  display: block;
}

.sg-Offer-detail {
  color: var(--jp-ui-font-color2);
  font-size: var(--jp-ui-font-size0);
}

.sg-Fields {
  display: grid;
  grid-template-columns: repeat(auto-fill, minmax(11em, 1fr));
  gap: 8px;
  padding: 6px 0 4px 24px;
}

.sg-Fields label {
  color: var(--jp-ui-font-color2);
  font-size: var(--jp-ui-font-size0);
}

.sg-Fields input {
  width: 100%;
}

.sg-Head {
  position: sticky;
  z-index: 1;
  top: 0;
  padding: 3px 12px;
  background: var(--jp-layout-color1);
  border-bottom: var(--jp-border-width) solid var(--jp-border-color2);
  color: var(--jp-ui-font-color2);
  font-size: var(--jp-ui-font-size0);
}

.sg-Head:empty {
  display: none;
}

.sg-Totals {
  display: flex;
  flex-wrap: wrap;
  gap: 2px 12px;
  margin: 0;
  padding: 0;
  list-style: none;
  font-variant-numeric: tabular-nums;
}

.sg-Totals .sg-Meter {
  margin-left: 5px;
  vertical-align: middle;
}

.sg-Chosen {
  display: flex;
  flex-wrap: wrap;
  align-items: center;
  gap: 4px;
  color: var(--jp-ui-font-color1);
}

.sg-Chosen label {
  display: inline-flex;
  align-items: center;
  gap: 4px;
  margin-right: auto;
}

.sg-Chosen button {
  display: inline-flex;
  align-items: center;
  justify-content: center;
  width: 24px;
  height: 20px;
  padding: 0;
  border: var(--jp-border-width) solid var(--jp-border-color1);
  border-radius: var(--jp-border-radius);
  background: var(--jp-layout-color1);
  color: inherit;
  font: inherit;
  cursor: pointer;
}

.sg-Chosen button:hover:enabled {
  background: var(--jp-layout-color2);
}

.sg-Chosen button:focus-visible {
  outline: 2px solid var(--jp-brand-color1);
}

.sg-Chosen button:disabled {
  opacity: 0.5;
  cursor: default;
}

.sg-Chosen button svg {
  display: block;
  width: 12px;
  height: 12px;
}

.sg-Card {
  position: fixed;
  z-index: 10000;
  box-sizing: border-box;
  width: max-content;
  padding: 8px 10px;
  border: var(--jp-border-width) solid var(--jp-border-color1);
  border-radius: var(--jp-border-radius);
  background: var(--jp-layout-color1);
  box-shadow: var(--jp-elevation-z4);
  color: var(--jp-ui-font-color1);
  font-family: var(--jp-ui-font-family);
  font-size: var(--jp-ui-font-size1);
  pointer-events: none;
}

.sg-Card p {
  margin: 0;
}

.sg-Meters .sg-Meter {
  display: block;
}

.sg-Meters .sg-Sparkline {
  display: block;
  margin-left: 2px;
}

.sg-Meters {
  margin-top: 6px;
  border-collapse: collapse;
  font-variant-numeric: tabular-nums;
}

.sg-Meters th {
  padding: 1px 10px 1px 0;
  color: var(--jp-ui-font-color2);
  font-weight: normal;
  text-align: left;
}

.sg-Meters td {
  padding: 1px 6px 1px 0;
  vertical-align: middle;
  white-space: nowrap;
}

.sg-Use .sg-Meter {
  margin-left: 8px;
  vertical-align: middle;
}

.sg-Bar {
  display: flex;
  flex-wrap: wrap;
  align-items: center;
  gap: 6px 10px;
  padding: 5px 10px;
  border-bottom: var(--jp-border-width) solid var(--jp-border-color1);
  border-left: 4px solid var(--jp-warn-color1);
  background: var(--jp-layout-color2);
  color: var(--jp-ui-font-color1);
  font-size: var(--jp-ui-font-size1);
}

.sg-Bar > span {
  flex: 1 1 24em;
}

.sg-Bar button {
  border: var(--jp-border-width) solid var(--jp-border-color1);
}

.sg-Held {
  margin: 0;
  padding-left: 8px;
  color: var(--jp-ui-font-color2);
  font-size: var(--jp-ui-font-size1);
  font-style: italic;
}

/* What is positioned in an output that is not trusted stays in it. */
.sg-Confined {
  contain: layout paint;
}
`,""]),e.d(o,{},{A:n})},31(r,o,e){var t=e(29),a=e.n(t),i=e(30),n=(e.n(i))()(a());n.push([r.id,`.sg-SavedBar {
  display: flex;
  flex-wrap: wrap;
  align-items: center;
  gap: 4px 8px;
  min-height: 34px;
  padding: 3px 10px;
  border-bottom: var(--jp-border-width) solid var(--jp-border-color1);
  background: var(--jp-layout-color2);
  color: var(--jp-ui-font-color1);
  font-size: var(--jp-ui-font-size1);
}

.sg-SavedBar.sg-mod-narrow {
  min-height: 92px;
}

.sg-SavedBar-text {
  flex: 1 1 16em;
}

.sg-Fields .sg-Wrong {
  display: block;
  color: var(--jp-error-color1);
}

.sg-Fields select {
  width: 100%;
}

.sg-Fields details {
  grid-column: 1 / -1;
}

.sg-Fields summary {
  cursor: pointer;
  color: var(--jp-ui-font-color2);
  font-size: var(--jp-ui-font-size0);
}

.sg-Fields details > div {
  display: grid;
  grid-template-columns: repeat(auto-fill, minmax(11em, 1fr));
  gap: 8px;
  padding-top: 6px;
}
`,""]),e.d(o,{},{A:n})},30(r){r.exports=function(r){var o=[];return o.toString=function(){return this.map(function(o){var e="",t=void 0!==o[5];return o[4]&&(e+="@supports (".concat(o[4],") {")),o[2]&&(e+="@media ".concat(o[2]," {")),t&&(e+="@layer".concat(o[5].length>0?" ".concat(o[5]):""," {")),e+=r(o),t&&(e+="}"),o[2]&&(e+="}"),o[4]&&(e+="}"),e}).join("")},o.i=function(r,e,t,a,i){"string"==typeof r&&(r=[[null,r,void 0]]);var n={};if(t)for(var s=0;s<this.length;s++){var l=this[s][0];null!=l&&(n[l]=!0)}for(var p=0;p<r.length;p++){var d=[].concat(r[p]);t&&n[d[0]]||(void 0!==i&&(void 0===d[5]||(d[1]="@layer".concat(d[5].length>0?" ".concat(d[5]):""," {").concat(d[1],"}")),d[5]=i),e&&(d[2]&&(d[1]="@media ".concat(d[2]," {").concat(d[1],"}")),d[2]=e),a&&(d[4]?(d[1]="@supports (".concat(d[4],") {").concat(d[1],"}"),d[4]=a):d[4]="".concat(a)),o.push(d))}},o}},29(r){r.exports=function(r){return r[1]}},22(r){var o=[];function e(r){for(var e=-1,t=0;t<o.length;t++)if(o[t].identifier===r){e=t;break}return e}function t(r,t){for(var a={},i=[],n=0;n<r.length;n++){var s=r[n],l=t.base?s[0]+t.base:s[0],p=a[l]||0,d="".concat(l," ").concat(p);a[l]=p+1;var c=e(d),g={css:s[1],media:s[2],sourceMap:s[3],supports:s[4],layer:s[5]};if(-1!==c)o[c].references++,o[c].updater(g);else{var u=function(r,o){var e=o.domAPI(o);return e.update(r),function(o){o?(o.css!==r.css||o.media!==r.media||o.sourceMap!==r.sourceMap||o.supports!==r.supports||o.layer!==r.layer)&&e.update(r=o):e.remove()}}(g,t);t.byIndex=n,o.splice(n,0,{identifier:d,updater:u,references:1})}i.push(d)}return i}r.exports=function(r,a){var i=t(r=r||[],a=a||{});return function(r){r=r||[];for(var n=0;n<i.length;n++){var s=e(i[n]);o[s].references--}for(var l=t(r,a),p=0;p<i.length;p++){var d=e(i[p]);0===o[d].references&&(o[d].updater(),o.splice(d,1))}i=l}}},24(r){var o={};r.exports=function(r,e){var t=function(r){if(void 0===o[r]){var e=document.querySelector(r);if(window.HTMLIFrameElement&&e instanceof window.HTMLIFrameElement)try{e=e.contentDocument.head}catch(r){e=null}o[r]=e}return o[r]}(r);if(!t)throw Error("Couldn't find a style target. This probably means that the value for the 'insert' parameter is invalid.");t.appendChild(e)}},26(r){r.exports=function(r){var o=document.createElement("style");return r.setAttributes(o,r.attributes),r.insert(o,r.options),o}},25(r,o,e){r.exports=function(r){var o=e.nc;o&&r.setAttribute("nonce",o)}},23(r){r.exports=function(r){if("u"<typeof document)return{update:function(){},remove:function(){}};var o=r.insertStyleElement(r);return{update:function(e){var t,a,i;t="",e.supports&&(t+="@supports (".concat(e.supports,") {")),e.media&&(t+="@media ".concat(e.media," {")),(a=void 0!==e.layer)&&(t+="@layer".concat(e.layer.length>0?" ".concat(e.layer):""," {")),t+=e.css,a&&(t+="}"),e.media&&(t+="}"),e.supports&&(t+="}"),(i=e.sourceMap)&&"u">typeof btoa&&(t+="\n/*# sourceMappingURL=data:application/json;base64,".concat(btoa(unescape(encodeURIComponent(JSON.stringify(i))))," */")),r.styleTagTransform(t,o,r.options)},remove:function(){var r;null===(r=o).parentNode||r.parentNode.removeChild(r)}}}},27(r){r.exports=function(r,o){if(o.styleSheet)o.styleSheet.cssText=r;else{for(;o.firstChild;)o.removeChild(o.firstChild);o.appendChild(document.createTextNode(r))}}},21(r,o,e){var t=e(22),a=e.n(t),i=e(23),n=e.n(i),s=e(24),l=e.n(s),p=e(25),d=e.n(p),c=e(26),g=e.n(c),u=e(27),f=e.n(u),h=e(28),v={};v.styleTagTransform=f(),v.setAttributes=d(),v.insert=l().bind(null,"head"),v.domAPI=n(),v.insertStyleElement=g(),a()(h.A,v),h.A&&h.A.locals&&h.A.locals;var m=e(31),x={};x.styleTagTransform=f(),x.setAttributes=d(),x.insert=l().bind(null,"head"),x.domAPI=n(),x.insertStyleElement=g(),a()(m.A,x),m.A&&m.A.locals&&m.A.locals}}]);