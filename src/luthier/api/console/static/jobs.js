// The jobs of the account, the newest first.

import { call } from "./api.js";
import { announce, h, replace } from "./dom.js";
import { age, time } from "./format.js";
import { STATES, customizationOf, hasEnded, modelNames, progressOf, stateChip } from "./job_states.js";
import { errorBox, go, link, pause } from "./router.js";
import { table } from "./table.js";

const PAGE = 25;
const BUSY_SECONDS = 4;
const CALM_SECONDS = 20;

/** Draw the list, and keep it up to date. */
export async function render(root, params, signal) {
  const wanted = STATES.includes(params.query.get("state")) ? params.query.get("state") : null;
  // Positions of the pages before this one, to go back to.
  const before = [];
  let position = null;
  const filter = h(
    "select",
    {
      id: "state",
      value: wanted ?? "",
      onchange: () => {
        window.location.hash = filter.value ? `${link("jobs")}?state=${filter.value}` : link("jobs");
      },
    },
    h("option", { value: "" }, "All states"),
    STATES.map((state) => h("option", { value: state }, state)),
  );
  const list = h("div", { "aria-busy": "true" }, h("p", { class: "soft" }, "Loading …"));
  const problem = h("div");
  const older = h("button", { type: "button", hidden: true }, "Older");
  const newer = h("button", { type: "button", hidden: true }, "Newer");
  replace(
    root,
    h(
      "div",
      { class: "heading" },
      h("h1", null, "Jobs"),
      h(
        "div",
        { class: "actions" },
        h("label", { for: "state", class: "visually-hidden" }, "State"),
        filter,
        h("a", { class: "button primary", href: link("new") }, "New job"),
      ),
    ),
    problem,
    list,
    h("div", { class: "actions pages" }, newer, older),
  );

  let shown = "";
  let following = null;
  const load = async () => {
    const query = { limit: PAGE, state: wanted, position };
    const at = position;
    const found = await call("GET", "/api/v1/jobs", { query, signal });
    if (at !== position) return found.jobs;
    following = found.next ?? null;
    older.hidden = following === null;
    newer.hidden = before.length === 0;
    const now = JSON.stringify(found);
    // Ages change even where nothing else does; a table that is drawn anew keeps the focus.
    if (now !== shown || found.jobs.length) draw(list, found.jobs, wanted, nameOf);
    shown = now;
    list.removeAttribute("aria-busy");
    return found.jobs;
  };
  const turn = async (to) => {
    position = to;
    try {
      await load();
      replace(problem);
      window.scrollTo(0, 0);
      announce(before.length ? "Older jobs" : "The newest jobs");
    } catch (error) {
      if (error.name !== "AbortError")
        replace(
          problem,
          errorBox(error, () => turn(to)),
        );
    }
  };
  older.addEventListener("click", () => {
    before.push(position);
    turn(following);
  });
  newer.addEventListener("click", () => turn(before.pop() ?? null));

  const nameOf = await modelNames(signal);
  let jobs = await load();
  // The page stands; what follows keeps it up to date until it is left.
  keepUpToDate();

  async function keepUpToDate() {
    while (await pause(jobs.every((job) => hasEnded(job.state)) ? CALM_SECONDS : BUSY_SECONDS, signal)) {
      try {
        jobs = await load();
        replace(problem);
      } catch (error) {
        if (error.name === "AbortError") return;
        replace(problem, errorBox(error));
      }
    }
  }
}

function draw(list, jobs, wanted, nameOf) {
  const focused = list.contains(document.activeElement) ? document.activeElement.getAttribute("href") : null;
  const scrolled = list.querySelector(".scroll")?.scrollLeft ?? 0;
  const empty = wanted
    ? `No job is ${wanted.toLowerCase()}.`
    : [
        "There are no jobs yet. ",
        h("button", { type: "button", class: "quiet", onclick: () => go("new") }, "Train the first model"),
      ];
  replace(
    list,
    table({
      caption: "Jobs, the newest first",
      columns: [
        "Name",
        "State",
        "Base model",
        "Model",
        "Kind",
        { name: "Progress", kind: "wide" },
        { name: "Created", kind: "nowrap" },
      ],
      rows: jobs.map((job) => [
        h("a", { href: link("jobs", job.name) }, job.name),
        stateChip(job.state),
        nameOf(job.base),
        job.state === "Completed" ? h("a", { href: link("models", job.model_name) }, job.model_name) : job.model_name,
        customizationOf(job),
        progressOf(job) ?? h("span", { class: "soft" }, "–"),
        h("time", { datetime: job.created, title: time(job.created) }, age(job.created)),
      ]),
      empty,
    }),
  );
  const scroll = list.querySelector(".scroll");
  if (scroll) scroll.scrollLeft = scrolled;
  if (focused) {
    for (const each of list.querySelectorAll("a")) if (each.getAttribute("href") === focused) each.focus();
  }
}
