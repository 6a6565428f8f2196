// Line charts as SVG: axes, a legend, the values under the pointer, and the same in words.

import { h, replace, svg } from "./dom.js";
import { number } from "./format.js";

/** Pixels; the width is that of the place where the chart stands. */
const HEIGHT = 260;
const USUAL_WIDTH = 720;
const LEAST_WIDTH = 280;
const EDGE = { left: 56, right: 14, top: 12, bottom: 34 };
/** Points of a line that are drawn at most: more than there are pixels show nothing. */
const MOST_POINTS = 600;

/**
 * A chart that can be given new values.
 * @param {{title: string, x: string, y: string}} labels `x` and `y` name what the axes measure
 * @returns {{element: HTMLElement, update: function(Array<{name: string, points: Array<[number, number]>, marks?: boolean}>)}}
 *   `points` in the order of x
 */
export function lineChart({ title, x, y }) {
  const drawing = h("div", { class: "drawing" });
  const legend = h("div", { class: "legend" });
  const words = h("p", { class: "visually-hidden" });
  const value = h("p", { class: "soft chart-value" }, "\u00a0");
  const element = h("figure", { class: "chart" }, h("figcaption", null, title), legend, drawing, value, words);
  let shown = [];
  let width = USUAL_WIDTH;

  const update = (series) => {
    const known = series
      .map((each, index) => ({ ...each, index, points: each.points.filter((p) => p.every(Number.isFinite)) }))
      .filter((each) => each.points.length);
    words.textContent = known.map((each) => inWords(each, x)).join(" ");
    shown = known.map((each) => ({ ...each, points: thin(each.points) }));
    redraw();
  };

  const redraw = () => {
    if (!shown.length) {
      replace(drawing, h("p", { class: "soft" }, "There are no values yet."));
      replace(legend);
      return;
    }
    const scales = scalesOf(shown, width);
    replace(
      drawing,
      draw(shown, scales, { title, x, y }, (at) => point(shown, scales, at, value, x)),
    );
    replace(
      legend,
      shown.map((each) => h("span", { class: `series-${each.index}` }, h("i", { class: "swatch" }), each.name)),
    );
  };
  update([]);
  // Text keeps its size, on a phone as on a wide screen.
  new ResizeObserver(() => {
    const room = Math.max(LEAST_WIDTH, Math.round(drawing.clientWidth) || USUAL_WIDTH);
    if (room === width) return;
    width = room;
    redraw();
  }).observe(drawing);
  return { element, update };
}

function thin(points) {
  if (points.length <= MOST_POINTS) return points;
  // Means of neighbours, so that a noisy line keeps its course; the last point stays what it is.
  const size = Math.ceil(points.length / MOST_POINTS);
  const found = [];
  for (let start = 0; start < points.length; start += size) {
    const part = points.slice(start, start + size);
    const mean = part.reduce((sum, each) => sum + each[1], 0) / part.length;
    found.push([part[Math.floor(part.length / 2)][0], mean]);
  }
  found[found.length - 1] = points[points.length - 1];
  return found;
}

function scalesOf(series, width) {
  const all = series.flatMap((each) => each.points);
  const range = (axis) =>
    all.reduce(([low, high], p) => [Math.min(low, p[axis]), Math.max(high, p[axis])], [Infinity, -Infinity]);
  const [left, right] = widen(range(0), 0);
  const [low, high] = widen(range(1), 0.06);
  return {
    width,
    left,
    right,
    low,
    high,
    x: (value) => EDGE.left + ((value - left) / (right - left)) * (width - EDGE.left - EDGE.right),
    y: (value) => HEIGHT - EDGE.bottom - ((value - low) / (high - low)) * (HEIGHT - EDGE.top - EDGE.bottom),
  };
}

/**
 * A range with room at its ends.
 * @param {[number, number]} range
 * @param {number} share of the range that is added at each end
 * @returns {[number, number]}
 */
export function widen([low, high], share) {
  // A range of a few units in the last place is rounding, and no place on it could be told from the next.
  if (high - low <= 1e-9 * Math.max(Math.abs(low), Math.abs(high)))
    return [low - (Math.abs(low) || 1) * 0.5, high + (Math.abs(high) || 1) * 0.5];
  const more = (high - low) * share;
  return [low - more, high + more];
}

/**
 * Round places on an axis.
 * @param {number} low
 * @param {number} high
 * @param {number} most about so many
 * @returns {Array<number>}
 */
