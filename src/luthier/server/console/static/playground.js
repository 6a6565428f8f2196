// The playground of a model: one form for each ability of the model.

import { call } from "./api.js";
import { Chat } from "./chat.js";
import { MADE_FOR, StatusChip, allModels, nameOf, writes } from "./models.js";
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
  const { data, error, read } = useData(allModels);
  if (!data) return html`<${Pending} title="Playground" error=${error} read=${read} />`;
  const active = data.filter((each) => /^active$/i.test(each.status));
  const rows = [...active.filter((each) => each.kind === "custom"), ...active.filter((each) => each.kind !== "custom")];
  return html`
    <${Heading} title="Playground" />
    <p>Choose a model. A chat can be compared with a second model, also blind.</p>
    <${DataTable} caption="Models to try" filter="name or use" rows=${rows} columns=${[
      { name: "Name", value: nameOf, show: (each) => html`<a href=${link("playground", each.id)}><bdi>${nameOf(each)}</bdi></a>` },
      { name: "Kind", value: (each) => (each.kind === "custom" ? "custom model" : "base model") },
      { name: "Use", value: (each) => (writes(each) ? "chat" : each.kind === "custom" ? "predictions" : (MADE_FOR[each.base_kind] ?? each.base_kind)) },
    ]} />
  `;
}

/** The page. */
export function Playground({ params }) {
  const found = useData((signal) => call("GET", `/api/v1/models/${encodeURIComponent(params.id)}`, { signal }));
  const chosen = useSignal(null);
  const model = found.data;
  if (!model) return html`<${Pending} title="Playground" ...${found} />`;
  const does = (model.abilities?.does ?? []).filter((each) => each in TABS);
  const shown = chosen.value ?? does[0];
  const chip = model.kind === "custom" ? html`<${StatusChip} status=${model.status} />` : html`<${Chip}>base model<//>`;
  return html`
    <${Heading} title=${model.name} tab=${`Playground: ${model.name}`} chips=${chip}>
      <a class="button" href=${link("models", model.id)}>About this model</a>
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

function reasonFor({ kind, status, failure, abilities }) {
  if (kind === "custom" && status !== "Active")
    return `The model has the status ${status} and cannot be used${failure ? `: ${failure}` : "."}`;
  if (!abilities)
    return "The tasks of this model are unknown. Files or a package of the model are missing on this server.";
  return `Models of the method ${abilities.method} have no predictions. Train a model for labels, tags or embeddings.`;
}
