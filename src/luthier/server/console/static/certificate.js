// What is certified of a model, in words, tables and a chart: whether it learned, from what, and what was checked.

import { call, messageOf } from "./api.js";
import { lineChart } from "./chart.js";
import { h, replace } from "./dom.js";
import { bytes, duration, number, shortName, time, words } from "./format.js";
import { link } from "./router.js";
import { facts, table } from "./table.js";

/** Rows of a table of a report that are shown. */
const MOST_ROWS = 100;
/** Characters from which a text of a report is a paragraph. */
const LONG_TEXT = 60;
/** Colours of the outcomes of luthier/engine/verdict.py. */
const OUTCOMES = {
  learned: "good",
  still_improving: "good",
  overfitted: "warning",
  declined: "warning",
  hardly_learned: "warning",
  worse: "error",
  unmeasured: "note",
};
const GATES = { passed: "good", warnings: "warning", refused: "error" };

/**
 * All that a certificate says.
 * @param {Object} view as `GET /api/v1/models/ID/certificate` answers
 * @param {Array<Object>} models those of the account, to name the lineage; none where the key may not list them
 * @param {?string} job id of the job that made the model
 * @returns {Array<HTMLElement>}
 */
export function certificateSections({ certificate, lineage, shares, errors }, models, job = null) {
  const record = certificate.record ?? {};
  const metrics = record.metrics ?? {};
  return [
    section(
      "Did it learn?",
      verdict(record, metrics),
      scores(metrics, new Set(shares)),
      baselines(metrics.comparison, new Set(errors)),
      curves(certificate),
    ),
    section(
      "What was checked",
      gate(record.data_report),
      labelIssues(metrics.label_issues, job),
      parity(record.parity),
      imported(record.checks),
      reports(certificate.reports),
    ),
    section("Where it comes from", chain(certificate, lineage, models), dataFiles(record)),
    section(
      "How it was made",
      made(record, certificate),
      settings(record.recipe),
      forecast(certificate.forecast),
      energy(certificate.compute),
    ),
    certificate.missing?.length
      ? section(
          "Not known",
          h(
            "ul",
            null,
            certificate.missing.map((each) => h("li", null, each)),
          ),
        )
      : null,
  ];
}

/**
 * A button that saves certificate.json with the bytes that are certified.
 * @param {Object} model
 * @param {AbortSignal} signal
 * @returns {HTMLElement}
 */
export function certificateDownload(model, signal) {
  const problem = h("span", { class: "error", role: "alert" });
  const save = async () => {
    replace(problem);
    try {
      const path = `/api/v1/models/${encodeURIComponent(model.id)}/certificate.json`;
      const file = URL.createObjectURL(await call("GET", path, { signal, accept: "application/octet-stream" }));
      h("a", { href: file, download: `${model.name}-certificate.json` }).click();
      setTimeout(() => URL.revokeObjectURL(file), 10_000);
    } catch (error) {
      if (error.name !== "AbortError") problem.textContent = messageOf(error);
    }
  };
  return h("span", null, h("button", { type: "button", onclick: save }, "Download certificate.json"), " ", problem);
}

/** A value of a measure: shares have one decimal, as on the command line, so that 99.96 % is not all. */
function measureText(value, isShare) {
  return isShare ? `${(100 * value).toFixed(1)} %` : number(value, 4);
}

function section(title, ...content) {
  return content.some(Boolean) ? h("section", null, h("h2", null, title), content) : null;
}

function verdict(record, metrics) {
  const found = metrics.verdict;
  const limits = record.withheld
    ? h("p", { class: "box error" }, `Withheld, not to be used: ${record.withheld}.`)
    : record.accepted
      ? h("p", { class: "box warning" }, `Accepted outside its limits: ${record.accepted}.`)
      : null;
  if (!found?.text) return [limits, h("p", { class: "soft" }, "Nothing was measured that says whether it learned.")];
  return [
    limits,
    h(
      "div",
      { class: `box ${OUTCOMES[found.outcome] ?? "note"}` },
      h("p", null, h("strong", null, found.text.charAt(0).toUpperCase() + found.text.slice(1)), "."),
      found.advice ? h("p", null, found.advice.replace(/\.?$/, ".")) : null,
    ),
  ];
}

