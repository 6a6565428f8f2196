// A chat with a model that writes, alone or beside another one that gets the same messages.

import { call, chat, messageOf } from "./api.js";
import { ENDINGS, StreamedAnswer, turnsOf } from "./answers.js";
import { announce, h, replace } from "./dom.js";
import { duration, number } from "./format.js";
import { writes } from "./models.js";

/** Draw the chat with `model`. */
export async function render(root, model, signal) {
  const others = await otherWriters(model, signal);
  const main = side(model);
  let beside = null;
  let stop = null;
  /** Settled once the answers that are under way have ended. */
  let running = Promise.resolve();

  const columns = h("div", { class: "sides" }, main.element);
  const message = h("textarea", {
    id: "message",
    rows: "3",
    placeholder: "Write a message",
    dir: "auto",
    "aria-describedby": "message-help",
  });
  const send = h("button", { type: "submit", class: "primary" }, "Send");
  const halt = h("button", { type: "button", hidden: true, onclick: () => stop?.abort() }, "Stop");
  const clear = h("button", { type: "button", onclick: () => restart() }, "Start anew");
  const system = h("textarea", { id: "system", rows: "2", dir: "auto", placeholder: "None" });
  const temperature = h("input", { id: "temperature", type: "number", min: "0", max: "2", step: "0.1", value: "0" });
  const most = h("input", { id: "most-tokens", type: "number", min: "1", max: "100000", step: "1", value: "256" });
  const seed = h("input", { id: "seed", type: "number", min: "0", step: "1", placeholder: "drawn" });
  const picker = h(
    "select",
    { id: "beside", onchange: () => setBeside(picker.value) },
    h("option", { value: "" }, "no other model"),
    others.map((each) =>
      h(
        "option",
        { value: each.id },
        `${each.name}${each.arn === model.base ? " (its base)" : each.kind === "custom" ? "" : " (base model)"}`,
      ),
    ),
  );

  const setBeside = (id) => {
    const other = others.find((each) => each.id === id);
    // Both models need the same earlier turns, or their answers cannot be compared.
    beside = other ? side(other, main) : null;
    replace(columns, main.element, beside?.element);
    columns.classList.toggle("two", Boolean(beside));
  };
  const restart = async () => {
    stop?.abort();
    // What is stopped still writes down the turn that it has begun.
    await running;
    main.clear();
    beside?.clear();
    message.focus();
  };
  const submit = async (event) => {
    event?.preventDefault();
    const text = message.value;
    if (stop || !text.trim()) return;
    const settings = {
      // What is no number is the server's to refuse, in its own words.
      temperature: temperature.value === "" ? undefined : temperature.valueAsNumber,
      max_tokens: most.value === "" ? undefined : most.valueAsNumber,
      seed: seed.value === "" ? undefined : seed.valueAsNumber,
    };
    const own = new AbortController();
    stop = own;
    const left = () => own.abort();
    signal.addEventListener("abort", left, { once: true });
    // A model that is added during an answer would lack that turn.
    send.disabled = picker.disabled = true;
    halt.hidden = false;
    message.value = "";
    try {
      const sides = [main, beside].filter(Boolean);
      const answers = Promise.all(sides.map((each) => each.ask(text, system.value, settings, own.signal)));
      running = answers.catch(() => {});
      const ends = await answers;
      announce(ends.every(Boolean) ? "The answer is complete." : "There is no complete answer.");
      // A message that nobody answered is not lost to who wrote it.
      if (!ends.some(Boolean) && !own.signal.aborted && !message.value) message.value = text;
    } finally {
      signal.removeEventListener("abort", left);
      if (stop === own) stop = null;
      send.disabled = picker.disabled = false;
      halt.hidden = true;
      if (!signal.aborted) message.focus();
    }
  };
  message.addEventListener("keydown", (event) => {
    // An input method takes Enter for itself while it composes.
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) submit(event);
    if (event.key === "Escape") stop?.abort();
  });
  replace(
    root,
    h(
      "details",
      { class: "rule" },
      h("summary", null, "Settings"),
      h(
        "div",
        { class: "inside" },
        h(
          "div",
          { class: "fields" },
          h(
            "div",
            null,
            h("label", { for: "temperature" }, "Temperature"),
            temperature,
            h("p", { class: "help" }, "0 takes the likeliest token each time; 1 draws as the model has learned."),
          ),
          h("div", null, h("label", { for: "most-tokens" }, "Tokens at most"), most),
          h(
            "div",
            null,
            h("label", { for: "seed" }, "Seed"),
            seed,
            h("p", { class: "help" }, "The same one gives the same answer."),
          ),
        ),
        h("div", null, h("label", { for: "system" }, "System prompt"), system),
      ),
    ),
    h("div", { class: "narrow" }, h("label", { for: "beside" }, "Ask side by side"), picker),
    columns,
    h(
      "form",
      { class: "ask", onsubmit: submit },
      h("label", { for: "message", class: "visually-hidden" }, "Message"),
      message,
      h(
        "div",
        { class: "actions" },
        send,
        halt,
        clear,
        h("span", { id: "message-help", class: "help" }, "Enter sends, Shift and Enter start a line."),
      ),
    ),
  );
  message.focus();
}

