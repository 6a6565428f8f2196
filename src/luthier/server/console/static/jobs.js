// The jobs of the account, the newest first.

import { call, may } from "./api.js";
import { announce, h, replace, replaceKeepingFocus } from "./dom.js";
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
  // What is shown: jobs of a state from a position on, and the positions of the pages before it, to go back to.
  let place = { state: wanted, position: null, before: [] };
  // What was asked for last, which is shown once it has come.
  let going = place;
  const filter = h(
    "select",
    {
      id: "state",
      value: wanted ?? "",
      onchange: () => {
        // Only the list is drawn anew: who is at the filter stays there.
        history.pushState(null, "", filter.value ? `${link("jobs")}?state=${filter.value}` : link("jobs"));
        turn({ state: filter.value || null, position: null, before: [] });
      },
    },
    h("option", { value: "" }, "All states"),
    STATES.map((state) => h("option", { value: state }, state)),
  );
  const list = h("div", { "aria-busy": "true" }, h("p", { class: "soft" }, "Loading …"));
  // What polling failed at goes when it works again; that a page could not be turned, when one is.
  const problem = h("div");
  const refusal = h("div");
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
        may("develop") ? h("a", { class: "button primary", href: link("new") }, "New job") : null,
      ),
    ),
    refusal,
    problem,
    list,
    h("div", { class: "actions pages" }, newer, older),
  );

  let shown = "";
  let following = null;
  let jobs = [];
  const naming = modelNames(signal);
  const load = async (to) => {
    const query = { limit: PAGE, state: to.state, position: to.position };
    const [found, nameOf] = await Promise.all([call("GET", "/api/v1/jobs", { query, signal }), naming]);
    // Somebody has turned to another page meanwhile.
    if (to !== going) return;
    place = to;
    jobs = found.jobs;
    following = found.next ?? null;
    older.hidden = following === null;
    newer.hidden = place.before.length === 0;
    const now = JSON.stringify([to.state, found]);
    // What has not changed is left alone but for its ages, with what somebody has marked in it.
    if (now !== shown) draw(list, jobs, place.state, nameOf);
    else for (const each of list.querySelectorAll("time")) each.textContent = age(each.getAttribute("datetime"));
    shown = now;
    list.removeAttribute("aria-busy");
  };
  const turn = async (to) => {
    const pressed = document.activeElement;
    going = to;
    try {
      await load(to);
      if (to !== going) return;
      replace(refusal);
      window.scrollTo(0, 0);
      // At either end, the button that led there is gone.
      if (pressed === older && older.hidden) newer.focus();
      if (pressed === newer && newer.hidden) older.focus();
      announce(
        to.before.length ? "Older jobs" : to.state ? `Jobs that are ${to.state.toLowerCase()}` : "The newest jobs",
      );
    } catch (error) {
      if (error.name === "AbortError" || to !== going) return;
      going = place;
      replace(
        refusal,
        errorBox(error, () => turn(to)),
      );
    }
  };
  older.addEventListener("click", () =>
    turn({ ...place, position: following, before: [...place.before, place.position] }),
  );
  newer.addEventListener("click", () =>
    turn({ ...place, position: place.before.at(-1) ?? null, before: place.before.slice(0, -1) }),
  );

  await load(going);
  // The page stands; what follows keeps it up to date until it is left.
  keepUpToDate();

  async function keepUpToDate() {
    while (await pause(jobs.every((job) => hasEnded(job.state)) ? CALM_SECONDS : BUSY_SECONDS, signal)) {
      try {
        await load(going);
        replace(problem);
      } catch (error) {
        if (error.name === "AbortError") return;
        replace(problem, errorBox(error));
      }
    }
  }
}

function draw(list, jobs, wanted, nameOf) {
  const empty = wanted
    ? `No job is ${wanted.toLowerCase()}.`
    : [
        "There are no jobs yet. ",
        may("develop")
          ? h("button", { type: "button", class: "quiet", onclick: () => go("new") }, "Train the first model")
          : null,
      ];
  replaceKeepingFocus(
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
        [
          h("a", { href: link("jobs", job.name) }, job.name),
          job.suffix ? h("span", { class: "soft" }, ` ${job.suffix}`) : null,
        ],
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
}
