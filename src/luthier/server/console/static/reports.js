// The list and the page of work that ends with a report: evaluations, comparisons and studies.

import { call, may, pathOf } from "./api.js";
import { learnNames, withNames } from "./files.js";
import { hasEnded } from "./jobs.js";
import {
  Age, Chip, Empty, ErrorBox, Heading, PageButtons, Pending, Said, Table, confirmed, html, link, toast, useAction, useData, usePages, usePolling,
} from "./ui.js";

const SECONDS = 4;
const PAGE = 25;
const STATES = { Completed: "good", Failed: "error", Running: "note" };

const stateChip = ({ state }) => html`<${Chip} kind=${STATES[state]}>${state}<//>`;

/** A list, newest first; `columns` and `cells` precede state, rows and age. The field `rowsField` of the request has the rows. */
export function ReportList({ kind, title, rowsField, columns, cells, empty }) {
  const pages = usePages();
  const position = pages.value.at(-1);
  const { data, error, read } = useData(async (signal) => {
    const found = await call("GET", `/api/v1/${kind}`, { query: { limit: PAGE, position }, signal });
    await learnNames(found.measurements.map((each) => each.request[rowsField]), signal);
    return found;
  }, [position]);
  usePolling(SECONDS, async () => data?.measurements.some((each) => !hasEnded(each.state)) && read());
  if (!data) return html`<${ErrorBox} error=${error} again=${read} />`;
  const rows = data.measurements.map((each) => {
    const [first, ...others] = cells(each);
    return [html`<a href=${link(kind, each.id)}><bdi>${first}</bdi></a>`, ...others, stateChip(each), withNames(each.request[rowsField]), html`<${Age} at=${each.created} />`];
  });
  return html`
    <section>
      <h2>${title}</h2>
      <${ErrorBox} error=${error} again=${read} />
      <${Table} caption=${`${title}, newest first`} columns=${[...columns, "State", "Rows", { name: "Age", kind: "nowrap" }]} rows=${rows}
        empty=${html`<${Empty} text=${empty} />`} />
      <${PageButtons} pages=${pages} next=${data.next} noun=${kind} />
    </section>
  `;
}

/** A page; `title`, `actions` and `renderReport` get the work of the API. `list` has the address and the name of the list. */
export function ReportPage({ kind, id, rowsField, noun, list: [page, name], tab, title, actions, renderReport }) {
  const path = pathOf(kind, id);
  const { data, error, read } = useData(async (signal) => {
    const found = await call("GET", path, { signal });
    await learnNames([found.request[rowsField]], signal);
    return found;
  });
  usePolling(SECONDS, async () => data && !hasEnded(data.state) && read());
  const stop = useAction(() => call("POST", `${path}/stop`).then(read));
  const remove = useAction(async () => {
    if (!(await confirmed({ title: `Delete this ${noun}?`, text: "The models and the rows stay.", verb: "Delete", danger: true }))) return null;
    await call("DELETE", path);
    toast(`The ${noun} was deleted.`);
    return link(page);
  });
  if (!data) return html`<${Pending} title=${name} error=${error} read=${read} />`;
  const { state, progress, failure, report } = data;
  const ended = hasEnded(state);
  return html`
    <p class="soft"><a href=${link(page)}>${name}</a> /</p>
    <${Heading} title=${title(data)} tab=${tab} chips=${stateChip(data)}>
      ${actions(data)}
      ${may("develop") && html`<button type="button" class="danger" onclick=${ended ? remove.run : stop.run}>${ended ? "Delete" : "Stop"}</button>`}
    <//>
    <p class="soft">Rows: ${withNames(data.request[rowsField])}</p>
    <${ErrorBox} error=${error} /><${ErrorBox} error=${stop.error} /><${ErrorBox} error=${remove.error} />
    ${failure && html`<p class="box error" role="alert"><${Said} text=${withNames(failure)} /></p>`}
    ${!ended && html`
      <p class="soft" role="status">${progress?.phase ?? (state === "Queued" ? "Waiting for a worker …" : "Starting …")}</p>
      ${progress?.total && html`<progress max=${progress.total} value=${progress.done} aria-label=${progress.phase} />`}
    `}
    ${report && renderReport(data)}
  `;
}