function scores(metrics, shares) {
  const { before = {}, kept = {}, kept_step: step } = metrics.verdict ?? {};
  const names = Object.keys(kept ?? {}).filter((name) => typeof kept[name] === "number");
  if (!names.length) return null;
  return table({
    caption: "Held-out rows, before and after",
    showCaption: true,
    columns: [
      "Measure",
      { name: "Before training", kind: "number" },
      { name: `Kept (step ${number(step)})`, kind: "number" },
    ],
    rows: names.map((name) => [
      words(name),
      typeof before?.[name] === "number" ? measureText(before[name], shares.has(name)) : "–",
      measureText(kept[name], shares.has(name)),
    ]),
  });
}

function baselines(comparison, errors) {
  if (!comparison?.baselines?.length) return null;
  const measure = comparison.measure ?? "score";
  const rows = [
    ["this model", comparison.tuned, null, null],
    ...comparison.baselines.map((each) => [each.name, each.score, each.error, each.seconds]),
  ];
  // What is compared is a share, or else an error. The best stands first, and what has no score last.
  const isError = errors.has(measure);
  const cost = ([, score]) => (typeof score === "number" ? (isError ? score : -score) : Infinity);
  rows.sort((a, b) => (cost(a) === cost(b) ? 0 : cost(a) - cost(b)));
  return [
    table({
      caption: `Beside simple baselines: ${words(measure).toLowerCase()} on the same ${number(comparison.rows)} rows`,
      showCaption: true,
      columns: ["Model", { name: words(measure), kind: "number" }, { name: "Fitted in", kind: "number" }],
      rows: rows.map(([name, score, error, seconds]) => [
        name === "this model" ? h("strong", null, name) : name,
        typeof score === "number"
          ? `${measureText(score, !isError)}${error ? ` ± ${measureText(error, !isError)}` : ""}`
          : "–",
        seconds === null ? "–" : duration(seconds),
      ]),
    }),
    comparison.verdict
      ? h("p", null, `${comparison.verdict.charAt(0).toUpperCase()}${comparison.verdict.slice(1)}.`)
      : null,
    comparison.left_out?.length ? h("p", { class: "soft" }, `Left out: ${comparison.left_out.join("; ")}.`) : null,
  ];
}

function curves(certificate) {
  const series = Object.entries(certificate.curves ?? {}).map(([name, points]) => ({
    name: words(name),
    points,
    marks: name === "validation",
  }));
  if (!series.some((each) => each.points.length)) return null;
  const chart = lineChart({ title: "Loss while it was trained", x: "step", y: "loss" });
  chart.update(series);
  return chart.element;
}

function gate(report) {
  if (!report) return null;
  const rules = report.rules ?? [];
  return [
    h(
      "p",
      null,
      "The rows: ",
      h("span", { class: `chip ${GATES[report.verdict] ?? ""}` }, words(report.verdict)),
      " ",
      report.checks?.length
        ? h(
            "span",
            { class: "soft" },
            `${report.checks.length} checks: ${report.checks.map((each) => each.replaceAll("_", " ")).join(", ")}.`,
          )
        : null,
    ),
    rules.length
      ? table({
          caption: "What the data gate found",
          columns: [{ name: "Rule", kind: "code" }, "Severity", { name: "Rows", kind: "number" }, "First places"],
          rows: rules.map((each) => [
            h("code", null, each.rule),
            h("span", { class: `chip ${each.severity}` }, words(each.severity)),
            number(each.count),
            (each.first ?? []).map(shortName).join(", "),
          ]),
        })
      : null,
  ];
}

function labelIssues(found, job) {
  if (!found) return null;
  const { issues, rows } = found;
  return h(
    "p",
    null,
    `${number(issues)} of ${number(rows)} labels are worth a look.`,
    issues && job ? [" ", h("a", { href: link("jobs", job) }, "Show the rows"), "."] : null,
  );
}

function parity(found) {
  if (!found) return null;
  const difference = Math.abs(found.trained - found.reloaded);
  const next = found.next_tokens;
  return [
    h(
      "p",
      null,
      `Trained and read back from disk, its loss is ${number(found.trained, 4)} and ${number(found.reloaded, 4)} `,
      `on ${number(found.rows)} rows`,
      ` (${number(difference, 2)} apart${found.rounded ? ", its merged weights are rounded" : ""}).`,
    ),
    next
      ? h(
          "p",
          null,
          `The likeliest next token is the same at ${measureText(next.agreement, true)} of ${number(next.tokens)} places.`,
        )
      : null,
    found.greedy
      ? h(
          "p",
          null,
          `In what it writes greedily, at ${measureText(found.greedy.agreement, true)} of ${number(found.greedy.tokens)} places.`,
        )
      : null,
  ];
}

