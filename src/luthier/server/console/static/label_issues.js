// Labels of a completed job that may be wrong: keep or change each, then write a corrected file.

import { call, may, pathOf } from "./api.js";
import { idOf, learnNames, placeOf, remember } from "./files.js";
import { number, percent } from "./format.js";
import { ErrorBox, Table, html, link, toast, useAction, useData, useSignal } from "./ui.js";

const PAGE = 50;

/** Rows with label issues, as a table that grows page by page. */
export function LabelIssues({ job }) {
  const { issues, rows } = job.result.label_issues;
  const kept = `luthier.labels.${job.name}`;
  const [found, next, decided, written] = [useSignal([]), useSignal(0), useSignal(JSON.parse(sessionStorage.getItem(kept) ?? "{}")), useSignal([])];
  const page = useData(async (signal) => {
    const path = `${pathOf("jobs", job.name)}/label-issues`;
    const loaded = await call("GET", path, { query: { limit: PAGE, position: next.value }, signal });
    await learnNames(loaded.issues.map((each) => each.file), signal);
    found.value = [...found.value, ...loaded.issues];
    next.value = loaded.next ?? null;
  });
  const changed = Object.values(decided.value).filter((each) => each.choice === "change");
  const write = useAction(async () => {
    const made = [];
    for (const [training, labels] of Object.entries(labelsByFile(changed)))
      made.push(await call("POST", "/api/v1/cleanings", { body: { training, labels, columns: job.recipe.data?.columns } }));
    made.forEach(({ address, name }) => remember({ id: idOf(address), filename: name }));
    toast(`Changed in a new file: ${number(changed.length)} ${changed.length === 1 ? "label" : "labels"}.`);
    written.value = made;
  });
  const decide = (issue, choice) => () => {
    decided.value = { ...decided.value, [keyOf(issue)]: { ...issue, choice } };
    sessionStorage.setItem(kept, JSON.stringify(decided.value));
  };
  const button = (issue, choice, label) => html`
    <button type="button" class="quiet" aria-pressed=${String(decided.value[keyOf(issue)]?.choice === choice)} onclick=${decide(issue, choice)}>
      ${label}<span class="visually-hidden">: ${placeOf(issue)}</span>
    </button>
  `;
  const isDeveloper = may("develop");
  return html`
    <section id="label-issues">
      <h2>Label issues</h2>
      <p>
        ${number(issues)} of ${number(rows)} labels differ from the labels of similar rows. Many of these labels may be right.
        ${isDeveloper && " Keep or change each label, then write a corrected file. Your file does not change."}
      </p>
      <${Table} caption="Rows with label issues, largest difference first" rows=${found.value.map((each) => [
        html`<bdi>${each.text}</bdi>`,
        html`<bdi>${each.label}</bdi>`,
        html`<bdi>${each.likely_label}</bdi> <span class="soft">${percent(each.probability)}</span>`,
        placeOf(each),
        ...(isDeveloper ? [html`${button(each, "keep", "Keep")} ${button(each, "change", "Change")}`] : []),
      ])} columns=${[{ name: "Text", kind: "wide" }, { name: "Label", kind: "breakable" }, { name: "Label of similar rows", kind: "breakable" }, "Location", ...(isDeveloper ? [{ name: "Decision", hidden: true, kind: "nowrap" }] : [])]} />
      <${ErrorBox} error=${page.error} />
      <div class="actions">
        ${next.value !== null && html`<button type="button" onclick=${page.read}>Show more</button>`}
        ${changed.length > 0 && html`
          <button type="button" class="primary" disabled=${write.busy} onclick=${write.run}>
            ${write.busy ? "Writing the file …" : `Write a file with ${number(changed.length)} changed label${changed.length === 1 ? "" : "s"}`}
          </button>
        `}
      </div>
      <${ErrorBox} error=${write.error} />
      ${written.value.map(({ address, name }) => html`
        <p class="box good" role="status">
          <a href=${link("data", address)}>${name}</a> has the changed labels.${" "}
          <a href=${`${link("new")}?rows=${encodeURIComponent(address)}`}>Train on these rows</a>
        </p>
      `)}
    </section>
  `;
}

const keyOf = ({ file, line, row }) => `${file} ${line ?? row}`;

/** Return corrected labels by line, by address of the file. */
export function labelsByFile(issues) {
  const found = {};
  for (const { file, line, row, likely_label: label } of issues) (found[file] ??= {})[line ?? row] = label;
  return found;
}
