// One model: facts, certificate, memory, snippets, exports and deletion.

import { ApiError, call, may, pathOf } from "./api.js";
import { Certificate } from "./certificate.js";
import { ModelEvaluations } from "./evaluate.js";
import { Exports } from "./exports.js";
import { learnNames } from "./files.js";
import { age, bytes, number } from "./format.js";
import { BaseLink, MADE_FOR, StatusChip, allModels, deploymentsOf, languagesOf, loadedModels, nameOf, whereOf } from "./models.js";
import { snippets } from "./snippets.js";
import {
  Age, Chip, Download, ErrorBox, Facts, Heading, Pending, announce, confirmed, html, link, toast, useAction, useData, usePolling, useSignal,
} from "./ui.js";

const SECONDS = 10;
const ABILITIES = {
  write: "generates text", predict: "labels, scores or tags", embed: "embeddings", make_images: "generates images",
  reconstruct: "reconstructs images",
};

/** The page. */
export function Model({ params }) {
  const path = pathOf("models", params.id);
  const found = useData(async (signal) => {
    const model = await call("GET", path, { signal });
    const [certified, job, models, loaded, deployments] = await Promise.all([
      readCertificate(path, model, signal),
      model.job && may("read") ? readJob(model.job, signal) : null,
      allModels(signal),
      model.kind === "custom" ? loadedModels(signal) : null,
      model.kind === "custom" && may("read") ? deploymentsOf(model, signal) : [],
    ]);
    return { model, certified, job, models, loaded, deployments };
  });
  if (!found.data) return html`<${Pending} title="Model" ...${found} />`;
  const { model, certified, job, models, loaded, deployments } = found.data;
  const isCustom = model.kind === "custom";
  const active = isCustom && model.status === "Active";
  const certificate = certified?.certificate;
  const chips = [
    html`<${StatusChip} status=${model.status} />`,
    html`<${Chip}>${isCustom ? "custom model" : "base model"}<//>`,
  ];
  return html`
    <${Heading} title=${nameOf(model)} chips=${chips}>
      ${model.abilities?.does.length > 0 && may("invoke") &&
      html`<a class="button primary" href=${link("playground", model.id)}>Playground</a>`}
      ${(active || !isCustom) && may("develop") &&
      html`<a class="button" href=${`${link("new")}?base=${encodeURIComponent(model.id)}`}>Train from this model</a>`}
      ${active && may("develop") && html`
        <a class="button" href=${`${link("evaluations")}?task=comparisons&model=${model.id}`}>Compare with the base</a>
        <a class="button" href=${`${link("deployments")}?model=${model.id}`}>Deploy or promote</a>
      `}
      ${active && may("read") && html`<a class="button" href=${link("health", model.name)}>Health</a>`}
      ${active && may("read") && html`<${Download} path=${`${path}/certificate.json`} name=${`${model.name}-certificate.json`} label="Download certificate.json" />`}
    <//>
    ${model.failure && html`<p class="box error">${model.failure}</p>`}
    <${Facts} pairs=${[
      ["Id", html`<code>${model.id}</code>`],
      ["Trained from", model.base && html`<${BaseLink} arn=${model.base} models=${models} />`],
      ["Created by job", model.job && html`<a href=${link("jobs", model.job)}><bdi>${job?.name ?? model.job}</bdi></a>`],
      ["Imported from", model.source && html`<code>${model.source}</code>`],
      ["Created", model.created && html`<${Age} at=${model.created} />`],
      ["Deployed as", deployments.length > 0 ? html`<${DeploymentLinks} names=${deployments} />` : null],
      ["Method", model.abilities?.method],
      ["Use", isCustom ? null : (MADE_FOR[model.base_kind] ?? model.base_kind)],
      ["Abilities", abilityText(model.abilities)],
      ...baseFacts(model),
    ]} />
    <p class="soft">ARN <code>${model.arn}</code></p>
    ${active && html`<${Memory} path=${path} model=${model} first=${loaded[model.id]} />`}
    <${ErrorBox} error=${certified?.error} />
    ${certificate && html`<${Certificate} view=${certified} models=${models} job=${job} />`}
    ${(active || !isCustom) && may("read") && html`<${ModelEvaluations} model=${model} />`}
    ${(active || !isCustom) && html`<${Calls} model=${model} storedId=${certificate?.id ?? (isCustom ? null : model.name)} />`}
    ${active && may("read") && html`<${Exports} model=${model} />`}
    ${isCustom && may("develop") && html`<${Deletion} model=${model} path=${path} deployments=${deployments} />`}
  `;
}

function baseFacts({ facts, ...model }) {
  if (!facts) return [];
  return [
    ["Parameters", number(facts.parameters)],
    ["Memory (32-bit weights)", bytes(facts.memory_bytes)],
    ["Longest input", facts.context ? `${number(facts.context)} tokens` : null],
    ["Languages", languagesOf({ facts })],
    ["Licence", facts.licence],
    ["Files", whereOf({ ...model, facts })],
  ];
}

