// Two jobs side by side: only what differs, and both curves.

import { call, events, pathOf } from "./api.js";
import { LineChart } from "./charts.js";
import { learnNames, withNames } from "./files.js";
import { number, time, words } from "./format.js";
import { certificateOf, modelNames, timeTaken } from "./jobs.js";
import { Empty, ErrorBox, Field, Heading, Pending, Table, html, link, options, useData, useSignal } from "./ui.js";

const CHOICES = 50;

/** A menu that opens the comparison with another job. */
export function CompareWith({ job }) {
  const { data } = useData((signal) => call("GET", "/api/v1/jobs", { query: { limit: CHOICES }, signal }));
  const others = (data?.jobs ?? []).filter((each) => each.name !== job.name);
  if (!others.length) return null;
  const choose = ({ target }) => target.value && (window.location.hash = link("jobs", job.name, "with", target.value));
  return html`
    <div class="narrow">
      <${Field} id="other" label="Compare with another job" help=${data.next && `The newest ${CHOICES} jobs.`}>
        <select id="other" onchange=${choose}>${options([["", "Choose a job …"], ...others.map((each) => [each.name, each.name])])}</select>
      <//>
    </div>
  `;
}

/** The page. */
export function JobDifferences({ params }) {
  const names = [params.name, params.other];
  const all = useSignal(false);
  const { data, error, read } = useData(async (signal) => {
    const [jobs, nameOf] = await Promise.all([Promise.all(names.map((name) => loaded(name, signal))), modelNames(signal)]);
    await learnNames(jobs.flatMap((each) => each.job.details.sources ?? []), signal);
    return { jobs, nameOf };
  });
  if (!data) return html`<${Pending} title="Compare jobs" error=${error} read=${read} />`;
  const [first, second] = data.jobs.map((each) => factsOf(each, data.nameOf));
  const rows = differences(first, second, all.value);
  const lines = data.jobs.map(({ job, losses }) => ({ name: job.name, points: losses, marks: true }));
  return html`
    <p class="soft"><a href=${link("jobs")}>Jobs</a> / <a href=${link("jobs", names[0])}>${names[0]}</a> /</p>
    <${Heading} title=${`${names[0]} and ${names[1]}`} tab="Compare jobs">
      <button type="button" aria-pressed=${String(all.value)} onclick=${() => (all.value = !all.value)}>Show all settings</button>
    <//>
    <${ErrorBox} error=${error} />
    <${Table} caption="Differences of the jobs" columns=${["Value", ...names]}
      rows=${rows.map(([name, ...values]) => [name, ...values.map((each) => html`<bdi>${withNames(each)}</bdi>`)])}
      empty=${html`<${Empty} text="The jobs have equal settings and results." />`} />
    ${lines.some((each) => each.points.length) && html`<${LineChart} title="Validation loss" x="step" series=${lines} />`}
  `;
}

async function loaded(name, signal) {
  const path = pathOf("jobs", name);
  const job = await call("GET", path, { signal });
  const losses = new Map();
  for await (const { kind, data } of events(`${path}/events`, { query: { follow: false }, signal }))
    if (kind === "metrics" && "valid_loss" in data) losses.set(data.step, data.valid_loss);
  const view = job.state === "Completed" ? await certificateOf(job, signal).catch(() => null) : null;
  return { job, losses: [...losses].sort((a, b) => a[0] - b[0]), record: view?.certificate.record ?? {} };
}

/** Return all values of a job by name, the result first. */
function factsOf({ job, record }, nameOf) {
  const kept = record.metrics?.verdict?.kept ?? {};
  const { rows, validation_rows: held, dropped, truncated } = record.data ?? {};
  return {
    State: job.state,
    ...Object.fromEntries(Object.entries(kept).map(([name, value]) => [words(name), number(value, 4)])),
    ...(job.result && { "Training loss": number(job.result.train_loss, 4), Steps: number(job.result.steps) }),
    "Time taken": timeTaken(job), Started: time(job.started), "Base model": nameOf(job.base),
    Data: (job.details.sources ?? []).join(", "), "Rows learned": number(rows), "Rows held out": number(held),
    "Rows left out": number(dropped), "Rows cut": number(truncated),
    ...flattened({ ...job.details.chosen, ...flattened({ ...job.recipe, name: null }) }),
  };
}

/** Return nested settings by dotted name, without values of null. */
export function flattened(settings, prefix = "") {
  const found = {};
  for (const [name, value] of Object.entries(settings ?? {})) {
    if (value !== null && typeof value === "object" && !Array.isArray(value)) Object.assign(found, flattened(value, `${prefix}${name}.`));
    else if (value !== null) found[prefix + name] = typeof value === "string" ? value : JSON.stringify(value);
  }
  return found;
}

/** Return rows `[name, first, second]` of the values that differ; of all values with `all`. */
export function differences(first, second, all = false) {
  const names = [...new Set([...Object.keys(first), ...Object.keys(second)])];
  const rows = names.map((name) => [name, String(first[name] ?? "–"), String(second[name] ?? "–")]);
  return all ? rows : rows.filter(([, a, b]) => a !== b);
}
