// What a job will take, each figure with its interval.

import { h } from "./dom.js";
import { bytes, duration, number, words } from "./format.js";
import { facts, table } from "./table.js";

/** Parts of the time, in words. */
const PARTS = {
  data: "Reading the data",
  load: "Loading the model",
  begin: "Measuring before the first step",
  baselines: "Simple models to compare with",
  calibrate: "Calibration",
  ahead: "What is computed ahead",
  steps: "Training steps",
  validation: "Validation",
  checkpoints: "Checkpoints",
  store: "Storing the model",
};

/**
 * @param {Object} estimate as the API gives it
 * @returns {HTMLElement}
 */
export function estimateView(estimate) {
  const range = (figure, format) =>
    !figure
      ? null
      : [
          format(figure.value),
          figure.low === figure.high ? null : h("small", null, `${format(figure.low)} to ${format(figure.high)}`),
        ];
  const cost = estimate.cost ?? estimate.energy;
  const parts = Object.entries(estimate.parts ?? {}).filter(([, figure]) => figure.high > 0);
  return h(
    "section",
    { class: "estimate" },
    h("h2", null, "Estimate"),
    facts([
      ["Time", range(estimate.seconds, duration)],
      ["Memory", range(estimate.memory, bytes)],
      ["Disk", range(estimate.disk, bytes)],
      ["Cost", cost?.value !== undefined ? range(cost, number) : null],
      ["Steps", number(estimate.steps)],
      ["Passes", number(estimate.epochs)],
      ["Rows", number(estimate.rows)],
      ["Tokens", range(estimate.tokens, (value) => number(Math.round(value)))],
    ]),
    h(
      "p",
      { class: "soft" },
      `Objective ${estimate.objective}, adaptation ${estimate.adaptation}, on ${estimate.machine}. `,
      "The figures are of a few real steps on these rows; other work on the machine makes it slower.",
    ),
    h(
      "details",
      null,
      h("summary", null, "Where the time goes"),
      table({
        caption: "Parts of the time",
        columns: [
          "Part",
          { name: "Time", kind: "number" },
          { name: "At least", kind: "number" },
          { name: "At most", kind: "number" },
        ],
        rows: parts.map(([name, figure]) => [
          PARTS[name] ?? words(name),
          duration(figure.value),
          duration(figure.low),
          duration(figure.high),
        ]),
      }),
    ),
  );
}
