// Scheduled evaluations of a deployment: the series of results, and a form.

import { call, may, pathOf } from "./api.js";
import { DataField, EMPTY } from "./data_field.js";
import { learnNames, withNames } from "./files.js";
import { scoreText, time, words } from "./format.js";
import { hasEnded } from "./jobs.js";
import {
  Chip, ErrorBox, Field, Section, Table, confirmed, html, link, options, toast, useAction, useData, usePolling, useSignal,
} from "./ui.js";

const SECONDS = 5;
const PERIODS = [["day", "each day"], ["week", "each week"]];

/** The schedule of a deployment; without a schedule, a form if `isNew` is true. */
export function Schedule({ deployment, isNew }) {
  const path = `${pathOf("deployments", deployment)}/schedule`;
  const rows = useSignal(EMPTY);
  const { data, error, read } = useData(async (signal) => {
    const schedule = await call("GET", path, { signal }).catch((failure) => (failure.status === 404 ? null : Promise.reject(failure)));
    if (schedule) await learnNames([schedule.request.rows], signal);
    return { schedule };
  });
  const schedule = data?.schedule;
  usePolling(SECONDS, async () => schedule && !hasEnded(schedule.results.at(-1)?.state) && read());
  const start = useAction(async (event) => {
    await call("PUT", path, { body: { every: event.target.elements.every.value, rows: rows.value.address } });
    rows.value = EMPTY;
    toast("The schedule is stored. The first evaluation starts now.");
    await read();
  });
  const end = useAction(async () => {
    if (!(await confirmed({ title: "End the scheduled evaluations?", text: "The reports stay.", verb: "End", danger: true }))) return;
    await call("DELETE", path);
    toast("The scheduled evaluations have ended.");
    await read();
  });
  const offered = data && !schedule && isNew && may("develop");
  if (!error && !schedule && !offered) return null;
  return html`
    <${Section} title=${schedule ? `Evaluations each ${schedule.every}` : "Scheduled evaluations"}>
      <${ErrorBox} error=${error} again=${read} />
      ${schedule && html`
        <p class="soft">Rows: ${withNames(schedule.request.rows)}. ${schedule.skipped ?? `Next: ${time(schedule.next_run)}.`}</p>
        <${Results} results=${schedule.results} />
        <${ErrorBox} error=${end.error} />
        ${may("develop") && html`<div class="actions"><button type="button" class="danger" id="end-schedule" onclick=${end.run}>End the schedule</button></div>`}
      `}
      ${offered && html`
        <p class="soft">The model behind this name is evaluated on the same rows again and again. A significant fall is an alert.</p>
        <details class="rule" id="new-schedule">
          <summary>Evaluate regularly</summary>
          <form class="inside" onsubmit=${start.run}>
            <${Field} id="every" label="Evaluate"><select id="every" name="every">${options(PERIODS)}</select><//>
            <${DataField} id="scheduled" label="Held-out rows" field=${rows}
              help="Rows that the model has not learned, in the form of the training rows." />
            <${ErrorBox} error=${start.error} />
            <div class="actions"><button type="submit" class="primary" disabled=${start.busy || !rows.value.address}>Start the schedule</button></div>
          </form>
        </details>
      `}
    <//>
  `;
}

function Results({ results }) {
  return html`
    <${Table} caption="Scheduled evaluations, newest first" columns=${["Time", "Model", { name: "Score", kind: "number" }, "Change"]}
      rows=${results.toReversed().map((each) => [
        html`<a href=${link("evaluations", each.evaluation)}>${time(each.created)}</a>`, each.model,
        each.measure ? `${words(each.measure)} ${scoreText(each.measure, each.score)}` : each.failure ?? each.state,
        each.change?.is_fall && each.change.significant ? html`<${Chip} kind="warning">significant fall<//>` : "–",
      ])} empty="The first evaluation starts soon." />
  `;
}
