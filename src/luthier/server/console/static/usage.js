// The quotas of the account, and its use on each day.

import { call } from "./api.js";
import { DayChart } from "./charts.js";
import { bytes, duration, number, percent, words } from "./format.js";
import { Chip, DataTable, Empty, ErrorBox, Field, Heading, Pending, Table, bound, html, options, useData, usePolling, useSignal } from "./ui.js";

const SECONDS = 30;
/** Models with a colour of their own; all other models share one colour. */
const COLOURED = 3;
/** Days of a chart at most: the bars of more days are too narrow to see. */
const MOST_DAYS = 400;
const NEARLY = 0.8;
const PARTS = [["model", "models"], ["user", "users"]];
const MEASURES = {
  requests: ["Requests", number], tokens: ["Input and output tokens", number], generated_tokens: ["Output tokens", number],
  training_seconds: ["Training time", duration], bytes_in: ["Bytes received", bytes], bytes_out: ["Bytes sent", bytes],
  stored_bytes: ["Stored bytes", bytes],
};

/** The page. */
export function Usage() {
  const today = new Date();
  const from = useSignal(dayText(new Date(today.getTime() - 29 * 86_400_000)));
  const to = useSignal(dayText(today));
  const measure = useSignal("requests");
  const by = useSignal("model");
  const quotas = useData((signal) => call("GET", "/api/v1/usage", { signal }));
  const days = useData(async (signal) => {
    const report = await call("GET", "/api/v1/usage/days", { query: { from: from.value, to: to.value }, signal });
    const rows = report.days.map((each) => ({ ...each, tokens: each.prompt_tokens + each.generated_tokens }));
    return { ...report, days: rows };
  }, [from.value, to.value]);
  usePolling(SECONDS, quotas.read);
  if (!quotas.data) return html`<${Pending} title="Usage" ...${quotas} />`;
  return html`
    <${Heading} title="Usage" chips=${html`<span class="soft">account <code>${quotas.data.account}</code></span>`} />
    <h2>Quotas</h2>
    <${Quotas} quotas=${quotas.data.quotas} />
    <h2>Usage by day</h2>
    <div class="fields">
      <${Field} id="measure" label="Measure">
        <select id="measure" ...${bound(measure)}>
          ${options(Object.entries(MEASURES).map(([name, [label]]) => [name, label]))}
        </select>
      <//>
      <${Field} id="by" label="Parts of the bars"><select id="by" ...${bound(by)}>${options(PARTS)}</select><//>
      <${Field} id="from" label="From"><input id="from" type="date" ...${bound(from)} /><//>
      <${Field} id="to" label="To"><input id="to" type="date" ...${bound(to)} /><//>
    </div>
    ${days.error ? html`<${ErrorBox} error=${days.error} again=${days.read} />`
      : days.data && html`<${Days} report=${days.data} measure=${measure.value} by=${by.value} />`}
  `;
}

function Quotas({ quotas }) {
  const rows = Object.entries(quotas).map(([name, { used, quota }]) => {
    const show = name.endsWith("bytes") ? bytes : number;
    const share = quota > 0 ? used / quota : used > 0 ? 1 : 0;
    const [kind, text] = share >= 1 ? ["error", "full"] : ["warning", "nearly full"];
    const full = share >= NEARLY && html` <${Chip} kind=${kind}>${text}<//>`;
    const label = `${words(name)}: ${percent(share)} of the quota`;
    const bar = html`<progress max="1" value=${Math.min(1, share)} class=${share >= 1 ? "full" : null} aria-label=${label} />`;
    return [words(name), [show(used), full], show(quota), bar];
  });
  const columns = [
    { name: "Quantity", hidden: true }, { name: "Used", kind: "number" }, { name: "Quota", kind: "number" },
    { name: "Share of the quota", hidden: true },
  ];
  return html`<${Table} caption="Usage and quotas" columns=${columns} rows=${rows} />`;
}

function Days({ report, measure, by }) {
  const { days, first, last } = report;
  const shown = [...days].sort((a, b) => b.day.localeCompare(a.day) || b.requests - a.requests);
  const figure = (name, value, show = number) => ({
    name, kind: "number", value: (each) => each[value], show: (each) => (each[value] || show === number ? show(each[value]) : "–"),
  });
  const columns = [
    { name: "Day", value: (each) => each.day, show: (each) => html`<span class="nowrap">${each.day}</span>` },
    { name: "User", value: (each) => nameOf("user", each.user) },
    { name: "Model", value: (each) => nameOf("model", each.model), show: (each) => html`<bdi>${nameOf("model", each.model)}</bdi>` },
    figure("Requests", "requests"), figure("Input tokens", "prompt_tokens"), figure("Output tokens", "generated_tokens"),
    figure("Training", "training_seconds", duration), figure("Received", "bytes_in", bytes), figure("Sent", "bytes_out", bytes),
    figure("Stored", "stored_bytes", bytes),
  ];
  return html`
    <${Chart} days=${days} first=${first} last=${last} measure=${measure} by=${by} />
    <${DataTable} caption="Usage by day, user and model" filter="day, user or model" empty="No usage on these days." columns=${columns} rows=${shown} />
    <p class="help">Days are in UTC. The last minute may be missing. Training and storage have no user.</p>
  `;
}

function Chart({ days: all, first, last, measure, by }) {
  const [title, show] = MEASURES[measure];
  const dates = datesBetween(first, last, MOST_DAYS);
  const days = all.filter((each) => each.day >= dates[0]);
  const cut = dates[0] > first;
  const totals = new Map();
  for (const each of days) totals.set(each[by], (totals.get(each[by]) ?? 0) + (each[measure] ?? 0));
  const ranked = [...totals].filter(([, sum]) => sum > 0).sort((a, b) => b[1] - a[1]).map(([part]) => part);
  if (!ranked.length) return html`<${Empty} text=${`No usage${cut ? ` on the latest ${MOST_DAYS} days` : ""}.`} />`;
  const others = ranked.length - COLOURED;
  const names = ranked.slice(0, COLOURED).map((part) => nameOf(by, part));
  if (others > 0) names.push(others === 1 ? nameOf(by, ranked[COLOURED]) : `${others} others`);
  const places = new Map(dates.map((day, index) => [day, index]));
  const series = names.map((name) => ({ name, values: Array(dates.length).fill(0) }));
  for (const each of days) {
    const place = Math.min(ranked.indexOf(each[by]), COLOURED);
    if (place >= 0 && places.has(each.day)) series[place].values[places.get(each.day)] += each[measure] ?? 0;
  }
  return html`
    <${DayChart} title=${`${title} by day`} days=${dates} series=${series} show=${show} />
    ${cut && html`<p class="soft">The chart shows the latest ${MOST_DAYS} days.</p>`}
  `;
}

const nameOf = (by, part) => part || `no ${by}`;

const dayText = (date) => date.toISOString().slice(0, 10);

/** Return the days from `first` to `last`, such as `2026-01-31`; the newest `most` days. */
export function datesBetween(first, last, most) {
  const found = [];
  const start = Date.parse(first);
  for (let at = Date.parse(last); at >= start && found.length < most; at -= 86_400_000) found.push(dayText(new Date(at)));
  return found.reverse();
}
