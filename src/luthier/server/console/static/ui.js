// Preact, htm and signals, with the hooks and components that all pages share. Text of data is never parsed as HTML.

import { call, may, messageOf } from "./api.js";
import { age, time } from "./format.js";
import htm from "./vendor/htm.js";
import { useEffect, useLayoutEffect, useRef } from "./vendor/preact-hooks.js";
import { h, render } from "./vendor/preact.js";
import { signal, useSignal } from "./vendor/signals.js";

export { render, signal, useEffect, useRef, useSignal };
export const html = htm.bind(h);

/** Return the address of a page, from segments such as `"jobs", name`. */
export const link = (...segments) => `#/${segments.map(encodeURIComponent).join("/")}`;

/** Open a page. */
export function go(...segments) {
  window.location.hash = link(...segments);
}

/** Report a text to screen readers. */
export function announce(text) {
  const status = document.getElementById("status");
  if (status) status.textContent = text;
}

/** The open question and the newest messages of the page, which `Overlays` shows. */
const question = signal(null);
const toasts = signal([]);
const TOAST_SECONDS = 6;

/** Show a message for some seconds, with an optional button `{label, act}`. */
export function toast(text, button) {
  const shown = { text, button };
  announce(text);
  toasts.value = [...toasts.value, shown];
  setTimeout(() => closeToast(shown), 1000 * TOAST_SECONDS);
}

function closeToast(shown) {
  toasts.value = toasts.value.filter((each) => each !== shown);
}

/**
 * Ask `{title, text, verb, other, danger, typed}` in a dialog. Resolves to whether the user confirms, or to "other" for the
 * button `other`; `typed` must be typed first.
 */
export function confirmed(asked) {
  return new Promise((resolve) => (question.value = { ...asked, resolve }));
}

/** Dialog and messages above the page. */
export function Overlays() {
  return html`
    ${question.value && html`<${Question} key=${question.value} ...${question.value} />`}
    <div class="toasts">
      ${toasts.value.map((each) => html`
        <div class="toast">
          ${each.text}
          ${each.button && html`
            <button type="button" class="quiet" onclick=${() => (closeToast(each), each.button.act())}>${each.button.label}</button>
          `}
        </div>
      `)}
    </div>
  `;
}

function Question({ title, text, verb, other, danger, typed, resolve }) {
  const dialog = useRef(null);
  const value = useSignal("");
  useEffect(() => {
    dialog.current.showModal();
    // A question of one page must not stay above another.
    const leave = () => dialog.current?.close();
    addEventListener("hashchange", leave);
    return () => removeEventListener("hashchange", leave);
  }, []);
  const close = () => {
    question.value = null;
    const { returnValue } = dialog.current;
    resolve(returnValue === "other" ? "other" : returnValue === "yes");
  };
  return html`
    <dialog ref=${dialog} onclose=${close} aria-labelledby="question">
      <form method="dialog">
        <h2 id="question">${title}</h2>
        <p>${text}</p>
        ${typed && html`
          <label for="typed-name">Type <bdi><code>${typed}</code></bdi> to confirm</label>
          <input id="typed-name" autocomplete="off" spellcheck="false" ...${bound(value, "oninput")} />
        `}
        <div class="actions">
          <button value="yes" class=${danger ? "danger" : "primary"} disabled=${typed && value.value.trim() !== typed}>${verb}</button>
          ${other && html`<button value="other">${other}</button>`}
          <button value="no" formnovalidate>Cancel</button>
        </div>
      </form>
    </dialog>
  `;
}

/**
 * Call `load` with an AbortSignal when the component appears and when `deps` change. Returns `{data, error, read}`:
 * `data` stay until new data are loaded, and `read` loads again.
 */
export function useData(load, deps = []) {
  const found = useSignal({ data: null, error: null });
  const running = useRef(null);
  const latest = useRef(load);
  latest.current = load;
  const read = useRef(async () => {
    running.current?.abort();
    const { signal: left } = (running.current = new AbortController());
    try {
      const data = await latest.current(left);
      if (!left.aborted) found.value = { data, error: null };
    } catch (error) {
      if (!left.aborted && error.name !== "AbortError") found.value = { ...found.value, error };
    }
  }).current;
  useEffect(() => {
    read();
    return () => running.current.abort();
  }, deps);
  return { ...found.value, read };
}

