// Forms of the playground: predictions for text, images, sound and values, similarity, and image generation.

import { cosine, likeliest, spansOf } from "./answers.js";
import { InputError, call, may, pathOf } from "./api.js";
import { number, percent } from "./format.js";
import { Chip, ErrorBox, Field, Table, announce, html, link, options, useAction, useData, useEffect, useLeaving, useSignal } from "./ui.js";

/** Bytes of a file that is sent. base64 is a third longer, and the server rejects larger bodies. */
const LARGEST_FILE = 18_000_000;
/** Forms of input: label, media type of a file, and the name in messages. */
const INPUTS = {
  text: ["Text"], window: ["Values"], image: ["Image", "image/*", "an image"],
  audio: ["Audio", "audio/*", "an audio file"],
};
const COLOURS = 6;
const MOST_TEXTS = 20;

/** A form with one button and the result below. `ask` gets the fields of the form and an AbortSignal. */
function Asking({ verb, ask, children }) {
  const result = useSignal(null);
  const left = useLeaving();
  const { busy, error, run } = useAction(async (event) => {
    result.value = null;
    result.value = await ask(event.target.elements, left);
  });
  return html`
    <form class="ask" onsubmit=${run}>
      ${children}
      <div class="actions"><button type="submit" class="primary" disabled=${busy}>${verb}</button></div>
    </form>
    <div aria-live="polite" id="answer">
      ${busy && html`<p class="soft">Waiting for the model …</p>`}
      <${ErrorBox} error=${error} />
      ${result.value}
    </div>
  `;
}

/** Return a file as base64; `noun` is what the user has to choose. */
async function base64Of(file, noun) {
  if (!file) throw new InputError(`Choose a file: ${noun}.`);
  if (file.size > LARGEST_FILE) throw new InputError(`The file is larger than ${LARGEST_FILE / 1e6} MB. Choose a smaller file.`);
  const reader = new FileReader();
  await new Promise((done) => {
    reader.onloadend = done;
    reader.readAsDataURL(file);
  });
  if (reader.error) throw new InputError("The file is moved or changed. Choose the file again.");
  return reader.result.slice(reader.result.indexOf(",") + 1);
}

/** The form of a model that returns labels, tags, numbers or text. */
export function Prediction({ model }) {
  const [kind] = model.abilities.reads;
  const capture = useData((signal) => (may("read") ? call("GET", "/api/v1/capture", { signal }) : null));
  const ask = async ({ input }, signal) => {
    const sent = await read(input, kind);
    const [answer] = await predict(model, [sent], signal);
    if (answer.label !== undefined) announce(`Label: ${[answer.label].flat().join(", ")}`);
    const file = INPUTS[kind][1] && input.files[0];
    return html`
      ${file && html`<${FileImage} class="preview" file=${file} audio=${kind === "audio"} />`}
      <${Answer} answer=${answer} text=${sent.text ?? ""} />
      ${capture.data && html`
        <p class="soft">
          ${capture.data.enabled
            ? html`<a href=${link("review")}>Rate this prediction in Review</a>`
            : html`Predictions can be rated if requests are captured. <a href=${link("review")}>Turn on capture in Review</a>.`}
        </p>
      `}
    `;
  };
  return html`<${Asking} verb="Predict" ask=${ask}><${Input} kind=${kind} id="input" /><//>`;
}

/** The form of a model that returns embeddings: the similarity of inputs. */
export function Similarity({ model }) {
  const [kind] = model.abilities.reads;
  if (!model.abilities.reads.includes("text")) {
    const askTwo = async ({ first, second }, signal) => {
      const sent = [await read(first, kind), await read(second, kind)];
      return html`<${Pairs} answers=${await predict(model, sent, signal)} names=${["First", "Second"]} />`;
    };
    return html`
      <${Asking} verb="Compare" ask=${askTwo}>
        <${Input} kind=${kind} id="first" label="First" /><${Input} kind=${kind} id="second" label="Second" />
      <//>
    `;
  }
  const ask = async ({ texts }, signal) => {
    const lines = texts.value.split("\n").map((each) => each.trim()).filter(Boolean);
    if (lines.length < 2) throw new InputError("Enter at least 2 texts, one per line.");
    if (lines.length > MOST_TEXTS) throw new InputError(`Enter at most ${MOST_TEXTS} texts; the field has ${lines.length}.`);
    return html`<${Pairs} answers=${await predict(model, lines.map((text) => ({ text })), signal)} names=${lines} />`;
  };
  const placeholder = "My card has not arrived\nWhere is my new card?\nHow do I change my PIN?";
  return html`
    <${Asking} verb="Compare" ask=${ask}>
      <${Field} id="texts" label="Texts, one per line" help=${`2 to ${MOST_TEXTS} texts. Each text is compared with all others.`}>
        <textarea id="texts" rows="6" dir="auto" placeholder=${placeholder} />
      <//>
    <//>
  `;
}

