// All models: the custom models of the account, then the base models.

import { call, may } from "./api.js";
import { DataField, EMPTY } from "./data_field.js";
import { idOf } from "./files.js";
import { bytes, compact, scoreText, shortName, words } from "./format.js";
import {
  Age, Chip, DataTable, Empty, ErrorBox, Heading, Pending, html, link, toast, useAction, useData, usePolling, useRef, useSignal,
} from "./ui.js";

const SECONDS = 15;
/** Models or deployments of the account in one response: the most that the server allows. */
const PAGE = 1000;
/** Models that are listed again in each round; a list twice as long is loaded half as often. */
const EACH_TIME = 200;
/** Rounds between two requests for the longest lists: five minutes. */
const MOST_ROUNDS = 20;
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

/** Return all models: base models, then the account's models, newest first. */
export async function allModels(signal) {
  const found = [];
  let page = {};
  do {
    page = await call("GET", "/api/v1/models", { query: { limit: PAGE, position: page.next }, signal });
    found.push(...page.models);
  } while (page.next !== undefined);
  return found;
}

/** Return the deployments of the account. */
export async function allDeployments(signal) {
  return (await call("GET", "/api/v1/deployments", { query: { limit: PAGE }, signal })).deployments;
}

/** Return the names of the deployments that serve a model or are about to. */
export async function deploymentsOf(model, signal) {
  return (await allDeployments(signal)).filter((each) => [each.model, each.next_model].includes(model.name)).map((each) => each.deployment);
}

/** The page. */
export function Models() {
  const round = useRef(0);
  const models = useData(allModels);
  const loaded = useData(loadedModels);
  usePolling(SECONDS, async () => {
    round.current += 1;
    const due = round.current % roundsBetween(models.data?.length ?? 0) === 0;
    await Promise.all([due && models.read(), loaded.read()]);
  });
  if (!models.data || !loaded.data)
    return html`<${Pending} title="Models" error=${models.error ?? loaded.error} read=${() => (models.read(), loaded.read())} />`;
  const custom = models.data.filter((each) => each.kind === "custom");
  return html`
    <${Heading} title="Models" />
    <${ErrorBox} error=${models.error ?? loaded.error} />
    <h2>Custom models</h2>
    <${Custom} models=${custom} all=${models.data} loaded=${loaded.data} />
    <h2>Base models</h2>
    <${Base} models=${models.data.filter((each) => each.kind !== "custom")} />
    ${may("administer") && html`<${ModelFile} done=${models.read} />`}
  `;
}