/** Call `act` with an AbortSignal every `seconds` while the component and the tab are visible. */
export function usePolling(seconds, act) {
  const latest = useRef(null);
  latest.current = { seconds, act };
  useEffect(() => {
    const left = new AbortController();
    (async () => {
      while (await pause(latest.current.seconds, left.signal)) await latest.current.act(left.signal);
    })();
    return () => left.abort();
  }, []);
}

/** Return a signal that is aborted when the component disappears. */
export function useLeaving() {
  const leaving = useRef(null);
  leaving.current ??= new AbortController();
  useEffect(() => () => leaving.current.abort(), []);
  return leaving.current.signal;
}

/**
 * An action of the user. Returns `{busy, error, run}`: `run` calls `act` unless an earlier call is busy. A link that `act`
 * returns is opened, unless the user has left the component meanwhile.
 */
export function useAction(act) {
  const state = useSignal({ busy: false, error: null });
  const left = useLeaving();
  const run = async (...given) => {
    given[0]?.preventDefault?.();
    if (state.value.busy) return;
    state.value = { busy: true, error: null };
    const open = (address) => {
      if (address && !left.aborted) window.location.hash = address;
    };
    const error = await act(...given).then(open).then(() => null, (failure) => failure);
    state.value = { busy: false, error: error?.name === "AbortError" ? null : error };
  };
  return { ...state.value, run };
}

/** Wait for at least 3 seconds, then until the tab is visible. Returns false once `left` is aborted. */
export async function pause(seconds, left) {
  await new Promise((done) => {
    const end = () => (clearTimeout(timer), left.removeEventListener("abort", end), done());
    const timer = setTimeout(end, 1000 * Math.max(3, seconds));
    left.addEventListener("abort", end);
  });
  while (document.hidden && !left.aborted)
    await new Promise((done) => {
      document.addEventListener("visibilitychange", done, { once: true, signal: left });
      left.addEventListener("abort", done, { once: true });
    });
  return !left.aborted;
}

/** The heading of a page. A page that appears is announced, and its heading gets the focus. */
export function Heading({ title, tab = title, chips, children }) {
  const heading = useRef(null);
  useEffect(() => {
    document.title = `${tab} – luthier`;
    announce(document.title);
    // A user who was faster than the page keeps the focus.
    if (!document.getElementById("main").contains(document.activeElement)) heading.current.focus();
  }, [tab]);
  return html`
    <div class="heading">
      <h1 tabindex="-1" ref=${heading}><bdi>${title}</bdi></h1>
      ${chips}
      <div class="actions">${children}</div>
    </div>
  `;
}

/** A page whose data are still loaded, or cannot be loaded. */
export function Pending({ title, error, read }) {
  if (!error) return html`<p class="soft">Loading …</p>`;
  return html`<${Heading} title=${title} /><${ErrorBox} error=${error} again=${read} />`;
}

/** Pages that do what a command does. */
const PAGES = [
  [/^luthier (clean|inspect)/, "data", "Data"], [/^luthier (compare|evaluate)/, "evaluations", "Evaluate"], [/^luthier tune/, "new", "New job"],
  [/^luthier live capture/, "review", "Review"], [/^luthier live (deploy|promote|rollback)/, "deployments", "Deployments"],
  [/^luthier study/, "studies", "Studies"], [/^luthier (chat|generate|predict)/, "playground", "Playground"],
];

