// One job as it happens: its progress, curves, settings and messages.

import { call, events, may } from "./api.js";
import { lineChart } from "./chart.js";
import { announce, h, replace, replaceKeepingFocus } from "./dom.js";
import { learnNames, withNames } from "./files.js";
import { dateOf, duration, number, time, words } from "./format.js";
import { customizationOf, hasEnded, modelNames, progressOf, stateChip, timeTaken } from "./job_states.js";
import { labelIssuesSection } from "./label_issues.js";
import { errorBox, link, pause } from "./router.js";
import { facts, table } from "./table.js";

const REFRESH_SECONDS = 5;
/** Messages that are shown at most: the newest. */
const MOST_MESSAGES = 300;
const DRAW_MILLISECONDS = 250;
const PARTS = { validation: "Checking the data", data_processing: "Preparing the data", training: "Training" };
const ACTIONS = {
  pause: { label: "Pause", states: ["Queued", "Running"] },
  resume: { label: "Resume", states: ["Paused"] },
  stop: {
    label: "Stop",
    states: ["Queued", "Running", "Paused"],
    ask: (name) => `Stop the job ${name}? It ends without a model, and cannot be resumed.`,
  },
};

/** Draw the page of a job, and follow it until it has ended. */
export async function render(root, params, signal) {
  const path = `/api/v1/jobs/${encodeURIComponent(params.name)}`;
  let job = await call("GET", path, { signal });
  const [nameOf] = await Promise.all([modelNames(signal), learnNames(job.details.sources ?? [], signal)]);
  document.title = `${job.name} – luthier`;

  const place = {};
  // What an action was refused for stays until something changes; what polling failed at, until it works again.
  for (const name of ["head", "refusal", "problem", "state", "result", "labels", "settings", "parts"]) place[name] = h("div");
  const messages = h("ol", { class: "messages", tabindex: "0", "aria-label": "Messages" });
  const loss = lineChart({ title: "Loss", x: "step", y: "loss" });
  const measure = lineChart({ title: "Quality", x: "step", y: "" });
  measure.element.hidden = true;
  const course = new Course();
  const recipe = h("pre", { class: "row" });
  const log = h("pre", { class: "row" });
  replace(
    root,
    place.head,
    place.refusal,
    place.problem,
    place.state,
    place.result,
    place.labels,
    h("section", null, h("h2", null, "Course"), loss.element, measure.element),
    h(
      "section",
      null,
      h("h2", null, "Settings"),
      place.settings,
      h("details", null, h("summary", null, "The whole recipe"), recipe),
    ),
    h("section", null, h("h2", null, "Parts"), place.parts),
    h(
      "section",
      null,
      h("h2", null, "Messages"),
      messages,
      h("details", { open: job.state === "Failed" }, h("summary", null, "The end of the log"), log),
    ),
  );

  const act = async (name, button) => {
    const action = ACTIONS[name];
    if (action.ask && !window.confirm(action.ask(job.name))) return;
    button.disabled = true;
    try {
      job = await call("POST", `${path}/${name}`, { signal });
      replace(place.refusal);
      drawJob();
    } catch (error) {
      if (error.name !== "AbortError") replace(place.refusal, errorBox(error));
    } finally {
      button.disabled = false;
      // A button that is disabled or gone has let the keyboard fall to the start of the page.
      if (!signal.aborted && document.activeElement === document.body)
        focusOn(button.isConnected ? button : place.head);
    }
  };

  let drawn = "";
  function drawJob() {
    if (job.log) log.textContent = withNames(job.log.join("\n")) || "The log is empty.";
    // How far it is changes all the time, and is drawn by itself.
    const now = JSON.stringify({ ...job, log: null, details: { ...job.details, progress: null } });
    drawState(place, job);
    if (now === drawn) return;
    // Buttons and links that somebody may be at are made anew only where something has changed.
    drawn = now;
    drawHead(place.head, job, nameOf, act);
    drawResult(place.result, job);
    if (!place.labels.hasChildNodes()) replace(place.labels, labelIssuesSection(job, signal));
    drawSettings(place.settings, job);
    drawParts(place.parts, job);
    recipe.textContent = withNames(JSON.stringify(job.recipe, null, 2));
  }

  let drawing = null;
  let drawTime = 0;
  function drawCourse() {
    drawing = null;
    const began = performance.now();
    loss.update(course.losses());
    const scores = course.scores();
    measure.element.hidden = !scores.length;
    if (scores.length) {
      measure.element.querySelector("figcaption").textContent = words(course.measure);
      measure.update(scores);
    }
    drawTime = performance.now() - began;
  }

  const refresh = async () => {
    const state = job.state;
    job = await call("GET", path, { signal });
    if (job.state !== state) {
      announce(`The job ${job.name} is ${job.state.toLowerCase()}.`);
      replace(place.refusal);
    }
    drawJob();
  };

  async function take(event) {
    course.last = Number(event.id) || course.last;
    if (event.kind === "metrics") {
      course.add(event.data);
      if (event.data.total_steps && event.data.train_loss !== undefined && job.state === "Running") {
        const known = job.details.progress ?? {};
        job.details.progress = {
          ...known,
          step: Math.max(event.data.step, known.step ?? 0),
          steps: event.data.total_steps,
        };
        drawState(place, job);
      }
      // A long course takes a while to draw: most of the time is left to what comes in.
      drawing ??= setTimeout(drawCourse, Math.max(DRAW_MILLISECONDS, 5 * drawTime));
      return;
    }
    await learnNames([event.data.message ?? ""], signal);
    addMessage(messages, event);
    if (event.kind === "state" && event.data.state !== job.state) await refresh();
  }

  /** Follow the stream while somebody looks; a hidden tab lets go of its connection. */
  async function follow() {
    for (;;) {
      const stream = new AbortController();
      const release = () => {
        if (document.hidden || signal.aborted) stream.abort();
      };
      document.addEventListener("visibilitychange", release);
      signal.addEventListener("abort", release);
      try {
        for await (const event of events(`${path}/events`, { query: { after: course.last }, signal: stream.signal })) {
          await take(event);
        }
        if (!signal.aborted) replace(place.problem);
        await refresh();
        if (hasEnded(job.state)) return;
      } catch (error) {
        if (signal.aborted) return;
        if (error.name !== "AbortError")
          replace(place.problem, errorBox(error, null), note("The page tries again by itself."));
        if (error.status === 401 || error.status === 403 || error.status === 404) return;
      } finally {
        document.removeEventListener("visibilitychange", release);
        signal.removeEventListener("abort", release);
      }
      if (!(await pause(3, signal))) return;
    }
  }

  async function refreshWhileOpen() {
    while (!hasEnded(job.state) && (await pause(REFRESH_SECONDS, signal))) {
      try {
        await refresh();
        replace(place.problem);
      } catch (error) {
        if (error.name === "AbortError" || error.status === 401) return;
        replace(place.problem, errorBox(error), note("The page tries again by itself."));
      }
    }
  }

  signal.addEventListener("abort", () => clearTimeout(drawing));
  drawJob();
  follow();
  refreshWhileOpen();
}

