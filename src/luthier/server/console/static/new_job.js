// The form for a new job: data, base model, settings and names; inspection and estimate before the start.

import { InputError, call, may } from "./api.js";
import { ALL, Rows, showRowsOf } from "./data.js";
import { DataField, EMPTY } from "./data_field.js";
import { idOf, learnNames, remember, sentence, withNames } from "./files.js";
import { Columns } from "./columns.js";
import { bytes, shortName } from "./format.js";
import { Estimate, Inspection, Working, inspect } from "./inspection.js";
import { CUSTOMIZATIONS } from "./jobs.js";
import { allModels, isHere, nameOf } from "./models.js";
import {
  ErrorBox, Field, Heading, Pending, announce, go, html, link, options, useData, useEffect, useLeaving, useRef,
  useSignal,
} from "./ui.js";

/** Settings with a field of their own: name in the recipe, label, attributes of the field. */
const SETTINGS = [
  ["data.validation_share", "Validation share", { min: "0", max: "0.9", step: "any", value: "0.1" }],
  ["training.epochs", "Epochs", { min: "0", step: "any" }],
  ["training.batch_size", "Batch size", { min: "1", step: "1" }],
  ["training.learning_rate", "Learning rate", { min: "0", step: "any" }],
  ["adaptation.rank", "Rank (LoRA and QLoRA)", { min: "1", step: "1" }],
];
const ADAPTATIONS = [
  ["", "Automatic"],
  ["lora", "LoRA: low-rank adapters"],
  ["qlora", "QLoRA: LoRA on a 4-bit base model"],
  ["full", "Full fine-tuning"],
  ["freeze", "Last layers only"],
  ["feature_extraction", "New head only"],
  ["bitfit", "BitFit: biases only"],
  ["adapters", "Bottleneck adapters"],
  ["prompt", "Prompt tuning"],
  ["prefix", "Prefix tuning"],
  ["sparse", "Sparse: weights with the largest gradients"],
];
const KINDS = Object.entries(CUSTOMIZATIONS).map(([value, { name }]) => [value, name]);
const LONGEST_NAME = 63;
/** Patterns of names with the help text, by field. */
const NAMES = {
  name: [/[a-zA-Z0-9][a-zA-Z0-9+\-.]*/, `Letters, digits, -, + and .; at most ${LONGEST_NAME}. Unique in the account.`],
  model_name: [/([a-zA-Z0-9][_\-]?)+/, `Letters and digits, with single - or _ between them; at most ${LONGEST_NAME}.`],
};
/** Fields whose values the tab keeps, and the key of the values in the session storage. */
const KEPT = [...SETTINGS.map(([id]) => id), "adaptation.method", "settings", "teacher", "grader", "base", "customization_type"];
const DRAFT = "luthier.job";
/** Milliseconds from the last change to the estimate. */
const PATIENCE = 800;

/** The page. */
export function NewJob({ query }) {
  const rows = query.get("rows");
  const found = useData(async (signal) => {
    if (!may("develop")) return {};
    await learnNames([rows ?? ""], signal);
    return { rows, models: (await allModels(signal)).filter((each) => /^active$/i.test(each.status)) };
  }, [rows]);
  if (!found.data) return html`<${Pending} title="New job" ...${found} />`;
  return html`
    <${Heading} title="New job" />
    ${may("develop")
      ? html`<${JobForm} key=${found.data.rows} ...${found.data} start=${query.get("base")} read=${query.get("columns")} />`
      : html`<p class="box note">This key has no permission to create jobs. Sign in with a key of the role developer.</p>`}
  `;
}