/** A text of the server, with `code` in another font and a link after a command that a page replaces. */
export function Said({ text }) {
  return text.split(/`([^`]+)`/).map((part, index) => {
    if (index % 2 === 0) return part;
    const [, page, name] = PAGES.find(([command]) => may("read") && command.test(part)) ?? [];
    return html`<code>${part}</code>${page && html` (<a href=${link(page)}>${name}</a>)`}`;
  });
}

/** An error with its location and, if `again` is given, a button. */
export function ErrorBox({ error, again, children }) {
  if (!error) return null;
  return html`
    <div class="box error" role="alert">
      <p><${Said} text=${messageOf(error)} /></p>
      ${error.parameter && html`<p class="soft">Parameter: <code>${error.parameter}</code></p>`}
      ${children && html`<p class="soft">${children}</p>`}
      ${again && ![400, 404].includes(error.status) && html`<button type="button" onclick=${again}>Try again</button>`}
    </div>
  `;
}

/** A button that saves the response of a path as a file. */
export function Download({ path, name, label = "Download", accept = "application/octet-stream" }) {
  const { busy, error, run } = useAction(async () => {
    const file = URL.createObjectURL(await call("GET", path, { accept }));
    Object.assign(document.createElement("a"), { href: file, download: name }).click();
    setTimeout(() => URL.revokeObjectURL(file), 10_000);
  });
  return html`<button type="button" disabled=${busy} onclick=${run}>${label}</button><${ErrorBox} error=${error} />`;
}

/** A coloured word; `kind` is good, note, warning, error or empty. */
export const Chip = ({ kind = "", children }) => html`<span class=${`chip ${kind}`}>${children}</span>`;

/** An age with the moment as tooltip. */
export const Age = ({ at }) => html`<time datetime=${at} title=${time(at)}>${age(at)}</time>`;

/** A place without content: a text, and links or buttons that change that. */
export const Empty = ({ text, children }) => html`
  <div class="empty"><p class="soft">${text}</p>${children && html`<div class="actions">${children}</div>`}</div>