/** Metrics of a job by step: what comes again after a crash is the same. */
class Course {
  constructor() {
    this.last = 0;
    this.measure = "";
    this.series = { training: new Map(), validation: new Map(), trainingScore: new Map(), validationScore: new Map() };
  }

  add(data) {
    const { training, validation, trainingScore, validationScore } = this.series;
    if (data.measure && data.measure !== "loss") this.measure = data.measure;
    // Events of validation tell the training loss of then as well, for clients of OpenAI.
    if ("valid_loss" in data) {
      validation.set(data.step, data.valid_loss);
      const score = data[`valid_${this.measure}`] ?? data[this.measure];
      if (this.measure && typeof score === "number") validationScore.set(data.step, score);
    } else if ("train_loss" in data) {
      training.set(data.step, data.train_loss);
      if (this.measure && typeof data[this.measure] === "number") trainingScore.set(data.step, data[this.measure]);
    }
  }

  losses() {
    return this.both("training", "validation");
  }

  scores() {
    return this.measure ? this.both("trainingScore", "validationScore").filter((each) => each.points.length) : [];
  }

  both(training, validation) {
    const points = (name) => [...this.series[name]].sort((a, b) => a[0] - b[0]);
    return [
      { name: "Training", points: points(training) },
      { name: "Validation", points: points(validation), marks: true },
    ];
  }
}

function drawHead(root, job, nameOf, act) {
  const buttons = Object.entries(ACTIONS)
    .filter(([, action]) => action.states.includes(job.state) && may("develop"))
    .map(([name, action]) => {
      const button = h("button", { type: "button", class: name === "stop" ? "danger" : null }, action.label);
      button.addEventListener("click", () => act(name, button));
      return button;
    });
  replaceKeepingFocus(
    root,
    h("p", { class: "soft" }, h("a", { href: link("jobs") }, "Jobs"), " /"),
    h(
      "div",
      { class: "heading" },
      h("h1", null, job.name, job.suffix ? h("span", { class: "soft" }, ` ${job.suffix}`) : null),
      stateChip(job.state),
      h("div", { class: "actions" }, buttons),
    ),
    facts([
      ["Base model", h("a", { href: link("models", job.base) }, nameOf(job.base))],
      [
        "Model",
        job.state === "Completed" ? h("a", { href: link("models", job.model_name) }, job.model_name) : job.model_name,
      ],
      ["Kind", customizationOf(job)],
      ["Data", (job.details.sources ?? []).map((each) => h("div", null, withNames(each)))],
      ["Created", time(job.created)],
      ["Ended", job.ended ? time(job.ended) : null],
      ["Workers started", job.attempts > 1 ? number(job.attempts) : null],
      ["Priority", job.priority ? number(job.priority) : null],
    ]),
  );
}

