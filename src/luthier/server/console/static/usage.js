// What the account stores and has in hand beside its quotas, and what it used on each day.

import { call } from "./api.js";
import { h, replace, svg } from "./dom.js";
import { bytes, duration, number, percent, words } from "./format.js";
import { errorBox, pause } from "./router.js";
import { hiddenName, table } from "./table.js";

const SECONDS = 30;
const WIDTH = 720;
const HEIGHT = 220;
const EDGE = { left: 64, right: 8, top: 10, bottom: 26 };
/** Models that have a colour of their own; the others share one. */
const COLOURED = 3;
const MOST_ROWS = 400;
/** Days of a chart: more than a year has columns that nobody can see. */
const MOST_DAYS = 400;
const NEARLY = 0.8;

const MEASURES = {
  requests: ["Requests", number],
  tokens: ["Tokens read and written", number],
  generated_tokens: ["Tokens written", number],
  training_seconds: ["Time of training", duration],
  bytes_in: ["Bytes in", bytes],
  bytes_out: ["Bytes out", bytes],
  stored_bytes: ["Stored bytes", bytes],
};

/** Draw the page. */
export async function render(root, params, signal) {
  const quotas = h("div");
  const days = h("div");
  const today = new Date();
  const from = h("input", {
    id: "from",
    type: "date",
    value: dayText(new Date(today.getTime() - 29 * 86_400_000)),
    onchange: () => readDays(),
  });
  const to = h("input", { id: "to", type: "date", value: dayText(today), onchange: () => readDays() });
  const measure = h(
    "select",
    { id: "measure", onchange: () => drawDays() },
    Object.entries(MEASURES).map(([name, [text]]) => h("option", { value: name }, text)),
  );
  let found = null;
  let reading = null;

  const drawDays = () => {
    if (found) replace(days, chart(found, measure.value), daysTable(found.days));
  };
  const readDays = async () => {
    // A slow answer for days that were chosen before would take the place of this one.
    reading?.abort();
    const own = new AbortController();
    reading = own;
    signal.addEventListener("abort", () => own.abort(), { once: true, signal: own.signal });
    try {
      const query = { from: from.value, to: to.value };
      const report = await call("GET", "/api/v1/usage/days", { query, signal: own.signal });
      if (own.signal.aborted) return;
      const rows = report.days.map((each) => ({ ...each, tokens: each.prompt_tokens + each.generated_tokens }));
      found = { ...report, days: rows };
      drawDays();
    } catch (error) {
      if (error.name === "AbortError" || own.signal.aborted) return;
      found = null;
      replace(days, errorBox(error, readDays));
    }
  };
  const readQuotas = async () => {
    const report = await call("GET", "/api/v1/usage", { signal });
    replace(quotas, bars(report.quotas));
    account.textContent = report.account;
  };
  const account = h("code");
  await readQuotas();
  replace(
    root,
    h("div", { class: "heading" }, h("h1", null, "Usage"), h("span", { class: "soft" }, "account ", account)),
    h("h2", null, "Beside the quotas"),
    quotas,
    h("h2", null, "By day and model"),
    h(
      "div",
      { class: "fields" },
      h("div", null, h("label", { for: "measure" }, "Show"), measure),
      h("div", null, h("label", { for: "from" }, "From"), from),
      h("div", null, h("label", { for: "to" }, "To"), to),
    ),
    days,
  );
  await readDays();
  // The page stands; its quotas are kept up to date until it is left.
  keepUpToDate();

  async function keepUpToDate() {
    while (await pause(SECONDS, signal)) {
      // What cannot be had now stays as it was; a person who does something is told why it fails.
      await readQuotas().catch(() => {});
    }
  }
}

function bars(quotas) {
  const rows = Object.entries(quotas).map(([name, { used, quota }]) => {
    const show = name.endsWith("bytes") ? bytes : number;
    const share = quota > 0 ? used / quota : used > 0 ? 1 : 0;
    const full = share >= 1 ? "full" : share >= NEARLY ? "nearly full" : null;
    return [
      words(name),
      [show(used), full ? [" ", h("span", { class: `chip ${share >= 1 ? "error" : "warning"}` }, full)] : null],
      show(quota),
      h("progress", {
        max: 1,
        value: Math.min(1, share),
        class: full ? "full" : null,
        "aria-label": `${words(name)}: ${percent(share)} of the quota`,
      }),
    ];
  });
  return table({
    caption: "What there is, beside what there may be",
    columns: [
      hiddenName("What"),
      { name: "Used", kind: "number" },
      { name: "Quota", kind: "number" },
      hiddenName("Share of the quota"),
    ],
    rows,
  });
}

