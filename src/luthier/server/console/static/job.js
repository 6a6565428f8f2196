// One job: progress and curves while it runs; afterwards verdict, examples, baselines, label issues and rows.

import { call, events, may, pathOf } from "./api.js";
import { baselines } from "./certificate.js";
import { LineChart } from "./charts.js";
import { learnNames, sentence, withNames } from "./files.js";
import { dateOf, duration, number, shortName, time, words } from "./format.js";
import { CompareWith } from "./job_differences.js";
import { ModelName, Progress, StateChip, certificateOf, customizationOf, hasEnded, modelNames, queuePlace, timeTaken } from "./jobs.js";
import { LabelIssues } from "./label_issues.js";
import {
  ErrorBox, ExampleCard, Facts, Heading, Pending, Said, Section, Table, announce, confirmed, html, link, pause, useAction, useData, useEffect, useLeaving,
  usePolling, useRef, useSignal,
} from "./ui.js";
import { HeldOut, ScoreBars, shorten, verdictOf } from "./verdict.js";

const REFRESH_SECONDS = 5;
/** Messages that are shown at most: the newest. */
const MOST_MESSAGES = 300;
/** Points of a curve that are kept at most: of more points, every second one. */
const MOST_POINTS = 2000;
const DRAW_MILLISECONDS = 250;
const PARTS = { validation: "Checking the data", data_processing: "Preparing the data", training: "Training" };
const ACTIONS = {
  pause: { label: "Pause", states: ["Queued", "Running"] },
  resume: { label: "Resume", states: ["Paused"] },
  stop: {
    label: "Stop",
    states: ["Queued", "Running", "Paused"],
    ask: (name) => ({
      title: `Stop the job ${name}?`, text: "A stopped job stores no model and cannot be resumed.", verb: "Stop", danger: true,
    }),
  },
};
const WAITING = {
  Queued: "The job waits for a free worker or for memory.",
  Paused: "The job is paused. Its progress is stored. Resume the job to continue.", Stopping: "The job is being stopped.",
};

/** The page. */
export function Job({ params }) {
  const path = pathOf("jobs", params.name);
  const found = useData(async (signal) => {
    const job = await call("GET", path, { signal });
    const [nameOf] = await Promise.all([modelNames(signal), learnNames(job.details.sources ?? [], signal)]);
    return { job, nameOf };
  });
  if (!found.data) return html`<p class="soft"><a href=${link("jobs")}>Jobs</a> /</p><${Pending} title="Job" ...${found} />`;
  return html`<${Followed} path=${path} first=${found.data.job} nameOf=${found.data.nameOf} />`;
}

