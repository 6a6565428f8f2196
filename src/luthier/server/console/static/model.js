// One model: what it is, whether it learned, what is certified of it, and what can be done with it.

import { ApiError, call, may } from "./api.js";
import { certificateDownload, certificateSections } from "./certificate.js";
import { announce, h, replace } from "./dom.js";
import { exportsSection } from "./exports.js";
import { age, bytes, time } from "./format.js";
import { MADE_FOR, baseLink, loadedModels, statusChip } from "./models.js";
import { errorBox, go, link, pause } from "./router.js";
import { snippets } from "./snippets.js";
import { facts } from "./table.js";

const SECONDS = 10;

/** Draw the page. */
export async function render(root, params, signal) {
  const path = `/api/v1/models/${encodeURIComponent(params.id)}`;
  const model = await call("GET", path, { signal });
  const [certified, { models }, loaded] = await Promise.all([
    readCertificate(path, model, signal),
    call("GET", "/api/v1/models", { signal }),
    model.kind === "custom" ? loadedModels(signal) : null,
  ]);
  const active = model.kind === "custom" && model.status === "Active";
  const certificate = certified?.certificate ?? null;
  const memory = active ? memoryControls(model, path, loaded, signal) : null;
  replace(
    root,
    h(
      "div",
      { class: "heading" },
      h("h1", null, h("bdi", null, model.name)),
      statusChip(model.status),
      h("span", { class: "chip" }, model.kind === "custom" ? "custom model" : "base model"),
      h(
        "div",
        { class: "actions" },
        model.abilities?.does.length && may("invoke")
          ? h("a", { class: "button primary", href: link("playground", model.id) }, "Try it")
          : null,
        (active || model.kind !== "custom") && may("develop")
          ? h("a", { class: "button", href: `${link("new")}?base=${encodeURIComponent(model.id)}` }, "Train from it")
          : null,
        active && may("read") ? certificateDownload(model, signal) : null,
      ),
    ),
    model.failure ? h("p", { class: "box error" }, model.failure) : null,
    facts([
      ["Id", h("code", null, model.id)],
      ["Trained from", model.base ? baseLink(model.base, models) : null],
      ["Made by job", model.job ? h("a", { href: link("jobs", model.job) }, model.job) : null],
      ["Copied from", model.source ? h("code", null, model.source) : null],
      ["Made", model.created ? h("span", { title: time(model.created) }, age(model.created)) : null],
      ["Method", model.abilities?.method],
      ["Made for", model.kind === "custom" ? null : (MADE_FOR[model.base_kind] ?? model.base_kind)],
      ["Answers", abilityText(model.abilities)],
    ]),
    h("p", { class: "soft" }, "ARN ", h("code", null, model.arn)),
    memory?.element,
    certified?.error ? errorBox(certified.error) : null,
    certificate ? certificateSections(certified, models, model.job) : null,
    callingSection(model, certificate?.id ?? (model.kind === "custom" ? null : model.name)),
    active && may("read") ? exportsSection(model, signal) : null,
    model.kind === "custom" && may("develop") ? deletion(model, path, signal) : null,
  );
  // The page stands; what is in memory is kept up to date until it is left.
  if (memory) keepUpToDate();

  async function keepUpToDate() {
    while (await pause(SECONDS, signal)) {
      const now = await loadedModels(signal).catch(() => undefined);
      if (now) memory.update(now[model.id]);
    }
  }
}

/** What it does, in words. */
function abilityText(abilities) {
  if (!abilities) return null;
  const texts = {
    write: "writes text",
    predict: "labels, scores or tags",
    embed: "embeddings",
    make_images: "makes images",
    reconstruct: "gives images back",
  };
  return abilities.does.map((each) => texts[each] ?? each).join(", ") || "nothing yet: it is a start for training";
}

/** The certificate; of a model that has none, or may not be read, `null` or the error to show. */
async function readCertificate(path, model, signal) {
  if (model.kind !== "custom" || model.status !== "Active" || !may("read")) return null;
  try {
    return await call("GET", `${path}/certificate`, { signal });
  } catch (error) {
    if (error instanceof ApiError && error.status !== 401 && error.status !== 0) return { error };
    throw error;
  }
}