/** A form that stores the models of a file of `luthier models pack`. */
function ModelFile({ done }) {
  const file = useSignal(EMPTY);
  const { busy, error, run } = useAction(async () => {
    const source = file.value.address;
    const { models } = await call("POST", "/api/v1/packed-models", { body: { source } });
    // The models are copies: the uploaded file has no further use.
    if (idOf(source)) await call("DELETE", `/v1/files/${encodeURIComponent(idOf(source))}`);
    file.value = EMPTY;
    toast(`Stored: ${models.join(", ")}.`);
    await done();
  });
  const help = html`<code>luthier models pack MODEL FILE.luthier</code> writes the file on a machine with network.
    Files over 512 MB need an address: copy the file with an S3 client.`;
  return html`
    <details class="rule">
      <summary>Add models from a file</summary>
      <form class="inside" onsubmit=${run}>
        <${DataField} id="model-file" label="Packed model" help=${help} field=${file} accept=".luthier" />
        <${ErrorBox} error=${error} />
        <div class="actions"><button type="submit" class="primary" disabled=${busy || !file.value.address}>Store the models</button></div>
      </form>
    </details>
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

/** Return the name of a model with the suffix of a job of the OpenAI API. */
export const nameOf = ({ name, suffix }) => (suffix ? `${name} ${suffix}` : name);

const nameLink = (model) => html`<a href=${link("models", model.id)}><bdi>${nameOf(model)}</bdi></a>`;

function tryLink(model) {
  return may("invoke") && html`<a href=${link("playground", model.id)} aria-label=${`Try ${model.name}`}>Try</a>`;
}

function Custom({ models, all, loaded }) {
  const baseOf = (model) => (model.base ? nameOf(all.find((each) => each.arn === model.base) ?? { name: shortName(model.base) }) : "–");
  const columns = [
    { name: "Name", value: nameOf, show: nameLink },
    { name: "Status", value: (model) => model.status, show: (model) => html`<${StatusChip} status=${model.status} />` },
    { name: "Base", value: baseOf, show: (model) => html`<${BaseLink} arn=${model.base} models=${all} />` },
    { name: "Quality", kind: "number", value: (model) => model.score, show: qualityOf },
    { name: "Size", kind: "number", value: (model) => model.bytes, show: (model) => bytes(model.bytes) },
    { name: "Created by", value: originOf, show: madeBy },
    {
      name: "Age", kind: "nowrap", value: (model) => model.created,
      show: (model) => html`<${Age} at=${model.created} />`,
    },
    { name: "In memory", kind: "nowrap", value: (model) => memoryOf(loaded[model.id]) },
    { name: "Playground", hidden: true, show: (model) => model.status === "Active" && tryLink(model) },
  ];
  const empty = html`
    <${Empty} text="This account has no custom models yet. A job trains a model on your rows.">
      ${may("develop") && html`<a class="button primary" href="#/home">Bring a file or try a sample</a>`}
    <//>
  `;
  return html`<${DataTable} caption="Custom models, the newest first" filter="name, base or status" columns=${columns} rows=${models} empty=${empty} />`;
}

/** Return the score on the held-out rows of the training. */
function qualityOf({ measure, score }) {
  return measure ? html`${scoreText(measure, score)} <small class="soft">${words(measure)}</small>` : "–";
}

const originOf = ({ job, source }) => (job ? "job" : source ? "import" : "–");
const madeBy = (model) => (model.job ? html`<a href=${link("jobs", model.job)}>job<span class="visually-hidden"> of ${nameOf(model)}</span></a>` : originOf(model));

function Base({ models }) {
  const columns = [
    { name: "Name", value: nameOf, show: nameLink },
    { name: "Use", value: (model) => MADE_FOR[model.base_kind] ?? model.base_kind },
    { name: "Parameters", kind: "number", value: (model) => model.facts?.parameters, show: (model) => compact(model.facts?.parameters) },
    { name: "Memory", kind: "number", value: (model) => model.facts?.memory_bytes, show: (model) => bytes(model.facts?.memory_bytes) },
    { name: "Languages", value: (model) => languagesOf(model) },
    { name: "Licence", kind: "nowrap", value: (model) => model.facts?.licence ?? "–" },
    { name: "Files", value: (model) => (isHere(model) ? "here" : "download"), show: whereOf },
    { name: "Playground", hidden: true, show: tryLink },
  ];
  return html`<${DataTable} caption="Base models" filter="name or use" columns=${columns} rows=${models} empty="The server offers no base models." />`;
}

const MOST_LANGUAGES = 4;
/** Return whether the files of a model are on the server. */
export const isHere = (model) => model.facts?.here !== false;

/** Return the languages of a base model. */
export function languagesOf({ facts }) {
  const all = facts?.languages ?? [];
  return all.length > MOST_LANGUAGES ? `${all.slice(0, MOST_LANGUAGES).join(", ")} and ${all.length - MOST_LANGUAGES} more` : all.join(", ") || "–";
}

/** Whether the files of a base model are on the server. */
export function whereOf(model) {
  if (isHere(model)) return html`<${Chip} kind="good">here<//>`;
  return model.facts.download_bytes ? `fetched on first use, ${bytes(model.facts.download_bytes)}` : "created on first use";
}

function memoryOf(loaded) {
  if (!loaded?.loaded) return "no";
  const requests = loaded.requests ? `, ${loaded.requests} active requests` : "";
  return `${bytes(loaded.memory_bytes)}${requests}`;
}