/** A job that is kept up to date until its end. */
function Followed({ path, first, nameOf }) {
  const shown = useSignal(first);
  const problem = useSignal(null);
  const course = useRef(null);
  course.current ??= new Course();
  const drawn = useSignal(course.current.snapshot());
  const left = useLeaving();
  const job = shown.value;

  const refresh = async () => {
    const { state } = shown.value;
    shown.value = await call("GET", path, { signal: left });
    if (shown.value.state !== state) announce(`The job ${job.name} is ${shown.value.state.toLowerCase()}.`);
  };
  const action = useAction(async (name, { ask }) => {
    if (ask && !(await confirmed(ask(job.name)))) return;
    shown.value = await call("POST", `${path}/${name}`, { signal: left });
  });
  usePolling(REFRESH_SECONDS, async () => {
    if (hasEnded(shown.value.state)) return;
    const failure = await refresh().catch((error) => error);
    if (failure?.name !== "AbortError") problem.value = failure ?? null;
  });
  useEffect(() => {
    let timer = null;
    // A replay of a long course would redraw the page for each event.
    const draw = () => {
      timer ??= setTimeout(() => {
        timer = null;
        drawn.value = course.current.snapshot();
      }, DRAW_MILLISECONDS);
    };
    left.addEventListener("abort", () => clearTimeout(timer));
    follow(path, shown, course.current, { left, draw, refresh, problem });
  }, []);

  const buttons = Object.entries(ACTIONS).filter(([, each]) => each.states.includes(job.state) && may("develop"));
  const log = job.log && (withNames(job.log.join("\n")) || "The log is empty.");
  const { losses, scores, measure, messages } = drawn.value;
  const { refit } = job.details;
  const event = refit && { at: refit.step, name: `Refit on all ${number(refit.rows)} rows` };
  return html`
    <p class="soft"><a href=${link("jobs")}>Jobs</a> /</p>
    <${Heading} title=${job.suffix ? `${job.name} ${job.suffix}` : job.name} chips=${html`<${StateChip} state=${job.state} />`}>
      ${buttons.map(
        ([name, each]) => html`
          <button type="button" key=${name} class=${name === "stop" ? "danger" : null} onclick=${() => action.run(name, each)}>
            ${each.label}
          </button>
        `,
      )}
    <//>
    <${ErrorBox} error=${action.error} />
    <${ErrorBox} error=${problem.value}>The page tries again automatically.<//>
    ${WAITING[job.state] && html`<p class="soft">${WAITING[job.state]} ${job.queue_position && `${queuePlace(job)}.`}</p>`}
    ${!hasEnded(job.state) && html`<${Progress} job=${job} />`}
    ${job.state === "Running" && messages.length > 0 && html`<p class="soft" id="stage"><${Said} text=${withNames(String(messages.at(-1).data.message))} /></p>`}
    <${Result} job=${job} />
    ${job.result?.label_issues?.issues ? html`<${LabelIssues} job=${job} />` : null}
    <section>
      <h2>Training curves</h2>
      <${LineChart} title="Loss" x="step" series=${losses} event=${event} />
      ${scores.length > 0 && html`<${LineChart} title=${words(measure)} x="step" series=${scores} event=${event} />`}
    </section>
    <${Section} title="Replies during training">${job.details.replies && html`<${Replies} measurements=${job.details.replies} />`}<//>
    <section><h2>Facts</h2><${JobFacts} job=${job} nameOf=${nameOf} /><${CompareWith} job=${job} /></section>
    <section>
      <h2>Settings and log</h2>
      <details class="rule"><summary>Settings with reasons</summary><div class="inside"><${Settings} job=${job} /></div></details>
      <details class="rule"><summary>Complete recipe</summary><pre class="row" tabindex="0">${withNames(JSON.stringify(job.recipe, null, 2))}</pre></details>
      <details class="rule"><summary>Steps of the job</summary><div class="inside"><${Parts} job=${job} /></div></details>
      <details class="rule" open=${!hasEnded(first.state)}><summary>Messages</summary><div class="inside"><${Messages} messages=${messages} /></div></details>
      <details class="rule" open=${first.state === "Failed"}><summary>End of the log</summary><pre class="row" tabindex="0">${log}</pre></details>
    </section>
  `;
}

/** Replies to held-out rows, before training and after the last measurements. */
function Replies({ measurements }) {
  const last = measurements.at(-1).replies;
  return last.map(({ prompt, wanted }, row) => {
    const parts = measurements.map(({ step, replies }) => [step ? `Step ${number(step)}` : "Before training", shorten(replies[row].reply) || "–"]);
    return html`<${ExampleCard} key=${row} title=${shorten(prompt)} parts=${[...parts, ["Wanted", shorten(wanted)]]} />`;
  });
}

/** Follow the stream of events while the tab is visible; a hidden tab closes its connection. */
async function follow(path, shown, course, { left, draw, refresh, problem }) {
  while (!left.aborted) {
    const stream = new AbortController();
    const release = () => (document.hidden || left.aborted) && stream.abort();
    document.addEventListener("visibilitychange", release);
    left.addEventListener("abort", release);
    try {
      for await (const event of events(`${path}/events`, { query: { after: course.last }, signal: stream.signal })) {
        if (event.kind !== "metrics") await learnNames([event.data.message ?? ""], left);
        course.add(event);
        draw();
        const step = stepOf(event, shown.value);
        if (step) shown.value = { ...shown.value, details: { ...shown.value.details, progress: step } };
        if (event.kind === "state" && event.data.state !== shown.value.state) await refresh();
      }
      problem.value = null;
      await refresh();
      if (hasEnded(shown.value.state)) return;
    } catch (error) {
      if (left.aborted) return;
      if (error.name !== "AbortError") problem.value = error;
      if ([401, 403, 404].includes(error.status)) return;
    } finally {
      document.removeEventListener("visibilitychange", release);
      left.removeEventListener("abort", release);
    }
    await pause(3, left);
  }
}

/** Return the progress after an event; null if the event has none. */
function stepOf({ kind, data }, job) {
  if (kind !== "metrics" || !data.total_steps || data.train_loss === undefined || job.state !== "Running") return null;
  const known = job.details.progress ?? {};
  return { ...known, step: Math.max(data.step, known.step ?? 0), steps: data.total_steps };
}

