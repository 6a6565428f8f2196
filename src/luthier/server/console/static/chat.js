// A chat with one model, or with two models that get the same messages.

import { ENDINGS, StreamedAnswer, turnsOf } from "./answers.js";
import { call, chat, may, messageOf } from "./api.js";
import { duration, number } from "./format.js";
import { allModels, writes } from "./models.js";
import { Field, announce, bound, html, link, options, signal, toast, useAction, useData, useEffect, useLeaving, useRef, useSignal } from "./ui.js";

/** The chat with `model`. */
export function Chat({ model }) {
  const others = useData((left) => otherWriters(model, left));
  const sides = useSignal(null);
  sides.value ??= [new Side(model)];
  const stop = useSignal(null);
  const running = useRef(Promise.resolve());
  const left = useLeaving();
  const message = useRef(null);
  const vote = useSignal(NO_VOTE);
  const [wins, wrong] = [useSignal({}), useSignal("")];
  useEffect(() => message.current.focus(), []);
  useEffect(() => left.addEventListener("abort", () => stop.value?.abort()), []);

  const choose = ({ target }) => {
    const other = others.data.find((each) => each.id === target.value);
    // Answers can be compared only if both models get the same earlier turns.
    // The sides may be shuffled.
    const own = sides.value.find((each) => each.model === model);
    sides.value = [own, ...(other ? [new Side(other, own)] : [])];
    vote.value = NO_VOTE;
    wins.value = {};
  };
  const isBlind = vote.value.blind && sides.value.length > 1;
  const judge = useAction(async (better) => {
    const name = better?.model.name ?? "equal";
    wins.value = { ...wins.value, [name]: (wins.value[name] ?? 0) + 1 };
    vote.value = { ...vote.value, revealed: true, open: false };
    if (better && may("rate")) await storePreference(better, sides.value.find((each) => each !== better));
  });
  const restart = async () => {
    stop.value?.abort();
    // An answer that is stopped still adds its turn.
    await running.current;
    for (const each of sides.value) each.clear();
    message.current?.focus();
  };
  const submit = async (event) => {
    event.preventDefault();
    const text = message.current.value;
    if (stop.value || !text.trim()) return;
    const field = (id) => document.getElementById(id);
    const numberOf = (id) => (field(id).value === "" ? undefined : field(id).valueAsNumber);
    const jsonOf = (id) => (field(id).value.trim() ? JSON.parse(field(id).value) : null);
    const body = { temperature: numberOf("temperature"), max_tokens: numberOf("most"), seed: numberOf("seed") };
    try {
      const [schema, tools] = [jsonOf("schema"), jsonOf("tools")];
      if (schema) body.response_format = { type: "json_schema", json_schema: { name: "reply", schema } };
      if (tools) body.tools = [tools].flat().map((each) => (each.type === "function" ? each : { type: "function", function: each }));
      wrong.value = "";
    } catch (error) {
      wrong.value = `The schema or the tools are not valid JSON: ${error.message}`;
      return;
    }
    const own = (stop.value = new AbortController());
    message.current.value = "";
    if (isBlind) {
      // Each vote is about one message, and the sides say nothing about the models.
      for (const each of sides.value) each.clear();
      if (Math.random() < 0.5) sides.value = sides.value.toReversed();
      vote.value = { ...vote.value, revealed: false, open: false };
    }
    const answers = Promise.all(sides.value.map((each) => each.ask(text, field("system").value, body, own.signal)));
    running.current = answers;
    const complete = await answers;
    stop.value = null;
    if (left.aborted) return;
    announce(complete.every(Boolean) ? "The reply is complete." : "The reply is incomplete.");
    if (isBlind) vote.value = { ...vote.value, open: complete.every(Boolean), revealed: !complete.every(Boolean) };
    // The user keeps a message without an answer.
    if (!complete.some(Boolean) && !own.signal.aborted && !message.current.value) message.current.value = text;
    message.current.focus();
  };
  const pressed = (event) => {
    // An input method uses Enter itself while it composes.
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) submit(event);
    if (event.key === "Escape") stop.value?.abort();
  };
  const about = (each) => (each.arn === model.base ? " (base of this model)" : each.kind === "custom" ? "" : " (base model)");
  return html`
    <details class="rule">
      <summary>Settings</summary>
      <div class="inside">
        <div class="fields">
          <${Field} id="temperature" label="Temperature" help="0 selects the most likely token.">
            <input id="temperature" type="number" min="0" max="2" step="0.1" defaultValue="0" />
          <//>
          <${Field} id="most" label="Maximum tokens"><input id="most" type="number" min="1" max="100000" defaultValue="256" /><//>
          <${Field} id="seed" label="Seed" help="The same seed gives the same reply.">
            <input id="seed" type="number" min="0" step="1" placeholder="random" />
          <//>
        </div>
        <div class="fields">
          <${Field} id="schema" label="JSON schema of the reply"><textarea id="schema" class="code" rows="2" spellcheck="false" placeholder='{"type": "object", …}' /><//>
          <${Field} id="tools" label="Tools, as a JSON list of functions"><textarea id="tools" class="code" rows="2" spellcheck="false" placeholder='[{"name": "…", "parameters": {…}}]' /><//>
        </div>
        <${Field} id="system" label="System prompt"><textarea id="system" rows="2" dir="auto" placeholder="None" /><//>
      </div>
    </details>
    <div class="narrow">
      <${Field} id="beside" label="Compare with">
        <select id="beside" disabled=${stop.value !== null} onchange=${choose}>
          ${options([["", "no other model"], ...(others.data ?? []).map((each) => [each.id, each.name + about(each)])])}
        </select>
      <//>
      ${sides.value.length > 1 && html`
        <label class="check">
          <input type="checkbox" id="blind" checked=${vote.value.blind} disabled=${stop.value !== null}
            onchange=${({ target }) => (vote.value = { ...NO_VOTE, blind: target.checked, revealed: true })} />
          ${" "}Blind: hide the names until you choose the better answer
        </label>
      `}
    </div>
    <div class=${`sides ${sides.value.length > 1 ? "two" : ""}`}>
      ${sides.value.map((each, index) => html`
        <${SideView} key=${each.model.id} side=${each} hidden=${isBlind && !vote.value.revealed && "AB"[index]} />
      `)}
    </div>
    ${isBlind && vote.value.open && html`
      <div class="actions" id="vote" role="group" aria-label="Better answer">
        ${sides.value.map((each, index) => html`<button type="button" class="primary" onclick=${() => judge.run(each)}>${"AB"[index]} is better</button>`)}
        <button type="button" onclick=${() => judge.run(null)}>Equal</button>
      </div>
    `}
    ${isBlind && Object.keys(wins.value).length > 0 && html`
      <p class="soft" role="status" id="wins">Better answers so far: ${Object.entries(wins.value).map(([name, count]) => `${name} ${count}`).join(", ")}.</p>
    `}
    <${RatingError} error=${judge.error} />
    ${wrong.value && html`<p class="problem" role="alert">${wrong.value}</p>`}
    <form class="ask" onsubmit=${submit}>
      <label for="message" class="visually-hidden">Message</label>
      <textarea id="message" rows="3" placeholder="Write a message" dir="auto" aria-describedby="message-help" ref=${message}
        onkeydown=${pressed} />
      <div class="actions">
        <button type="submit" class="primary" disabled=${stop.value !== null}>Send</button>
        ${stop.value && html`<button type="button" onclick=${() => stop.value.abort()}>Stop</button>`}
        <button type="button" onclick=${restart}>New chat</button>
        <span id="message-help" class="help">Enter sends the message, Shift+Enter starts a new line.</span>
      </div>
    </form>
  `;
}

