// The certificate of a model: whether the model learned, its checks, its data and its training.

import { LineChart } from "./charts.js";
import { withSources } from "./files.js";
import { bytes, duration, number, scoreText, shortName, time, words } from "./format.js";
import { Chip, Facts, Said, Section, Table, html, link } from "./ui.js";
import { verdictOf } from "./verdict.js";

/** Rows of a table of a report that are shown. */
const MOST_ROWS = 100;
/** Characters from which a text of a report is a paragraph. */
const LONG_TEXT = 60;
const AGREEMENT = { shares: new Set(["agreement"]) };
const GATES = { passed: "good", warnings: "warning", refused: "error" };

/**
 * All parts of a certificate. `view` is the answer of `GET /api/v1/models/ID/certificate`; `models` of the account have
 * the names of the lineage; `job` of the API created the model.
 */
export function Certificate({ view, models, job = null }) {
  const { certificate, lineage, shares, lower_is_better: errors } = view;
  const record = certificate.record ?? {};
  const metrics = record.metrics ?? {};
  const sets = { shares: new Set(shares), errors: new Set(errors) };
  const fileName = (path) => withSources(shortName(path), job?.details.sources ?? []);
  return html`
    <${Section} title="Verdict">
      ${verdict(record, metrics, sets)} ${scores(metrics, sets)}
      ${baselines(metrics.comparison, sets)} ${curves(certificate)}
    <//>
    <${Section} title="Checks">
      ${gate(record.data_report, fileName)} ${labelIssues(metrics.label_issues, job)} ${parity(record.parity)}
      ${imported(record.checks)} ${reports(certificate.reports, fileName)}
    <//>
    <${Section} title="Lineage and data">${chain(certificate, lineage, models)} ${dataFiles(record, fileName)}<//>
    <${Section} title="Training">
      ${made(record, certificate)} ${settings(record.recipe, fileName)} ${forecast(certificate.forecast)} ${energy(certificate.compute)}
    <//>
    <${Section} title="Unknown">
      ${certificate.missing?.length > 0 && html`<ul>${certificate.missing.map((each) => html`<li>${each}</li>`)}</ul>`}
    <//>
  `;
}

const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);

function verdict(record, metrics, sets) {
  const found = metrics.verdict;
  const brief = verdictOf(metrics, record.data?.validation_rows, sets);
  const limits = record.withheld
    ? html`<p class="box error">Withheld, do not use: ${record.withheld}.</p>`
    : record.accepted && html`<p class="box warning">Accepted outside its limits: ${record.accepted}.</p>`;
  if (!found?.text) return [limits, html`<p class="soft">No verdict: the run has no measurements.</p>`];
  return [
    limits,
    html`
      <div class=${`box ${brief?.kind ?? "note"}`}>
        <p><strong>${brief?.text ?? `${capital(found.text)}.`}</strong></p>
        ${brief && html`<details><summary>Reasons</summary><p>${capital(found.text)}. ${found.advice?.replace(/\.?$/, ".")}</p></details>`}
      </div>
    `,
  ];
}

function scores(metrics, sets) {
  const { before, kept, kept_step: step } = metrics.verdict ?? {};
  const names = Object.keys(kept ?? {}).filter((name) => typeof kept[name] === "number");
  if (!names.length) return null;
  const columns = ["Measure", "Before training", `Stored model (step ${number(step)})`];
  return html`<${Table} caption="Scores on validation rows" showCaption
    columns=${columns.map((name, index) => ({ name, kind: index ? "number" : null }))}
    rows=${names.map((name) => [
      words(name),
      typeof before?.[name] === "number" ? scoreText(name, before[name], sets) : "–",
      scoreText(name, kept[name], sets),
    ])} />`;
}