`;

/** Texts of one example next to each other. Parts are `[name, text, kind]`, with the kinds of `Chip`. */
export function ExampleCard({ title, parts, children }) {
  return html`
    <figure class="example">
      ${title && html`<figcaption class="soft">${title}</figcaption>`}
      <dl>${parts.map(([name, text, kind]) => html`<div class=${kind}><dt>${name}</dt><dd class="said" dir="auto">${text}</dd></div>`)}</dl>
      ${children}
    </figure>
  `;
}

/** A labelled form field. */
export function Field({ id, label, help, hidden, hideLabel, problem, children }) {
  return html`
    <div hidden=${hidden}>
      <label for=${id} class=${hideLabel ? "visually-hidden" : null}>${label}</label>
      ${children}
      ${help && html`<p class="help" id=${`${id}-help`}>${help}</p>`}
      ${problem && html`<p class="problem" id=${`problem-${id}`}>${problem}</p>`}
    </div>
  `;
}

/** Attributes of a field whose value is a signal. */
export const bound = (value, kind = "onchange") => ({ value, [kind]: (event) => (value.value = event.target.value) });

/** Options of a select, from pairs of value and label. */
export function options(pairs) {
  return pairs.map(([value, label]) => html`<option value=${value}>${label}</option>`);
}

/**
 * A table. On a narrow screen each row is a block of lines, named by the columns (style.css). Columns are names or
 * `{name, kind, hidden, sort, sorted}`, with the kinds number, code, nowrap and wide; `sort` is called by a button in the
 * heading. The first cell of a row is its heading.
 */
export function Table({ caption, showCaption, columns, rows, empty = "Nothing to show." }) {
  const region = useRef(null);
  const focused = region.current?.contains(document.activeElement);
  useLayoutEffect(() => {
    // The focus of a button that disappeared stays in the table.
    if (focused && document.activeElement === document.body) region.current?.focus({ preventScroll: true });
  });
  if (!rows.length) return empty?.type ? empty : html`<${Empty} text=${empty} />`;
  const all = columns.map((each) => (typeof each === "string" ? { name: each } : each));
  const hide = (hidden) => (hidden ? "visually-hidden" : null);
  return html`
    <div class=${all.some((each) => each.sort) ? "scroll sortable" : "scroll"} tabindex="0" role="region" aria-label=${caption} ref=${region}>
      <table>
        <caption class=${hide(!showCaption)}>${caption}</caption>
        <thead><tr>
          ${all.map((each) => html`<th scope="col" class=${each.kind} aria-sort=${each.sorted || null}><${Head} ...${each} /></th>`)}
        </tr></thead>
        <tbody>${rows.map((row) => html`<tr>${row.map((cell, index) => cellOf(cell, index, all[index]))}</tr>`)}</tbody>
      </table>
    </div>
  `;
}

function Head({ name, hidden, sort, sorted }) {
  if (!sort) return html`<span class=${hidden ? "visually-hidden" : null}>${name}</span>`;
  const arrow = { ascending: " ▲", descending: " ▼" }[sorted] ?? "";
  return html`<button type="button" class="quiet" onclick=${sort}>${name}<span aria-hidden="true">${arrow}</span></button>`;
}

/**
 * A table of objects that the page has complete, with a filter, sorting and pages. Columns of `Table` with `value`, which
 * returns the text or number of a row, and `show`, which returns the cell if it is not the value.
 */
export function DataTable({ caption, columns, rows, empty, filter, size = 25 }) {
  const [wanted, order, page] = [useSignal(""), useSignal(null), useSignal(0)];
  const id = `filter-${caption.replace(/\W+/g, "-")}`;
  const text = wanted.value.trim().toLowerCase();
  const kept = rows.filter((row) => !text || columns.some(({ value }) => String(value?.(row) ?? "").toLowerCase().includes(text)));
  if (order.value) kept.sort(compareBy(columns[order.value.index].value, order.value.down));
  const last = Math.max(0, Math.ceil(kept.length / size) - 1);
  const shown = Math.min(page.value, last);
  const sortBy = (index) => () => {
    const { index: before, down } = order.value ?? {};
    order.value = { index, down: before === index ? !down : columns[index].kind === "number" };
    page.value = 0;
  };
  const heads = columns.map(({ value, show, ...each }, index) => ({
    ...each,
    sort: value && !each.hidden && rows.length > 1 && sortBy(index),
    sorted: order.value?.index === index && (order.value.down ? "descending" : "ascending"),
  }));
  const cells = kept.slice(shown * size, (shown + 1) * size).map((row) => columns.map(({ value, show }) => (show ?? value)(row)));
  return html`
    ${(rows.length > size || (filter && rows.length > 0)) && html`
      <div class="narrow">
        <label for=${id}>Filter</label>
        <input type="search" id=${id} class="filter" placeholder=${filter} autocomplete="off" ...${bound(wanted, "oninput")} />
      </div>
    `}
    <${Table} caption=${caption} columns=${heads} rows=${cells} empty=${text ? "No row has this text." : empty} />
    ${last > 0 && html`
      <div class="actions pages">
        <button type="button" disabled=${shown === 0} onclick=${() => (page.value = shown - 1)}>Previous</button>
        <button type="button" disabled=${shown === last} onclick=${() => (page.value = shown + 1)}>Next</button>
        <span class="soft" role="status">Page ${shown + 1} of ${last + 1}, ${kept.length.toLocaleString("en")} rows</span>
      </div>
    `}
  `;
}

function compareBy(value, down) {
  const sign = down ? -1 : 1;
  const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true }));
  // Rows without a value are last in both orders.
  const isMissing = (each) => (each ?? "") === "";
  return (first, second) => {
    const [a, b] = [value(first), value(second)];
    return isMissing(a) || isMissing(b) ? isMissing(a) - isMissing(b) : sign * compare(a, b);
  };
}

/** Positions in a list of the API at which the pages begin, up to the page that is shown: a signal for `PageButtons`. */
export const usePages = () => useSignal([null]);

/** Buttons for a list that the API returns page by page; `next` is the position of the next page. */
export function PageButtons({ pages, next, noun, labels: [back, on] = ["Newer", "Older"] }) {
  const turn = (to) => {
    pages.value = to;
    window.scrollTo(0, 0);
    announce(`Page ${to.length} of the ${noun}`);
  };
  return html`
    <div class="actions pages">
      ${pages.value.length > 1 && html`<button type="button" onclick=${() => turn(pages.value.slice(0, -1))}>${back}</button>`}
      ${(next ?? null) !== null && html`<button type="button" onclick=${() => turn([...pages.value, next])}>${on}</button>`}
    </div>
  `;
}

function cellOf(cell, index, { name, kind, hidden }) {
  const label = hidden ? null : name;
  return index
    ? html`<td class=${kind} data-name=${label}>${cell}</td>`
    : html`<th scope="row" class=${kind} data-name=${label}>${cell}</th>`;
}

/** A list of names and values; pairs without a value are left out. */
export function Facts({ pairs }) {
  const known = pairs.filter((pair) => pair && (pair[1] ?? "") !== "");
  return html`<dl class="facts">
    ${known.map(([name, value]) => html`<div><dt>${name}</dt><dd>${value}</dd></div>`)}
  </dl>`;
}

/** A heading with content; nothing without content. */
export function Section({ title, children }) {
  const shown = [children].flat(9).some(Boolean);
  return shown ? html`<section><h2>${title}</h2>${children}</section>` : null;
}
