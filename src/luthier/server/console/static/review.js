// Review: captured answers to rate by keyboard, and training rows from the ratings.

import { likeliest, nearestText } from "./answers.js";
import { call, may, pathOf } from "./api.js";
import { number, percent, time, words } from "./format.js";
import { modelNames } from "./jobs.js";
import {
  Empty, ErrorBox, ExampleCard, Field, Heading, Pending, announce, bound, confirmed, html, link, options, signal, toast, useAction, useData,
  useEffect, useLeaving, useRef, useSignal,
} from "./ui.js";

const PAGE = 10;
/** Answers in the queue below which more are loaded. */
const AHEAD = 3;
/** Labels with scores in a card. */
const SCORES = 3;
const STARS = [1, 2, 3, 4, 5];
/** Kinds of rows that ratings give, with the filter of the answers. */
const EXPORTS = [
  ["sft", "answers that are not bad, and corrected answers (fine-tuning)"], ["dpo", "pairs of better and worse answers (DPO)"],
  ["kto", "answers with a judgement (KTO)"], ["classification", "texts with labels"],
];
/** Shares of answers for two raters; empty for all answers to all raters. */
const SHARES = ["", "0", "0.2"];
const KEYS = { u: { thumb: "up" }, d: { thumb: "down" }, ...Object.fromEntries(STARS.map((each) => [each, { rating: each }])) };
/** What redaction replaces (luthier/gate/pii.py). */
const HIDDEN = "Hidden: e-mail and IP addresses, phone, card, bank and national id numbers, keys and passwords. Not hidden: names of people, postal addresses, birth dates.";

/** The page. */
export function Review({ query }) {
  const model = useSignal(query.get("model") ?? "");
  return html`
    <${Heading} title="Review">
      <${CaptureState} />
    <//>
    <${Rating} key=${model.value} model=${model} />
  `;
}

/** A button that turns the capture of requests on. */
export function CaptureSwitch({ done }) {
  const { busy, error, run } = useAction(async () => {
    await call("PUT", "/api/v1/capture", { body: { enabled: true } });
    toast("Requests are captured from now on.");
    await done?.();
  });
  return html`
    <button type="button" class="primary" disabled=${busy} onclick=${run}>Capture requests</button>
    <${ErrorBox} error=${error} />
  `;
}

function CaptureState() {
  const { data, read } = useData((left) => (may("read") ? call("GET", "/api/v1/capture", { signal: left }) : null));
  const { run } = useAction(async (body, text) => {
    await call("PUT", "/api/v1/capture", { body });
    toast(text);
    await read();
  });
  const chooseRaters = ({ target: { value } }) =>
    run({ enabled: true, second_rater: value === "" ? null : Number(value) }, "The number of raters is stored.");
  if (!data) return null;
  if (!data.enabled) return may("develop") ? html`<${CaptureSwitch} done=${read} />` : html`<span class="soft">The capture is off.</span>`;
  return html`
    <span class="soft">Captured requests are kept for ${data.days} days.</span>
    ${data.redact && html`<details class="soft"><summary>Names are not hidden</summary>${HIDDEN}</details>`}
    ${may("develop") && html`
      <select aria-label="Raters of an answer" value=${String(data.second_rater ?? "")} onchange=${chooseRaters}>
        ${options([...new Set([...SHARES, String(data.second_rater ?? "")])].map((each) => [each, ratersText(each)]))}
      </select>
      <button type="button" class="quiet" onclick=${() => run({ enabled: false }, "The capture is off.")}>Turn off</button>
    `}
  `;
}

function ratersText(share) {
  if (share === "") return "Each rater sees all answers";
  return Number(share) ? `One rater, two for ${percent(Number(share))}` : "One rater for each answer";
}

/** Move the focus to a field that appears. */
const focus = (element) => element?.focus();

/** The queue of one model, or of all models. */
export class Queue {
  constructor(model) {
    this.model = model;
    this.state = signal({ answers: [], models: [], waiting: 0, rated: 0, done: 0, loaded: false, error: null });
    this.position = null;
    this.isComplete = false;
    this.pending = null;
  }

