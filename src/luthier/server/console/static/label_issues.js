// The labels of a job that are worth a look, as a table that grows by pages.

import { call } from "./api.js";
import { h, replace } from "./dom.js";
import { withNames } from "./files.js";
import { number, percent, shortName } from "./format.js";
import { errorBox } from "./router.js";
import { table } from "./table.js";

const PAGE = 50;

/**
 * @param {Object} job a completed job
 * @param {AbortSignal} signal
 * @returns {?HTMLElement} null if the job has no label issues
 */
export function labelIssuesSection(job, signal) {
  const { issues = 0, rows } = job.result?.label_issues ?? {};
  if (!issues) return null;
  const list = h("div");
  const problem = h("div");
  const more = h("button", { type: "button", hidden: true, onclick: () => load() }, "Show more");
  const found = [];
  let position = 0;

  async function load() {
    more.disabled = true;
    replace(problem);
    try {
      const path = `/api/v1/jobs/${encodeURIComponent(job.name)}/label-issues`;
      const page = await call("GET", path, { query: { limit: PAGE, position }, signal });
      found.push(...page.issues);
      position = page.next ?? null;
      more.hidden = position === null;
      replace(list, issuesTable(found));
    } catch (error) {
      if (error.name !== "AbortError") replace(problem, errorBox(error));
    } finally {
      more.disabled = false;
    }
  }

  load();
  return h(
    "section",
    { id: "label-issues" },
    h("h2", null, "Labels worth a look"),
    h(
      "p",
      null,
      `${number(issues)} of ${number(rows)} labels differ from those of similar rows. Many of them can be right: `,
      "read the rows, correct wrong labels in your file and train again.",
    ),
    list,
    problem,
    more,
  );
}

function issuesTable(found) {
  return table({
    caption: "Rows with label issues, the largest difference first",
    columns: ["Line", "Label", "Similar rows", { name: "Probability", kind: "number" }, "Text"],
    rows: found.map((each) => [
      `${shortName(withNames(each.file))}:${each.line}`,
      h("bdi", null, each.label),
      h("bdi", null, each.likely_label),
      percent(each.probability),
      h("bdi", null, each.text),
    ]),
  });
}
