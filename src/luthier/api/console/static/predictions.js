// What a model that reads says of a text, an image, a sound or values: labels, tags, numbers, embeddings.

import { call } from "./api.js";
import { cosine, likeliest, spansOf } from "./answers.js";
import { announce, h, replace } from "./dom.js";
import { number, percent } from "./format.js";
import { hiddenName } from "./models.js";
import { errorBox } from "./router.js";
import { table } from "./table.js";

const ACCEPT = { image: "image/*", audio: "audio/*" };
const NOUN = { text: "text", image: "image", audio: "sound", window: "values" };
/** Bytes of a file that are sent: base64 is a third longer, and the server refuses larger bodies. */
const LARGEST_FILE = 18_000_000;
const COLOURS = 6;

/** Draw the form of a model that answers with labels, tags, numbers or texts. */
export async function renderPrediction(root, model, signal) {
  const input = inputOf(model.abilities.reads, "input");
  asking(root, input.element, "Ask", signal, async () => {
    const asked = await input.read();
    const [answer] = await predict(model, [asked], signal);
    return [input.preview(), answerOf(answer, asked.text)];
  });
}

/** Draw the form of a model that gives embeddings: how alike inputs are. */
export async function renderSimilarity(root, model, signal) {
  if (!model.abilities.reads.includes("text")) {
    const first = inputOf(model.abilities.reads, "first", "First");
    const second = inputOf(model.abilities.reads, "second", "Second");
    asking(root, [first.element, second.element], "Compare", signal, async () => {
      const asked = [await first.read(), await second.read()];
      return similarity(await predict(model, asked, signal), ["First", "Second"]);
    });
    return;
  }
  const texts = h("textarea", {
    id: "texts",
    rows: "6",
    dir: "auto",
    placeholder: "My card has not arrived\nWhere is my new card?\nHow do I change my PIN?",
  });
  const form = h(
    "div",
    null,
    h("label", { for: "texts" }, "Texts, one a line"),
    texts,
    h("p", { class: "help" }, "Two to twenty; each is compared with each."),
  );
  asking(root, form, "Compare", signal, async () => {
    const lines = texts.value
      .split("\n")
      .map((each) => each.trim())
      .filter(Boolean);
    if (lines.length < 2) throw new RangeError("Write two texts or more, one a line.");
    if (lines.length > 20) throw new RangeError(`Compare twenty texts at most; these are ${lines.length}.`);
    return similarity(
      await predict(
        model,
        lines.map((text) => ({ text })),
        signal,
      ),
      lines,
    );
  });
}

/**
 * A form with one button, and the answer or the error below.
 * @param {Element} root
 * @param {*} fields
 * @param {string} verb of the button
 * @param {AbortSignal} signal
 * @param {function(): Promise<*>} ask gives what is shown; a RangeError is told as it is
 */
export function asking(root, fields, verb, signal, ask) {
  const result = h("div", { "aria-live": "polite" });
  const button = h("button", { type: "submit", class: "primary" }, verb);
  const submit = async (event) => {
    event.preventDefault();
    button.disabled = true;
    replace(result, h("p", { class: "soft" }, "The model works…"));
    try {
      replace(result, await ask());
    } catch (error) {
      if (error.name === "AbortError") return;
      replace(
        result,
        error instanceof RangeError ? h("p", { class: "box error", role: "alert" }, error.message) : errorBox(error),
      );
    } finally {
      button.disabled = false;
    }
  };
  replace(root, h("form", { class: "ask", onsubmit: submit }, fields, h("div", { class: "actions" }, button)), result);
}

/**
 * A file as base64.
 * @param {?File} file
 * @param {string} noun what it should be
 * @returns {Promise<string>}
 */
export async function base64Of(file, noun) {
  if (!file) throw new RangeError(`Choose an ${noun} first.`.replace("an sound", "a sound"));
  if (file.size > LARGEST_FILE)
    throw new RangeError(`The ${noun} is larger than ${LARGEST_FILE / 1e6} MB. Choose a smaller one.`);
  let bytes;
  try {
    bytes = new Uint8Array(await file.arrayBuffer());
  } catch {
    throw new RangeError(`The ${noun} cannot be read: the file was moved or changed. Choose it again.`);
  }
  let text = "";
  // Arguments of a call are limited.
  for (let at = 0; at < bytes.length; at += 0x8000) text += String.fromCharCode(...bytes.subarray(at, at + 0x8000));
  return btoa(text);
}

async function predict(model, inputs, signal) {
  const { answers } = await call("POST", `/api/v1/models/${encodeURIComponent(model.id)}/predictions`, {
    body: { inputs },
    signal,
  });
  return answers;
}

function inputOf(reads, id, label = null) {
  const kind = reads[0];
  const name = label ?? NOUN[kind].charAt(0).toUpperCase() + NOUN[kind].slice(1);
  if (kind === "text" || kind === "window") {
    const field = h("textarea", { id, rows: kind === "text" ? "4" : "3", dir: "auto" });
    const help =
      kind === "window"
        ? h("p", { class: "help" }, "Numbers in their order, between blanks, commas or lines; the last is judged.")
        : null;
    const read = async () => {
      if (!field.value.trim())
        throw new RangeError(kind === "text" ? "Write a text first." : "Write some numbers first.");
      return kind === "text" ? { text: field.value } : { window: numbersIn(field.value) };
    };
    return { element: h("div", null, h("label", { for: id }, name), field, help), read, preview: () => null };
  }
  const field = h("input", { id, type: "file", accept: ACCEPT[kind] });
  const read = async () => ({ [kind]: await base64Of(field.files[0], NOUN[kind]) });
  const preview = () => media(kind, field.files[0]);
  return { element: h("div", { class: "drop" }, h("label", { for: id }, name), field), read, preview };
}