  update(change) {
    this.state.value = { ...this.state.value, ...change };
  }

  /** Load the next answers, so that the next card needs no request. */
  async fill(left) {
    if (this.isComplete || this.filling) return;
    this.filling = true;
    try {
      const query = { model: this.model, limit: PAGE, position: this.position };
      const found = await call("GET", "/api/v1/review", { query, signal: left });
      const { answers, loaded } = this.state.value;
      if (!loaded) this.update({ waiting: found.waiting, rated: found.rated, models: found.models });
      this.update({ answers: [...answers, ...found.answers], loaded: true, error: null });
      this.position = found.next ?? null;
      this.isComplete = this.position === null;
    } catch (error) {
      if (error.name !== "AbortError") this.update({ error });
    } finally {
      this.filling = false;
    }
  }

  /** Remove the first answer with a rating, or without one to skip the answer. Until the next answer, the user can undo the rating. */
  rate(values, left) {
    const [answer, ...others] = this.state.value.answers;
    if (!answer) return;
    this.send();
    const rated = Boolean(values);
    this.update({ answers: others, done: this.state.value.done + rated, error: null });
    this.pending = { answer, values };
    if (others.length < AHEAD) this.fill(left);
  }

  undo() {
    if (!this.pending) return toast("Only the last answer can be undone, until its rating is stored.");
    const { answer, values } = this.pending;
    this.pending = null;
    this.update({ answers: [answer, ...this.state.value.answers], done: this.state.value.done - Boolean(values) });
    announce("Undone.");
  }

  /** Send the last rating; with `keepalive`, also if the browser leaves the page meanwhile. */
  async send(keepalive = false) {
    const { pending } = this;
    this.pending = null;
    if (!pending?.values) return;
    this.update({});
    const { request, position } = pending.answer;
    try {
      await call("POST", "/api/v1/feedback", { body: { request, position, ...pending.values }, keepalive });
    } catch (error) {
      // The answer returns to the end of the queue: the first answer is being read or edited.
      this.update({ error, answers: [...this.state.value.answers, pending.answer], done: this.state.value.done - 1 });
    }
  }
}

