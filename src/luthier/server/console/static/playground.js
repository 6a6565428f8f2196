// Trying a model: which form is shown follows from what the server says that the model does.

import { call } from "./api.js";
import { h, replace } from "./dom.js";
import { statusChip } from "./models.js";
import { errorBox, link } from "./router.js";

const TABS = {
  write: ["Chat", () => import("./chat.js"), "render"],
  predict: ["Ask it", () => import("./predictions.js"), "renderPrediction"],
  embed: ["Compare", () => import("./predictions.js"), "renderSimilarity"],
  make_images: ["Make images", () => import("./images.js"), "renderSamples"],
  reconstruct: ["Give images back", () => import("./images.js"), "renderReconstruction"],
};

/** Draw the page. */
export async function render(root, params, signal) {
  const model = await call("GET", `/api/v1/models/${encodeURIComponent(params.id)}`, { signal });
  const does = (model.abilities?.does ?? []).filter((each) => each in TABS);
  const heading = h(
    "div",
    { class: "heading" },
    h("h1", null, h("bdi", null, model.name)),
    model.kind === "custom" ? statusChip(model.status) : h("span", { class: "chip" }, "base model"),
    h("div", { class: "actions" }, h("a", { class: "button", href: link("models", model.id) }, "About this model")),
  );
  if (!does.length) {
    replace(root, heading, h("p", { class: "box note" }, reasonFor(model)));
    return;
  }
  const place = h("div", { id: "try" });
  const tabs = does.map((each) =>
    h("button", { type: "button", "aria-pressed": "false", onclick: () => choose(each).catch(fail) }, TABS[each][0]),
  );
  const fail = (error) => {
    if (error.name !== "AbortError") replace(place, errorBox(error));
  };
  let leave = null;
  const choose = async (chosen) => {
    // What the form before still waits for ends with it.
    leave?.abort();
    const own = new AbortController();
    leave = own;
    signal.addEventListener("abort", () => own.abort(), { once: true, signal: own.signal });
    tabs.forEach((button, index) => button.setAttribute("aria-pressed", String(does[index] === chosen)));
    const [, load, name] = TABS[chosen];
    const module = await load();
    if (own.signal.aborted) return;
    const page = h("div");
    replace(place, page);
    await module[name](page, model, own.signal);
  };
  replace(
    root,
    heading,
    does.length > 1 ? h("div", { class: "actions tabs", role: "group", "aria-label": "What to try" }, tabs) : null,
    place,
  );
  await choose(does[0]);
}

function reasonFor(model) {
  if (model.kind === "custom" && model.status !== "Active") {
    const why = model.failure ? `: ${model.failure}` : ".";
    return `The model is ${model.status.toLowerCase()} and cannot be asked${why}`;
  }
  if (!model.abilities) {
    return (
      "What this model answers cannot be told: its files are not on this server, or the package that trained it " +
      "is not installed."
    );
  }
  const { method } = model.abilities;
  return `A model of the method ${method} answers nothing by itself. Train it further, for labels, tags or embeddings.`;
}