const NO_VOTE = { blind: false, open: false, revealed: true };

/** Store the better of two answers as the preferred answer to the captured request of the other. */
async function storePreference(better, other) {
  const [winner, loser] = [better, other].map((each) => each.turns.value.at(-1).state.value.answer);
  await call("POST", "/api/v1/feedback", { body: { request: loser.id, thumb: "down", preferred: winner.text } });
  await call("POST", "/api/v1/feedback", { body: { request: winner.id, thumb: "up" } });
  toast("The preference is stored. Review makes training rows of preferences.");
}

/** Return the other models that chat, the base of the model first. */
async function otherWriters(model, left) {
  const rank = (each) => 2 * (each.arn === model.base) + (each.kind === "custom");
  return (await allModels(left))
    .filter((each) => each.id !== model.id && writes(each) && /^active$/i.test(each.status))
    .sort((a, b) => rank(b) - rank(a));
}

/** The turns with one model; `before` is another side whose turns come first. */
class Side {
  constructor(model, before = null) {
    this.model = model;
    this.copied = before?.history.length ? before.model.name : null;
    this.history = [...(before?.history ?? [])];
    this.turns = signal([...(before?.turns.value ?? [])]);
  }

  clear() {
    this.history = [];
    this.turns.value = [];
    this.copied = null;
  }