function Rating({ model }) {
  const named = useData(modelNames);
  // Clients name models by id, ARN, name or deployment.
  const nameOf = named.data ?? ((each) => each);
  const queue = useRef(null);
  queue.current ??= new Queue(model.value);
  const { answers, waiting, rated, done, models, loaded, error } = queue.current.state.value;
  const [first] = answers;
  // Requests without a complete text have no card.
  const remaining = queue.current.isComplete ? answers.length : Math.max(0, waiting - done);
  const [editing, sent] = [useSignal(null), useSignal(false)];
  const left = useLeaving();
  useEffect(() => {
    queue.current.fill(left);
    left.addEventListener("abort", () => queue.current.send());
    for (const event of ["pagehide", "luthier:signing-out"])
      window.addEventListener(event, () => queue.current.send(true), { signal: left });
  }, []);
  // A label is corrected, a text is edited; a good label is a row with this label.
  const hasLabels = useRef(false);
  hasLabels.current ||= first?.prediction?.label !== undefined;
  const [field, given] = first?.prediction ? ["label", first.prediction.label] : ["corrected", first?.reply];
  const rate = (values) => {
    editing.value = null;
    const isGood = values?.thumb === "up" && field === "label" && given !== undefined;
    queue.current.rate(isGood ? { ...values, label: given } : values, left);
  };
  const edit = () => (editing.value = String(given));
  // A label without a score is a typing error or a new label.
  const newLabels = useRef(new Set()).current;
  const save = async (event) => {
    event.preventDefault();
    const value = editing.value.trim();
    if (field !== "label") return rate({ corrected: value });
    const labels = Array.isArray(given) ? value.split(",").map((each) => each.trim()).filter(Boolean) : [value];
    const known = Object.keys(first.prediction.scores ?? {});
    for (const [index, label] of labels.entries()) {
      if (!known.length || known.includes(label) || newLabels.has(label)) continue;
      const nearest = nearestText(label, known);
      const text = `The model does not know the label “${label}”.`;
      const chosen = await confirmed(nearest
        ? { title: `Did you mean “${nearest}”?`, text, verb: `Use “${nearest}”`, other: `Use the new label “${label}”` }
        : { title: "Use a new label?", text, verb: `Use the new label “${label}”` });
      if (!chosen) return;
      if (chosen === "other" || !nearest) newLabels.add(label);
      else labels[index] = nearest;
    }
    rate({ label: Array.isArray(given) ? [...new Set(labels)] : labels[0] });
  };
  const undo = () => {
    // The form belongs to the answer that is first before the undo.
    editing.value = null;
    queue.current.undo();
  };
  const pressed = useRef(null);
  pressed.current = (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || /^(input|textarea|select)$/i.test(event.target.tagName) || !first) return;
    if (event.key in KEYS) rate(KEYS[event.key]);
    else if (event.key === "s") rate(null);
    else if (event.key === "e" && given) edit();
    else return;
    event.preventDefault();
  };
  useEffect(() => {
    const listen = (event) => {
      if (document.querySelector("dialog")) return;
      if (event.key === "z" && !/^(input|textarea|select)$/i.test(event.target.tagName)) undo();
      else pressed.current(event);
    };
    document.addEventListener("keydown", listen, { signal: left });
  }, []);
  if (!loaded) return error ? html`<${Pending} title="Review" error=${error} read=${() => queue.current.fill(left)} />` : html`<p class="soft">Loading …</p>`;
  const choices = [["", "all models"], ...models.map((each) => [each, nameOf(each)])];
  return html`
    <div class="narrow"><${Field} id="model" label="Model"><select id="model" ...${bound(model)}>${options(choices)}</select><//></div>
    <${ErrorBox} error=${error} again=${!queue.current.isComplete && (() => queue.current.fill(left))} />
    <progress max=${rated + done + remaining || 1} value=${rated + done} aria-label="Rated answers" />
    <p class="soft" id="progress">${number(rated + done)} rated by you, ${number(remaining)} to rate</p>
    ${first ? html`<${Card} key=${`${first.request} ${first.position}`} answer=${first} nameOf=${nameOf} />` : !error && html`
      <${Empty} text=${models.length ? "No complete answer waits for your rating." : "No answer is captured yet. Capture requests, then query a model: the answers appear here."}>
        ${may("invoke") && html`<a class="button" href=${link("playground")}>Talk to a model</a>`}
      <//>
    `}
    ${editing.value !== null && html`
      <form onsubmit=${save}>
        <${Field} id="corrected" label=${field === "label" ? "Correct label" : "Corrected answer"}>
          ${field === "label" ? html`
            <input id="corrected" list="labels" autocomplete="off" dir="auto" ref=${focus} ...${bound(editing, "oninput")} />
            <datalist id="labels">${Object.keys(first.prediction.scores ?? {}).map((each) => html`<option value=${each} />`)}</datalist>
          ` : html`<textarea id="corrected" rows="5" dir="auto" ref=${focus} ...${bound(editing, "oninput")} />`}
        <//>
        <div class="actions">
          <button type="submit" class="primary" disabled=${!editing.value.trim() || editing.value === String(given)}>Save</button>
          <button type="button" onclick=${() => (editing.value = null)}>Cancel</button>
        </div>
      </form>
    `}
    <div class="actions rate">
      ${first && html`
        <button type="button" onclick=${() => rate(KEYS.u)}>Good <kbd>u</kbd></button>
        <button type="button" onclick=${() => rate(KEYS.d)}>Bad <kbd>d</kbd></button>
        ${STARS.map((each) => html`<button type="button" aria-label=${`${each} of 5 stars`} onclick=${() => rate({ rating: each })}>${each} ★</button>`)}
        ${given && html`<button type="button" onclick=${edit}>Edit <kbd>e</kbd></button>`}
        <button type="button" onclick=${() => rate(null)}>Skip <kbd>s</kbd></button>
      `}
      ${(first || done > 0) && html`<button type="button" disabled=${!queue.current.pending} onclick=${undo}>Undo <kbd>z</kbd></button>`}
    </div>
    ${model.value && may("read") && html`<${RaterAgreement} key=${done} model=${model.value} />`}
    ${may("develop") && models.length > 0 && html`
      <details class="rule" open=${sent.value || (!first && done > 0)} ontoggle=${(event) => (sent.value = event.target.open)}>
        <summary>Make rows from these</summary>
        <div class="inside"><${Rows} models=${models} nameOf=${nameOf} chosen=${model.value} kind=${hasLabels.current ? "classification" : "sft"} before=${() => queue.current.send()} /></div>
      </details>
    `}
  `;
}

