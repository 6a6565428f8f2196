// Exports of one model for other software, and a form for new exports.

import { call, may, pathOf } from "./api.js";
import { bytes, number, percent } from "./format.js";
import { hasEnded } from "./jobs.js";
import { Age, Chip, ErrorBox, Field, PageButtons, Table, bound, html, options, useAction, useData, usePages, usePolling, useSignal } from "./ui.js";

const FORMATS = [
  ["safetensors", "safetensors: transformers, PEFT, diffusers"],
  ["gguf", "GGUF: llama.cpp"],
  ["onnx", "ONNX: ONNX Runtime"],
];
const TYPES = ["f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0"];
const MERGED = [["", "default of the format"], ["true", "merged into the base"], ["false", "exported as an adapter"]];
const STATES = { Completed: "good", Failed: "error", Stopped: "warning" };
const SECONDS = 4;

/** The exports of an active custom model. */
export function Exports({ model }) {
  const pages = usePages();
  const position = pages.value.at(-1);
  const { data, error, read } = useData((signal) => call("GET", "/api/v1/exports", { query: { model: model.arn, position }, signal }), [position]);
  usePolling(SECONDS, async () => {
    if (data?.exports.some((each) => !hasEnded(each.state))) await read();
  });
  const stop = useAction(async (id) => {
    await call("POST", `${pathOf("exports", id)}/stop`).finally(read);
  });
  return html`
    <section id="exports">
      <h2>Exports</h2>
      <${ErrorBox} error=${stop.error} />
      <${ErrorBox} error=${error} again=${read} />
      ${data && html`
        <${Table} caption="Exports of this model, newest first"
          columns=${["Format", "State", "Address", "Age", { name: "Stop", hidden: true }]}
          rows=${data.exports.map((each) => rowOf(each, stop.run))} empty="This model has no exports yet." />
        <${PageButtons} pages=${pages} next=${data.next} noun="exports" />
      `}
      ${may("develop") && html`<${ExportForm} model=${model} started=${read} />`}
    </section>
  `;
}

function rowOf(each, stop) {
  const { compared } = each.result ?? {};
  const result = typeof compared === "string" ? compared : compared?.text;
  const ended = hasEnded(each.state);
  const merged = each.merged === true ? "merged" : each.merged === false ? "adapter only" : null;
  return [
    [each.format, each.quantization, merged].filter(Boolean).join(", "),
    html`
      <${Chip} kind=${STATES[each.state] ?? "note"}>${each.state}<//>
      ${!ended && html`<${Phase} ...${each.progress} />`}
      ${each.failure && html`<p class="error">${each.failure}</p>`}
      ${result && html`<p class="soft">${result}</p>`}
    `,
    html`<${Address} output=${each.result?.address ?? each.output} files=${Object.values(each.result?.files ?? {})} />`,
    html`<${Age} at=${each.created} />`,
    !ended && may("develop") && html`
      <button type="button" data-export=${each.id} aria-label=${`Stop the export as ${each.format}`} onclick=${() => stop(each.id)}>
        Stop
      </button>
    `,
  ];
}

function Phase({ phase, done = 0, total }) {
  if (!phase) return null;
  const bar = total > 0 && html`<progress max=${total} value=${done} aria-label=${`${phase}: ${percent(done / total)}`} />`;
  return html`${" "}<span class="soft">${phase}</span>${bar}`;
}

function Address({ output, files }) {
  const size = files.reduce((sum, file) => sum + (file?.bytes ?? 0), 0);
  return html`
    <code>${output}</code>
    ${files.length > 0 && html`<small class="soft block">${number(files.length)} files${size > 0 && `, ${bytes(size)}`}</small>`}
  `;
}

function ExportForm({ model, started }) {
  const format = useSignal(FORMATS[0][0]);
  const { busy, error, run } = useAction(async (event) => {
    const { output, type, merged } = event.target.elements;
    const body = { output: output.value.trim(), format: format.value };
    if (merged.value) body.merged = merged.value === "true";
    if (format.value === "gguf" && type.value) body.quantization = type.value;
    await call("POST", `${pathOf("models", model.id)}/exports`, { body });
    started();
  });
  return html`
    <details>
      <summary>New export</summary>
      <form onsubmit=${run}>
        <div class="fields">
          <${Field} id="export-output" label="Address" help="An address in the object store of this server, for a new folder.">
            <input id="export-output" name="output" required placeholder="s3://bucket/prefix/" spellcheck="false" />
          <//>
          <${Field} id="export-format" label="Format">
            <select id="export-format" ...${bound(format)}>${options(FORMATS)}</select>
          <//>
          <${Field} id="export-type" label="Type of the weights" hidden=${format.value !== "gguf"}>
            <select id="export-type" name="type">${options([["", "as stored"], ...TYPES.map((each) => [each, each])])}</select>
          <//>
          <${Field} id="export-merged" label="Adapter">
            <select id="export-merged" name="merged">${options(MERGED)}</select>
          <//>
        </div>
        <${ErrorBox} error=${error} />
        <div class="actions"><button type="submit" disabled=${busy}>Export</button></div>
      </form>
    </details>
  `;
}