/** The scores of the model and of simple methods on the same rows. */
export function baselines(comparison, sets) {
  if (!comparison?.baselines?.length) return null;
  const measure = comparison.measure ?? "score";
  const rows = [
    ["this model", comparison.tuned, null, null],
    ...comparison.baselines.map((each) => [each.name, each.score, each.error, each.seconds]),
  ];
  // The best row is first; rows without a score are last.
  const isError = sets.errors.has(measure);
  const cost = ([, score]) => (typeof score === "number" ? (isError ? score : -score) : Infinity);
  rows.sort((a, b) => (cost(a) === cost(b) ? 0 : cost(a) - cost(b)));
  const scoreOf = (score, error) =>
    typeof score === "number" ? `${scoreText(measure, score, sets)}${error ? ` ± ${scoreText(measure, error, sets)}` : ""}` : "–";
  return [
    html`<${Table} showCaption
      caption=${`Comparison with simple baselines: ${words(measure).toLowerCase()} on the same ${number(comparison.rows)} rows`}
      columns=${["Model", { name: words(measure), kind: "number" }, { name: "Fitting time", kind: "number" }]}
      rows=${rows.map(([name, score, error, seconds]) => [
        name === "this model" ? html`<strong>${name}</strong>` : name,
        scoreOf(score, error),
        duration(seconds),
      ])} />`,
    comparison.verdict && html`<p><${Said} text=${`${capital(comparison.verdict)}.`} /></p>`,
    comparison.left_out?.length > 0 && html`<p class="soft">Left out: ${comparison.left_out.join("; ")}.</p>`,
  ];
}

function curves(certificate) {
  const series = Object.entries(certificate.curves ?? {}).map(([name, points]) => ({
    name: words(name),
    points,
    marks: name === "validation",
  }));
  if (!series.some((each) => each.points.length)) return null;
  return html`<${LineChart} title="Loss during training" x="step" series=${series} />`;
}

