// Evaluations of a model and comparisons of models as jobs, with their reports.

import { call, may, pathOf } from "./api.js";
import { resultView } from "./certificate.js";
import { DataField, EMPTY } from "./data_field.js";
import { learnNames, sentence, withNames } from "./files.js";
import { bytes, duration, number, scoreText, time, words } from "./format.js";
import { modelNames } from "./jobs.js";
import { allModels, nameOf } from "./models.js";
import { ReportList, ReportPage } from "./reports.js";
import {
  DataTable, Download, Empty, ErrorBox, ExampleCard, Field, Heading, Pending, Said, Section, Table, bound, html, link, options, useAction,
  useData, useSignal,
} from "./ui.js";
import { ScoreBars } from "./verdict.js";

const KINDS = { evaluations: "Evaluate a model", comparisons: "Compare with the base and simple methods" };
/** Rows of a comparison that are shown with the answers of all models, the worst first. */
const SHOWN = 10;
/** Worst answers that are shown without a click. */
const WORST = 3;
/** Labels of a confusion matrix at most (luthier/evaluation/report_page.py); the table of mistakes has more labels. */
const MOST_CELLS = 25;
/** Shades of the cells (style.css). */
const SHADES = 4;
/** Evaluations in the table of a model. */
const MOST_SHOWN = 10;

/** The lists of evaluations and comparisons, and a form. */
export function Evaluations({ query }) {
  return html`
    <${Heading} title="Evaluate and compare" tab="Evaluate" />
    ${may("develop") && html`<${NewMeasurement} chosen=${query.get("model")} task=${query.get("task")} />`}
    <${List} kind="evaluations" title="Evaluations" />
    <${List} kind="comparisons" title="Comparisons" />
  `;
}

function List({ kind, title }) {
  const named = useData(modelNames);
  return named.data && html`
    <${ReportList} kind=${kind} title=${title} rowsField="rows" columns=${["Models"]} cells=${(each) => [each.models.map(named.data).join(", ")]}
      empty=${`There are no ${kind} yet. Choose a model and a file with rows that the model has not learned.`} />
  `;
}

function NewMeasurement({ chosen, task }) {
  const kind = useSignal(task in KINDS ? task : "evaluations");
  const rows = useSignal(EMPTY);
  const models = useData(async (signal) => {
    const found = (await allModels(signal)).filter((each) => /^active$/i.test(each.status));
    return [...found.filter((each) => each.kind === "custom"), ...found.filter((each) => each.kind !== "custom")];
  });
  const { busy, error, run } = useAction(async (event) => {
    // The report names the model as the request does.
    const { model: { value: model }, rival } = event.target.elements;
    const models = [...new Set([model, rival.value])].filter(Boolean);
    const body = { rows: rows.value.address, ...(kind.value === "evaluations" ? { model } : { models, show: SHOWN }) };
    const made = await call("POST", `/api/v1/${kind.value}`, { body });
    return link(kind.value, made.id);
  });
  const shown = (models.data ?? []).filter((each) => kind.value === "evaluations" || each.kind === "custom");
  return html`
    <section class="box">
      <form onsubmit=${run}>
        <div class="fields">
          <${Field} id="kind" label="Task"><select id="kind" ...${bound(kind)}>${options(Object.entries(KINDS))}</select><//>
          <${Field} id="measured" label="Model">
            <select id="measured" name="model" required>
              ${shown.map((each) => html`<option value=${each.name} selected=${each.id === chosen}>${nameOf(each)}</option>`)}
            </select>
          <//>
          <${Field} id="rival" label="Second model (optional)" hidden=${kind.value === "evaluations" || shown.length < 2}>
            <select id="rival" name="rival">${options([["", "none"], ...shown.map((each) => [each.name, nameOf(each)])])}</select>
          <//>
        </div>
        <${DataField} id="held" label="Held-out rows" field=${rows} onchange=${() => {}}
          help="Rows that the model has not learned, in the form of the training rows." />
        <${ErrorBox} error=${models.error} again=${models.read} /><${ErrorBox} error=${error} />
        ${models.data && !shown.length && html`<p class="soft">A comparison needs a trained model. <a href=${link("home")}>Train one</a>.</p>`}
        <div class="actions">
          <button type="submit" class="primary" disabled=${busy || !rows.value.address || !shown.length}>Start</button>
        </div>
      </form>
    </section>
  `;
}

