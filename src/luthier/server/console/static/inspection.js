// Results before a job: the report of the data checks, and the estimate.

import { call, may } from "./api.js";
import { placeOf, sentence, withNames } from "./files.js";
import { bytes, duration, number, words } from "./format.js";
import { Chip, DataTable, ErrorBox, Facts, Said, Table, html, toast, useAction, useEffect, useSignal } from "./ui.js";

const VERDICTS = {
  passed: "The data are ready for training.", warnings: "The data have warnings. Read the warnings before training.",
  refused: "The data have errors. Fix the errors before training.",
};
const ORDER = ["error", "warning", "note"];
const MOST_ROWS = 3;
const MOST_LANGUAGES = 4;
/** Different problems of a rule that are shown at once. */
const MOST_PLACES = 5;
/** Tokens of a long row that are shown at its start and at its end. */
const HEAD = 120;
const TAIL = 240;
/** Parts of the training time. */
const PARTS = {
  data: "Reading the data", load: "Loading the model", begin: "Measuring before the first step", baselines: "Baselines",
  calibrate: "Calibration", ahead: "Precomputation", steps: "Training steps", validation: "Validation",
  checkpoints: "Checkpoints", store: "Storing the model",
};

/** Inspect rows: of a large file first the beginning, then all rows. `show` gets each report. */
export async function inspect(body, signal, show) {
  const first = await call("POST", "/api/v1/inspections", { body: { ...body, first_lines: true }, signal });
  show(first);
  if (!first.complete) show(await call("POST", "/api/v1/inspections", { body, signal }));
}

/** A text with the seconds of the work, and a button if the work can be cancelled. */
export function Working({ text, cancel }) {
  const seconds = useSignal(0);
  useEffect(() => {
    const timer = setInterval(() => (seconds.value += 1), 1000);
    return () => clearInterval(timer);
  }, []);
  return html`
    <p class="box note" role="status">
      ${text} … ${seconds.value > 0 && html`<span aria-hidden="true">${seconds.value} s</span>`}
      ${cancel && html` <button type="button" class="quiet" onclick=${cancel}>Cancel</button>`}
    </p>
  `;
}

/**
 * The verdict on the data, findings with locations, and rows as the model learns them. With `address` and `onfixed`, each
 * rule with an automatic fix has a button that writes a cleaned file; `showRows` filters the rows of the page by a rule.
 */
export function Inspection({ verdict, complete, report, address, columns, validation, onfixed, showRows }) {
  const splits = report.summaries?.learning?.splits ?? {};
  const rules = [...report.rules].sort((a, b) => ORDER.indexOf(a.severity) - ORDER.indexOf(b.severity));
  const count = (name) => rules.filter((rule) => rule.severity === name).reduce((sum, rule) => sum + rule.count, 0);
  const source = { training: address, columns, validation };
  const fixable = onfixed && may("develop") ? rules.filter((rule) => rule.fixable).map((rule) => rule.rule) : [];
  // Checks without a base model are repeated by the job, or by "Inspect the data".
  const skipped = Object.entries((report.base && report.left_out) || {}).map(([name, why]) => `${name} (${why})`);
  return html`
    <section class="inspection">
      <h2>Inspection</h2>
      <p class=${`box ${verdict}`}>
        <strong>${words(verdict)}</strong>. ${complete ? VERDICTS[verdict] : `This is about the first ${number(report.rows.train)} rows.`}
      </p>
      <${Facts} pairs=${[
        ["Training rows", number(report.rows.train)],
        ["Validation rows", report.rows.validation === undefined ? null : number(report.rows.validation)],
        ["Learned tokens", splits.train ? number(splits.train.tokens) : null],
        ["Errors", number(count("error"))],
        ["Warnings", number(count("warning"))],
        ["Row format", report.forms?.train],
        ["Length", lengthText(report.summaries?.lengths)],
        ["Languages", Object.keys(report.summaries?.language?.splits?.train?.input?.counts ?? {}).slice(0, MOST_LANGUAGES).join(", ")],
        ["Base model", report.base ? withNames(report.base) : null],
      ]} />
      <${Labels} balance=${report.summaries?.balance} />
      ${rules.length > 0 && html`<h3>Findings</h3>`}
      ${fixable.length > 0 && html`<p class="soft">A fix removes or changes the rows in a new file. Your file does not change.</p>`}
      ${fixable.length > 1 && html`<div class="actions"><${FixButton} rules=${fixable} source=${source} onfixed=${onfixed} /></div>`}
      ${rules.map((rule) => html`
        <${Rule} rule=${rule}>
          ${showRows && rule.places.some((each) => each.line || each.row) && html`
            <button type="button" onclick=${() => showRows(rule)}>Show these rows</button>
          `}
          ${fixable.includes(rule.rule) && html`<${FixButton} rules=${[rule.rule]} source=${source} onfixed=${onfixed} />`}
        <//>
      `)}
      ${Object.entries(splits).map(([split, found]) => html`<${Rows} split=${split} rows=${found.shown ?? []} />`)}
      ${skipped.length > 0 && html`<p class="soft">Not checked: ${skipped.join(", ")}.</p>`}
    </section>
  `;
}

