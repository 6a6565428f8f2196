// Charts by uPlot in the colours of the page, with the same values in words.

import { number } from "./format.js";
import { html, useEffect, useRef } from "./ui.js";
import uPlot from "./vendor/uplot.js";

const HEIGHT = 260;
const DARK = "(prefers-color-scheme: dark)";
/** Distances between two marks of an axis that counts steps or days. */
const WHOLE = [1, 10, 100, 1e3, 1e4, 1e5, 1e6, 1e7].flatMap((power) => [power, 2 * power, 5 * power]);

/**
 * A line chart. Series are `{name, points, marks}` with points `[x, y]` in order; `marks` draws each point.
 * `event` is a dashed vertical line `{at, name}`, or null. With `names`, x is an index of a name.
 */
export function LineChart({ title, x, series, event, names }) {
  const shown = series
    .map((each) => ({ ...each, points: each.points.filter((point) => point.every(Number.isFinite)) }))
    .filter((each) => each.points.length);
  if (!shown.length)
    return html`<figure class="chart"><figcaption>${title}</figcaption><p class="soft">No values yet.</p></figure>`;
  const data = uPlot.join(shown.map(({ points }) => [points.map((each) => each[0]), points.map((each) => each[1])]));
  const lines = shown.map(({ name, points, marks }) => ({
    label: name,
    width: 1.8,
    spanGaps: true,
    points: { show: marks || points.length === 1, size: 6 },
    value: (plot, value) => number(value, 4),
  }));
  const name = (at) => (names ? (names[at] ?? "") : number(at));
  const axes = { x, label: x, event, names, name, places: (plot, splits) => splits.map(name) };
  const words = [...shown.map((each) => inWords(each, x, name)), event && `${event.name}: from ${x} ${number(event.at)}.`].filter(Boolean).join(" ");
  return html`<${Plot} title=${title} words=${words} data=${data} lines=${lines} axes=${axes} />`;
}

/** A chart of stacked bars, one bar per day. Series are `{name, values}`; `show` formats a value. */
export function DayChart({ title, days, series, show }) {
  // Each bar has the sum of its own and all later series, and later bars cover its lower part.
  const sumFrom = (first, day) => series.slice(first).reduce((sum, each) => sum + each.values[day], 0);
  const sums = series.map((_, first) => days.map((_, day) => sumFrom(first, day)));
  const bars = series.map(({ name, values }, index) => ({
    label: name,
    bars: true,
    points: { show: false },
    value: (plot, value, _, day) => show(day === null ? null : values[day]),
  }));
  const date = (plot, splits) => splits.map((each) => days[each]?.slice(5) ?? "");
  const axes = { x: "day", places: date, shown: show, zero: true, name: (day) => days[day] };
  const words = "The table below has the values of this chart.";
  const data = [days.map((_, index) => index), ...sums];
  return html`<${Plot} title=${title} words=${words} data=${data} lines=${bars} axes=${axes} />`;
}

function Plot({ title, words, data, lines, axes }) {
  const place = useRef(null);
  const plot = useRef(null);
  const latest = useRef(null);
  latest.current = { data, lines, axes };
  useEffect(() => {
    const scheme = window.matchMedia(DARK);
    const element = place.current;
    const draw = () => {
      plot.current?.destroy();
      plot.current = new uPlot(settingsOf(latest.current, element), latest.current.data, element);
    };
    draw();
    const resized = new ResizeObserver(() => plot.current?.setSize({ width: element.clientWidth, height: HEIGHT }));
    resized.observe(element);
    scheme.addEventListener("change", draw);
    return () => {
      resized.disconnect();
      scheme.removeEventListener("change", draw);
      plot.current.destroy();
      plot.current = null;
    };
  }, [title, axes.x, axes.names, axes.event?.at, ...lines.map((each) => each.label), lines.some((each) => each.bars) && data].map(String));
  useEffect(() => plot.current.setData(data));
  return html`
    <figure class="chart">
      <figcaption>${title}</figcaption>
      <div ref=${place} aria-hidden="true"></div>
      <p class="visually-hidden">${words}</p>
    </figure>
  `;
}

function settingsOf({ data, lines, axes }, place) {
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const axis = { stroke: colour("soft"), grid: { stroke: colour("line"), width: 1 }, ticks: { show: false }, font: "11px system-ui" };
  const first = { label: axes.x, value: (plot, at) => (at === null ? "–" : (axes.name?.(at) ?? number(at))) };
  return {
    hooks: { draw: [(plot) => axes.event && drawEvent(plot, axes.event, colour("soft"))] },
    width: place.clientWidth || 600,
    height: HEIGHT,
    cursor: { y: false, drag: { setScale: false, x: false } },
    scales: {
      x: { time: false, range: (plot, low, high) => (axes.zero ? [low - 0.5, high + 0.5] : widen([low, high], 0)) },
      y: { range: (plot, low, high) => (axes.zero ? [0, 1.02 * high || 1] : widen([low, high], 0.06)) },
    },
    axes: [
      { ...axis, label: axes.label, size: 28, labelSize: 16, labelGap: -4, labelFont: axis.font, incrs: WHOLE, values: axes.places },
      { ...axis, size: 64, values: (plot, splits) => splits.map(axes.shown ?? ((each) => number(each))) },
    ],
    series: [
      first,
      ...lines.map(({ bars, ...line }, index) => ({
        ...line,
        stroke: colour(`series-${index}`),
        ...(bars && { fill: colour(`series-${index}`), width: 0, paths: uPlot.paths.bars({ size: [0.8] }) }),
      })),
    ],
  };
}

function drawEvent(plot, { at, name }, colour) {
  const { ctx: context, bbox: box } = plot;
  const x = Math.round(plot.valToPos(at, "x", true));
  const gap = 5 * devicePixelRatio;
  const isLeft = x < box.left + box.width / 2;
  context.save();
  context.strokeStyle = context.fillStyle = colour;
  context.lineWidth = devicePixelRatio;
  context.setLineDash([gap, gap]);
  context.beginPath();
  context.moveTo(x, box.top);
  context.lineTo(x, box.top + box.height);
  context.stroke();
  context.font = `${11 * devicePixelRatio}px system-ui`;
  context.textAlign = isLeft ? "left" : "right";
  context.textBaseline = "top";
  context.fillText(name, x + (isLeft ? gap : -gap), box.top + gap);
  context.restore();
}

/** Return a range that is extended by a share of itself at each end. */
export function widen([low, high], share) {
  // A range of a few units in the last place is rounding: marks on its axis would all be equal.
  if (high - low <= 1e-9 * Math.max(Math.abs(low), Math.abs(high)))
    return [low - (Math.abs(low) || 1) * 0.5, high + (Math.abs(high) || 1) * 0.5];
  const more = (high - low) * share;
  return [low - more, high + more];
}

function inWords({ name, points }, x, nameOf) {
  const [first, last] = [points[0], points.at(-1)];
  const least = points.reduce((best, each) => (each[1] < best[1] ? each : best));
  const at = ([step, value]) => `${number(value, 4)} at ${x} ${nameOf(step)}`;
  return points.length === 1 ? `${name}: ${at(first)}.` : `${name}: from ${at(first)} to ${at(last)}, lowest ${at(least)}.`;
}