function chart({ days: all, first, last }, measure) {
  const [title, show] = MEASURES[measure];
  const value = (each) => each[measure] ?? 0;
  const dates = datesBetween(first, last, MOST_DAYS);
  const days = all.filter((each) => each.day >= dates[0]);
  const cut = dates[0] > first ? `The latest ${MOST_DAYS} days are drawn.` : null;
  const totals = new Map();
  for (const each of days) totals.set(each.model, (totals.get(each.model) ?? 0) + value(each));
  const ranked = [...totals]
    .filter(([, sum]) => sum > 0)
    .sort((a, b) => b[1] - a[1])
    .map(([model]) => model);
  if (!ranked.length || !dates.length)
    return h(
      "p",
      { class: "empty soft" },
      `Nothing of this was used on ${cut ? `the latest ${MOST_DAYS} of these` : "these"} days.`,
    );
  const place = new Map(ranked.map((model, index) => [model, Math.min(index, COLOURED)]));
  const names = ranked.slice(0, COLOURED).map(nameOf);
  if (ranked.length > COLOURED)
    names.push(ranked.length === COLOURED + 1 ? nameOf(ranked[COLOURED]) : `${ranked.length - COLOURED} others`);
  const byDay = new Map(dates.map((day) => [day, Array(names.length).fill(0)]));
  for (const each of days) {
    const group = place.get(each.model);
    if (group !== undefined && byDay.has(each.day)) byDay.get(each.day)[group] += value(each);
  }
  const sums = [...byDay.values()].map((each) => each.reduce((a, b) => a + b, 0));
  const top = Math.max(...sums);
  const said = h("p", { class: "soft chart-value" }, "\u00a0");
  const step = (WIDTH - EDGE.left - EDGE.right) / dates.length;
  const height = (amount) => (amount / top) * (HEIGHT - EDGE.top - EDGE.bottom);
  const floor = HEIGHT - EDGE.bottom;
  const every = Math.ceil(dates.length / 6);
  const columns = dates.map((day, index) => {
    const left = EDGE.left + index * step;
    let at = floor;
    const parts = byDay.get(day).map((amount, group) => {
      at -= height(amount);
      return amount
        ? svg("rect", {
            class: `bar series-${group}`,
            x: left + step * 0.1,
            width: step * 0.8,
            y: at,
            height: height(amount),
          })
        : null;
    });
    const words = `${day}: ${show(sums[index])}${byDay
      .get(day)
      .map((amount, group) => (amount ? `, ${names[group]} ${show(amount)}` : ""))
      .join("")}`;
    const area = svg("rect", { class: "area", x: left, width: step, y: EDGE.top, height: floor - EDGE.top });
    area.addEventListener("pointerenter", () => {
      said.textContent = words;
    });
    return [
      parts,
      area,
      index % every === 0
        ? svg("text", { x: left + step / 2, y: HEIGHT - 8, "text-anchor": "middle" }, day.slice(5))
        : null,
    ];
  });
  return h(
    "figure",
    { class: "chart" },
    h("figcaption", null, `${title} by day`),
    h(
      "div",
      { class: "legend" },
      names.map((name, index) =>
        h("span", { class: `series-${index}` }, h("i", { class: "swatch" }), h("bdi", null, name)),
      ),
    ),
    svg(
      "svg",
      {
        viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
        role: "img",
        "aria-label": `${title} by day and model; the table below says the same.`,
      },
      [0, 0.5, 1].map((share) => [
        svg("line", {
          class: "grid",
          x1: EDGE.left,
          x2: WIDTH - EDGE.right,
          y1: floor - height(top * share),
          y2: floor - height(top * share),
        }),
        svg("text", { x: EDGE.left - 6, y: floor - height(top * share) + 4, "text-anchor": "end" }, show(top * share)),
      ]),
      columns,
    ),
    said,
    cut ? h("p", { class: "soft" }, cut) : null,
  );
}

function daysTable(days) {
  const shown = [...days].sort((a, b) => b.day.localeCompare(a.day) || b.requests - a.requests);
  return [
    table({
      caption: "What was used, by day and model",
      columns: [
        "Day",
        "Model",
        ...["Requests", "Tokens read", "Written", "Training", "In", "Out", "Stored"].map((name) => ({
          name,
          kind: "number",
        })),
      ],
      rows: shown
        .slice(0, MOST_ROWS)
        .map((each) => [
          h("span", { class: "nowrap" }, each.day),
          h("bdi", null, nameOf(each.model)),
          number(each.requests),
          number(each.prompt_tokens),
          number(each.generated_tokens),
          each.training_seconds ? duration(each.training_seconds) : "–",
          bytes(each.bytes_in),
          bytes(each.bytes_out),
          each.stored_bytes ? bytes(each.stored_bytes) : "–",
        ]),
      empty: "Nothing was used on these days.",
    }),
    shown.length > MOST_ROWS
      ? h(
          "p",
          { class: "soft" },
          `The latest ${MOST_ROWS} of ${number(shown.length)} rows are shown. Choose fewer days for the others.`,
        )
      : null,
    h("p", { class: "help" }, "Days are those of UTC. Counts of the last minute may be missing."),
  ];
}

function nameOf(model) {
  return model || "no model";
}

function dayText(date) {
  return date.toISOString().slice(0, 10);
}

/**
 * Days in their order.
 * @param {string} first such as `2026-01-31`
 * @param {string} last
 * @param {number} most the newest are kept
 * @returns {Array<string>}
 */
export function datesBetween(first, last, most) {
  const found = [];
  const start = Date.parse(first);
  for (let at = Date.parse(last); at >= start && found.length < most; at -= 86_400_000) found.push(dayText(new Date(at)));
  return found.reverse();
}