/** Return the usual and the longest length of the training rows' input. */
function lengthText(lengths) {
  const found = lengths?.splits?.train?.input_characters;
  return found ? `${number(found.p50)} characters, at most ${number(found.max)}` : "";
}

/** The labels of the training rows with their numbers of rows. */
function Labels({ balance }) {
  const counts = Object.entries(balance?.splits?.train?.counts ?? {}).sort((a, b) => b[1] - a[1]);
  if (!counts.length) return null;
  return html`
    <details class="rule">
      <summary>${number(counts.length)} labels, from ${number(counts.at(-1)[1])} to ${number(counts[0][1])} rows each</summary>
      <div class="inside">
        <${DataTable} caption="Labels of the training rows" filter="label" columns=${[
          { name: "Label", value: ([label]) => label }, { name: "Rows", kind: "number", value: ([, count]) => count },
        ]} rows=${counts} />
      </div>
    </details>
  `;
}

/** A button that writes a cleaned file without the faults of some rules. */
function FixButton({ rules, source, onfixed }) {
  const { busy, error, run } = useAction(async () => {
    const made = await call("POST", "/api/v1/cleanings", { body: { ...source, rules } });
    const changed = Object.values(made.changed).reduce((sum, each) => sum + each, 0);
    toast(`${made.name}: ${number(changed)} rows changed, ${number(made.rows_in - made.rows_out)} removed, ${number(made.rows_out)} left.`);
    return onfixed(made);
  });
  return html`
    <button type="button" class="primary" disabled=${busy} onclick=${run}>
      ${busy ? "Writing the file …" : rules.length > 1 ? `Fix ${rules.length} findings in a new file` : "Fix in a new file"}
    </button>
    <${ErrorBox} error=${error} />
  `;
}

function Rule({ rule, children }) {
  const times = rule.count === 1 ? "once" : `${number(rule.count)} times`;
  const groups = [...Map.groupBy(rule.places, (place) => [place.message, place.fix, place.excerpt].join("\n")).values()];
  return html`
    <details class="rule" open=${rule.severity === "error"}>
      <summary>
        <${Chip} kind=${rule.severity}>${words(rule.severity)}<//> ${rule.about}${" "}
        <span class="soft">${times} · <code>${rule.rule}</code></span>
      </summary>
      <div class="inside">
        ${rule.why && html`<p><strong>Why: </strong><${Said} text=${rule.why} /></p>`}
        ${rule.fix && html`<p><strong>Fix: </strong><${Said} text=${rule.fix} /></p>`}
        <div class="actions">${children}</div>
        <${Places} rule=${rule} groups=${groups.slice(0, MOST_PLACES)} />
        ${groups.length > MOST_PLACES && html`
          <details><summary>${number(groups.length - MOST_PLACES)} more</summary><${Places} rule=${rule} groups=${groups.slice(MOST_PLACES)} /></details>
        `}
        ${rule.places.length < rule.count && html`
          <p class="soft">Showing ${number(rule.places.length)} of ${number(rule.count)} locations.</p>
        `}
      </div>
    </details>
  `;
}