  /** Send a message and show the answer; returns whether the answer is complete. */
  async ask(text, system, settings, stopped) {
    const answer = new StreamedAnswer(performance.now());
    const state = signal({ answer, text: "", reasoning: "", busy: true, problem: null });
    const draw = (more) => {
      state.value = { ...state.value, text: answer.text, reasoning: answer.reasoning, ...more };
    };
    this.turns.value = [...this.turns.value, { text, state }];
    const messages = turnsOf(this.history, system, text);
    const body = { model: this.model.id, messages, stream_options: { include_usage: true }, ...settings };
    let problem = null;
    let frame = 0;
    try {
      for await (const chunk of chat("/v1/chat/completions", body, { signal: stopped })) {
        answer.add(chunk, performance.now());
        // One update for each frame keeps the page responsive during long and fast answers.
        frame ||= requestAnimationFrame(() => {
          frame = 0;
          draw({});
        });
      }
      // A server that is killed may close the connection as if the answer were complete.
      if (!answer.finish) problem = "The reply is incomplete: the server closed the connection. Check that the server is running, then send the message again.";
    } catch (error) {
      problem = error.name === "AbortError" ? "Stopped." : messageOf(error);
    }
    cancelAnimationFrame(frame);
    draw({ busy: false, problem });
    // A question without any answer is no turn of the chat.
    if (answer.text) this.history.push({ role: "user", content: text }, { role: "assistant", content: answer.text });
    return problem === null;
  }
}

/** The chat with one model; `hidden` is shown in place of the name. */
function SideView({ side, hidden }) {
  return html`
    <section class="side" aria-label=${`Chat with ${hidden || side.model.name}`}>
      <h2><bdi>${hidden || side.model.name}</bdi></h2>
      ${side.copied && !hidden && side.turns.value.length > 0 && html`<p class="help">Earlier turns are with <bdi>${side.copied}</bdi>.</p>`}
      <div class="turns">
        ${side.turns.value.map(
          ({ text, state }, index) => html`
            <div class="turn user" dir="auto"><p class="who">You</p><p class="said">${text}</p></div>
            <${Turn} key=${index} state=${state} hidden=${hidden} />
          `,
        )}
      </div>
    </section>
  `;
}