async function otherWriters(model, signal) {
  try {
    const { models } = await call("GET", "/api/v1/models", { signal });
    const found = models.filter((each) => each.id !== model.id && writes(each) && /^active$/i.test(each.status));
    // What it was trained from is what most people compare it with.
    return found.sort(
      (a, b) =>
        Number(b.arn === model.base) - Number(a.arn === model.base) ||
        Number(b.kind === "custom") - Number(a.kind === "custom"),
    );
  } catch (error) {
    if (error.name === "AbortError") throw error;
    return [];
  }
}

/** One model's part of the page, with its turns; `before` is another part whose turns it starts with. */
function side(model, before = null) {
  const log = h("div", { class: "turns" });
  if (before?.history.length)
    log.append(
      h("p", { class: "help" }, "These earlier turns are those of ", h("bdi", null, before.name), "."),
      ...before.turns(),
    );
  const element = h(
    "section",
    { class: "side", "aria-label": `Chat with ${model.name}` },
    h("h2", null, h("bdi", null, model.name)),
    log,
  );
  const history = [...(before?.history ?? [])];
  const turns = () => [...log.children].map((each) => each.cloneNode(true));

  const ask = async (text, system, settings, signal) => {
    const answer = new StreamedAnswer(performance.now());
    const shown = turn(answer);
    log.append(
      h("div", { class: "turn user", dir: "auto" }, h("p", { class: "who" }, "You"), h("p", { class: "said" }, text)),
      shown.element,
    );
    shown.element.scrollIntoView({ block: "nearest" });
    const body = {
      model: model.id,
      messages: turnsOf(history, system, text),
      stream_options: { include_usage: true },
      ...settings,
    };
    let problem = null;
    try {
      for await (const chunk of chat("/v1/chat/completions", body, { signal })) {
        shown.add(answer.add(chunk, performance.now()));
      }
      // A server that is killed in the middle may close the connection as if all was said.
      if (!answer.finish)
        problem = "The server ended the answer before it was complete. Check that it runs, then ask again.";
    } catch (error) {
      problem = error.name === "AbortError" ? "Stopped." : messageOf(error);
    }
    shown.end(problem);
    // What was begun and stopped is a turn of the chat; a question without any answer is none.
    if (answer.text) history.push({ role: "user", content: text }, { role: "assistant", content: answer.text });
    return problem === null;
  };
  const clear = () => {
    history.length = 0;
    replace(log);
  };
  return { element, name: model.name, history, turns, ask, clear };
}

/** An answer that grows; text is added once a frame, so that a long and fast one does not stop the page. */
function turn(answer) {
  const said = document.createTextNode("");
  const thought = document.createTextNode("");
  const reasoning = h(
    "details",
    { class: "reasoning", hidden: true },
    h("summary", null, "Reasoning"),
    h("p", { class: "said", dir: "auto" }, thought),
  );
  const waiting = h("p", { class: "soft" }, "…");
  const about = h("p", { class: "help" });
  const tools = h("div");
  const element = h(
    "div",
    { class: "turn model", "aria-busy": "true" },
    h("p", { class: "who" }, "Model"),
    reasoning,
    waiting,
    h("p", { class: "said", dir: "auto" }, said),
    tools,
    about,
  );
  let [text, reason] = ["", ""];
  let frame = 0;

  const flush = () => {
    frame = 0;
    const follows = window.innerHeight + window.scrollY >= document.documentElement.scrollHeight - 40;
    if (reason) {
      reasoning.hidden = false;
      thought.appendData(reason);
    }
    if (text) said.appendData(text);
    if (text || reason) waiting.remove();
    [text, reason] = ["", ""];
    if (follows) window.scrollTo(0, document.documentElement.scrollHeight);
  };
  const add = (more) => {
    text += more.text;
    reason += more.reasoning;
    // Frames do not come in a hidden tab, whose text is added when the answer is complete.
    if (!frame && !document.hidden) frame = requestAnimationFrame(flush);
  };
  const end = (problem) => {
    cancelAnimationFrame(frame);
    flush();
    waiting.remove();
    element.removeAttribute("aria-busy");
    if (!answer.text && !answer.tools.length && !problem)
      replace(tools, h("p", { class: "soft" }, "The answer is empty."));
    if (answer.tools.length) {
      replace(
        tools,
        answer.tools
          .filter(Boolean)
          .map((each) => h("p", null, "Calls ", h("code", null, each.name), h("pre", { class: "row" }, each.given))),
      );
    }
    replace(about, measures(answer));
    if (ENDINGS[answer.finish]) about.append(`${about.textContent ? "; " : ""}${ENDINGS[answer.finish]}`);
    if (problem)
      element.append(
        h(
          "p",
          { class: problem === "Stopped." ? "soft" : "box error", role: problem === "Stopped." ? null : "alert" },
          problem,
        ),
      );
  };
  return { element, add, end };
}

function measures(answer) {
  const { prompt_tokens: read, completion_tokens: written, prompt_tokens_details: details } = answer.usage ?? {};
  const cached = details?.cached_tokens ? ` (${number(details.cached_tokens)} of them known)` : "";
  return [
    read === undefined ? null : `${number(read)} tokens read${cached}, ${number(written)} written`,
    answer.firstTokenSeconds === null ? null : `first token after ${duration(answer.firstTokenSeconds)}`,
    answer.tokensPerSecond === null ? null : `${number(answer.tokensPerSecond)} tokens a second`,
  ]
    .filter(Boolean)
    .join(" · ");
}