/** Locations of a rule; locations with the same problem are one entry. */
function Places({ rule, groups }) {
  return html`
    <ul class="places">
      ${groups.map(([place, ...others]) => html`
        <li>
          <code>${placeOf(place)}</code>${others.length > 0 && ` and ${number(others.length)} more`} ${withNames(place.message ?? "")}
          ${place.fix && place.fix !== rule.fix && html` <strong>Fix: </strong><${Said} text=${withNames(place.fix)} />`}
          ${place.excerpt && html`<pre class="row" tabindex="0">${place.excerpt}</pre>`}
        </li>
      `)}
    </ul>
  `;
}

function Rows({ split, rows }) {
  if (!rows.length) return null;
  return html`
    <h3>${split === "train" ? "Model input" : `Rows of ${split}`}</h3>
    <p class="soft">Marked tokens are training targets.</p>
    ${rows.slice(0, MOST_ROWS).map(
      (row) => html`
        <figure class="example">
          <figcaption class="soft">
            ${placeOf(row)}${row.taught && html` · learned: <mark>${String(row.taught)}</mark>`}
          </figcaption>
          <pre class="row" tabindex="0">${tokensView(row.tokens ?? [], row.learned ?? [])}</pre>
        </figure>
      `,
    )}
  `;
}

/** Return tokens with learned tokens marked, in as few elements as there are changes. */
export function tokensView(tokens, learned) {
  const cut = tokens.length - HEAD - TAIL;
  const parts = cut > 0 ? [[0, HEAD], [tokens.length - TAIL, tokens.length]] : [[0, tokens.length]];
  return parts.map(([from, to], index) => {
    const found = index ? [html`<em> … ${number(cut)} tokens … </em>`] : [];
    for (let at = from; at < to;) {
      let end = at;
      while (end < to && learned[end] === learned[at]) end += 1;
      const text = tokens.slice(at, end).join("");
      found.push(learned[at] ? html`<mark>${text}</mark>` : text);
      at = end;
    }
    return found;
  });
}

/** The estimated time, memory and cost of a job, each with its interval. */
export function Estimate({ estimate }) {
  const range = (figure, format) => {
    if (!figure) return null;
    const interval = figure.low !== figure.high && html`<small>${format(figure.low)} to ${format(figure.high)}</small>`;
    return [format(figure.value), interval];
  };
  const cost = estimate.cost ?? estimate.energy;
  const parts = Object.entries(estimate.parts ?? {}).filter(([, figure]) => figure.high > 0);
  return html`
    <section class="estimate">
      <h2>Estimate</h2>
      ${(estimate.warnings ?? []).map((each) => html`<p class="box warning"><${Said} text=${sentence(each)} /></p>`)}
      <${Facts} pairs=${[
        ["Time", range(estimate.seconds, duration)],
        ["Memory", range(estimate.memory, bytes)],
        ["Disk", range(estimate.disk, bytes)],
        ["Cost", cost?.value === undefined ? null : range(cost, number)],
      ]} />
      <details>
        <summary>How these figures were estimated</summary>
        <p class="soft">
          Objective ${estimate.objective}, adaptation ${estimate.adaptation}, on ${estimate.machine}. The figures come from a
          few training steps on these rows. Other work on the machine makes the job slower.
        </p>
        <${Facts} pairs=${[
          ["Steps", number(estimate.steps)],
          ["Epochs", number(estimate.epochs)],
          ["Rows", number(estimate.rows)],
          ["Tokens", range(estimate.tokens, (value) => number(Math.round(value)))],
        ]} />
        <${Table} caption="Time by part"
          columns=${["Part", ...["Time", "Minimum", "Maximum"].map((name) => ({ name, kind: "number" }))]}
          rows=${parts.map(([name, { value, low, high }]) => [PARTS[name] ?? words(name), ...[value, low, high].map(duration)])} />
      </details>
    </section>
  `;
}