/** Messages, and metrics by step. Metrics of a step that is repeated after a crash replace each other. */
class Course {
  constructor() {
    this.last = 0;
    this.measure = "";
    this.messages = [];
    this.series = { training: new Map(), validation: new Map(), trainingScore: new Map(), validationScore: new Map() };
  }

  add({ id, kind, data }) {
    this.last = Number(id) || this.last;
    if (kind !== "metrics") {
      this.messages = [...this.messages.slice(1 - MOST_MESSAGES), { id, kind, data }];
      return;
    }
    const put = (name, value) => {
      const points = this.series[name].set(data.step, value);
      if (points.size > MOST_POINTS) [...points.keys()].forEach((step, index) => index % 2 && points.delete(step));
    };
    if (data.measure && data.measure !== "loss") this.measure = data.measure;
    // Events of a validation repeat the training loss for clients of OpenAI.
    if ("valid_loss" in data) {
      put("validation", data.valid_loss);
      const score = data[`valid_${this.measure}`] ?? data[this.measure];
      if (this.measure && typeof score === "number") put("validationScore", score);
    } else if ("train_loss" in data) {
      put("training", data.train_loss);
      if (this.measure && typeof data[this.measure] === "number") put("trainingScore", data[this.measure]);
    }
  }

  snapshot() {
    const line = (name, series) => ({ name, points: [...this.series[series]].sort((a, b) => a[0] - b[0]) });
    const both = (first, second) => [line("Training", first), { ...line("Validation", second), marks: true }];
    const scores = this.measure ? both("trainingScore", "validationScore").filter((each) => each.points.length) : [];
    return { losses: both("training", "validation"), scores, measure: this.measure, messages: this.messages };
  }
}

function JobFacts({ job, nameOf }) {
  return html`<${Facts} pairs=${[
    ["Base model", html`<a href=${link("models", job.base)}>${nameOf(job.base)}</a>`],
    ["Model", html`<${ModelName} job=${job} />`],
    ["Method", customizationOf(job)],
    ["Data", (job.details.sources ?? []).map((each) => html`<div><a href=${link("data", each)}>${shortName(withNames(each))}</a></div>`)],
    ["Created", time(job.created)],
    ["Ended", job.ended ? time(job.ended) : null],
    [hasEnded(job.state) ? "Time taken" : "Time since the start", timeTaken(job)],
    ["Steps", job.result && number(job.result.steps)],
    ["Final training loss", job.result && number(job.result.train_loss, 4)],
    ["Validation loss", job.result?.validation_losses?.map((each) => number(each, 4)).join(", ")],
    ["Workers started", job.attempts > 1 ? number(job.attempts) : null],
    ["Priority", job.priority ? number(job.priority) : null],
  ]} />`;
}

function Result({ job }) {
  if (job.state === "Failed")
    return html`
      <div class="box error" role="alert">
        <p><strong>The job failed.</strong></p>
        <p class="failure"><${Said} text=${withNames(job.failure ?? "The reason is unknown.")} /></p>
      </div>
    `;
  if (job.state !== "Completed") return null;
  return html`<${Completed} job=${job} />`;
}