/** The evaluations of a model as a table, newest first. */
export function ModelEvaluations({ model }) {
  const { data, error, read } = useData(async (signal) => {
    const { measurements } = await call("GET", "/api/v1/evaluations", { query: { limit: MOST_SHOWN, state: "Completed", model: model.arn }, signal });
    await learnNames(measurements.map((each) => each.request.rows), signal);
    return Promise.all(measurements.map((each) => call("GET", pathOf("evaluations", each.id), { signal })));
  });
  const rows = (data ?? []).map(({ id, ended, request, report, lower_is_better: lower }) => {
    const [name, score] = Object.entries(report.scores)[0];
    const sets = { errors: new Set(lower) };
    return [
      html`<a href=${link("evaluations", id)}>${time(ended)}</a>`, withNames(request.rows), number(report.rows), words(name),
      scoreText(name, score, sets), rangeText(name, report.intervals?.[name], sets),
    ];
  });
  return html`
    <section id="evaluations">
      <h2>Evaluations</h2>
      <${ErrorBox} error=${error} again=${read} />
      ${data && html`
        <${Table} caption="Evaluations of this model, newest first" rows=${rows}
          columns=${["Time", "File", ...["Rows", "Measure", "Score", "95 % interval"].map((name) => ({ name, kind: name === "Measure" ? null : "number" }))]}
          empty=${html`
            <${Empty} text="This model has no evaluations yet.">
              ${may("develop") && html`<a class="button" href=${`${link("evaluations")}?model=${encodeURIComponent(model.id)}`}>Evaluate on a file</a>`}
            <//>
          `} />
      `}
    </section>
  `;
}

const rangeText = (name, interval, sets) => interval?.map((value) => scoreText(name, value, sets)).join(" to ") ?? "–";

/** The page of one evaluation. */
export const Evaluation = ({ params }) => html`<${Measured} kind="evaluations" id=${params.id} />`;

/** The page of one comparison. */
export const Comparison = ({ params }) => html`<${Measured} kind="comparisons" id=${params.id} />`;

function Measured({ kind, id }) {
  const named = useData(modelNames);
  if (!named.data) return html`<${Pending} title="Evaluation" ...${named} />`;
  const title = ({ models }) => (kind === "evaluations" ? `Evaluation of ${named.data(models[0])}` : `Comparison of ${models.map(named.data).join(" and ")}`);
  const actions = ({ state }) => state === "Completed" &&
    html`<${Download} path=${`${pathOf(kind, id)}/report`} name=${`${kind}-report.html`} label="Download the report" accept="text/html" />`;
  const renderReport = ({ report, lower_is_better: lower }) => html`<${kind === "evaluations" ? EvaluationReport : ComparisonReport} report=${report} sets=${{ errors: new Set(lower) }} />`;
  return html`
    <${ReportPage} kind=${kind} id=${id} rowsField="rows" noun="report" list=${["evaluations", "Evaluate and compare"]} title=${title} actions=${actions} renderReport=${renderReport} />
  `;
}

/** Return bars for `ScoreBars` from scores `[name, value, interval, isTuned]` of one measure. */
function barsOf(measure, scores, sets) {
  const bars = scores.map(([name, value, interval, isTuned]) => ({
    name, value, shown: scoreText(measure, value, sets), low: interval?.[0] ?? null, high: interval?.[1] ?? null, kind: isTuned ? "tuned" : "base",
  }));
  return { bars, measure: words(measure), isLess: sets.errors.has(measure) };
}

function EvaluationReport({ report, sets }) {
  const { model, rows, scores, errors, intervals = {}, slices = [], labels, mistakes = [], worst = [], remarks = [], ...others } = report;
  const [[first, value] = []] = Object.entries(scores);
  const figure = (name) => ({ name, kind: "number" });
  return html`
    <div class="box note" id="summary">
      <p><strong>${words(first ?? "")} ${scoreText(first, value, sets)} on ${number(rows)} rows${intervals[first] && ` (95 % interval ${rangeText(first, intervals[first], sets)})`}.</strong></p>
      ${remarks.map((each) => html`<p><${Said} text=${sentence(each)} /></p>`)}
    </div>
    <${Section} title="Scores">
      <${Table} caption="Scores" columns=${["Measure", figure("Score"), figure("95 % interval")]}
        rows=${Object.entries(scores).map(([name, score]) => [words(name), scoreText(name, score, sets), rangeText(name, intervals[name], sets)])} />
    <//>
    <${Section} title="Worst answers">
      ${worst.slice(0, WORST).map(answerCard)}
      ${worst.length > WORST && html`<details><summary>${worst.length - WORST} more answers</summary>${worst.slice(WORST).map(answerCard)}</details>`}
    <//>
    <${Section} title="Confusion matrix">
      ${labels && Object.keys(labels).length <= MOST_CELLS && html`<${Confusion} labels=${labels} mistakes=${mistakes} />`}
    <//>
    <${Section} title="Most frequent mistakes">
      ${mistakes.length > 0 && html`<${DataTable} caption="Mistakes" filter="label" size=${10} rows=${mistakes} columns=${[
        { name: "Label", value: (each) => each.label }, { name: "Answer", value: (each) => each.answer },
        { ...figure("Rows"), value: (each) => each.rows },
      ]} />`}
    <//>
    <${Section} title="Parts of the rows">
      ${slices.length > 0 && html`<${Table} caption="Parts of the rows" columns=${["Part", figure("Rows"), figure(words(first)), figure("95 % interval")]}
        rows=${slices.map((each) => [`${each.by}: ${each.value}`, number(each.rows), scoreText(first, each.scores?.[first], sets), rangeText(first, each.interval, sets)])} />`}
    <//>
    ${(labels || Object.keys(others).length > 0) && html`
      <details class="rule"><summary>More figures</summary><div class="inside"><h3 class="visually-hidden">Figures</h3>${resultView({ ...others, ...(labels && { labels }) })}</div></details>
    `}
  `;
}

