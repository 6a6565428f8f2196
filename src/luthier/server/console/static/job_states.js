// States of jobs, and what is shown of how far they are.

import { call } from "./api.js";
import { h } from "./dom.js";
import { dateOf, duration, number, shortName } from "./format.js";

export const STATES = ["Queued", "Running", "Paused", "Stopping", "Completed", "Failed", "Stopped"];
/** States in which a job or an export changes no more. */
export const ENDED = new Set(["Completed", "Failed", "Stopped"]);
const KINDS = { Running: "note", Completed: "good", Failed: "error", Paused: "warning", Stopping: "warning" };

/** What a job can make of its rows: its name, and when it is what is wanted. */
export const CUSTOMIZATIONS = {
  FINE_TUNING: { name: "Fine-tuning", about: "what is learned goes by the shape of the rows" },
  CONTINUED_PRE_TRAINING: { name: "Continued pre-training", about: "to go on writing texts" },
  DISTILLATION: { name: "Distillation", about: "to answer as a teacher model does" },
  REINFORCEMENT_FINE_TUNING: { name: "Reinforcement fine-tuning", about: "to score well with a grader" },
};

/**
 * @param {Object} job
 * @returns {string} what the job makes of its rows
 */
export function customizationOf(job) {
  return CUSTOMIZATIONS[job.customization_type]?.name ?? job.customization_type;
}

/**
 * The names of models by their ARNs, which is how jobs name what they start from.
 * @param {AbortSignal} signal
 * @returns {Promise<function(string): string>}
 */
export async function modelNames(signal) {
  const names = new Map();
  try {
    for (const each of (await call("GET", "/api/v1/models", { signal })).models) names.set(each.arn, each.name);
  } catch (error) {
    // Who may not list models reads the ends of their ARNs.
    if (error.name === "AbortError" || error.status === 401) throw error;
  }
  return (arn) => names.get(arn) ?? shortName(arn);
}

/**
 * @param {string} state
 * @returns {boolean} whether a job can change no more
 */
export function hasEnded(state) {
  return ENDED.has(state);
}

/**
 * @param {string} state
 * @returns {HTMLElement}
 */
export function stateChip(state) {
  return h("span", { class: `chip ${KINDS[state] ?? ""}` }, state);
}

/**
 * How far a job is, as a bar and in words.
 * @param {Object} job as the API shows it
 * @returns {?HTMLElement} null where nothing is known of it
 */
export function progressOf(job) {
  const progress = job.details?.progress;
  if (!progress) return null;
  const label = `Step ${number(progress.step)} of ${number(progress.steps)}`;
  const left = job.state === "Running" ? timeLeft(progress.estimated_finish) : "";
  return h(
    "div",
    { class: "progress" },
    hasEnded(job.state) ? null : h("progress", { max: progress.steps || 1, value: progress.step, "aria-label": label }),
    h("small", { class: "soft" }, label, left ? `, ${left}` : null),
  );
}

/**
 * How long a job has been worked on, or took.
 * @param {Object} job
 * @returns {?string}
 */
export function timeTaken(job) {
  const [from, to] = [dateOf(job.started), dateOf(job.ended) ?? new Date()];
  return from ? duration((to - from) / 1000) : null;
}

function timeLeft(finish) {
  const at = dateOf(finish);
  if (!at) return "";
  const seconds = (at - Date.now()) / 1000;
  return seconds > 0 ? `about ${duration(Math.max(1, Math.round(seconds)))} left` : "nearly done";
}
