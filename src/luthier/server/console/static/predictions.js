// What a model that reads says of a text, an image, a sound or values: labels, tags, numbers, embeddings.

import { call } from "./api.js";
import { cosine, likeliest, spansOf } from "./answers.js";
import { asking, base64Of } from "./asking.js";
import { announce, h } from "./dom.js";
import { number, percent } from "./format.js";
import { hiddenName, table } from "./table.js";

const ACCEPT = { image: "image/*", audio: "audio/*" };
const NOUN = { text: "text", image: "image", audio: "sound", window: "values" };
const COLOURS = 6;

/** Draw the form of a model that answers with labels, tags, numbers or texts. */
export async function renderPrediction(root, model, signal) {
  const input = inputOf(model.abilities.reads, "input", signal);
  asking(root, input.element, "Ask", signal, async () => {
    const asked = await input.read();
    const [answer] = await predict(model, [asked], signal);
    return [input.preview(), answerOf(answer, asked.text)];
  });
}

/** Draw the form of a model that gives embeddings: how alike inputs are. */
export async function renderSimilarity(root, model, signal) {
  if (!model.abilities.reads.includes("text")) {
    const first = inputOf(model.abilities.reads, "first", signal, "First");
    const second = inputOf(model.abilities.reads, "second", signal, "Second");
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

async function predict(model, inputs, signal) {
  const { answers } = await call("POST", `/api/v1/models/${encodeURIComponent(model.id)}/predictions`, {
    body: { inputs },
    signal,
  });
  return answers;
}

function inputOf(reads, id, signal, label = null) {
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
  // A sound is read from its address as long as it can be played: until another takes its place, or the form goes.
  let address = null;
  const free = () => {
    if (address) URL.revokeObjectURL(address);
    address = null;
  };
  signal.addEventListener("abort", free);
  const preview = () => {
    free();
    if (!field.files[0]) return null;
    address = URL.createObjectURL(field.files[0]);
    return kind === "image"
      ? h("img", { class: "preview", src: address, alt: "The image that was asked about" })
      : h("audio", { controls: true, src: address });
  };
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
