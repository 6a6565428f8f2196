// All models: the account's own, then the base models that jobs start from.

import { call, may } from "./api.js";
import { h, replace } from "./dom.js";
import { age, bytes, shortName, time } from "./format.js";
import { errorBox, link, pause } from "./router.js";
import { hiddenName, table } from "./table.js";

const SECONDS = 15;
/** How many models a list may have to be asked for again each time; one twice as long is asked for half as often. */
const EACH_TIME = 200;
/** Rounds between two questions for the longest lists: they wait five minutes. */
const MOST_ROUNDS = 20;
/** Rows of a table: an account may have ten thousand models. */
const MOST_ROWS = 200;
const STATUS = { Active: "good", ACTIVE: "good", Creating: "note", Failed: "error" };

/** Draw the page. */
export async function render(root, params, signal) {
  const { models: found } = await call("GET", "/api/v1/models", { signal });
  let state = { models: found, loaded: await loadedModels(signal) };
  let shown = JSON.stringify(state);
  const filter = h("input", {
    type: "search",
    id: "filter",
    placeholder: "name, id, base or status",
    autocomplete: "off",
    oninput: () => draw(),
  });
  const problem = h("div");
  const lists = h("div");
  replace(
    root,
    h(
      "div",
      { class: "heading" },
      h("h1", null, "Models"),
      may("develop")
        ? h("div", { class: "actions" }, h("a", { class: "button primary", href: "#/new" }, "New job"))
        : null,
    ),
    h("div", { class: "narrow" }, h("label", { for: "filter" }, "Filter"), filter),
    problem,
    lists,
  );
  const draw = () => {
    const wanted = filter.value.trim().toLowerCase();
    const kept = state.models.filter((model) => textOf(model).includes(wanted));
    const custom = kept.filter((model) => model.kind === "custom").reverse();
    const base = kept.filter((model) => model.kind !== "custom");
    const none = wanted ? "No model has this in its name, id, base or status." : null;
    replace(
      lists,
      h("h2", null, "Custom models"),
      customTable(custom, state, none),
      h("h2", null, "Base models"),
      baseTable(base, none),
    );
  };
  draw();
  // The page stands; what follows keeps it up to date until it is left.
  keepUpToDate();

  async function keepUpToDate() {
    for (let round = 1; await pause(SECONDS, signal); round += 1) {
      try {
        const due = round % roundsBetween(state.models.length) === 0;
        const [models, memory] = await Promise.all([
          due ? call("GET", "/api/v1/models", { signal }).then((next) => next.models) : state.models,
          loadedModels(signal),
        ]);
        replace(problem);
        state = { models, loaded: memory };
        // A table that is drawn anew takes the focus from who walks through its links: it waits for them.
        if (lists.contains(document.activeElement)) continue;
        const now = JSON.stringify(state);
        if (now !== shown) draw();
        shown = now;
      } catch (error) {
        if (error.name === "AbortError") return;
        replace(problem, errorBox(error));
      }
    }
  }
}

/**
 * After how many rounds a list is asked for again: thousands of models are a long answer.
 * @param {number} models
 * @returns {number}
 */
export function roundsBetween(models) {
  return Math.min(MOST_ROUNDS, Math.max(1, Math.ceil(models / EACH_TIME)));
}

/**
 * Whether a model of the list answers chats: a classifier that was tuned on a network that writes does not.
 * @param {Object} model
 * @returns {boolean}
 */
export function writes(model) {
  return model.writes === true;
}

/**
 * The account's models in memory, by id.
 * @param {AbortSignal} signal
 * @returns {Promise<Object>}
 */
export async function loadedModels(signal) {
  const { models } = await call("GET", "/api/v1/loaded-models", { signal });
  return Object.fromEntries(models.map((each) => [each.id, each]));
}

/** Where a model stands, as a coloured word. */
export function statusChip(status) {
  const shown = status === "ACTIVE" ? "Active" : status;
  return h("span", { class: `chip ${STATUS[status] ?? ""}` }, shown);
}

/** The end of an ARN as people know it, with a link to its model. */
export function baseLink(arn, models = []) {
  if (!arn) return "–";
  const id = shortName(arn);
  const known = models.find((each) => each.arn === arn);
  return h("a", { href: link("models", id) }, h("bdi", null, known?.name ?? id));
}

function textOf(model) {
  return [model.name, model.id, model.status, model.base ?? "", model.job ?? "", model.base_kind]
    .join(" ")
    .toLowerCase();
}

function customTable(models, { models: all, loaded }, none) {
  const rows = models
    .slice(0, MOST_ROWS)
    .map((model) => [
      h("a", { href: link("models", model.id) }, h("bdi", null, model.name)),
      statusChip(model.status),
      baseLink(model.base, all),
      model.job ? h("a", { href: link("jobs", model.job) }, model.job) : model.source ? "from outside" : "–",
      h("span", { title: time(model.created) }, age(model.created)),
      memoryOf(loaded[model.id]),
      model.status === "Active" && may("invoke")
        ? h("a", { href: link("playground", model.id), "aria-label": `Try ${model.name}` }, "Try")
        : null,
    ]);
  return [
    table({
      caption: "Custom models, the newest first",
      columns: [
        "Name",
        "Status",
        "Base",
        "Made by",
        { name: "Age", kind: "nowrap" },
        { name: "In memory", kind: "nowrap" },
        hiddenName("Try it"),
      ],
      rows,
      empty: none ?? [
        "This account has no custom models yet. ",
        may("develop") ? h("a", { href: "#/new" }, "Train one") : null,
      ],
    }),
    cutText(models, "newest"),
  ];
}

function baseTable(models, none) {
  return [
    table({
      caption: "Base models",
      columns: ["Name", "Id", "Made for", hiddenName("Try it")],
      rows: models
        .slice(0, MOST_ROWS)
        .map((model) => [
          h("a", { href: link("models", model.id) }, h("bdi", null, model.name)),
          h("code", null, model.id),
          MADE_FOR[model.base_kind] ?? model.base_kind,
          may("invoke") ? h("a", { href: link("playground", model.id), "aria-label": `Try ${model.name}` }, "Try") : null,
        ]),
      empty: none ?? "The server offers no base models.",
    }),
    cutText(models, "first"),
  ];
}

function cutText(models, which) {
  return models.length > MOST_ROWS
    ? h("p", { class: "soft" }, `The ${which} ${MOST_ROWS} of ${models.length} are shown. Filter to find others.`)
    : null;
}

/** Kinds of base models (luthier/models/base_kinds.py) in words. */
export const MADE_FOR = {
  causal_lm: "writing text",
  masked_lm: "reading texts (masked language model)",
  encoder: "reading texts",
  image_encoder: "reading images",
  audio_encoder: "reading sounds",
  image_text_encoder: "comparing images and texts",
  autoencoding: "compressing, and finding what is unusual",
  adversarial: "making images",
  denoising: "making images",
  image_to_text: "writing about images",
};

function memoryOf(loaded) {
  if (!loaded?.loaded) return "no";
  const answers = loaded.requests ? `, answers ${loaded.requests}` : "";
  return `${bytes(loaded.memory_bytes)}${answers}`;
}
