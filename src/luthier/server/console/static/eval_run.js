// The report of an eval run. Browsers that open the `report_url` of a run are redirected here.

import { call } from "./api.js";
import { number } from "./format.js";
import { Facts, Heading, Pending, Table, html, useData } from "./ui.js";

/** The page. */
export function EvalRun({ params }) {
  const path = `/v1/evals/${encodeURIComponent(params.eval)}/runs/${encodeURIComponent(params.run)}/report`;
  const found = useData((signal) => call("GET", path, { signal }));
  const report = found.data;
  if (!report) return html`<${Pending} title="Eval run" ...${found} />`;
  return html`
    <${Heading} title=${report.name} />
    <p class="soft">Eval run${report.model && html` of <bdi>${report.model}</bdi>`}</p>
    <${Facts} pairs=${report.facts.map(([name, value, more]) => [name, [value, more && html`<small>${more}</small>`]])} />
    ${report.tables.map(
      ({ caption, columns, rows, further }) => html`
        <h2>${caption}</h2>
        <${Table} caption=${caption}
          columns=${columns.map(({ name, kind }) => ({ name: name || "Bar", hidden: !name, kind }))}
          rows=${rows.map((row) => row.map((value, index) => cellOf(value, columns[index].kind)))} />
        ${further > 0 && html`<p class="soft">${number(further)} more rows are not shown.</p>`}
      `,
    )}
  `;
}

function cellOf(value, kind) {
  if (value === "") return null;
  if (kind === "bar") return html`<progress max="100" value=${value} aria-hidden="true" />`;
  return kind === "code" ? html`<code>${value}</code>` : html`<bdi>${String(value)}</bdi>`;
}
