// Data: the list of files, and one file with findings, fixes and rows.

import { call, may } from "./api.js";
import { Columns } from "./columns.js";
import { DataField, EMPTY } from "./data_field.js";
import { addressOf, idOf, learnNames, remember, withNames } from "./files.js";
import { bytes, number, shortName, time } from "./format.js";
import { Inspection, Working, inspect, tokensView } from "./inspection.js";
import {
  Chip, DataTable, Download, Empty, ErrorBox, ExampleCard, Field, Heading, PageButtons, Pending, confirmed, go, html, link, options, toast,
  useAction, useData, usePages, useSignal,
} from "./ui.js";

const FILES = 100;
const ROWS = 20;
/** Characters of a value that are shown. */
const LONGEST_VALUE = 600;
/** Milliseconds after the last key until a search begins. */
const PATIENCE = 300;
/** The filter of `Rows` that shows all rows. */
export const ALL = { rule: "", lines: "" };

/** The list of files. */
export function Files() {
  const pages = usePages();
  const after = pages.value.at(-1);
  const { data, error, read } = useData(async (signal) => {
    const files = await call("GET", "/v1/files", { query: { limit: FILES, after }, signal });
    files.data.forEach(remember);
    return files;
  }, [after]);
  const field = useSignal(EMPTY);
  const open = () => field.value.address && go("data", field.value.address);
  const remove = useAction(async (file) => {
    const asked = { title: `Delete ${file.filename}?`, text: "Models that were trained on the file stay.", verb: "Delete", danger: true };
    if (!(await confirmed(asked))) return;
    await call("DELETE", `/v1/files/${encodeURIComponent(file.id)}`);
    toast(`${file.filename} is deleted.`);
    await read();
  });
  // A filter covers the files of one page only.
  const isWhole = after === null && !data?.has_more;
  if (!data) return html`<${Pending} title="Data" error=${error} read=${read} />`;
  const columns = [
    { name: "File", value: (each) => each.filename, show: (each) => html`<a href=${link("data", addressOf(each.id))}><bdi>${each.filename}</bdi></a>` },
    { name: "Size", kind: "number", value: (each) => each.bytes, show: (each) => bytes(each.bytes) },
    { name: "Purpose", value: (each) => each.purpose },
    { name: "Stored", kind: "nowrap", value: (each) => each.created_at, show: (each) => time(new Date(1000 * each.created_at).toISOString()) },
    may("develop") && {
      name: "Delete", hidden: true,
      show: (each) => html`<button type="button" class="quiet" aria-label=${`Delete ${each.filename}`} onclick=${() => remove.run(each)}>Delete</button>`,
    },
  ].filter(Boolean);
  return html`
    <${Heading} title="Data" />
    <p>Open a file to read its rows, to see what the checks find, and to fix it.</p>
    ${may("develop") && html`
      <section class="box"><${DataField} id="opened" label="Bring a file" field=${field} onchange=${open}
        help="JSON Lines, CSV, Parquet or text. The address of an object in a bucket works as well." /></section>
    `}
    <${ErrorBox} error=${error} again=${read} /><${ErrorBox} error=${remove.error} />
    <${DataTable} caption="Files" filter=${isWhole && "name"} columns=${columns} rows=${data.data} size=${FILES}
      empty=${html`
        <${Empty} text="There are no files yet. Bring a file, or store the rows of a sample.">
          ${may("develop") && html`<a class="button primary" href=${link("home")}>Try a sample</a>`}
        <//>
      `} />
    <${PageButtons} pages=${pages} next=${data.has_more ? data.last_id : null} noun="files" />
  `;
}

/** The page of one file; the query has the filter. */
export function Data({ params, query }) {
  const { address } = params;
  const known = useData(async (signal) => {
    await learnNames([address], signal);
    return shortName(withNames(address));
  }, [address]);
  const columns = useSignal({});
  const found = useSignal(null);
  const state = JSON.stringify([address, columns.value]);
  // Checks without a base model need no download.
  const checks = useData(async (signal) => {
    const body = { training: address, columns: columns.value, base: "none" };
    if (may("develop")) await inspect(body, signal, (report) => (found.value = { ...report, state }));
    return state;
  }, [state]);
  const lines = useSignal({ ...ALL, lines: query.get("lines") ?? "" });
  if (!known.data) return html`<${Pending} title="Data" ...${known} />`;
  const trainLink = `${link("new")}?${new URLSearchParams({ rows: address, columns: JSON.stringify(columns.value) })}`;
  return html`
    <p class="soft"><a href=${link("data")}>Data</a> /</p>
    <${Heading} title=${known.data} tab=${`Data: ${known.data}`}>
      ${idOf(address) && html`<${Download} path=${`/v1/files/${encodeURIComponent(idOf(address))}/content`} name=${known.data} />`}
      ${may("develop") && found.value?.verdict !== "refused" && html`<a class="button primary" href=${trainLink}>Train on these rows</a>`}
    <//>
    ${may("develop") && html`<${Columns} address=${address} columns=${columns} onchange=${() => {}} />`}
    <${ErrorBox} error=${checks.error} again=${checks.read} />
    ${!checks.error && checks.data !== state && may("develop") && html`
      <${Working} key=${state} text=${found.value?.state === state ? "Checking all rows" : "Checking the first rows"} />
    `}
    ${found.value && html`
      <${Inspection} ...${found.value} address=${address} columns=${columns.value} showRows=${showRowsOf(address, lines)} onfixed=${(made) => link("data", made.address)} />
    `}
    <${Rows} key=${lines.value.lines} address=${address} columns=${columns.value} lines=${lines} />
  `;
}