function numbersIn(text) {
  const found = text
    .split(/[\s,;]+/)
    .filter(Boolean)
    .map(Number);
  if (!found.length || found.some((each) => !Number.isFinite(each)))
    throw new RangeError("Write numbers alone, such as 1.0 1.2 0.9.");
  return found;
}

/** The file that was asked about; its address is given back when the element has read it. */
function media(kind, file) {
  if (!file) return null;
  const address = URL.createObjectURL(file);
  const free = () => URL.revokeObjectURL(address);
  if (kind === "image")
    return h("img", {
      class: "preview",
      src: address,
      alt: "The image that was asked about",
      onload: free,
      onerror: free,
    });
  return h("audio", { controls: true, src: address, onerror: free });
}

function answerOf(answer, text) {
  const parts = [];
  if (answer.entities) parts.push(entities(text ?? "", answer.entities));
  else if (answer.tags) parts.push(h("p", { class: "row", dir: "auto" }, answer.tags.join(" ")));
  if (answer.label !== undefined) {
    const labels = Array.isArray(answer.label) ? answer.label : [answer.label];
    const said = labels.length ? labels.join(", ") : "none of its labels";
    parts.push(h("p", null, "Label: ", h("strong", null, h("bdi", null, said))));
    announce(`Label: ${said}`);
  }
  if (answer.scores) parts.push(scoreBars(answer.scores));
  if (typeof answer.rating === "number")
    parts.push(h("p", null, "Rating: ", h("strong", null, number(answer.rating, 4))));
  if (typeof answer.score === "number") parts.push(h("p", null, "Score: ", h("strong", null, number(answer.score, 4))));
  if (typeof answer.anomalous === "boolean") {
    parts.push(
      h(
        "p",
        null,
        h("span", { class: `chip ${answer.anomalous ? "warning" : "good"}` }, answer.anomalous ? "unusual" : "usual"),
      ),
    );
  }
  if (typeof answer.text === "string") {
    parts.push(h("p", { class: "box said", dir: "auto" }, answer.text || "(an empty text)"));
    if (typeof answer.probability === "number")
      parts.push(h("p", { class: "soft" }, `Probability ${percent(answer.probability)}`));
  }
  if (!parts.length || answer.embedding) parts.push(h("pre", { class: "row" }, JSON.stringify(answer)));
  return h("section", null, h("h2", null, "Answer"), parts);
}

function scoreBars(scores) {
  const { shown, further } = likeliest(scores);
  return [
    h(
      "div",
      { class: "bars", role: "list", "aria-label": "Scores of the labels" },
      shown.map(([label, score]) =>
        h(
          "div",
          { role: "listitem" },
          h("bdi", { class: "name" }, label),
          h("progress", { max: 1, value: score, "aria-hidden": "true" }),
          h("span", { class: "figure" }, percent(score)),
        ),
      ),
    ),
    further ? h("p", { class: "soft" }, `${number(further)} less likely labels are left out.`) : null,
  ];
}

function entities(text, found) {
  const labels = [...new Set(found.map((each) => each.label))];
  const spans = spansOf(text, found);
  return [
    h(
      "p",
      { class: "box said", dir: "auto" },
      spans.map((span) =>
        span.label === null
          ? span.text
          : h(
              "mark",
              { class: `tag tag-${labels.indexOf(span.label) % COLOURS}` },
              h("bdi", null, span.text),
              h("small", null, ` ${span.label}`),
            ),
      ),
    ),
    found.length ? null : h("p", { class: "soft" }, "It finds nothing in this text."),
  ];
}

function similarity(answers, names) {
  const vectors = answers.map((each) => each.embedding);
  if (vectors.some((each) => !Array.isArray(each)))
    return h("pre", { class: "row" }, JSON.stringify(answers).slice(0, 10_000));
  const pairs = [];
  for (let a = 0; a < vectors.length; a += 1) {
    for (let b = a + 1; b < vectors.length; b += 1) pairs.push([names[a], names[b], cosine(vectors[a], vectors[b])]);
  }
  pairs.sort((a, b) => b[2] - a[2]);
  return h(
    "section",
    null,
    h("h2", null, "The most alike first"),
    table({
      caption: "Cosine of each pair",
      columns: ["One", "Other", hiddenName("As a bar"), { name: "Cosine", kind: "number" }],
      rows: pairs.map(([a, b, value]) => [
        h("bdi", null, a),
        h("bdi", null, b),
        h("progress", { max: 1, value: Math.max(0, value || 0), "aria-hidden": "true" }),
        number(value, 3),
      ]),
    }),
    h("p", { class: "soft" }, `Embeddings of ${number(vectors[0].length)} numbers.`),
  );
}