/** What a model from outside was tried with before it was taken. */
function imported(checks) {
  const rows = Object.entries(checks ?? {});
  if (!rows.length) return null;
  return table({
    caption: "Checked when it was imported",
    showCaption: true,
    columns: ["What", "Outcome"],
    rows: rows.map(([name, value]) => [
      words(name),
      shorten(typeof value === "string" ? value : JSON.stringify(value)),
    ]),
  });
}

function reports(kept) {
  if (!kept?.length) return null;
  return [
    h("h3", null, "Reports kept with the model"),
    kept.map(({ file, report }) =>
      h(
        "details",
        { class: "rule" },
        h("summary", null, words(report.kind), h("span", { class: "soft" }, ` · ${time(report.created)}`)),
        h(
          "div",
          { class: "inside" },
          facts([
            ["File", h("code", null, file)],
            ["Measured on", Object.keys(report.data).map((name) => h("div", null, shortName(name)))],
          ]),
          resultView(report.result),
        ),
      ),
    ),
  ];
}

/** The result of a report: single values as facts, lists of objects as tables, the rest by its parts. */
function resultView(result) {
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
    facts(single.filter((each) => !isLong(each))),
    single.filter(isLong).map(([name, text]) => h("p", null, h("strong", null, name), ": ", text)),
    parts.filter(([, value]) => isObject(value)).map(([name, value]) => {
      const entries = Object.entries(value);
      if (!entries.length) return null;
      const title = h("h4", null, words(name));
      if (!entries.every(([, each]) => isObject(each))) return [title, resultView(value)];
      const columns = [...new Set(entries.flatMap(([, each]) => Object.keys(each)))];
      const named = Array.isArray(value) ? [] : ["name"];
      return [
        title,
        table({
          caption: words(name),
          columns: [...named, ...columns].map(words),
          rows: entries
            .slice(0, MOST_ROWS)
            .map(([key, each]) => [...named.map(() => key), ...columns.map((column) => shown(each[column]))]),
        }),
        entries.length > MOST_ROWS
          ? h("p", { class: "soft" }, `${MOST_ROWS} of ${number(entries.length)} rows are shown.`)
          : null,
      ];
    }),
  ];
}

function chain(certificate, lineage, models) {
  const relatives = certificate.lineage ?? [];
  const parents = relatives.filter((each) => !each.helped);
  const helpers = relatives.filter((each) => each.helped);
  const known = new Map(models.map((each) => [each.arn, each]));
  const steps = lineage.map((arn, index) => ({
    arn,
    model: known.get(arn),
    // The certificate begins behind the model itself.
    relative: index === 0 ? { content_sha256: certificate.content_sha256, part: "this model" } : parents[index - 1],
  }));
  const named = ({ arn, model }) =>
    model
      ? h("a", { href: link("models", model.id) }, h("bdi", null, model.name))
      : h(
          "span",
          null,
          h("bdi", null, shortName(arn)),
          models.length ? h("span", { class: "soft" }, " (deleted since)") : null,
        );
  return [
    h(
      "ol",
      { class: "lineage" },
      steps.map((step) => h("li", null, named(step), step.relative ? relativeFacts(step.relative) : null)),
    ),
    parents.length > lineage.length - 1
      ? h(
          "p",
          { class: "soft" },
          `Below: ${parents
            .slice(lineage.length - 1)
            .map((each) => each.id)
            .join(", ")}.`,
        )
      : null,
    helpers.length
      ? [
          h("h3", null, "What helped"),
          h(
            "ul",
            null,
            helpers.map((each) => h("li", null, each.id, relativeFacts(each))),
          ),
        ]
      : null,
  ];
}

function relativeFacts(relative) {
  return h("small", { class: "soft" }, [
    words(relative.part ?? ""),
    relative.source ? [", from ", h("code", null, relative.source)] : null,
    relative.licence ? `, licence ${relative.licence}` : null,
    relative.content_sha256
      ? [", SHA-256 ", h("code", { title: relative.content_sha256 }, relative.content_sha256.slice(0, 16), "…")]
      : null,
  ]);
}

