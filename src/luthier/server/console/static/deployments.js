// Deployments: names that applications send, the models behind the names, promotion and rollback.

import { call, may, pathOf } from "./api.js";
import { duration, number, percent, scoreText, shortName, time, words } from "./format.js";
import { weekHealth } from "./health.js";
import { Calls } from "./model.js";
import { allModels } from "./models.js";
import { Schedule } from "./schedule.js";
import {
  Age, Chip, Empty, ErrorBox, Facts, Field, Heading, PageButtons, Pending, Section, Table, bound, confirmed, html, link,
  options, toast, useAction, useData, usePages, usePolling, useSignal,
} from "./ui.js";

const SECONDS = 5;
const PAGE = 25;
const SHARES = [["", "all requests at once"], ["0.05", "5 % of users first"], ["0.1", "10 % of users first"], ["0.25", "25 % of users first"]];
const STATES = { Ready: "good", Failed: "error", Creating: "note" };
const CHANGES = { switched: "good", canary: "note", preparing: "note", ended: "warning" };

/** Return the name of a model with the score on the held-out rows of its training. */
const labelOf = ({ name, measure, score, score_rows }) =>
  measure ? `${name} (${words(measure).toLowerCase()} ${scoreText(measure, score)}${score_rows ? ` of ${number(score_rows)} own rows` : ""})` : name;

/** Return the active custom models of the account, newest first. */
async function deployableModels(signal) {
  return (await allModels(signal)).filter((each) => each.kind === "custom" && each.status === "Active");
}

/** The list of deployments. */
export function Deployments({ query }) {
  const pages = usePages();
  const position = pages.value.at(-1);
  const { data, error, read } = useData((signal) => call("GET", "/api/v1/deployments", { query: { limit: PAGE, position }, signal }), [position]);
  usePolling(SECONDS, read);
  if (!data) return html`<${Pending} title="Deployments" error=${error} read=${read} />`;
  // The model that another page chose is proposed on the page of the deployment.
  const chosen = query.has("model") ? `?${query}` : "";
  const rows = data.deployments.map((each) => [
    html`<a href=${`${link("deployments", each.deployment)}${chosen}`}><bdi>${each.deployment}</bdi></a>`,
    html`<${Chip} kind=${STATES[each.status]}>${each.status}<//>${each.failure && html`<p class="soft">${each.failure}</p>`}`,
    html`<a href=${link("models", each.model)}><bdi>${each.model}</bdi></a>`,
    each.canary_share ? `${each.next_model}: ${percent(each.canary_share)}` : each.next_model ? `${each.next_model}: loading` : "–",
    html`<${Age} at=${each.modified} />`,
    chosen && may("develop") && html`<a href=${`${link("deployments", each.deployment)}${chosen}`}>Promote here<span class="visually-hidden">: ${each.deployment}</span></a>`,
  ]);
  const empty = html`<${Empty} text="Nothing is deployed yet. A deployment is a name that applications use while you change the model behind the name." />`;
  return html`
    <${Heading} title="Deployments" />
    <${ErrorBox} error=${error} again=${read} />
    <${Table} caption="Deployments, newest first" columns=${["Name", "State", "Answers now", "Canary", { name: "Changed", kind: "nowrap" }, { name: "Promotion", hidden: true }]} rows=${rows} empty=${empty} />
    <${PageButtons} pages=${pages} next=${data.next} noun="deployments" />
    ${may("develop") && html`<${NewDeployment} chosen=${query.get("model")} />`}
  `;
}

