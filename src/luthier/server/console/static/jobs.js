// The list of jobs, and the states and progress of jobs.

import { call, may, pathOf } from "./api.js";
import { dateOf, duration, number, shortName } from "./format.js";
import { allModels, nameOf } from "./models.js";
import { Age, Chip, Empty, ErrorBox, Heading, PageButtons, Table, html, link, options, useData, usePages, usePolling } from "./ui.js";

const PAGE = 25;
const BUSY_SECONDS = 4;
const CALM_SECONDS = 20;
const COLUMNS = [
  "Name", "State", "Base model", "Model", "Method", { name: "Progress", kind: "wide" }, { name: "Created", kind: "nowrap" },
];
export const STATES = ["Queued", "Running", "Paused", "Stopping", "Completed", "Failed", "Stopped"];
const ENDED = ["Completed", "Failed", "Stopped"];
const COLOURS = { Running: "note", Completed: "good", Failed: "error", Paused: "warning", Stopping: "warning" };

/** Methods of customization: the name and what the method is for. */
export const CUSTOMIZATIONS = {
  FINE_TUNING: { name: "Fine-tuning", about: "objective chosen from the rows" },
  CONTINUED_PRE_TRAINING: { name: "Continued pre-training", about: "train on plain text" },
  DISTILLATION: { name: "Distillation", about: "train on the replies of a teacher" },
  REINFORCEMENT_FINE_TUNING: { name: "Reinforcement fine-tuning", about: "optimize the score of a grader" },
};

/** The page. */
export function Jobs({ query }) {
  const state = STATES.includes(query.get("state")) ? query.get("state") : "";
  const choose = (event) => {
    const chosen = event.target.value;
    window.location.hash = chosen ? `${link("jobs")}?state=${chosen}` : link("jobs");
  };
  return html`
    <${Heading} title="Jobs">
      <label for="state" class="visually-hidden">State</label>
      <select id="state" value=${state} onchange=${choose}>
        ${options([["", "All states"], ...STATES.map((each) => [each, each])])}
      </select>
      ${may("develop") && html`<a class="button primary" href=${link("new")}>New job</a>`}
    <//>
    <${List} key=${state} state=${state} />
  `;
}

function List({ state }) {
  const pages = usePages();
  const position = pages.value.at(-1);
  const names = useData(modelNames);
  const { data, error, read } = useData(
    (signal) => call("GET", "/api/v1/jobs", { query: { limit: PAGE, state, position }, signal }),
    [position],
  );
  usePolling(data?.jobs.every((each) => hasEnded(each.state)) ? CALM_SECONDS : BUSY_SECONDS, read);
  if (!data || !names.data) return error ? html`<${ErrorBox} error=${error} again=${read} />` : html`<p class="soft">Loading …</p>`;
  const empty = state
    ? `No job is ${state.toLowerCase()}.`
    : html`
      <${Empty} text="There are no jobs yet. A job trains a model on your rows.">
        ${may("develop") && html`<a class="button primary" href=${link("home")}>Bring a file or try a sample</a>`}
      <//>
    `;
  return html`
    <${ErrorBox} error=${error} again=${read} />
    <${Table} caption="Jobs, newest first" columns=${COLUMNS} empty=${empty}
      rows=${data.jobs.map((job) => rowOf(job, names.data))} />
    <${PageButtons} pages=${pages} next=${data.next} noun="jobs" />
  `;
}

function rowOf(job, nameOf) {
  return [
    [html`<a href=${link("jobs", job.name)}>${job.name}</a>`, job.suffix && html`<span class="soft"> ${job.suffix}</span>`],
    html`<${StateChip} state=${job.state} />`,
    nameOf(job.base),
    html`<${ModelName} job=${job} />`,
    customizationOf(job),
    [
      html`<${Progress} job=${job} />`,
      job.queue_position && html`<small class="soft">${queuePlace(job)}</small>`,
      !job.details?.progress && !job.queue_position && html`<span class="soft">–</span>`,
    ],
    html`<${Age} at=${job.created} />`,
  ];
}

/** The name of a job's model, with a link to a model that exists. */
export function ModelName({ job }) {
  const name = nameOf({ name: job.model_name, suffix: job.suffix });
  return job.state === "Completed" ? html`<a href=${link("models", job.model_name)}>${name}</a>` : name;
}

/** Return the name of a job's method. */
export function customizationOf(job) {
  return CUSTOMIZATIONS[job.customization_type]?.name ?? job.customization_type;
}

/** Return a function from the ARN or id of a model to its name. */
export async function modelNames(signal) {
  const names = new Map();
  try {
    for (const each of await allModels(signal))
      for (const key of [each.arn, each.id]) names.set(key, nameOf(each));
  } catch (error) {
    // Keys that may not list models see the last part of the ARN.
    if (error.name === "AbortError" || error.status === 401) throw error;
  }
  return (arn) => names.get(arn) ?? shortName(arn);
}

/** Return the certificate of the model of a completed job; null if a later model has the name of the deleted one. */
export async function certificateOf(job, signal) {
  const view = await call("GET", `${pathOf("models", job.model_name)}/certificate`, { signal });
  return view.certificate.id === job.result.stored_id ? view : null;
}

/** Return whether a job or an export is over. */
export const hasEnded = (state) => ENDED.includes(state);

export const StateChip = ({ state }) => html`<${Chip} kind=${COLOURS[state]}>${state}<//>`;

/** The progress of a job as a bar and in words; nothing if the progress is unknown. */
export function Progress({ job }) {
  const { progress } = job.details ?? {};
  if (!progress) return null;
  const label = `Step ${number(progress.step)} of ${number(progress.steps)}`;
  const left = job.state === "Running" ? timeLeft(progress.estimated_finish) : "";
  return html`
    <div class="progress">
      ${!hasEnded(job.state) && html`<progress max=${progress.steps || 1} value=${progress.step} aria-label=${label} />`}
      <small class="soft">${label}${left && `, ${left}`}</small>
    </div>
  `;
}

/** Return the position of a waiting job, and its expected start. */
export function queuePlace({ queue_position: position, expected_start: start }) {
  const seconds = start && (dateOf(start) - Date.now()) / 1000;
  return `Position ${number(position)} in the queue${start ? `, expected start ${seconds > 1 ? `in about ${duration(Math.round(seconds))}` : "soon"}` : ""}`;
}

/** Return the time since the start of a job, or between its start and end; null before the start. */
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