async function predict(model, inputs, signal) {
  const path = `${pathOf("models", model.id)}/predictions`;
  return (await call("POST", path, { body: { inputs }, signal })).answers;
}

function Input({ kind, id, label }) {
  const [name, accept] = INPUTS[kind];
  if (accept) return html`<${FileField} id=${id} label=${label ?? name} accept=${accept} />`;
  const help = kind === "window" && "Numbers in order, separated by spaces, commas or lines. The model scores the last number.";
  return html`<${Field} id=${id} label=${label ?? name} help=${help}><textarea id=${id} rows="4" dir="auto" /><//>`;
}

function FileField({ id, label, accept }) {
  return html`<div class="drop"><label for=${id}>${label}</label><input id=${id} type="file" accept=${accept} /></div>`;
}

/** Return the value of an input as the API expects it. */
async function read(field, kind) {
  const [, accept, noun] = INPUTS[kind];
  if (accept) return { [kind]: await base64Of(field.files[0], noun) };
  if (!field.value.trim()) throw new InputError(kind === "text" ? "Enter text." : "Enter numbers.");
  if (kind === "text") return { text: field.value };
  const found = field.value.split(/[\s,;]+/).filter(Boolean).map(Number);
  if (!found.length || !found.every(Number.isFinite)) throw new InputError("Enter only numbers, such as 1.0 1.2 0.9.");
  return { window: found };
}

function Answer({ answer, text }) {
  const { label, scores, entities, tags, rating, score, anomalous } = answer;
  const known = [label, scores, entities, tags, rating, score, anomalous, answer.text].some((each) => each !== undefined);
  const figure = (name, value) => typeof value === "number" && html`<p>${name}: <strong>${number(value, 4)}</strong></p>`;
  return html`
    <section>
      <h2>Prediction</h2>
      ${entities ? html`<${Entities} text=${text} found=${entities} />` : tags && html`<p class="row" dir="auto">${tags.join(" ")}</p>`}
      ${label !== undefined && html`<p>Label: <strong><bdi>${[label].flat().join(", ") || "none"}</bdi></strong></p>`}
      ${scores && html`<${Scores} scores=${scores} />`}
      ${figure("Rating", rating)} ${figure("Score", score)}
      ${typeof anomalous === "boolean" && html`
        <p><${Chip} kind=${anomalous ? "warning" : "good"}>${anomalous ? "unusual" : "usual"}<//></p>
      `}
      ${typeof answer.text === "string" && html`
        <p class="box said" dir="auto">${answer.text || "(empty text)"}</p>
        ${typeof answer.probability === "number" && html`<p class="soft">Probability ${percent(answer.probability)}</p>`}
      `}
      ${(!known || answer.embedding) && html`<pre class="row" tabindex="0">${JSON.stringify(answer)}</pre>`}
    </section>
  `;
}

function Scores({ scores }) {
  const { shown, further } = likeliest(scores);
  return html`
    <div class="bars" role="list" aria-label="Scores of the labels">
      ${shown.map(([label, score]) => html`
        <div role="listitem">
          <bdi class="name">${label}</bdi>
          <progress max="1" value=${score} aria-hidden="true" />
          <span class="figure">${percent(score)}</span>
        </div>
      `)}
    </div>
    ${further > 0 && html`<p class="soft">${number(further)} labels with lower scores are not shown.</p>`}
  `;
}

function Entities({ text, found }) {
  const labels = [...new Set(found.map((each) => each.label))];
  const mark = (span) => html`
    <mark class=${`tag tag-${labels.indexOf(span.label) % COLOURS}`}><bdi>${span.text}</bdi><small> ${span.label}</small></mark>
  `;
  return html`
    <p class="box said" dir="auto">${spansOf(text, found).map((span) => (span.label === null ? span.text : mark(span)))}</p>
    ${!found.length && html`<p class="soft">The model found no entities in this text.</p>`}
  `;
}