function drawState(place, job) {
  const waits = {
    Queued: "The job waits for its turn, or for memory.",
    Paused: "The job is paused. What it has learned so far is kept; resume it to go on.",
    Stopping: "The job is being stopped.",
  }[job.state];
  const taken = timeTaken(job);
  replace(
    place.state,
    waits ? h("p", { class: "soft" }, waits) : null,
    progressOf(job),
    taken ? h("p", { class: "soft" }, hasEnded(job.state) ? `It took ${taken}.` : `Begun ${taken} ago.`) : null,
  );
}

function drawResult(root, job) {
  if (job.state === "Failed") {
    replace(
      root,
      h(
        "div",
        { class: "box error", role: "alert" },
        h("p", null, h("strong", null, "The job has failed.")),
        h("p", { class: "failure" }, withNames(job.failure ?? "No reason is known.")),
      ),
    );
    return;
  }
  if (job.state !== "Completed") {
    replace(root);
    return;
  }
  const result = job.result ?? {};
  const verdicts = (result.verdicts ?? []).map(sentence);
  const losses = (result.validation_losses ?? []).map((each) => number(each, 4)).join(", ");
  replaceKeepingFocus(
    root,
    h(
      "div",
      { class: `box ${verdicts.length ? "note" : "good"}` },
      h("p", null, h("strong", null, "The model is trained.")),
      verdicts.map((text) => h("p", null, text)),
    ),
    facts([
      ["Steps", number(result.steps)],
      ["Tokens", number(result.tokens)],
      ["Training loss at the end", number(result.train_loss, 4)],
      ["Validation loss", losses || null],
    ]),
    h(
      "div",
      { class: "actions" },
      h("a", { class: "button primary", href: link("models", job.model_name) }, "Open the model"),
      may("invoke") ? h("a", { class: "button", href: link("playground", job.model_name) }, "Try it") : null,
    ),
  );
}

function drawSettings(root, job) {
  const { chosen = {}, reasons = {} } = job.details;
  const shown = (value) => (typeof value === "number" ? number(value, 4) : String(value));
  replaceKeepingFocus(
    root,
    table({
      caption: "Settings that were chosen for these rows",
      showCaption: true,
      columns: [{ name: "Setting", kind: "code" }, "Value", "Why"],
      rows: Object.entries(chosen).map(([name, value]) => [name, shown(value), withNames(reasons[name] ?? "")]),
      empty: hasEnded(job.state)
        ? "No setting was chosen."
        : "Settings that were left open are chosen once the data are read.",
    }),
  );
}

function drawParts(root, job) {
  const known = job.details.parts ?? {};
  const took = (part) => {
    const [from, to] = [dateOf(part.created), dateOf(part.modified)];
    return part.status === "Completed" && from && to ? duration((to - from) / 1000) : "–";
  };
  replaceKeepingFocus(
    root,
    table({
      caption: "Parts of the work",
      columns: ["Part", "State", { name: "Began", kind: "nowrap" }, { name: "Took", kind: "number" }],
      rows: Object.entries(PARTS)
        .filter(([name]) => known[name])
        .map(([name, label]) => [
          label,
          known[name].status === "Completed" ? "Completed" : hasEnded(job.state) ? "Not finished" : "In progress",
          time(known[name].created),
          took(known[name]),
        ]),
      empty: "No worker has begun yet.",
    }),
  );
}

function addMessage(list, { kind, data }) {
  const text = withNames(String(data.message ?? "")).replace(/^warning: /, "");
  const label = { warning: "Warning", error: "Error", state: data.state }[kind];
  const atEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 40;
  const at = dateOf(data.at);
  list.append(
    h(
      "li",
      { class: kind },
      h("time", { datetime: data.at, class: "soft" }, at ? at.toLocaleTimeString() : ""),
      label ? h("span", { class: `chip ${kind === "state" ? "" : kind}` }, label) : null,
      h("span", { class: "text" }, text),
    ),
  );
  while (list.children.length > MOST_MESSAGES) list.firstChild.remove();
  // Who reads further up is left there.
  if (atEnd) list.scrollTop = list.scrollHeight;
}

/** A message of the server as a sentence that stands by itself. */
function sentence(message) {
  const text = withNames(message).trim();
  return `${text.charAt(0).toUpperCase()}${text.slice(1)}${/[.!?]$/.test(text) ? "" : "."}`;
}

function focusOn(element) {
  if (element.tagName !== "BUTTON") element.tabIndex = -1;
  element.focus({ preventScroll: true });
}

function note(text) {
  return h("p", { class: "soft" }, text);
}
