// Health of a model or deployment: figures of captured requests over weeks or days, with intervals.

import { call, may, pathOf } from "./api.js";
import { LineChart } from "./charts.js";
import { number, percent, time, words } from "./format.js";
import { modelNames } from "./jobs.js";
import { CaptureSwitch } from "./review.js";
import { Schedule } from "./schedule.js";
import { DataTable, Empty, ExampleCard, Field, Heading, Pending, Section, Table, bound, html, link, options, useData, useSignal } from "./ui.js";

const RANGES = [["7d", "7 days"], ["30d", "30 days"], ["90d", "90 days"], ["365d", "a year"]];
const NAMES = { errors: "Errors", milliseconds: "Median latency in ms", tokens: "Tokens per answer", empty: "Empty answers", rating: "Rating" };
/** Measures with this prefix are shares of a label. */
const LABEL = "label.";
const ALERTS = 10;
/** Measures in one table, and periods in the table of the labels. */
const MOST_COLUMNS = 8;
const SHOWN_PERIODS = 4;

/** Return the name of a measure such as `label.refund`. */
const nameOf = (measure) => NAMES[measure] ?? words(measure.replace(".", ": "));

/** Return a figure with its interval as text. */
export function figureText(figure) {
  if (!figure) return "–";
  const show = (value) => (figure.is_share ? percent(value) : number(value));
  const interval = typeof figure.low === "number" ? ` (${show(figure.low)} to ${show(figure.high)})` : "";
  return `${show(figure.value)}${interval}`;
}

const healthPath = (model) => `${pathOf("models", model)}/health`;

/** Return the figures of a model or deployment in the last 7 days, without reading the answers. */
export const weekHealth = (model, signal) => call("GET", healthPath(model), { query: { since: "7d", answers: false }, signal });

/** The page. */
export function HealthPage({ params }) {
  const since = useSignal("30d");
  const measure = useSignal("");
  const path = healthPath(params.name);
  const { data, error, read } = useData((signal) => call("GET", path, { query: { since: since.value }, signal }), [since.value]);
  const drift = useData((signal) => call("GET", path, { query: { since: "7d", drift: true }, signal }));
  const alerts = useData((signal) => call("GET", "/api/v1/alerts", { query: { subject: params.name, limit: ALERTS }, signal }));
  const capture = useData((signal) => call("GET", "/api/v1/capture", { signal }));
  // Clients name models by id as well.
  const shownName = useData(modelNames).data ?? ((each) => each);
  const range = html`
    <label for="since" class="visually-hidden">Period</label>
    <select id="since" ...${bound(since)}>${options(RANGES)}</select>
  `;
  if (error?.status === 404)
    return html`
      <${Heading} title=${`Health of ${shownName(params.name)}`} tab="Health">${range}<//>
      ${capture.data?.enabled
        ? html`<${Empty} text="Capture is on. No request has come in under this name in this period." />`
        : html`<${Empty} text="No request of this model is captured in this period.">${may("develop") && html`<${CaptureSwitch} done=${capture.read} />`}<//>`}
    `;
  if (!data || error) return html`<${Pending} title="Health" error=${error} read=${read} />`;
  const { periods } = data;
  const measures = [...new Set(periods.flatMap((each) => Object.keys(each.measures)))];
  const shown = measures.includes(measure.value) ? measure.value : measures[0];
  const line = (name, field) => ({
    name, marks: field === "value",
    points: periods.flatMap(({ measures: { [shown]: figure } }, index) => (typeof figure?.[field] === "number" ? [[index, figure[field]]] : [])),
  });
  // Many labels would make the table wider than the page; they have a table of their own.
  const isLabel = (name) => name.startsWith(LABEL) && measures.length > MOST_COLUMNS;
  const columns = measures.filter((name) => !isLabel(name));
  const labels = measures.filter(isLabel);
  const unit = periods.length > 1 && Date.parse(periods[1].first) - Date.parse(periods[0].first) > 86_400_000 ? "Week" : "Day";
  return html`
    <${Heading} title=${`Health of ${shownName(params.name)}`} tab="Health">
      ${range}
      <a class="button" href=${`${link("review")}?model=${encodeURIComponent(params.name)}`}>Rate answers</a>
    <//>
    <p class=${`box ${data.changes.length ? "warning" : "note"}`} id="summary"><strong>${data.summary}</strong></p>
    ${alerts.data?.alerts.length > 0 && html`
      <${Section} title="Alerts"><ul>${alerts.data.alerts.map((each) => html`<li>${time(each.created)}: ${each.text}</li>`)}</ul><//>
    `}
    ${data.label_stability && html`
      <p>
        Shares of labels: stability index ${number(data.label_stability.index)} compared with the ${data.label_stability.compared_with}
        ${" "}(${number(data.label_stability.by_chance)} by chance).
      </p>
    `}
    ${periods.length > 1 && html`
      <div class="narrow">
        <${Field} id="measure" label="Measure">
          <select id="measure" value=${shown} onchange=${(event) => (measure.value = event.target.value)}>
            ${options(measures.map((each) => [each, nameOf(each)]))}
          </select>
        <//>
      </div>
      <${LineChart} title=${nameOf(shown)} x=${unit.toLowerCase()} names=${periods.map((each) => each.first)}
        series=${[line("Value", "value"), line("Lower bound (95 %)", "low"), line("Upper bound (95 %)", "high")]} />
    `}
    <${Table} caption=${`Figures by ${unit.toLowerCase()}, newest first, with 95 % intervals`}
      columns=${[unit, { name: "Requests", kind: "number" }, ...columns.map((name) => ({ name: nameOf(name), kind: "number wrap" }))]}
      rows=${periods.toReversed().map((each) => [each.first, number(each.requests), ...columns.map((name) => figureText(each.measures[name]))])} />
    ${drift.data && (drift.data.drift || drift.data.drift_unknown) && html`
      <section id="drift">
        <h2>New requests</h2>
        <p>${drift.data.drift?.summary ?? drift.data.drift_unknown}</p>
        ${drift.data.drift?.clusters.map((each) => html`<${ExampleCard} title=${`${number(each.inputs)} requests unlike the training rows`} parts=${each.examples.map((text, index) => [`Request ${index + 1}`, text])} />`)}
      </section>
    `}
    <${Schedule} deployment=${params.name} />
    ${labels.length > 0 && html`
      <section id="labels">
        <h2>Labels</h2>
        <${DataTable} caption="Shares of labels with 95 % intervals" filter="label" rows=${labels} columns=${[
          { name: "Label", value: (name) => name.slice(LABEL.length) },
          ...periods.slice(-SHOWN_PERIODS).reverse().map((each) => ({
            name: each.first, kind: "number", value: (name) => each.measures[name]?.value, show: (name) => figureText(each.measures[name]),
          })),
        ]} />
      </section>
    `}
  `;
}