/** Return a function that shows the rows of a rule; the lines of a folder belong to several files. */
export function showRowsOf(address, lines) {
  if (address.endsWith("/")) return null;
  return (rule) => {
    lines.value = { rule: rule.rule, lines: [...new Set(rule.places.flatMap((each) => [each, ...(each.others ?? [])]).map((each) => each.line ?? each.row).filter(Boolean))].join(",") };
    document.getElementById("rows").scrollIntoView();
  };
}

/** Rows of a file with search, a filter by label, and pages. */
export function Rows({ address, columns, lines }) {
  const [search, label, slice, timer] = [useSignal(""), useSignal(""), useSignal(""), useSignal(null)];
  const pages = usePages();
  const position = pages.value.at(-1);
  const query = { address, search: search.value, label: label.value, slice: slice.value, lines: lines.value.lines, limit: ROWS, position };
  const { data, error, read } = useData((signal) => call("GET", "/api/v1/rows", { query, signal }), [JSON.stringify(query)]);
  const first = () => (pages.value = [null]);
  const typed = ({ target }) => {
    clearTimeout(timer.peek());
    timer.value = setTimeout(() => (first(), (search.value = target.value)), PATIENCE);
  };
  if (!data) return html`<section id="rows"><h2>Rows</h2>${error ? html`<${ErrorBox} error=${error} again=${read} />` : html`<p class="soft">Loading …</p>`}</section>`;
  const isFiltered = search.value || label.value || slice.value || lines.value.lines;
  return html`
    <section id="rows">
      <h2>Rows</h2>
      <div class="fields">
        <${Field} id="search" label="Search"><input id="search" type="search" placeholder="text in a row" autocomplete="off" oninput=${typed} /><//>
        ${data.labels.length > 0 && html`
          <${Field} id="label" label="Label">
            <select id="label" value=${label.value} onchange=${(event) => (first(), (label.value = event.target.value))}>
              ${options([["", "all labels"], ...data.labels.map((each) => [each.label, `${each.label} (${number(each.rows)})`])])}
            </select>
          <//>
        `}
        ${data.slices.length > 0 && html`
          <${Field} id="slice" label="Part of the rows">
            <select id="slice" value=${slice.value} onchange=${(event) => (first(), (slice.value = event.target.value))}>
              ${options([["", "all rows"], ...data.slices.map((each) => [each, each.replace("=", ": ")])])}
            </select>
          <//>
        `}
      </div>
      ${lines.value.lines && html`
        <p><${Chip} kind="note">${lines.value.rule ? `Rows of ${lines.value.rule}` : "Chosen rows"}<//>
          ${" "}<button type="button" class="quiet" onclick=${() => (lines.value = ALL)}>Show all rows</button></p>
      `}
      <${ErrorBox} error=${error} again=${read} />
      <p class="soft" role="status" id="found">
        ${isFiltered ? `${number(data.found)} of ${number(data.total)} rows` : `${number(data.total)} rows`}${data.form ? `, ${data.form}` : ""}.
        ${!data.is_complete && " The file has more rows; a search covers these rows only."}
      </p>
      ${data.rows.map((row) => html`<${RowCard} key=${row.line} row=${row} address=${address} columns=${columns} />`)}
      ${!data.rows.length && html`<${Empty} text="No row matches." />`}
      <${PageButtons} pages=${pages} next=${data.next} noun="rows" labels=${["Previous", "Next"]} />
    </section>
  `;
}

/** A row as written, and after a click as the model learns it. */
function RowCard({ row, address, columns }) {
  const shown = useSignal(null);
  const { busy, error, run } = useAction(async () => {
    const { report } = await call("POST", "/api/v1/inspections", { body: { training: address, columns, line: row.line } });
    shown.value = { base: report.base, row: report.summaries.learning?.splits?.train?.shown?.[0] };
  });
  const parts = Object.entries(row.record).map(([name, value]) => [name, shorten(textOf(value))]);
  const button = !shown.value && may("develop") && html`
    <button type="button" class="quiet" disabled=${busy} onclick=${run}>
      ${busy ? "Loading the tokenizer …" : "As the model sees it"}<span class="visually-hidden">: row ${row.line}</span>
    </button>
  `;
  return html`
    <${ExampleCard} title=${html`Row ${number(row.line)} ${button}`} parts=${parts}>
      ${shown.value && html`<${ModelInput} ...${shown.value} />`}
      <${ErrorBox} error=${error} />
    <//>
  `;
}

function ModelInput({ base, row }) {
  if (!row) return html`<p class="soft">This row cannot be learned. The findings say why.</p>`;
  const count = row.learned.filter(Boolean).length;
  return html`
    <p class="help">
      ${number(row.tokens.length)} tokens of ${base}${count ? `, ${number(count)} learned (marked)` : ""}.
      ${row.taught && html` Learned: <mark>${String(row.taught)}</mark>`}
    </p>
    <pre class="row" tabindex="0">${tokensView(row.tokens, row.learned)}</pre>
  `;
}

/** Return a value as text; turns of a conversation as lines. */
export function textOf(value) {
  if (typeof value === "string") return value;
  const isTurn = (each) => typeof each?.role === "string" && each.content !== undefined;
  if (Array.isArray(value) && value.length && value.every(isTurn))
    return value.map((each) => `${each.role}: ${textOf(each.content)}`).join("\n");
  return JSON.stringify(value);
}

const shorten = (text) => (text.length > LONGEST_VALUE ? `${text.slice(0, LONGEST_VALUE)}…` : text);