function gate(report, fileName) {
  if (!report) return null;
  const { rules = [], checks = [] } = report;
  return [
    html`
      <p>
        Data checks: <${Chip} kind=${GATES[report.verdict]}>${words(report.verdict)}<//>${" "}
        ${checks.length > 0 && html`
          <span class="soft">${checks.length} checks: ${checks.map((each) => each.replaceAll("_", " ")).join(", ")}.</span>
        `}
      </p>
    `,
    rules.length > 0 && html`<${Table} caption="Findings of the data checks"
      columns=${[{ name: "Rule", kind: "code" }, "Severity", { name: "Rows", kind: "number" }, "First locations"]}
      rows=${rules.map((each) => [
        html`<code>${each.rule}</code>`,
        html`<${Chip} kind=${each.severity}>${words(each.severity)}<//>`,
        number(each.count),
        (each.first ?? []).map(fileName).join(", "),
      ])} />`,
  ];
}

function labelIssues(found, job) {
  if (!found) return null;
  const rows = found.issues > 0 && job && html`${" "}<a href=${link("jobs", job.id)}>Show the rows</a>`;
  return html`<p>Label issues: ${number(found.issues)} of ${number(found.rows)} labels.${rows}</p>`;
}

function parity(found) {
  if (!found) return null;
  const { trained, reloaded, next_tokens: next, greedy, rounded } = found;
  const apart = `${number(Math.abs(trained - reloaded), 2)} apart${rounded ? ", merged weights are rounded" : ""}`;
  return [
    html`
      <p>
        Loss after training: ${number(trained, 4)}. Loss after loading the stored model: ${number(reloaded, 4)} on${" "}
        ${number(found.rows)} rows (${apart}).
      </p>
    `,
    next && html`<p>Most likely next token: equal for ${scoreText("agreement", next.agreement, AGREEMENT)} of ${number(next.tokens)} tokens.</p>`,
    greedy && html`<p>Greedy generation: equal for ${scoreText("agreement", greedy.agreement, AGREEMENT)} of ${number(greedy.tokens)} tokens.</p>`,
  ];
}

/** The checks of an imported model. */
function imported(checks) {
  const rows = Object.entries(checks ?? {});
  if (!rows.length) return null;
  return html`<${Table} caption="Checks at import" showCaption columns=${["Check", "Outcome"]}
    rows=${rows.map(([name, value]) => [words(name), shorten(textOf(value))])} />`;
}

function reports(kept, fileName) {
  if (!kept?.length) return null;
  return html`
    <h3>Reports stored with the model</h3>
    ${kept.map(
      ({ file, report }) => html`
        <details class="rule">
          <summary>${words(report.kind)}<span class="soft"> · ${time(report.created)}</span></summary>
          <div class="inside">
            <${Facts} pairs=${[
              ["File", html`<code>${file}</code>`],
              ["Measured on", Object.keys(report.data).map((name) => html`<div>${fileName(name)}</div>`)],
            ]} />
            ${resultView(report.result)}
          </div>
        </details>
      `,
    )}
  `;
}

/** The result of a report: single values as facts, lists of objects as tables, the rest by its parts. */
export function resultView(result) {
  const isList = (value) => Array.isArray(value) && !value.some((each) => typeof each === "object");
  const isObject = (value) => typeof value === "object" && value !== null && !isList(value);
  const shown = (value) => {
    if (isObject(value)) return JSON.stringify(value);
    if (isList(value)) return value.map(shown).join(", ");
    return typeof value === "number" ? number(value, 4) : String(value ?? "–");
  };
  const parts = Object.entries(result);
  const single = parts.filter(([, value]) => !isObject(value)).map(([name, value]) => [words(name), shown(value)]);
  const isLong = ([, text]) => text.length > LONG_TEXT;
  return [
    html`<${Facts} pairs=${single.filter((each) => !isLong(each))} />`,
    single.filter(isLong).map(([name, text]) => html`<p><strong>${name}</strong>: ${text}</p>`),
    parts.filter(([, value]) => isObject(value)).map(([name, value]) => {
      const entries = Object.entries(value);
      if (!entries.length) return null;
      const title = html`<h4>${words(name)}</h4>`;
      if (!entries.every(([, each]) => isObject(each))) return [title, resultView(value)];
      const columns = [...new Set(entries.flatMap(([, each]) => Object.keys(each)))];
      const named = Array.isArray(value) ? [] : ["name"];
      const cells = ([key, each]) => [...named.map(() => key), ...columns.map((column) => shown(each[column]))];
      const rows = entries.slice(0, MOST_ROWS).map(cells);
      return [
        title,
        html`<${Table} caption=${words(name)} columns=${[...named, ...columns].map(words)} rows=${rows} />`,
        entries.length > MOST_ROWS && html`<p class="soft">Showing ${MOST_ROWS} of ${number(entries.length)} rows.</p>`,
      ];
    }),
  ];
}

/** The model itself first, its base last. */
function chain(certificate, lineage, models) {
  const relatives = certificate.lineage ?? [];
  const parents = relatives.filter((each) => !each.helped);
  const helpers = relatives.filter((each) => each.helped);
  const below = parents.slice(lineage.length - 1);
  const known = new Map(models.map((each) => [each.arn, each]));
  const named = (arn) => {
    const model = known.get(arn);
    if (model) return html`<a href=${link("models", model.id)}><bdi>${model.name}</bdi></a>`;
    return html`<span><bdi>${shortName(arn)}</bdi>${models.length > 0 && html`<span class="soft"> (deleted)</span>`}</span>`;
  };
  // The lineage in the certificate begins with the parent of the model.
  const self = { content_sha256: certificate.content_sha256, part: "this model" };
  return html`
    <ol class="lineage">
      ${lineage.map((arn, index) => html`<li>${named(arn)} ${relativeFacts(index ? parents[index - 1] : self)}</li>`)}
    </ol>
    ${below.length > 0 && html`<p class="soft">Earlier models: ${below.map((each) => each.id).join(", ")}.</p>`}
    ${helpers.length > 0 && html`
      <h3>Teachers and other models</h3>
      <ul>${helpers.map((each) => html`<li>${each.id} ${relativeFacts(each)}</li>`)}</ul>
    `}
  `;
}

function relativeFacts(relative) {
  if (!relative) return null;
  const { part = "", source, licence, content_sha256: hash } = relative;
  return html`
    <small class="soft">
      ${words(part)}${source && html`, from <code>${source}</code>`}${licence && `, licence ${licence}`}
      ${hash && html`, SHA-256 <code title=${hash}>${hash.slice(0, 16)}…</code>`}
    </small>
  `;
}

function dataFiles(record, fileName) {
  const files = Object.entries(record.data?.sha256 ?? {});
  if (!files.length) return null;
  const { rows, validation_rows: held, dropped, truncated, tokens } = record.data;
  return html`
    <h3>Data</h3>
    <${Facts} pairs=${[
      ["Training rows", number(rows)],
      ["Tokens", number(tokens)],
      ["Validation rows", held ? number(held) : null],
      ["Rows left out (too long)", dropped ? number(dropped) : null],
      ["Rows truncated", truncated ? number(truncated) : null],
    ]} />
    <${Table} caption="Hashes of the data files" columns=${["File", { name: "SHA-256", kind: "code" }]}
      rows=${files.map(([name, digest]) => [fileName(name), html`<code>${digest}</code>`])} />
  `;
}

function made({ metrics = {}, ...record }, certificate) {
  const known = (name, show) => (metrics[name] === undefined ? null : show(metrics[name]));
  const torch = record.torch ? `, torch ${record.torch}` : "";
  return html`<${Facts} pairs=${[
    ["Objective", record.recipe?.objective?.method],
    ["Adaptation", record.recipe?.adaptation?.method],
    ["Steps", known("steps", number)],
    ["Tokens", known("tokens", number)],
    ["Trained weights", known("trained_weights", (count) => `${number(count)} of ${number(metrics.weights)}`)],
    ["Training time", known("seconds", duration)],
    ["Peak memory", known("peak_memory_bytes", bytes)],
    ["Precision", record.precision],
    ["Machine", certificate.machine],
    ["Created with", record.luthier ? `luthier ${record.luthier}${torch}` : null],
  ]} />`;
}

function settings(recipe, fileName) {
  if (!recipe) return null;
  const rows = Object.entries(recipe).flatMap(([group, fields]) =>
    fields && typeof fields === "object" && !Array.isArray(fields)
      ? Object.entries(fields).map(([name, value]) => [`${group}.${name}`, value])
      : [[group, fields]],
  );
  const shown = (name, value) => (name.startsWith("data.") && typeof value === "string" ? fileName(value) : textOf(value));
  return html`
    <details>
      <summary>All settings</summary>
      <${Table} caption="Settings" columns=${["Setting", "Value"]}
        rows=${rows.map(([name, value]) => [html`<code>${name}</code>`, shorten(shown(name, value))])} />
    </details>
  `;
}

function forecast(found) {
  const asked = (found ?? []).filter((each) => typeof each.estimate === "number");
  if (!asked.length) return null;
  const amount = (name, value) => {
    if (typeof value !== "number") return "–";
    if (name === "seconds") return duration(value);
    return name.endsWith("bytes") ? bytes(value) : number(value);
  };
  const columns = ["Quantity", "Estimate", "Interval", "Measured"];
  return html`<${Table} caption="Estimate and measurement" showCaption
    columns=${columns.map((name, index) => ({ name, kind: index ? "number" : null }))}
    rows=${asked.map(({ quantity, estimate, low, high, actual }) => [
      words(quantity.replace(/_bytes$/, "")),
      amount(quantity, estimate),
      typeof low === "number" ? `${amount(quantity, low)} to ${amount(quantity, high)}` : "–",
      amount(quantity, actual),
    ])} />`;
}

function energy(compute) {
  if (!compute) return null;
  const assumed = compute.watts_assumed && html`<small>assumed, not measured</small>`;
  return html`
    <h3>Compute and energy</h3>
    <${Facts} pairs=${[
      ["Operations", compute.flops ? `${compute.flops.toExponential(2)} FLOPs` : null],
      ["Energy", typeof compute.kilowatt_hours === "number" ? `${number(1000 * compute.kilowatt_hours)} Wh` : null],
      ["Power", compute.watts ? [`${number(compute.watts)} W`, assumed] : null],
      ["Time", compute.seconds ? duration(compute.seconds) : null],
    ]} />
  `;
}

const textOf = (value) => (typeof value === "string" ? value : JSON.stringify(value));

function shorten(text) {
  return text.length > 200 ? `${text.slice(0, 200)}…` : text;
}
