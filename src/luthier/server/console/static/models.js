// All models: the custom models of the account, then the base models.

import { call, may } from "./api.js";
import { age, bytes, shortName, time } from "./format.js";
import { Chip, ErrorBox, Heading, Pending, Table, bound, html, link, useData, usePolling, useRef, useSignal } from "./ui.js";

const SECONDS = 15;
/** Models that are listed again in each round; a list twice as long is loaded half as often. */
const EACH_TIME = 200;
/** Rounds between two requests for the longest lists: five minutes. */
const MOST_ROUNDS = 20;
/** Rows of a table: an account may have ten thousand models. */
const MOST_ROWS = 200;
const STATUS = { Active: "good", ACTIVE: "good", Creating: "note", Failed: "error" };
/** Kinds of base models (luthier/models/base_kinds.py) and their use. */
export const MADE_FOR = {
  causal_lm: "text generation",
  masked_lm: "text classification (masked language model)",
  encoder: "text embeddings",
  reranker: "ranking of documents",
  image_encoder: "image classification",
  audio_encoder: "audio classification",
  image_text_encoder: "matching images and text",
  autoencoding: "compression and anomaly detection",
  adversarial: "image generation",
  denoising: "image generation",
  image_to_text: "reading text in images",
};

/** The page. */
export function Models() {
  const wanted = useSignal("");
  const round = useRef(0);
  const models = useData(async (signal) => (await call("GET", "/api/v1/models", { signal })).models);
  const loaded = useData(loadedModels);
  usePolling(SECONDS, async () => {
    round.current += 1;
    const due = round.current % roundsBetween(models.data?.length ?? 0) === 0;
    await Promise.all([due && models.read(), loaded.read()]);
  });
  if (!models.data || !loaded.data)
    return html`<${Pending} title="Models" error=${models.error ?? loaded.error} read=${() => (models.read(), loaded.read())} />`;
  const text = wanted.value.trim().toLowerCase();
  const kept = models.data.filter((model) => textOf(model).includes(text));
  const none = text && "No model has this name, id, base, job or status.";
  return html`
    <${Heading} title="Models">${may("develop") && html`<a class="button primary" href="#/new">New job</a>`}<//>
    <div class="narrow">
      <label for="filter">Filter</label>
      <input type="search" id="filter" placeholder="name, id, base or status" autocomplete="off" ...${bound(wanted, "oninput")} />
    </div>
    <${ErrorBox} error=${models.error ?? loaded.error} />
    <h2>Custom models</h2>
    <${Custom} models=${kept.filter(isCustom).reverse()} all=${models.data} loaded=${loaded.data} none=${none} />
    <h2>Base models</h2>
    <${Base} models=${kept.filter((each) => !isCustom(each))} none=${none} />
  `;
}

/** Return the number of rounds between two requests for a list of this length. */
export const roundsBetween = (models) => Math.min(MOST_ROUNDS, Math.max(1, Math.ceil(models / EACH_TIME)));

/** Return whether a model of the list answers chats. A classifier tuned from a language model does not. */
export const writes = (model) => model.writes === true;

/** Return the account's models in memory, by id. */
export async function loadedModels(signal) {
  const { models } = await call("GET", "/api/v1/loaded-models", { signal });
  return Object.fromEntries(models.map((each) => [each.id, each]));
}

export function StatusChip({ status }) {
  return html`<${Chip} kind=${STATUS[status]}>${status === "ACTIVE" ? "Active" : status}<//>`;
}

/** A link to the model of an ARN. */
export function BaseLink({ arn, models }) {
  if (!arn) return "–";
  const id = shortName(arn);
  return html`<a href=${link("models", id)}><bdi>${nameOf(models.find((each) => each.arn === arn) ?? { name: id })}</bdi></a>`;
}

function textOf(model) {
  return [nameOf(model), model.id, model.status, model.base ?? "", model.job ?? "", model.base_kind].join(" ").toLowerCase();
}

const isCustom = (model) => model.kind === "custom";

/** Return the name of a model with the suffix of a job of the OpenAI API. */
export const nameOf = ({ name, suffix }) => (suffix ? `${name} ${suffix}` : name);

const nameLink = (model) => html`<a href=${link("models", model.id)}><bdi>${nameOf(model)}</bdi></a>`;

function tryLink(model) {
  return may("invoke") && html`<a href=${link("playground", model.id)} aria-label=${`Try ${model.name}`}>Try</a>`;
}

function Custom({ models, all, loaded, none }) {
  const columns = [
    "Name", "Status", "Base", "Created by", { name: "Age", kind: "nowrap" }, { name: "In memory", kind: "nowrap" },
    { name: "Playground", hidden: true },
  ];
  const empty = none || ["This account has no custom models yet. ", may("develop") && html`<a href="#/new">Train a model</a>`];
  const rows = models.slice(0, MOST_ROWS).map((model) => [
    nameLink(model),
    html`<${StatusChip} status=${model.status} />`,
    html`<${BaseLink} arn=${model.base} models=${all} />`,
    model.job ? html`<a href=${link("jobs", model.job)}>${model.job}</a>` : model.source ? "import" : "–",
    html`<span title=${time(model.created)}>${age(model.created)}</span>`,
    memoryOf(loaded[model.id]),
    model.status === "Active" && tryLink(model),
  ]);
  return html`
    <${Table} caption="Custom models, the newest first" columns=${columns} rows=${rows} empty=${empty} />
    <${Cut} models=${models} which="newest" />
  `;
}

function Base({ models, none }) {
  return html`
    <${Table} caption="Base models" columns=${["Name", "Id", "Use", { name: "Playground", hidden: true }]}
      rows=${models.slice(0, MOST_ROWS).map((model) => [
        nameLink(model),
        html`<code>${model.id}</code>`,
        MADE_FOR[model.base_kind] ?? model.base_kind,
        tryLink(model),
      ])}
      empty=${none || "The server offers no base models."} />
    <${Cut} models=${models} which="first" />
  `;
}

function Cut({ models, which }) {
  if (models.length <= MOST_ROWS) return null;
  return html`<p class="soft">Showing the ${which} ${MOST_ROWS} of ${models.length} models. Filter to find others.</p>`;
}

function memoryOf(loaded) {
  if (!loaded?.loaded) return "no";
  const requests = loaded.requests ? `, ${loaded.requests} active requests` : "";
  return `${bytes(loaded.memory_bytes)}${requests}`;
}