function NewDeployment({ chosen }) {
  const models = useData(deployableModels);
  const { busy, error, run } = useAction(async (event) => {
    const { name, model } = event.target.elements;
    const body = { name: name.value.trim(), model: model.value };
    await call("POST", "/api/v1/deployments", { body });
    toast(`${body.name} is being deployed.`);
    return link("deployments", body.name);
  });
  if (models.data?.length === 0)
    return html`<p class="soft">A deployment needs a trained model. <a href=${link("home")}>Train one from a file or a sample</a>.</p>`;
  return html`
    <section>
      <h2>New deployment</h2>
      <p class="soft">To change the model behind a name that applications use already, open the name above and promote the model.</p>
      <${ErrorBox} error=${models.error} again=${models.read} />
      <form onsubmit=${run}>
        <div class="fields">
          <${Field} id="deployment-name" label="Name" help="Applications send this name as the model: letters, digits, - and _.">
            <input id="deployment-name" name="name" required pattern="([0-9a-zA-Z][_\\-]?)+" title="letters, digits, - and _" maxlength="63" autocomplete="off" spellcheck="false" />
          <//>
          <${Field} id="deployment-model" label="Model">
            <select id="deployment-model" name="model" required>
              ${(models.data ?? []).map((each) => html`<option value=${each.id} selected=${each.id === chosen}>${labelOf(each)}</option>`)}
            </select>
          <//>
        </div>
        <${ErrorBox} error=${error} />
        <div class="actions"><button type="submit" class="primary" disabled=${busy}>Deploy</button></div>
      </form>
    </section>
  `;
}

const isPending = ({ history }) => history.some((each) => ["preparing", "canary"].includes(each.state));

