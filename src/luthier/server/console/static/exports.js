// Exports of one model: what was written for other software, and a form to have more written.

import { call, may } from "./api.js";
import { h, replace } from "./dom.js";
import { age, bytes, number, percent, time } from "./format.js";
import { hasEnded } from "./job_states.js";
import { errorBox, pause } from "./router.js";
import { hiddenName, table } from "./table.js";

const FORMATS = [
  ["safetensors", "safetensors: transformers, PEFT, diffusers"],
  ["gguf", "GGUF: llama.cpp"],
  ["onnx", "ONNX: ONNX Runtime"],
];
const TYPES = ["f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0"];
const STATES = { Completed: "good", Failed: "error", Stopped: "warning" };
const SECONDS = 4;

/**
 * The section about exports; it asks the server again while one goes on.
 * @param {Object} model an active custom model
 * @param {AbortSignal} signal
 * @returns {HTMLElement}
 */
export function exportsSection(model, signal) {
  const list = h("div");
  const problem = h("div");
  let following = false;
  let again = false;

  const follow = async () => {
    // An answer that is under way may be older than what there is now.
    again = true;
    if (following) return;
    following = true;
    try {
      do {
        again = false;
        const { exports } = await call("GET", "/api/v1/exports", { query: { model: model.arn }, signal });
        draw(list, exportsTable(exports, stop));
        if (!again && exports.every((each) => hasEnded(each.state))) break;
      } while (again || (await pause(SECONDS, signal)));
    } catch (error) {
      if (error.name !== "AbortError")
        replace(
          problem,
          errorBox(error, () => {
            replace(problem);
            follow();
          }),
        );
    } finally {
      following = false;
    }
  };
  const stop = async (id) => {
    try {
      await call("POST", `/api/v1/exports/${encodeURIComponent(id)}/stop`, { signal });
    } catch (error) {
      if (error.name !== "AbortError") replace(problem, errorBox(error));
    }
    await follow();
  };
  follow();
  return h("section", null, h("h2", null, "Exports"), problem, list, may("develop") ? exportForm(model, signal, follow) : null);
}

/** Draw the table anew; the focus stays at the button of its export, or in the table where that has none now. */
function draw(list, made) {
  const focused = list.contains(document.activeElement) ? document.activeElement : null;
  const scrolled = list.querySelector(".scroll")?.scrollLeft ?? 0;
  const id = focused?.getAttribute("data-export");
  replace(list, made);
  const scroll = list.querySelector(".scroll");
  if (scroll) scroll.scrollLeft = scrolled;
  if (!focused) return;
  const same = [...list.querySelectorAll("[data-export]")].find((each) => each.getAttribute("data-export") === id);
  (same ?? scroll)?.focus({ preventScroll: true });
}

function exportsTable(found, stop) {
  return table({
    caption: "Exports of this model, the newest first",
    columns: ["Format", "State", "To", "Age", hiddenName("Stop")],
    rows: found.map((each) => [
      formText(each),
      [
        h("span", { class: `chip ${STATES[each.state] ?? "note"}` }, each.state),
        progressOf(each),
        each.failure ? h("p", { class: "error" }, each.failure) : null,
        comparedText(each.result),
      ],
      addressOf(each),
      h("span", { title: time(each.created) }, age(each.created)),
      hasEnded(each.state) || !may("develop")
        ? null
        : h(
            "button",
            {
              type: "button",
              "data-export": each.id,
              "aria-label": `Stop the export as ${each.format}`,
              onclick: () => stop(each.id),
            },
            "Stop",
          ),
    ]),
    empty: "It was not exported yet.",
  });
}

function formText(each) {
  const more = [
    each.quantization,
    each.merged === true ? "merged" : null,
    each.merged === false ? "adapter alone" : null,
  ];
  return [each.format, ...more.filter(Boolean)].join(", ");
}

function progressOf(each) {
  const { phase, done, total } = each.progress ?? {};
  if (!phase || hasEnded(each.state)) return null;
  return [
    " ",
    h("span", { class: "soft" }, phase),
    total
      ? h("progress", { max: total, value: done ?? 0, "aria-label": `${phase}: ${percent((done ?? 0) / total)}` })
      : null,
  ];
}

function comparedText(result) {
  const compared = result?.compared;
  if (!compared) return null;
  const text = typeof compared === "string" ? compared : compared.text;
  return text ? h("p", { class: "soft" }, text) : null;
}

function addressOf(each) {
  const files = Object.values(each.result?.files ?? {});
  const size = files.reduce((sum, file) => sum + (file?.bytes ?? 0), 0);
  return [
    h("code", null, each.result?.address ?? each.output),
    files.length
      ? h("small", { class: "soft block" }, `${number(files.length)} files${size ? `, ${bytes(size)}` : ""}`)
      : null,
  ];
}

function exportForm(model, signal, follow) {
  const problem = h("div");
  const format = h(
    "select",
    { id: "export-format", onchange: () => offer() },
    FORMATS.map(([value, text]) => h("option", { value }, text)),
  );
  const type = h(
    "select",
    { id: "export-type" },
    h("option", { value: "" }, "as it is stored"),
    TYPES.map((each) => h("option", { value: each }, each)),
  );
  const types = h("div", null, h("label", { for: "export-type" }, "Type of the weights"), type);
  const merged = h(
    "select",
    { id: "export-merged" },
    h("option", { value: "" }, "as the format wants it"),
    h("option", { value: "true" }, "folded into the base"),
    h("option", { value: "false" }, "the adapter alone"),
  );
  const output = h("input", {
    id: "export-output",
    required: true,
    placeholder: "s3://bucket/prefix/",
    autocomplete: "off",
    spellcheck: "false",
  });
  const button = h("button", { type: "submit" }, "Export");
  const offer = () => {
    types.hidden = format.value !== "gguf";
  };
  offer();
  const start = async (event) => {
    event.preventDefault();
    button.disabled = true;
    replace(problem);
    const body = { output: output.value.trim(), format: format.value };
    if (merged.value) body.merged = merged.value === "true";
    if (format.value === "gguf" && type.value) body.quantization = type.value;
    try {
      await call("POST", `/api/v1/models/${encodeURIComponent(model.id)}/exports`, { body, signal });
      follow();
    } catch (error) {
      if (error.name !== "AbortError") replace(problem, errorBox(error));
    } finally {
      button.disabled = false;
    }
  };
  return h(
    "details",
    null,
    h("summary", null, "Export for other software"),
    h(
      "form",
      { onsubmit: start },
      h(
        "div",
        { class: "fields" },
        h(
          "div",
          null,
          h("label", { for: "export-output" }, "Write below"),
          output,
          h(
            "p",
            { class: "help" },
            "An address in the object store of this server, s3://bucket/prefix/. A folder is made there.",
          ),
        ),
        h("div", null, h("label", { for: "export-format" }, "Format"), format),
        types,
        h("div", null, h("label", { for: "export-merged" }, "An adapter is"), merged),
      ),
      problem,
      h("div", { class: "actions" }, button),
    ),
  );
}
