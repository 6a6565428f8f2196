// The columns of the training rows: what each column is read as.

import { call } from "./api.js";
import { withNames } from "./files.js";
import { ErrorBox, Table, html, options, useData, useRef } from "./ui.js";

const IGNORE = "ignore:";
/** Form of rows without labels or answers. */
const TEXT_ONLY = '{"text"}';

/**
 * A menu for each column; `columns` is a signal with columns by key, where an empty column ignores its key.
 * `onpreview` gets the first rows as the server reads them.
 */
export function Columns({ address, columns, onchange, onpreview = () => {} }) {
  const shown = useData(
    async (signal) => {
      if (!address) return null;
      const preview = await call("POST", "/api/v1/previews", { body: { training: address, columns: columns.value }, signal });
      onpreview(preview);
      return preview;
    },
    [address, JSON.stringify(columns.value)],
  );
  const isOpen = useRef(false);
  if (!address) return null;
  if (!shown.data) return html`<${ErrorBox} error=${shown.error} again=${shown.read} />`;
  const { columns: found, keys, form } = shown.data;
  // A fault of single rows is a finding of the checks.
  const problem = form ? null : shown.data.problem;
  const choose = (name) => (event) => {
    columns.value = withColumn(columns.value, name, event.target.value);
    onchange();
  };
  isOpen.current ||= Boolean(problem) || Object.keys(columns.value).length > 0;
  const menu = ({ name }) => html`
    <select aria-label=${`Read ${name} as`} value=${chosenFor(columns.value, name)} onchange=${choose(name)}>
      ${options([["", "Automatic"], [IGNORE, "Ignore"], ...keys.map((key) => [key, key])])}
    </select>
  `;
  return html`
    ${form === TEXT_ONLY && html`<p class="box note">Rows have text only: the model learns to continue text. To classify text, add a “label” to each row.</p>`}
    <details class="further columns" open=${isOpen.current}>
      <summary>Columns${form ? `: read as ${form}` : ""}</summary>
      ${problem && html`
        <p class="problem" role="status">
          ${withNames(problem)}
          ${found.length > 0 && " Choose what each column is: “text” and “label” to classify, “prompt” and “completion” to generate answers."}
        </p>
      `}
      <${ErrorBox} error=${shown.error} />
      <${Table} caption="Columns of the training rows" columns=${[{ name: "Column", kind: "code" }, "First value", "Read as"]}
        rows=${found.map((each) => [html`<bdi>${each.name}</bdi>`, html`<bdi>${each.example}</bdi>`, menu(each)])}
        empty="The file has no columns." />
    </details>
  `;
}

/** Return the choice for a column: a key, `ignore:`, or empty for automatic. */
export function chosenFor(columns, name) {
  if (columns[name] === "") return IGNORE;
  return Object.keys(columns).find((key) => columns[key] === name) ?? "";
}

/** Return columns by key after a choice for the column `name`; a key has one column. */
export function withColumn(columns, name, choice) {
  const kept = Object.entries(columns).filter(([key, column]) => column !== name && !(key === name && column === "") && key !== choice);
  const added = choice === IGNORE ? [[name, ""]] : choice ? [[choice, name]] : [];
  return Object.fromEntries([...kept, ...added]);
}