/** One deployment. */
export function Deployment({ params, query }) {
  const path = pathOf("deployments", params.name);
  const { data, error, read } = useData((signal) => call("GET", path, { signal }));
  const watch = useData((signal) => weekHealth(params.name, signal));
  const capture = useData((signal) => call("GET", "/api/v1/capture", { signal }));
  const serving = useData((signal) => data && call("GET", pathOf("models", shortName(data.model_arn)), { signal }), [data?.model_arn]);
  usePolling(SECONDS, read);
  const back = useAction(async () => {
    const pending = isPending(data);
    const text = pending ? `The pending change ends. ${data.model} continues to answer.` : `${data.earlier} answers again, instead of ${data.model}.`;
    if (!(await confirmed({ title: `Roll back ${params.name}?`, text, verb: "Roll back", danger: true }))) return;
    await call("POST", `${path}/rollback`);
    toast(pending ? "The pending change has ended." : "The rollback has begun.");
    await read();
  });
  const removal = useAction(async () => {
    const text = `Requests with the model ${params.name} fail from now on. The model stays. The history of the deployment is deleted.`;
    if (!(await confirmed({ title: "Delete this deployment?", text, verb: "Delete", danger: true, typed: params.name }))) return null;
    await call("DELETE", `/model-customization/custom-model-deployments/${encodeURIComponent(params.name)}`);
    toast(`The deployment ${params.name} was deleted.`);
    return link("deployments");
  });
  if (!data) return html`<${Pending} title="Deployment" error=${error} read=${read} />`;
  const { canary, history } = data;
  return html`
    <p class="soft"><a href=${link("deployments")}>Deployments</a> /</p>
    <${Heading} title=${data.deployment} chips=${html`<${Chip} kind=${STATES[data.status]}>${data.status}<//>`}>
      ${data.status === "Ready" && may("invoke") && html`<a class="button primary" href=${link("playground", data.deployment)}>Playground</a>`}
      <a class="button" href=${link("health", data.deployment)}>Health</a>
      ${may("develop") && (data.earlier || isPending(data)) && html`<button type="button" class="danger" onclick=${back.run}>Roll back</button>`}
      ${may("develop") && data.status !== "Creating" && html`<button type="button" class="danger" id="delete" disabled=${removal.busy} onclick=${removal.run}>Delete</button>`}
    <//>
    <${ErrorBox} error=${error} /><${ErrorBox} error=${back.error} /><${ErrorBox} error=${removal.error} />
    <${Facts} pairs=${[
      ["Answers now", html`<a href=${link("models", data.model)}><bdi>${data.model}</bdi></a>`],
      ["Canary", canary && html`<bdi>${canary.model}</bdi>`],
      ["Share of the canary", canary && percent(canary.share)],
      ...figuresOf(watch.data),
    ]} />
    ${watch.data && html`<p class="soft">${watch.data.summary}</p>`}
    ${watch.error?.status === 404 && html`
      <p class="soft">
        No request of the last 7 days is captured under this name.${" "}
        ${capture.data?.enabled ? "Capture is on." : html`<a href=${link("review")}>Turn on capture in Review</a> to see figures.`}
      </p>
    `}
    ${canary && html`<${Canary} canary=${canary} />`}
    ${serving.data && html`<${Calls} model=${{ ...serving.data, id: data.deployment, deployed: data.model }} storedId=${null} />`}
    ${may("develop") && html`<${Promotion} path=${path} deployment=${data} chosen=${query.get("model")} done=${read} />`}
    <${Schedule} deployment=${data.deployment} isNew />
    <${Section} title="History"><${History} history=${history} /><//>
  `;
}

/** Return requests, latency and errors of the last days as facts. */
function figuresOf(health) {
  if (!health) return [];
  const { requests, measures: { errors, milliseconds, rating }, first } = health.periods.at(-1);
  return [
    [`Requests since ${first}`, number(requests)],
    ["Median latency", milliseconds && duration(milliseconds.value / 1000)],
    ["Errors", errors && percent(errors.value)],
    ["Rating", rating && number(rating.value)],
  ];
}

function Canary({ canary }) {
  const rows = canary.comparisons.map((each) => [words(each.measure), each.canary, each.serving, `${number(each.evidence)} of ${number(each.needed)}`]);
  return html`
    <section>
      <h2>Canary</h2>
      <progress max=${canary.promoted_at} value=${canary.answers} aria-label="Answers of the canary" />
      <p class="soft">${number(canary.answers)} of ${number(canary.promoted_at)} answers until the canary serves all requests.</p>
      <${Table} caption="Canary and serving model" columns=${["Measure", "Canary", "Serving model", { name: "Evidence against the canary", kind: "number" }]}
        rows=${rows} empty="No measure has enough answers yet." />
    </section>
  `;
}

function Promotion({ path, deployment, chosen, done }) {
  const models = useData(deployableModels);
  const share = useSignal("");
  const { busy, error, run } = useAction(async (event) => {
    const name = event.target.elements.model.value;
    const who = share.value ? `${percent(Number(share.value))} of the users get ${name} first.` : `${name} answers all requests, once the server has loaded the model.`;
    if (!(await confirmed({ title: `Promote ${name}?`, text: who, verb: "Promote" }))) return;
    await call("POST", `${path}/promote`, { body: { model: name, ...(share.value && { share: Number(share.value) }) } });
    toast(`${name} is being prepared.`);
    await done();
  });
  const others = (models.data ?? []).filter((each) => each.name !== deployment.model);
  return html`
    <section id="promotion">
      <h2>Promote another model</h2>
      <${ErrorBox} error=${models.error} again=${models.read} />
      ${models.data && !others.length && html`<p class="soft">There is no other model. <a href=${link("new")}>Train a new one</a>.</p>`}
      ${others.length > 0 && html`
        <p class="soft">Scores are on rows of each model's own training. <a href=${link("evaluations")}>Compare the models</a> on the same rows before you decide.</p>
        <form onsubmit=${run}>
          <div class="fields">
            <${Field} id="promoted" label="Model">
              <select id="promoted" name="model">
                ${others.map((each) => html`<option value=${each.name} selected=${each.id === chosen}>${labelOf(each)}</option>`)}
              </select>
            <//>
            <${Field} id="share" label="Share" help="A canary that is worse is rolled back automatically.">
              <select id="share" ...${bound(share)}>${options(SHARES)}</select>
            <//>
          </div>
          <${ErrorBox} error=${error} />
          <div class="actions"><button type="submit" class="primary" disabled=${busy}>Promote</button></div>
        </form>
      `}
    </section>
  `;
}

function History({ history }) {
  const rows = history.toReversed().map((each) => [
    html`<time datetime=${each.requested}>${time(each.requested)}</time>`,
    html`<bdi>${each.model}</bdi>`,
    words(each.action),
    html`<${Chip} kind=${CHANGES[each.state]}>${each.state}<//>`,
    each.user,
    each.note ?? "–",
  ]);
  return html`<${Table} caption="Changes, newest first" columns=${[{ name: "Time", kind: "nowrap" }, "Model", "Action", "State", "User", "Note"]} rows=${rows} />`;
}