/** The verdict of a completed job, held-out examples, baselines and the number of rows. */
function Completed({ job }) {
  const found = useData(async (signal) => {
    const [view, base] = await Promise.all([
      certificateOf(job, signal),
      call("GET", pathOf("models", job.base), { signal }).catch(() => null),
    ]);
    return view && { view, base };
  });
  const { verdicts = [], examples, retraining } = job.result ?? {};
  const reasons = verdicts.filter((each) => each !== retraining?.verdict);
  const record = found.data?.view.certificate.record ?? {};
  const metrics = record.metrics ?? {};
  const sets = { shares: new Set(found.data?.view.shares), errors: new Set(found.data?.view.lower_is_better) };
  const verdict = verdictOf(metrics, record.data?.validation_rows, sets);
  const { rows, validation_rows: held, dropped, truncated, learned_tokens: learned } = record.data ?? {};
  // A refit learns the held-out rows as well.
  const refitted = held === 0 && metrics.comparison?.rows > 0;
  return html`
    <div class=${`box ${verdict?.kind ?? "note"}`} id="result">
      <p><strong>${verdict?.text ?? "The model is trained."}</strong></p>
      ${reasons.length > 0 && html`
        <details><summary>Reasons</summary>${reasons.map((each) => html`<p><${Said} text=${sentence(each)} /></p>`)}</details>
      `}
    </div>
    ${retraining && html`
      <div class="box note" id="retraining">
        <p><strong>Compared with the model before.</strong> <${Said} text=${sentence(retraining.verdict)} /></p>
        <p><a href=${link("deployments")}>Deployments</a></p>
      </div>
    `}
    <div class="actions">
      <a class="button primary" href=${link("models", job.model_name)}>Open the model</a>
      ${may("invoke") && html`<a class="button" href=${link("playground", job.model_name)}>Playground</a>`}
      ${may("develop") && found.data && html`
        <a class="button" href=${`${link("evaluations")}?task=comparisons&model=${encodeURIComponent(shortName(found.data.view.model))}`}>Compare with the base</a>
        <a class="button" href=${`${link("deployments")}?model=${encodeURIComponent(shortName(found.data.view.model))}`}>Deploy or promote</a>
      `}
    </div>
    <${ErrorBox} error=${found.error?.status !== 404 && found.error} again=${found.read} />
    ${verdict && html`<${ScoreBars} verdict=${verdict} />`}
    ${found.data && may("invoke") && html`
      <section id="examples"><h2>Held-out examples</h2><${HeldOut} job=${job} rows=${examples} base=${found.data.base} refitted=${refitted} /></section>
    `}
    <${Section} title="Comparison with simple methods">${baselines(metrics.comparison, sets)}<//>
    ${rows !== undefined && html`
      <section>
        <h2>Rows</h2>
        <${Facts} pairs=${[
          ["Learned", number(rows)],
          ["Held out to measure", refitted ? html`${number(metrics.comparison.rows)}<small>learned as well after the measurement</small>` : number(held)],
          ["Left out: longer than the context", number(dropped)],
          ["Cut to the context", number(truncated)],
          ["Learned tokens", number(learned)],
        ]} />
      </section>
    `}
  `;
}

function Settings({ job }) {
  const { chosen = {}, reasons = {} } = job.details;
  const shown = (value) => (typeof value === "number" ? number(value, 4) : String(value));
  return html`<${Table} caption="Settings chosen for these rows" showCaption
    columns=${[{ name: "Setting", kind: "code" }, "Value", "Reason"]}
    rows=${Object.entries(chosen).map(([name, value]) => [name, shown(value), withNames(reasons[name] ?? "")])}
    empty=${hasEnded(job.state) ? "No setting was chosen automatically." : "The settings are chosen after the data are read."} />`;
}

function Parts({ job }) {
  const known = job.details.parts ?? {};
  const took = ({ status, created, modified }) => {
    const [from, to] = [dateOf(created), dateOf(modified)];
    return status === "Completed" && from && to ? duration((to - from) / 1000) : "–";
  };
  const stateOf = ({ status }) => (status === "Completed" ? status : hasEnded(job.state) ? "Not finished" : "In progress");
  return html`<${Table} caption="Steps of the job"
    columns=${["Step", "State", { name: "Started", kind: "nowrap" }, { name: "Duration", kind: "number" }]}
    rows=${Object.entries(PARTS)
      .filter(([name]) => known[name])
      .map(([name, label]) => [label, stateOf(known[name]), time(known[name].created), took(known[name])])}
    empty="No worker has started yet." />`;
}

function Messages({ messages }) {
  const list = useRef(null);
  const atEnd = useRef(true);
  useEffect(() => {
    // A reader who scrolled up stays there.
    if (atEnd.current) list.current.scrollTop = list.current.scrollHeight;
  }, [messages]);
  const scrolled = ({ target }) => (atEnd.current = target.scrollHeight - target.scrollTop - target.clientHeight < 40);
  return html`
    <ol class="messages" tabindex="0" aria-label="Messages" ref=${list} onscroll=${scrolled}>
      ${messages.map(({ id, kind, data }) => {
        const label = { warning: "Warning", error: "Error", state: data.state }[kind];
        return html`
          <li key=${id} class=${kind}>
            <time datetime=${data.at} class="soft">${dateOf(data.at)?.toLocaleTimeString()}</time>
            ${label && html`<span class=${`chip ${kind === "state" ? "" : kind}`}>${label}</span>`}
            <span class="text"><${Said} text=${withNames(String(data.message ?? "")).replace(/^warning: /, "")} /></span>
          </li>
        `;
      })}
    </ol>
  `;
}