function abilityText(abilities) {
  if (!abilities) return null;
  return abilities.does.map((each) => ABILITIES[each] ?? each).join(", ") || "none: a starting point for training";
}

/** Return the certificate, or `{error}`; null if the model has none or the key may not read it. */
async function readCertificate(path, model, signal) {
  if (model.kind !== "custom" || model.status !== "Active" || !may("read")) return null;
  try {
    return await call("GET", `${path}/certificate`, { signal });
  } catch (error) {
    if (error instanceof ApiError && error.status !== 401 && error.status !== 0) return { error };
    throw error;
  }
}

/** Return the job of a model, and learn the names of the job's files; null for a deleted job. */
async function readJob(id, signal) {
  try {
    const job = await call("GET", pathOf("jobs", id), { signal });
    await learnNames(job.details.sources ?? [], signal);
    return job;
  } catch (error) {
    if (error.status === 404) return null;
    throw error;
  }
}

/** The state of the model in memory, with buttons that change the state. */
function Memory({ path, model, first }) {
  const state = useSignal(first);
  const waiting = useSignal("");
  const { busy, error, run } = useAction(async (verb, text) => {
    waiting.value = text;
    announce(text);
    state.value = await call("POST", `${path}/${verb}`);
    announce(memoryText(state.value));
  });
  usePolling(SECONDS, async (signal) => {
    const found = await loadedModels(signal).catch(() => null);
    if (found && !busy) state.value = found[model.id];
  });
  const { loaded } = state.value ?? {};
  const button = (verb, label, text) =>
    html`<button type="button" key=${verb} aria-disabled=${busy} onclick=${() => run(verb, text)}>${label}</button>`;
  return html`
    <section class="box" id="memory">
      <p>${busy ? waiting : memoryText(state.value)}</p>
      ${may("develop") && html`
        <div class="actions">
          ${loaded ? button("unload", "Unload", "Unloading the model …") : button("load", "Load", "Loading the model …")}
        </div>
      `}
      <${ErrorBox} error=${error} />
    </section>
  `;
}

function memoryText(state) {
  if (!state?.loaded) return "The model is not in memory. The first request waits until the model is loaded.";
  const shared = state.base ? " and shares the network of its base" : "";
  const stays = "The server unloads the model if other models need the memory.";
  const busy = state.requests ? ` Active requests: ${state.requests}.` : "";
  return `Loaded ${age(state.loaded_at)}, uses ${bytes(state.memory_bytes)}${shared}. ${stays}${busy}`;
}

/** Commands and programs that query a model; `storedId` is its id in the CLI, or null. */
export function Calls({ model, storedId }) {
  const found = snippets({ origin: window.location.origin, model, storedId });
  if (!found.length) return null;
  return html`
    <section>
      <h2>Use the model</h2>
      ${found.map(
        ({ name, about, code }, index) => html`
          <details class="rule" open=${index === 0}>
            <summary>${name}</summary>
            <div class="inside">
              ${about && html`<p class="soft">${about}</p>`}
              <pre class="row" tabindex="0"><code>${code}</code></pre>
              <${Copy} name=${name} code=${code} />
            </div>
          </details>
        `,
      )}
    </section>
  `;
}

function Copy({ name, code }) {
  const label = useSignal("Copy");
  const copy = async () => {
    try {
      await navigator.clipboard.writeText(code);
      label.value = "Copied";
    } catch {
      // Browsers allow the clipboard only to pages over https or from this machine.
      label.value = "Select the text and copy";
    }
    announce(label.value);
    setTimeout(() => (label.value = "Copy"), 3000);
  };
  return html`<button type="button" class="quiet" aria-label=${`Copy: ${name}`} onclick=${copy}>${label}</button>`;
}

function DeploymentLinks({ names }) {
  return names.map((each, index) => html`${index > 0 && ", "}<a href=${link("deployments", each)}><bdi>${each}</bdi></a>`);
}

function Deletion({ model, path, deployments }) {
  const { busy, error, run } = useAction(async () => {
    const text = "The server removes the files of the model for good. The job that created the model stays.";
    if (!(await confirmed({ title: "Delete this model?", text, verb: "Delete", danger: true, typed: model.name }))) return null;
    await call("DELETE", path);
    toast(`${model.name} was deleted.`);
    return link("models");
  });
  return html`
    <section id="deletion">
      <h2>Delete</h2>
      <${ErrorBox} error=${error} />
      ${deployments.length > 0
        ? html`<p class="soft">The model is deployed as <${DeploymentLinks} names=${deployments} />. Delete the deployment before the model.</p>`
        : html`<button type="button" class="danger" disabled=${busy} onclick=${run}>Delete this model</button>`}
    </section>
  `;
}