/** An answer of the model while it grows. */
function Turn({ state, hidden }) {
  const place = useRef(null);
  const { answer, text, reasoning, busy, problem } = state.value;
  useEffect(() => place.current.scrollIntoView({ block: "nearest" }), []);
  useEffect(() => {
    // The page follows the answer while its end is visible.
    if (busy && document.documentElement.scrollHeight - window.innerHeight - window.scrollY < 120)
      window.scrollTo(0, document.documentElement.scrollHeight);
  }, [text, reasoning]);
  const tools = busy ? [] : answer.tools.filter(Boolean);
  return html`
    <div class="turn model" aria-busy=${busy ? "true" : null} ref=${place}>
      <p class="who">${hidden || (answer.model ?? "Model")}</p>
      ${reasoning && html`<details class="reasoning"><summary>Reasoning</summary><p class="said" dir="auto">${reasoning}</p></details>`}
      ${busy && !text && !reasoning && html`<p class="soft">…</p>`}
      <p class="said" dir="auto">${text}</p>
      ${tools.map((each) => html`<p>Tool call: <code>${each.name}</code></p><pre class="row" tabindex="0">${each.given}</pre>`)}
      ${!busy && !text && !tools.length && !problem && html`<p class="soft">The reply is empty.</p>`}
      ${!busy && !hidden && html`<p class="help">${measures(answer)}</p>`}
      ${!busy && !hidden && !problem && answer.id && may("rate") && html`<${Feedback} id=${answer.id} text=${answer.text} />`}
      ${problem && html`
        <p class=${problem === "Stopped." ? "soft" : "box error"} role=${problem === "Stopped." ? null : "alert"}>${problem}</p>
      `}
    </div>
  `;
}

/** Buttons that rate an answer or save it as an example, if the capture stores the answer. */
function Feedback({ id, text }) {
  const [chosen, editing] = [useSignal(""), useSignal(null)];
  const { busy, error, run } = useAction(async (values, said) => {
    await call("POST", "/api/v1/feedback", { body: { request: id, ...values } });
    chosen.value = values.thumb ?? chosen.value;
    editing.value = null;
    toast(said);
  });
  const button = (thumb, label) => html`
    <button type="button" class="quiet" aria-pressed=${String(chosen.value === thumb)} onclick=${() => run({ thumb }, "The rating is stored.")}>${label}</button>
  `;
  const save = (event) => {
    event.preventDefault();
    const edited = editing.value.trim();
    // An unchanged answer is an example because it is good.
    run(edited === text.trim() ? { thumb: "up" } : { corrected: edited }, "The example is saved. Review makes training rows of examples.");
  };
  return html`
    <div class="actions">
      ${button("up", "Good answer")} ${button("down", "Bad answer")}
      <button type="button" class="quiet" onclick=${() => (editing.value = text)}>Save as example</button>
    </div>
    ${editing.value !== null && html`
      <form onsubmit=${save}>
        <${Field} id=${`example-${id}`} label="Answer that the model should give">
          <textarea id=${`example-${id}`} rows="4" dir="auto" ...${bound(editing, "oninput")} />
        <//>
        <div class="actions">
          <button type="submit" class="primary" disabled=${busy || !editing.value.trim()}>Save</button>
          <button type="button" onclick=${() => (editing.value = null)}>Cancel</button>
        </div>
      </form>
    `}
    <${RatingError} error=${error} />
  `;
}

function RatingError({ error }) {
  if (!error) return null;
  return html`
    <p class="soft" role="alert">
      ${error.status === 404 ? html`Ratings need captured requests. <a href=${link("review")}>Turn on capture in Review</a>, then ask again.` : messageOf(error)}
    </p>
  `;
}

function measures({ usage, finish, firstTokenSeconds: first, tokensPerSecond: speed }) {
  const { prompt_tokens: input, completion_tokens: output, prompt_tokens_details: details } = usage ?? {};
  const cached = details?.cached_tokens ? ` (${number(details.cached_tokens)} cached)` : "";
  return [
    input === undefined ? null : `${number(input)} input tokens${cached}, ${number(output)} output tokens`,
    first === null ? null : `first token after ${duration(first)}`,
    speed === null ? null : `${number(speed)} tokens per second`,
    ENDINGS[finish],
  ]
    .filter(Boolean)
    .join(" · ");
}