function dataFiles(record) {
  const files = Object.entries(record.data?.sha256 ?? {});
  if (!files.length) return null;
  const { rows, validation_rows: held, dropped, truncated, tokens } = record.data;
  const held_out = held ? `, measured on ${number(held)} others` : "";
  return [
    h("h3", null, "Data"),
    h(
      "p",
      null,
      `Trained on ${number(rows)} rows (${number(tokens)} tokens)${held_out}.`,
      dropped ? ` ${number(dropped)} too long rows were left out.` : null,
      truncated ? ` ${number(truncated)} were cut.` : null,
    ),
    table({
      caption: "Hashes of the files of the data",
      columns: ["File", { name: "SHA-256", kind: "code" }],
      rows: files.map(([name, digest]) => [shortName(name), h("code", null, digest)]),
    }),
  ];
}

function made(record, certificate) {
  const metrics = record.metrics ?? {};
  return facts([
    ["Objective", record.recipe?.objective?.method],
    ["Adaptation", record.recipe?.adaptation?.method],
    ["Steps", metrics.steps === undefined ? null : number(metrics.steps)],
    ["Tokens read", metrics.tokens === undefined ? null : number(metrics.tokens)],
    [
      "Weights trained",
      metrics.trained_weights === undefined ? null : `${number(metrics.trained_weights)} of ${number(metrics.weights)}`,
    ],
    ["Training took", metrics.seconds === undefined ? null : duration(metrics.seconds)],
    ["Peak memory", metrics.peak_memory_bytes === undefined ? null : bytes(metrics.peak_memory_bytes)],
    ["Precision", record.precision],
    ["Machine", certificate.machine],
    ["Made by", record.luthier ? `luthier ${record.luthier}${record.torch ? `, torch ${record.torch}` : ""}` : null],
  ]);
}

function settings(recipe) {
  if (!recipe) return null;
  const rows = Object.entries(recipe).flatMap(([group, fields]) =>
    fields && typeof fields === "object" && !Array.isArray(fields)
      ? Object.entries(fields).map(([name, value]) => [`${group}.${name}`, value])
      : [[group, fields]],
  );
  const shown = (value) => (typeof value === "string" ? value : JSON.stringify(value));
  return h(
    "details",
    null,
    h("summary", null, "All settings"),
    table({
      caption: "Settings",
      columns: ["Setting", "Value"],
      rows: rows.map(([name, value]) => [
        h("code", null, name),
        shorten(name.startsWith("data.") && typeof value === "string" ? shortName(value) : shown(value)),
      ]),
    }),
  );
}

function forecast(found) {
  const asked = (found ?? []).filter((each) => typeof each.estimate === "number");
  if (!asked.length) return null;
  const amount = (name, value) => {
    if (typeof value !== "number") return "–";
    if (name === "seconds") return duration(value);
    return name.endsWith("bytes") ? bytes(value) : number(value);
  };
  return table({
    caption: "Estimate, and what it took",
    showCaption: true,
    columns: [
      "What",
      { name: "Estimated", kind: "number" },
      { name: "Between", kind: "number" },
      { name: "Took", kind: "number" },
    ],
    rows: asked.map((each) => [
      words(each.quantity.replace(/_bytes$/, "")),
      amount(each.quantity, each.estimate),
      each.low === null || each.low === undefined
        ? "–"
        : `${amount(each.quantity, each.low)} to ${amount(each.quantity, each.high)}`,
      amount(each.quantity, each.actual),
    ]),
  });
}

function energy(compute) {
  if (!compute) return null;
  return [
    h("h3", null, "Compute and energy"),
    facts([
      ["Operations", compute.flops ? `${compute.flops.toExponential(2)} FLOPs` : null],
      ["Energy", typeof compute.kilowatt_hours === "number" ? `${number(1000 * compute.kilowatt_hours)} Wh` : null],
      [
        "Power",
        compute.watts
          ? h(
              "span",
              null,
              `${number(compute.watts)} W`,
              compute.watts_assumed ? h("small", null, "assumed, not measured") : null,
            )
          : null,
      ],
      ["Time", compute.seconds ? duration(compute.seconds) : null],
    ]),
  ];
}

function shorten(text) {
  return text.length > 200 ? `${text.slice(0, 200)}…` : text;
}