function answerCard({ row, input, expected, answer, confidence }) {
  const title = `${withNames(row)}${confidence ? `, confidence ${confidence}` : ""}`;
  return html`<${ExampleCard} title=${title} parts=${[["Input", input], ["Wanted", expected], ["Answer", answer, "error"]]} />`;
}

/** A grid of counts by wanted label (rows) and answer (columns), shaded by the share of the row. */
function Confusion({ labels, mistakes }) {
  const names = Object.keys(labels);
  const wrong = new Map(mistakes.map((each) => [JSON.stringify([each.label, each.answer]), each.rows]));
  const missed = (label) => mistakes.reduce((sum, each) => sum + (each.label === label ? each.rows : 0), 0);
  const cell = (label, answer) => {
    const isRight = label === answer;
    const rows = isRight ? labels[label].rows - missed(label) : (wrong.get(JSON.stringify([label, answer])) ?? 0);
    const shade = labels[label].rows ? Math.ceil((SHADES * rows) / labels[label].rows) : 0;
    return html`<td class=${`shade-${shade}${isRight ? " right" : ""}`}>${rows || ""}</td>`;
  };
  return html`
    <p class="help">Rows are the wanted labels, columns are the answers. A stronger colour means a larger share of the row.</p>
    <div class="matrix" tabindex="0" role="region" aria-label="Confusion matrix">
      <table>
        <caption class="visually-hidden">Confusion matrix</caption>
        <thead><tr><th scope="col">Wanted</th>${names.map((name) => html`<th scope="col"><bdi>${name}</bdi></th>`)}</tr></thead>
        <tbody>${names.map((label) => html`<tr><th scope="row"><bdi>${label}</bdi></th>${names.map((answer) => cell(label, answer))}</tr>`)}</tbody>
      </table>
    </div>
  `;
}

function ComparisonReport({ report, sets }) {
  const { measure, rows, contenders, verdict, remarks = [], shown = [] } = report;
  const picture = barsOf(measure, contenders.map((each) => [each.name, each.score, each.interval, each.technique.startsWith("fine-tuning")]), sets);
  const figure = (name) => ({ name, kind: "number" });
  return html`
    <div class=${`box ${{ true: "good", false: "warning" }[report.worth_it] ?? "note"}`} id="summary">
      <p><strong>${verdict}</strong></p>
      ${remarks.map((each) => html`<p><${Said} text=${sentence(each)} /></p>`)}
    </div>
    <${ScoreBars} verdict=${picture} />
    <${Section} title=${`All contenders on ${number(rows)} rows`}>
      <${Table} caption="Contenders, the best first" columns=${["Name", figure(words(measure)), figure("95 % interval"), figure("Time per answer"), figure("Memory")]}
        rows=${contenders.map((each) => [
          each.name, scoreText(measure, each.score, sets), rangeText(measure, each.interval, sets),
          duration(each.seconds), each.memory_bytes ? bytes(each.memory_bytes) : "–",
        ])} />
    <//>
    <${Section} title="Worst answers">
      ${shown.length > 0 && html`<p class="help">The ${number(shown.length)} rows on which the first model is worst. <a href=${link("evaluations")}>Evaluate a model</a> for all its wrong answers.</p>`}
      ${shown.map((row) => html`<${ExampleCard} title=${row.prompt} parts=${[...Object.entries(row.replies), ["Wanted", row.expected]]} />`)}
    <//>
  `;
}