function RaterAgreement({ model }) {
  const { data } = useData((signal) => call("GET", `${pathOf("models", model)}/agreement`, { signal }));
  const shown = ({ name, answers, alpha, low, high }) =>
    `${name}: alpha ${number(alpha)} (${number(low)} to ${number(high)}) on ${number(answers)} answers`;
  return html`<p class="soft">Agreement of raters: ${data?.agreement.map(shown).join("; ") || "no answer has two raters"}.</p>`;
}

function Card({ answer, nameOf }) {
  const turns = typeof answer.prompt === "string" ? [{ role: "user", content: answer.prompt }] : answer.prompt;
  const textOf = ({ content }) => (typeof content === "string" ? content : JSON.stringify(content));
  const said = answer.prediction ? predictionText(answer.prediction) : answer.reply;
  return html`
    <div aria-live="polite" id="card">
      <${ExampleCard} title=${`${nameOf(answer.model)}, ${time(answer.created)}`} parts=${[["Question", textOf(turns.at(-1))], ["Answer", said || "(empty)"]]}>
        ${turns.length > 1 && html`
          <details><summary>${number(turns.length - 1)} earlier turns</summary>
            ${turns.slice(0, -1).map((each) => html`<p class="said"><strong>${each.role}: </strong>${textOf(each)}</p>`)}
          </details>
        `}
      <//>
    </div>
  `;
}

/** Return a prediction as lines; scores of many labels are cut. */
function predictionText(prediction) {
  const shown = (value) => (value && typeof value === "object" ? JSON.stringify(value) : typeof value === "number" ? number(value) : String(value));
  return Object.entries(prediction).map(([name, value]) => {
    const text = name === "scores" ? likeliest(value, SCORES).shown.map(([label, score]) => `${label} ${percent(score)}`).join(", ") : shown(value);
    return `${words(name)}: ${text}`;
  }).join("\n");
}

function Rows({ models, nameOf, chosen, kind, before }) {
  const found = useSignal(null);
  const { busy, error, run } = useAction(async (event) => {
    const { model, to } = event.target.elements;
    // The last rating may still wait for an undo.
    await before();
    found.value = await call("POST", "/api/v1/review/rows", { body: { model: model.value, to: to.value } });
  });
  return html`
    <form onsubmit=${run}>
      <div class="fields">
        <${Field} id="rows-model" label="Model">
          <select id="rows-model" name="model" defaultValue=${chosen}>
            ${models.map((each) => html`<option value=${each} selected=${each === chosen}>${nameOf(each)}</option>`)}
          </select>
        <//>
        <${Field} id="rows-kind" label="Rows"><select id="rows-kind" name="to" defaultValue=${kind}>
          ${EXPORTS.map(([value, label]) => html`<option value=${value} selected=${value === kind}>${label}</option>`)}
        </select><//>
      </div>
      <${ErrorBox} error=${error} />
      <div class="actions"><button type="submit" class="primary" disabled=${busy}>Make rows</button></div>
    </form>
    ${found.value && html`
      <p class="box good" role="status">
        ${number(found.value.rows)} rows from ${number(found.value.answers)} rated answers.${" "}
        <a href=${`${link("new")}?rows=${encodeURIComponent(found.value.address)}`}>Train on these rows</a>
      </p>
    `}
  `;
}