function memoryControls(model, path, loaded, signal) {
  const words = h("p");
  const problem = h("div");
  const actions = h("div", { class: "actions" });
  const element = h("section", { class: "box" }, words, actions, problem);
  let busy = false;
  let shown = null;

  const act = (verb, waiting) => async () => {
    busy = true;
    replace(problem);
    for (const button of actions.querySelectorAll("button")) button.disabled = true;
    words.textContent = waiting;
    announce(waiting);
    let state;
    try {
      state = await call("POST", `${path}/${verb}`, { signal });
    } catch (error) {
      if (error.name === "AbortError") return;
      replace(problem, errorBox(error));
    }
    busy = false;
    const again = state ?? (await loadedModels(signal).catch(() => null))?.[model.id];
    draw(again);
    announce(words.textContent);
  };
  const draw = (state) => {
    shown = JSON.stringify(state);
    words.textContent = memoryText(state);
    replace(
      actions,
      !state?.loaded && may("develop")
        ? h("button", { type: "button", onclick: act("load", "It is being loaded…") }, "Load")
        : null,
      state?.loaded && may("develop")
        ? h("button", { type: "button", onclick: act("unload", "It is being unloaded…") }, "Unload")
        : null,
    );
  };
  draw(loaded[model.id]);
  const update = (state) => {
    if (!busy && JSON.stringify(state) !== shown && !actions.contains(document.activeElement)) draw(state);
  };
  return { element, update };
}

function memoryText(state) {
  if (!state?.loaded) {
    return "Not in memory: the first answer waits until it is loaded.";
  }
  const shared = state.base ? ", beside the base whose network it shares" : "";
  const busy = state.requests ? ` It answers ${state.requests} request${state.requests === 1 ? "" : "s"} now.` : "";
  return `Loaded ${age(state.loaded_at)}, ${bytes(state.memory_bytes)}${shared}. It goes when others need the room.${busy}`;
}

function callingSection(model, storedId) {
  const found = snippets({ origin: window.location.origin, model, storedId });
  if (!found.length || !(model.kind !== "custom" || model.status === "Active")) return null;
  return h(
    "section",
    null,
    h("h2", null, "Call it"),
    found.map(({ name, about, code }, index) => {
      const copy = h("button", { type: "button", class: "quiet", "aria-label": `Copy: ${name}` }, "Copy");
      copy.addEventListener("click", async () => {
        try {
          await navigator.clipboard.writeText(code);
          copy.textContent = "Copied";
        } catch {
          // Browsers give the clipboard to pages of https and of this machine alone.
          copy.textContent = "Select it and copy";
        }
        announce(copy.textContent);
        setTimeout(() => {
          copy.textContent = "Copy";
        }, 3000);
      });
      return h(
        "details",
        { class: "rule", open: index === 0 },
        h("summary", null, name),
        h(
          "div",
          { class: "inside" },
          about ? h("p", { class: "soft" }, about) : null,
          h("pre", { class: "row", tabindex: "0" }, h("code", null, code)),
          copy,
        ),
      );
    }),
  );
}

function deletion(model, path, signal) {
  const typed = h("input", { id: "typed-name", autocomplete: "off", spellcheck: "false", oninput: () => check() });
  const button = h("button", { type: "submit", class: "danger", disabled: true }, "Delete for good");
  const problem = h("div");
  const check = () => {
    button.disabled = typed.value.trim() !== model.name;
  };
  const remove = async (event) => {
    event.preventDefault();
    check();
    if (button.disabled) return;
    button.disabled = true;
    replace(problem);
    try {
      await call("DELETE", path, { signal });
      announce(`${model.name} was deleted.`);
      go("models");
    } catch (error) {
      if (error.name !== "AbortError") replace(problem, errorBox(error));
      check();
    }
  };
  return h(
    "section",
    null,
    h("h2", null, "Delete"),
    h(
      "details",
      null,
      h("summary", null, "Delete this model"),
      h(
        "form",
        { class: "narrow", onsubmit: remove },
        h("p", null, "Its files are removed and cannot be had back. The job that made it stays."),
        h(
          "label",
          { for: "typed-name" },
          "Type its name, ",
          h("bdi", null, h("code", null, model.name)),
          ", to confirm",
        ),
        typed,
        problem,
        h("div", { class: "actions" }, button),
      ),
    ),
  );
}