function Pairs({ answers, names }) {
  const vectors = answers.map((each) => each.embedding);
  if (!vectors.every(Array.isArray)) return html`<pre class="row" tabindex="0">${JSON.stringify(answers).slice(0, 10_000)}</pre>`;
  const others = (a) => vectors.map((_, b) => b).filter((b) => b > a);
  const pairs = vectors.flatMap((first, a) => others(a).map((b) => [names[a], names[b], cosine(first, vectors[b])]));
  pairs.sort((a, b) => b[2] - a[2]);
  const rows = pairs.map(([first, second, value]) => [
    html`<bdi>${first}</bdi>`,
    html`<bdi>${second}</bdi>`,
    html`<progress max="1" value=${Math.max(0, value || 0)} aria-hidden="true" />`,
    number(value, 3),
  ]);
  return html`
    <section>
      <h2>Most similar pairs first</h2>
      <${Table} caption="Cosine similarity of each pair" rows=${rows}
        columns=${["First", "Second", { name: "Bar", hidden: true }, { name: "Cosine", kind: "number" }]} />
      <p class="soft">Embeddings have ${number(vectors[0].length)} dimensions.</p>
    </section>
  `;
}

/** The form of a model that generates images. */
export function Samples({ model }) {
  const { labels, reads_prompts: prompts, method } = model.abilities;
  const ask = async (fields, signal) => {
    const body = { count: fields.count.valueAsNumber };
    for (const name of ["seed", "steps"]) if (fields[name]?.value) body[name] = fields[name].valueAsNumber;
    for (const name of ["label", "prompt"]) if (fields[name]?.value.trim()) body[name] = fields[name].value;
    const made = await call("POST", `${pathOf("models", model.id)}/images`, { body, signal });
    return html`
      <section>
        <h2>Images</h2>
        <div class="pictures">
          ${made.images.map((each, index) => html`<${Picture} png=${each.png} caption=${each.label ?? body.prompt} index=${index} />`)}
        </div>
        <p class="soft">${number(made.width)} × ${number(made.height)} pixels. Seed: ${made.seed}.</p>
      </section>
    `;
  };
  const whole = (id, attributes) => html`<input id=${id} type="number" step="1" ...${attributes} />`;
  return html`
    <${Asking} verb="Generate images" ask=${ask}>
      <div class="fields">
        ${prompts && html`<${Field} id="prompt" label="Prompt"><input id="prompt" dir="auto" autocomplete="off" /><//>`}
        ${labels.length > 0 && html`
          <${Field} id="label" label="Class">
            <select id="label">${options([["", "each class in turn"], ...labels.map((each) => [each, each])])}</select>
          <//>
        `}
        <${Field} id="count" label="Number of images">${whole("count", { min: 1, max: 64, defaultValue: 8 })}<//>
        ${method === "diffusion" && html`
          <${Field} id="steps" label="Denoising steps">${whole("steps", { min: 1, max: 10000, placeholder: "as stored" })}<//>
        `}
        <${Field} id="seed" label="Seed">${whole("seed", { min: 0, placeholder: "random" })}<//>
      </div>
    <//>
  `;
}

/** The form of an autoencoder, or of a model that restores images. */
export function Reconstruction({ model }) {
  const ask = async ({ image }, signal) => {
    const file = image.files[0];
    const body = { images: [await base64Of(file, "an image")] };
    const found = await call("POST", `${pathOf("models", model.id)}/reconstructions`, { body, signal });
    const restored = found.compression_ratio === null;
    return html`
      <section>
        <h2>Original and ${restored ? "restored image" : "reconstruction"}</h2>
        <div class="pictures">
          <figure><${FileImage} file=${file} /><figcaption>original</figcaption></figure>
          ${found.images.map((each, index) => html`<${Picture} png=${each.png} caption=${restored ? "restored" : `error ${number(each.error)}`} index=${index} />`)}
        </div>
        ${!restored && html`<p class="soft">Compression ratio: ${number(found.compression_ratio)}.</p>`}
      </section>
    `;
  };
  return html`
    <${Asking} verb="Reconstruct" ask=${ask}>
      <${FileField} id="image" label="Image" accept="image/*" />
    <//>
  `;
}

/** A file of the user as an image or, with `audio`, as a player. */
function FileImage({ file, audio, ...props }) {
  const address = useSignal("");
  useEffect(() => {
    const made = (address.value = URL.createObjectURL(file));
    // Players read from the address as long as they are shown.
    return () => URL.revokeObjectURL(made);
  }, [file]);
  if (!address.value) return null;
  return audio ? html`<audio controls src=${address} />` : html`<img src=${address} alt="The chosen file" ...${props} />`;
}

function Picture({ png, caption, index }) {
  return html`
    <figure>
      <img src=${`data:image/png;base64,${png}`} alt=${`Image ${index + 1}${caption ? `: ${caption}` : ""}`} />
      ${caption && html`<figcaption><bdi>${caption}</bdi></figcaption>`}
    </figure>
  `;
}
