// Models that make images, and those that give images back.

import { call } from "./api.js";
import { asking, base64Of } from "./asking.js";
import { h } from "./dom.js";
import { number } from "./format.js";

/** Draw the form of a model that makes images. */
export async function renderSamples(root, model, signal) {
  const { labels, reads_prompts: prompts, method } = model.abilities;
  const count = h("input", { id: "count", type: "number", min: "1", max: "64", step: "1", value: "8" });
  const seed = h("input", { id: "seed", type: "number", min: "0", step: "1", placeholder: "drawn" });
  const label = labels.length
    ? h(
        "select",
        { id: "label" },
        h("option", { value: "" }, "each in turn"),
        labels.map((each) => h("option", { value: each }, each)),
      )
    : null;
  const prompt = prompts ? h("input", { id: "prompt", dir: "auto", autocomplete: "off" }) : null;
  const steps =
    method === "diffusion"
      ? h("input", { id: "steps", type: "number", min: "1", max: "10000", step: "1", placeholder: "as it was stored" })
      : null;
  const field = (id, text, input) => (input ? h("div", null, h("label", { for: id }, text), input) : null);
  const fields = h(
    "div",
    { class: "fields" },
    field("prompt", "What the images show", prompt),
    field("label", "Class", label),
    field("count", "How many", count),
    field("steps", "Steps from noise", steps),
    field("seed", "Seed", seed),
  );
  asking(root, fields, "Make images", signal, async () => {
    const body = { count: count.valueAsNumber };
    if (seed.value !== "") body.seed = seed.valueAsNumber;
    if (label?.value) body.label = label.value;
    if (prompt?.value.trim()) body.prompt = prompt.value;
    if (steps?.value) body.steps = steps.valueAsNumber;
    const made = await call("POST", `/api/v1/models/${encodeURIComponent(model.id)}/images`, { body, signal });
    return h(
      "section",
      null,
      h("h2", null, "Images"),
      h(
        "div",
        { class: "pictures" },
        made.images.map((each, index) => picture(each.png, each.label ?? prompt?.value ?? "", index)),
      ),
      h(
        "p",
        { class: "soft" },
        `${number(made.width)} × ${number(made.height)} pixels. Seed ${made.seed} gives the same images again.`,
      ),
    );
  });
}

/** Draw the form of an autoencoder. */
export async function renderReconstruction(root, model, signal) {
  const file = h("input", { id: "image", type: "file", accept: "image/*" });
  asking(
    root,
    h("div", { class: "drop" }, h("label", { for: "image" }, "Image"), file),
    "Give it back",
    signal,
    async () => {
      const body = { images: [await base64Of(file.files[0], "image")] };
      const found = await call("POST", `/api/v1/models/${encodeURIComponent(model.id)}/reconstructions`, {
        body,
        signal,
      });
      const address = URL.createObjectURL(file.files[0]);
      const free = () => URL.revokeObjectURL(address);
      return h(
        "section",
        null,
        h("h2", null, "Before and after"),
        h(
          "div",
          { class: "pictures" },
          h(
            "figure",
            null,
            h("img", { src: address, alt: "The image that was sent", onload: free, onerror: free }),
            h("figcaption", null, "sent"),
          ),
          found.images.map((each, index) => picture(each.png, `error ${number(each.error)}`, index)),
        ),
        h("p", { class: "soft" }, `It keeps one number for ${number(found.compression_ratio)} of the image.`),
      );
    },
  );
}

function picture(png, caption, index) {
  return h(
    "figure",
    null,
    h("img", { src: `data:image/png;base64,${png}`, alt: `Image ${index + 1}${caption ? `: ${caption}` : ""}` }),
    caption ? h("figcaption", null, h("bdi", null, caption)) : null,
  );
}
