// The first page: bring a file, try a sample, talk to a model; below what runs and what is ready.

import { call, may, pathOf } from "./api.js";
import { DataField, EMPTY } from "./data_field.js";
import { age, dateOf, number } from "./format.js";
import { weekHealth } from "./health.js";
import { Progress, StateChip, hasEnded } from "./jobs.js";
import { nameOf, writes } from "./models.js";
import { ErrorBox, Heading, Section, Table, html, link, useAction, useData, usePolling, useSignal } from "./ui.js";

const SECONDS = 5;
const RECENT = 5;
const WEEK = 7 * 86_400_000;
/** Samples that are shown without a click. */
const SAMPLES = 4;
/** Newest models of the account among which text generators are shown. */
const MODELS = 50;

/** The page. */
export function Home() {
  const jobs = useData(async (signal) => (await call("GET", "/api/v1/jobs", { query: { limit: RECENT }, signal })).jobs);
  usePolling(SECONDS, () => jobs.read());
  const files = useSignal(EMPTY);
  const bring = () => files.value.address && (window.location.hash = formFor(files.value.address));
  return html`
    <${Heading} title="What would you like to do?" tab="Home" />
    <div class="cards">
      ${may("develop") && html`
        <section class="box">
          <h2>Bring a file</h2>
          <p>Your rows are checked first. You start the training on the next page.</p>
          <${DataField} id="rows" label="Training rows" field=${files} onchange=${bring}
            help="JSON Lines, CSV, Parquet or text: labelled texts, questions with answers, conversations." />
        </section>
        <${Samples} />
      `}
      <${Talk} />
    </div>
    <${Waiting} />
    <${Recent} ...${jobs} />
    <${Deployed} />
  `;
}

/** What waits for a person. */
function Waiting() {
  const { data } = useData((signal) => (may("review") ? call("GET", "/api/v1/review", { query: { limit: 0 }, signal }) : null));
  const alerts = useData((signal) => call("GET", "/api/v1/alerts", { query: { limit: RECENT }, signal }));
  const news = (alerts.data?.alerts ?? []).filter((each) => Date.now() - dateOf(each.created) < WEEK);
  return html`
    <${Section} title="Waiting for you">
      ${data?.waiting > 0 && html`<p><a href=${link("review")}>${number(data.waiting)} answers to rate</a></p>`}
      ${news.map((each) => html`<p><a href=${link("health", each.subject)}><bdi>${each.subject}</bdi></a>: ${each.text}</p>`)}
    <//>
  `;
}

/** Newest deployments with the figures of the last week. */
function Deployed() {
  const { data } = useData(async (signal) => (await call("GET", "/api/v1/deployments", { query: { limit: RECENT }, signal })).deployments);
  const rows = (data ?? []).map(({ deployment, status, model }) => [
    html`<a href=${link("deployments", deployment)}><bdi>${deployment}</bdi></a>`, status, html`<bdi>${model}</bdi>`, html`<${Week} deployment=${deployment} />`,
  ]);
  return html`
    <${Section} title="Deployed">
      ${rows.length > 0 && html`<${Table} caption="Deployments" columns=${["Name", "State", "Answers now", { name: "Last 7 days", kind: "wide" }]} rows=${rows} />`}
    <//>
  `;
}

/** The figures of the last week in a sentence; deployments without captured requests have no figures. */
function Week({ deployment }) {
  const { data } = useData((signal) => weekHealth(deployment, signal));
  return data ? html`<a href=${link("health", deployment)}>${data.summary}</a>` : "–";
}

function Samples() {
  const { data, error, read } = useData(async (signal) => (await call("GET", "/api/v1/examples", { signal })).examples);
  const { busy, error: failed, run } = useAction(async (name) => {
    const { files } = await call("POST", pathOf("examples", name));
    return formFor(files["train.jsonl"]);
  });
  const list = (samples) => html`
    <ul class="samples">
      ${samples.map((each) => html`
        <li>
          <button type="button" disabled=${busy} onclick=${() => run(each.name)}>${each.title}</button>
          <small class="soft block">${each.measure}: ${each.result}. ${each.credit}</small>
        </li>
      `)}
    </ul>
  `;
  return html`
    <section class="box">
      <h2>Try a sample</h2>
      <p>Public rows with a measured result. The button stores the rows in your account.</p>
      <${ErrorBox} error=${error ?? failed} again=${error && read} />
      ${list((data ?? []).slice(0, SAMPLES))}
      ${data?.length > SAMPLES && html`<details><summary>${data.length - SAMPLES} more samples</summary>${list(data.slice(SAMPLES))}</details>`}
    </section>
  `;
}

function Talk() {
  const { data, error, read } = useData(async (signal) => (await call("GET", "/api/v1/models", { query: { limit: MODELS }, signal })).models);
  const isCustom = (each) => each.kind === "custom";
  const writers = (data ?? []).filter((each) => writes(each) && /^active$/i.test(each.status)).sort((a, b) => isCustom(b) - isCustom(a));
  return html`
    <section class="box">
      <h2>Talk to a model</h2>
      <p>Models that generate text, your own first. A base model knows nothing about your work yet.</p>
      <${ErrorBox} error=${error} again=${read} />
      <ul class="samples">
        ${writers.slice(0, RECENT).map((each) => html`<li><a href=${link("playground", each.id)}>${nameOf(each)}</a></li>`)}
      </ul>
      ${data && !writers.length && html`<p class="soft">No model generates text yet.</p>`}
    </section>
  `;
}

function Recent({ data, error, read }) {
  if (!data) return html`<${ErrorBox} error=${error} again=${read} />`;
  const rows = data.map((job) => [
    html`<a href=${link("jobs", job.name)}>${job.name}</a>`,
    html`<${StateChip} state=${job.state} />`,
    hasEnded(job.state) ? age(job.created) : html`<${Progress} job=${job} />`,
  ]);
  return html`
    <${Section} title="Recent jobs">
      ${rows.length > 0 && html`<${Table} caption="Recent jobs" columns=${["Name", "State", { name: "Progress or age", kind: "wide" }]} rows=${rows} />`}
    <//>
  `;
}

/** Return the address of the form for a new job with these rows. */
const formFor = (rows) => `${link("new")}?rows=${encodeURIComponent(rows)}`;