function JobForm({ models, start, rows, read }) {
  const form = useRef(null);
  const opened = useRef(new Date()).current;
  const left = useLeaving();
  const draft = useRef(JSON.parse(sessionStorage.getItem(DRAFT) ?? "{}")).current;
  const [training, validation] = [useSignal(given(rows)), useSignal(draft.validation ?? EMPTY)];
  const kind = useSignal(draft.customization_type ?? "FINE_TUNING");
  const wanted = start ?? draft.base;
  const base = useSignal(models.find((each) => wanted && [each.id, each.name, each.arn].includes(wanted))?.name ?? "");
  const initial = useRef(base.value).current;
  const names = useSignal(draft.names ?? {});
  const columns = useSignal(JSON.parse(read ?? "{}"));
  const [working, lines] = [useSignal(null), useSignal(ALL)];
  const outcome = useSignal("");
  const [inspection, problem, preview] = [useSignal(null), useSignal(null), useSignal(null)];
  const [changes, download] = [useSignal(0), useSignal(false)];
  // The body of the estimate as JSON: equal settings are estimated once.
  const planned = useSignal(null);
  const estimate = useData(
    async (signal) => planned.value && { of: planned.value, ...(await call("POST", "/api/v1/estimates", { body: JSON.parse(planned.value), signal })) },
    [planned.value],
  );

  const isDistillation = kind.value === "DISTILLATION";
  const isReinforcement = kind.value === "REINFORCEMENT_FINE_TUNING";
  const ready =
    training.value.address !== null && !training.value.busy && !validation.value.busy && !isBusy(working.value);
  const hasRows = training.value.address !== null;
  // A change during the start would cancel a job that the server may have created, or start another one.
  const isStarting = Boolean(working.value?.isStart);
  const named = base.value || preview.value?.base;
  const chosen = models.find((each) => [nameOf(each), each.name, each.id].includes(named));
  const canEstimate = !isDistillation && chosen && (isHere(chosen) || download.value);
  const proposed = proposeName(training.value.name, base.value, opened);
  const about = problem.value && fieldOf(problem.value.parameter);
  const hasOwn = SETTINGS.some(([id, , { value = "" }]) => (draft[id] ?? value) !== value) || Boolean(draft["adaptation.method"] || draft.settings);
  useEffect(() => {
    if (!problem.value) return;
    const field = document.getElementById(about);
    field?.focus();
    (field ?? form.current.querySelector(".submit")).scrollIntoView({ block: "nearest" });
  }, [problem.value]);

  useEffect(() => {
    for (const id of KEPT) if (id !== "base" && draft[id] !== undefined) form.current.elements[id].value = draft[id];
  }, []);
  const keep = () => {
    const { address, name, said } = validation.value;
    const kept = { names: names.value, ...(address && { validation: { ...EMPTY, address, name, said } }) };
    for (const id of KEPT) kept[id] = form.current.elements[id].value;
    // The base model of a link is for this visit, unless the person chooses another one.
    if (start && base.value === initial) kept.base = "";
    sessionStorage.setItem(DRAFT, JSON.stringify(kept));
  };
  useEffect(keep, [changes.value, validation.value.address, names.value]);
  const reset = () => {
    kind.value = "FINE_TUNING";
    base.value = "";
    names.value = {};
    validation.value = EMPTY;
    forget();
  };

  const stop = () => {
    working.value?.cancel();
    working.value = null;
  };
  // Results belong to the base model and the method they were made for …
  const forget = () => {
    if (isBusy(working.value)) stop();
    outcome.value = planned.value = null;
    if (!inspection.value?.background) inspection.value = null;
    changed();
  };
  // … and to the rows.
  const forgetRows = () => {
    stop();
    inspection.value = preview.value = null;
    lines.value = ALL;
    forget();
  };
  const changed = () => (changes.value += 1);
  const valueOf = (id) => form.current.elements[id].value.trim();
  const inspected = () => ({
    training: training.value.address,
    ...(valueOf("base") && { base: valueOf("base") }),
    ...(validation.value.address && { validation: validation.value.address }),
    columns: columns.value,
  });
  /** Choose the base model by the rows if neither the user nor the preview did: archives have no preview. */
  const chooseBase = async (signal) => {
    if (valueOf("base") || preview.value?.base) return;
    const { report } = await call("POST", "/api/v1/inspections", { body: { ...inspected(), first_lines: true }, signal });
    preview.value = { ...preview.value, base: report.base };
  };
  /** Return the fields that jobs and estimates share. */
  const common = () => {
    const settings = readSettings(form.current.elements, validation.value.address !== null);
    if (Object.keys(columns.value).length) settings.data = { columns: columns.value, ...settings.data };
    return {
      base: valueOf("base") || preview.value.base,
      customization_type: kind.value,
      validation: validation.value.address ? [validation.value.address] : [],
      settings,
      ...(isReinforcement && { grader: parseObject(valueOf("grader"), "grader") }),
    };
  };
  /** Do one thing that takes a while and can be cancelled. Other things end work in the background. */
  const run = async (text, work, { cancelled = "Cancelled.", background = false, isStart = false } = {}) => {
    working.value?.cancel();
    const own = new AbortController();
    left.addEventListener("abort", () => own.abort(), { once: true });
    const mine = { text, background, isStart, cancel: () => own.abort() };
    working.value = mine;
    outcome.value = problem.value = null;
    try {
      await work(own.signal);
    } catch (error) {
      if (left.aborted || working.value !== mine) return;
      if (error.name === "AbortError") {
        outcome.value = cancelled;
        announce("Cancelled.");
      } else {
        error.message = withNames(error.message);
        for (const [id, field] of [["training", training], ["validation", validation]])
          if (fieldOf(error.parameter) === id) field.value = { ...field.value, problem: error.message };
        problem.value = error;
      }
    } finally {
      if (working.value === mine) working.value = null;
    }
  };
  const startInspection = (background) =>
    run("Inspecting the data", async (signal) => {
      const body = background ? { ...inspected(), base: "none" } : inspected();
      await inspect(body, signal, (found) => (inspection.value = { ...found, background }));
      if (background && inspection.value.verdict !== "refused") await chooseBase(signal);
    }, { background });
  // Training steps next to the checks would be measured too slow.
  const isPlanned = ready && !working.value && preview.value && canEstimate && inspection.value?.verdict !== "refused";
  useEffect(() => {
    const timer = isPlanned && setTimeout(() => {
      try {
        planned.value = JSON.stringify({ ...common(), training: training.value.address });
      } catch {
        planned.value = null; // The start reports the faulty field.
      }
    }, PATIENCE);
    return () => clearTimeout(timer);
  }, [Boolean(isPlanned), changes.value, named]);
  useEffect(() => {
    if (!hasRows) return;
    // The page has the same rows after a reload.
    history.replaceState(null, "", `${link("new")}?${new URLSearchParams({ rows: training.value.address, columns: JSON.stringify(columns.value) })}`);
  }, [training.value.address, JSON.stringify(columns.value)]);
  // New rows are inspected at once, without a model: a person sees what is in the file before
  // choosing settings, and nothing is downloaded yet.
  const previewed = (found) => {
    preview.value = found;
    if (!isBusy(working.value)) startInspection(true);
  };
  /** Continue with a cleaned file. */
  const useCleaned = ({ address, name }) => {
    columns.value = {};
    training.value = { ...EMPTY, address, name, said: `Selected: ${name}.` };
    remember({ id: idOf(address), filename: name });
    forgetRows();
  };
  const startJob = (event) => {
    event.preventDefault();
    const work = async (signal) => {
      const named = { name: valueOf("name"), model_name: valueOf("model_name") };
      await chooseBase(signal);
      const body = { ...common(), training: [training.value.address], ...named };
      if (isDistillation) body.teacher = valueOf("teacher");
      const created = await call("POST", "/api/v1/jobs", { body, signal });
      names.value = {};
      keep();
      go("jobs", created.name);
    };
    // The server may have created the job before the request was cancelled.
    run("Starting the job", work, { isStart: true, cancelled: html`Cancelled. The job may exist already: check <a href=${link("jobs")}>the jobs</a>.` });
  };

  /** Attributes of the field with this id. */
  const field = (id) => ({ id, ...(about === id && { "aria-invalid": "true", "aria-describedby": `problem-${id}` }) });
  const row = (id, label, content, { help, hidden } = {}) => html`
    <${Field} id=${id} label=${label} help=${help} hidden=${hidden} problem=${about === id && problem.value.message}>${content}<//>
  `;
  const nameField = (id) => html`
    <input ...${field(id)} type="text" required maxlength=${LONGEST_NAME} pattern=${NAMES[id][0].source} title=${NAMES[id][1]} autocomplete="off" spellcheck="false"
      value=${names.value[id] ?? proposed} oninput=${(event) => (names.value = { ...names.value, [id]: event.target.value })} />
  `;
  const changeKind = (event) => {
    kind.value = event.target.value;
    forget();
  };
  const changeBase = ({ target }) => {
    base.value = target.value && target.selectedOptions[0].textContent;
    forget();
  };
  return html`
    <form class="new-job" onsubmit=${startJob} onreset=${reset} ref=${form}>
      <fieldset inert=${isStarting}>
        <legend>Data</legend>
        <div class="fields">
          <${DataField} id="training" label="Training rows" field=${training} onchange=${() => ((columns.value = {}), forgetRows())}
            help="JSON Lines, CSV, Parquet or text. An address that ends with a slash selects all files below." />
          <${DataField} id="validation" label="Validation rows (optional)" field=${validation} onchange=${() => (forget(), hasRows && startInspection(true))}
            help="Rows to evaluate the model. The model is not trained on these rows." />
        </div>
        <${Columns} key=${training.value.address} address=${training.value.address} columns=${columns} onchange=${forgetRows}
          onpreview=${previewed} />
      </fieldset>
      ${working.value?.background && html`<${Working} ...${working.value} />`}
      <${Shown} content=${!inspection.value?.background && inspection.value}>${inspection.value && html`
        <${Inspection} ...${inspection.value} address=${training.value.address} columns=${columns.value}
          validation=${validation.value.address} onfixed=${useCleaned} showRows=${showRowsOf(training.value.address, lines)} />
      `}<//>
      <fieldset hidden=${!hasRows} inert=${isStarting}>
        <legend>Model</legend>
        <div class="fields">
          ${row("base", "Base model", html`
            <select ...${field("base")} onchange=${changeBase}>
              <option value="">Automatic${preview.value?.base ? `: ${preview.value.base}` : ""}</option>
              <${ModelOptions} models=${models} chosen=${base.peek()} />
            </select>
          `, { help: !base.value && preview.value?.base_reason && sentence(preview.value.base_reason) })}
          ${row("customization_type", "Method", html`
            <select ...${field("customization_type")} value=${kind} onchange=${changeKind}>${options(KINDS)}</select>
          `, { help: sentence(CUSTOMIZATIONS[kind.value].about) })}
          ${row("teacher", "Teacher", html`<select ...${field("teacher")} onchange=${changed}><${ModelOptions} models=${models} /></select>`,
            { help: "The model that generates the training targets.", hidden: !isDistillation })}
          ${row("grader", "Grader", html`
            <textarea ...${field("grader")} rows="4" spellcheck="false" class="code" onchange=${changed}>${'{"method": "exact"}'}</textarea>
          `, { help: "Grader of replies, as JSON.", hidden: !isReinforcement })}
        </div>
      </fieldset>
      <fieldset hidden=${!hasRows} inert=${isStarting}>
        <details class="rule" id="own-settings" open=${hasOwn || isSetting(about)} onInvalidCapture=${(event) => (event.currentTarget.open = true)}>
          <summary>Settings <span class="soft">(empty ones are chosen from the data and the model)</span></summary>
          <div class="inside">
            <p class="soft">
              The page of the job shows the reasons. The tab keeps your settings.${" "}<button type="reset" class="quiet">Reset</button>
            </p>
            <div class="fields">
              ${SETTINGS.map(([id, label, { value, ...kept }]) => row(id, label, html`
                <input ...${field(id)} type="number" placeholder="automatic" defaultValue=${value} ...${kept} onchange=${changed} />
              `, { hidden: id === SETTINGS[0][0] && validation.value.address !== null }))}
              ${row("adaptation.method", "Adaptation", html`
                <select ...${field("adaptation.method")} onchange=${changed}>${options(ADAPTATIONS)}</select>
              `)}
            </div>
            ${row("settings", "More settings, as JSON", html`
              <textarea ...${field("settings")} rows="3" spellcheck="false" class="code" onchange=${changed}
                placeholder='{"training": {"seed": 1}}'></textarea>
            `, { help: "Grouped as in a recipe. These settings override the fields above." })}
          </div>
        </details>
      </fieldset>
      <fieldset hidden=${!hasRows} inert=${isStarting}>
        <legend>Names</legend>
        <div class="fields">
          ${row("name", "Job", nameField("name"), { help: NAMES.name[1] })}
          ${row("model_name", "Model", nameField("model_name"), { help: NAMES.model_name[1] })}
        </div>
      </fieldset>
      ${planned.value && (
        estimate.data?.of === planned.value ? html`<${Estimate} estimate=${estimate.data.estimate} />`
        : estimate.error ? html`<${ErrorBox} error=${estimate.error} again=${estimate.read}>There is no estimate.<//>`
        : html`<${Working} key=${planned.value} text="Estimating time and memory" />`
      )}
      ${hasRows && isDistillation && html`<p class="soft">Distillation has no estimate: the time depends on the teacher.</p>`}
      ${hasRows && !isDistillation && chosen && !canEstimate && html`
        <p class="soft">
          The estimate of time and memory downloads the base model (${bytes(chosen.facts.download_bytes)}).
          ${" "}<button type="button" class="quiet" onclick=${() => (download.value = true)}>Estimate</button>
        </p>
      `}
      <${ErrorBox} error=${!document.getElementById(about) && problem.value} />
      <div class="actions submit" hidden=${!hasRows}>
        <button type="button" disabled=${!ready} onclick=${() => startInspection(false)}>Inspect the data</button>
        <button type="submit" class=${inspection.value?.verdict === "refused" ? null : "primary"} disabled=${!ready}
          title=${inspection.value?.verdict === "refused" ? "A job on data with errors fails, unless settings change the checks." : null}>
          Start
        </button>
      </div>
      <div class="outcome">
        ${isBusy(working.value) ? html`<${Working} ...${working.value} />` : outcome.value && html`<p class="soft">${outcome.value}</p>`}
      </div>
    </form>
    ${hasRows && !training.value.address.endsWith("/") && html`
      <${Rows} key=${training.value.address} address=${training.value.address} columns=${columns.value} lines=${lines} />
    `}
  `;
}

/** Return whether work runs that a person has started. */
const isBusy = (working) => working !== null && !working.background;

/** Return the value of the data field for rows that another page chose. */
function given(address) {
  if (!address) return EMPTY;
  const name = shortName(withNames(address));
  return { ...EMPTY, address, name, said: `Selected: ${name}.` };
}

/** A result that gets the focus when it appears. */
function Shown({ content, children }) {
  const place = useRef(null);
  useEffect(() => {
    if (!content) return;
    place.current.focus({ preventScroll: true });
    place.current.scrollIntoView({ block: "nearest" });
  }, [content]);
  return html`<div tabindex="-1" ref=${place}>${children}</div>`;
}

function ModelOptions({ models, chosen }) {
  const group = (label, kind) => {
    const found = models.filter((each) => each.kind === kind);
    if (!found.length) return null;
    return html`
      <optgroup label=${label}>
        ${found.map((each) => html`
          <option value=${kind === "custom" ? each.arn : each.id} selected=${each.name === chosen}>${nameOf(each)}</option>
        `)}
      </optgroup>
    `;
  };
  return [group("Base models", "foundation"), group("Your models", "custom")];
}

function readSettings(elements, hasValidation) {
  const found = {};
  for (const [name] of SETTINGS) {
    const { validity, value } = elements[name];
    if (validity.badInput) throw new InputError("Enter a number.", `settings.${name}`);
    if (value !== "" && !(hasValidation && name === SETTINGS[0][0])) found[name] = Number(value);
  }
  const method = elements["adaptation.method"].value;
  const more = elements.settings.value.trim();
  return byGroup({ ...found, ...(method && { "adaptation.method": method }), ...(more && parseObject(more, "settings")) });
}

/** Return the id of the form field for a parameter of a request, such as `settings.training.seed`. */
export function fieldOf(parameter) {
  const [first, ...rest] = (parameter ?? "").split(/[.[]/);
  if (first !== "settings") return first;
  const setting = rest.join(".");
  return isSetting(setting) ? setting : "settings";
}

/** Return whether a field is one of the settings, which are folded. */
const isSetting = (id) => [...SETTINGS.map(([name]) => name), "adaptation.method", "settings"].includes(id);

/** Return settings by group, from `{"training.seed": 1}` or `{"training": {"seed": 1}}`. */
export function byGroup(settings) {
  const found = {};
  for (const [name, value] of Object.entries(settings)) {
    const [group, ...field] = name.split(".");
    if (field.length) found[group] = { ...found[group], [field.join(".")]: value };
    else found[group] = typeof value === "object" && value !== null ? { ...found[group], ...value } : value;
  }
  return found;
}

function parseObject(text, parameter) {
  let found;
  try {
    found = JSON.parse(text);
  } catch (error) {
    throw new InputError(`Invalid JSON: ${error.message}.`, parameter);
  }
  if (typeof found !== "object" || found === null || Array.isArray(found))
    throw new InputError("Enter a JSON object: { … }.", parameter);
  return found;
}

/** Return a free name from the file or the base model and the time at which the form was opened. */
function proposeName(file, base, now) {
  const moment = [now.getMonth() + 1, now.getDate(), "-", now.getHours(), now.getMinutes(), now.getSeconds()];
  const digits = moment.map((each) => (each === "-" ? each : String(each).padStart(2, "0"))).join("");
  return `${stemOf(file.split(".")[0] || base) || "model"}-${digits}`;
}

/** Return a text as the names of jobs may be written; empty if no character is allowed in a name. */
export function stemOf(text) {
  return text
    .normalize("NFKD")
    .replace(/\p{M}+/gu, "")
    .replace(/[^A-Za-z0-9]+/g, "-")
    .replace(/^-+|-+$/g, "")
    .slice(0, 40)
    .replace(/-+$/, "");
}
