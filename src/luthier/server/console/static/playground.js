// The playground of a model: one form for each ability of the model.

import { call, may, pathOf } from "./api.js";
import { Chat } from "./chat.js";
import { shortName } from "./format.js";
import { MADE_FOR, StatusChip, allDeployments, allModels, nameOf, writes } from "./models.js";
import { Prediction, Reconstruction, Samples, Similarity } from "./predictions.js";
import { Chip, DataTable, Heading, Pending, html, link, useData, useSignal } from "./ui.js";

const TABS = {
  write: ["Chat", Chat],
  predict: ["Predict", Prediction],
  embed: ["Compare", Similarity],
  make_images: ["Generate images", Samples],
  reconstruct: ["Reconstruct images", Reconstruction],
};

/** The page without a model: a list of models to choose from. */
export function ChooseModel() {
  const { data, error, read } = useData((signal) => Promise.all([allModels(signal), may("read") ? allDeployments(signal) : []]));
  if (!data) return html`<${Pending} title="Playground" error=${error} read=${read} />`;
  const [models, deployments] = data;
  const active = models.filter((each) => /^active$/i.test(each.status));
  const served = deployments.flatMap(({ deployment: name, status, model }) => {
    const serving = active.find((each) => each.kind === "custom" && each.name === model);
    return status === "Ready" && serving ? [{ ...serving, id: name, name, suffix: null, deployed: model }] : [];
  });
  const kindOf = ({ deployed, kind }) => (deployed ? `deployment of ${deployed}` : kind === "custom" ? "custom model" : "base model");
  const rows = [...served, ...active.filter((each) => each.kind === "custom"), ...active.filter((each) => each.kind !== "custom")];
  return html`
    <${Heading} title="Playground" />
    <p>Choose a model. A chat can be compared with a second model, also blind.</p>
    <${DataTable} caption="Models to try" filter="name or use" rows=${rows} columns=${[
      { name: "Name", value: nameOf, show: (each) => html`<a href=${link("playground", each.id)}><bdi>${nameOf(each)}</bdi></a>` },
      { name: "Kind", value: kindOf },
      { name: "Use", value: (each) => (writes(each) ? "chat" : each.kind === "custom" ? "predictions" : (MADE_FOR[each.base_kind] ?? each.base_kind)) },
    ]} />
  `;
}

/** The page. */
export function Playground({ params }) {
  const found = useData((signal) => targetOf(params.id, signal));
  const chosen = useSignal(null);
  const model = found.data;
  if (!model) return html`<${Pending} title="Playground" ...${found} />`;
  const does = (model.abilities?.does ?? []).filter((each) => each in TABS);
  const shown = chosen.value ?? does[0];
  const chip = model.kind === "custom" ? html`<${StatusChip} status=${model.status} />` : html`<${Chip}>base model<//>`;
  return html`
    <${Heading} title=${model.name} tab=${`Playground: ${model.name}`} chips=${chip}>
      ${model.deployed
        ? html`<a class="button" href=${link("deployments", model.id)}>About this deployment</a>`
        : html`<a class="button" href=${link("models", model.id)}>About this model</a>`}
    <//>
    ${does.length > 1 && html`
      <div class="actions tabs" role="group" aria-label="Task">
        ${does.map((each) => html`
          <button type="button" aria-pressed=${String(each === shown)} onclick=${() => (chosen.value = each)}>${TABS[each][0]}</button>
        `)}
      </div>
    `}
    ${shown ? html`<div id="try"><${TABS[shown][1]} key=${shown} model=${model} /></div>`
      : html`<p class="box note">${reasonFor(model)}</p>`}
  `;
}

/** Return a model, or a deployment as the serving model under the name of the deployment. As in requests, a deployment precedes models. */
async function targetOf(name, signal) {
  const read = (id) => call("GET", pathOf("models", id), { signal });
  const missing = (error) => (error.status === 404 ? null : Promise.reject(error));
  const model = await read(name).catch((error) => (may("read") ? missing(error) : Promise.reject(error)));
  if (model?.id === name || !may("read")) return model;
  const deployment = await call("GET", pathOf("deployments", name), { signal }).catch(missing);
  // The server names the missing model.
  return deployment ? { ...(await read(shortName(deployment.model_arn))), id: name, name, deployed: deployment.model } : model ?? read(name);
}

function reasonFor({ kind, status, failure, abilities }) {
  if (kind === "custom" && status !== "Active")
    return `The model has the status ${status} and cannot be used${failure ? `: ${failure}` : "."}`;
  if (!abilities)
    return "The tasks of this model are unknown. Files or a package of the model are missing on this server.";
  return `Models of the method ${abilities.method} have no predictions. Train a model for labels, tags or embeddings.`;
}