export function ticks(low, high, most) {
  const rough = (high - low) / most;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= rough);
  if (!step) return [];
  const start = Math.ceil(low / step);
  // Counted, not summed: where a step is less than the last place of `low`, a sum would stay where it is for ever.
  const count = Math.min(Math.floor((high - low) / step + 1e-9), Math.ceil(most)) + 1;
  return Array.from({ length: count }, (_, index) => Number(((start + index) * step).toPrecision(12))).filter(
    (at) => at <= high + step * 1e-9,
  );
}

function draw(series, scales, labels, onPoint) {
  const cursor = svg("line", { class: "cursor", y1: EDGE.top, y2: HEIGHT - EDGE.bottom, visibility: "hidden" });
  const picture = svg(
    "svg",
    {
      viewBox: `0 0 ${scales.width} ${HEIGHT}`,
      role: "img",
      "aria-label": `${labels.title}: ${labels.y} by ${labels.x}`,
    },
    ticks(scales.low, scales.high, 5).map((at) => [
      svg("line", { class: "grid", x1: EDGE.left, x2: scales.width - EDGE.right, y1: scales.y(at), y2: scales.y(at) }),
      svg("text", { x: EDGE.left - 8, y: scales.y(at) + 4, "text-anchor": "end" }, number(at)),
    ]),
    ticks(scales.left, scales.right, Math.max(3, scales.width / 100))
      .filter((at) => at >= scales.left && (labels.x !== "step" || Number.isInteger(at)))
      .map((at) => svg("text", { x: scales.x(at), y: HEIGHT - EDGE.bottom + 16, "text-anchor": "middle" }, number(at))),
    svg("line", {
      class: "axis",
      x1: EDGE.left,
      x2: scales.width - EDGE.right,
      y1: HEIGHT - EDGE.bottom,
      y2: HEIGHT - EDGE.bottom,
    }),
    svg("text", { class: "label", x: scales.width - EDGE.right, y: HEIGHT - 3, "text-anchor": "end" }, labels.x),
    svg("text", { class: "label", x: EDGE.left + 6, y: EDGE.top + 8 }, labels.y),
    series.map((each) => [
      svg("polyline", {
        class: `line series-${each.index}`,
        points: each.points.map(([a, b]) => `${scales.x(a).toFixed(1)},${scales.y(b).toFixed(1)}`).join(" "),
      }),
      each.marks || each.points.length === 1
        ? each.points.map(([a, b]) =>
            svg("circle", { class: `mark series-${each.index}`, cx: scales.x(a), cy: scales.y(b), r: 3 }),
          )
        : null,
    ]),
    cursor,
  );
  picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect();
    const at = onPoint(((event.clientX - box.left) / box.width) * scales.width);
    cursor.setAttribute("x1", at);
    cursor.setAttribute("x2", at);
    cursor.setAttribute("visibility", "visible");
  });
  picture.addEventListener("pointerleave", () => cursor.setAttribute("visibility", "hidden"));
  return picture;
}

/** Tell the values nearest to a place; gives the place of the nearest of them. */
function point(series, scales, at, value, label) {
  const nearest = (points) =>
    points.reduce((best, p) => (Math.abs(scales.x(p[0]) - at) < Math.abs(scales.x(best[0]) - at) ? p : best));
  const found = series.map((each) => [each.name, nearest(each.points)]);
  const place = found
    .map(([, p]) => p[0])
    .reduce((best, p) => (Math.abs(scales.x(p) - at) < Math.abs(scales.x(best) - at) ? p : best));
  const shown = found.filter(([, p]) => p[0] === place).map(([name, p]) => `${name} ${number(p[1], 4)}`);
  value.textContent = `${label} ${number(place)}: ${shown.join(", ")}`;
  return scales.x(place);
}

function inWords({ name, points }, label) {
  const [first, last] = [points[0], points[points.length - 1]];
  const least = points.reduce((best, p) => (p[1] < best[1] ? p : best));
  if (points.length === 1) return `${name}: ${number(first[1], 4)} at ${label} ${number(first[0])}.`;
  return (
    `${name}: from ${number(first[1], 4)} at ${label} ${number(first[0])} to ${number(last[1], 4)} at ${label} ` +
    `${number(last[0])}, lowest ${number(least[1], 4)} at ${label} ${number(least[0])}.`
  );
}
