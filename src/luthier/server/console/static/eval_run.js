// The report about a run of an eval: `report_url` leads browsers here.

import { call } from "./api.js";
import { h, replace } from "./dom.js";
import { number } from "./format.js";
import { facts, hiddenName, table } from "./table.js";

/** Draw the page. */
export async function render(root, params, signal) {
  const path = `/v1/evals/${encodeURIComponent(params.eval)}/runs/${encodeURIComponent(params.run)}/report`;
  const report = await call("GET", path, { query: { format: "json" }, signal });
  document.title = `${report.name} – luthier`;
  replace(
    root,
    h("h1", null, h("bdi", null, report.name)),
    h("p", { class: "soft" }, report.model ? ["Run of an eval of ", h("bdi", null, report.model)] : "Run of an eval"),
    facts(report.facts.map(([name, value, more]) => [name, [value, more ? h("small", null, more) : null]])),
    report.tables.map((each) => [
      h("h2", null, each.caption),
      table({
        caption: each.caption,
        columns: each.columns.map(({ name, kind }) => ({ ...(name ? { name } : hiddenName("As a bar")), kind })),
        rows: each.rows.map((row) => row.map((value, index) => cell(value, each.columns[index].kind))),
      }),
      each.further ? h("p", { class: "soft" }, `${number(each.further)} more rows are not shown.`) : null,
    ]),
  );
}

function cell(value, kind) {
  if (value === "") return null;
  if (kind === "bar") return h("progress", { max: 100, value, "aria-hidden": "true" });
  return h(kind === "code" ? "code" : "bdi", null, String(value));
}
