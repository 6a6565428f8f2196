// A new job: data, base model and settings; a look at the data and an estimate before it starts.

import { call, may } from "./api.js";
import { dataField } from "./data_field.js";
import { announce, h, replace } from "./dom.js";
import { estimateView } from "./estimate.js";
import { withNames } from "./files.js";
import { inspectionView } from "./inspection.js";
import { CUSTOMIZATIONS } from "./job_states.js";
import { errorBox, go, link } from "./router.js";

/** Settings that are asked for by name: the field of the recipe, its label, how it is written. */
const SETTINGS = [
  ["data.validation_share", "Share held out to measure on", { type: "number", min: "0", max: "0.9", step: "any" }],
  ["training.epochs", "Passes over the data", { type: "number", min: "0", step: "any" }],
  ["training.batch_size", "Rows in a batch", { type: "number", min: "1", step: "1" }],
  ["training.learning_rate", "Learning rate", { type: "number", min: "0", step: "any" }],
  ["adaptation.rank", "Rank (of LoRA and QLoRA)", { type: "number", min: "1", step: "1" }],
];
const ADAPTATIONS = [
  ["", "Chosen for the base model"],
  ["lora", "LoRA: small matrices beside the weights"],
  ["qlora", "QLoRA: LoRA on a base of 4 bits"],
  ["full", "All weights"],
  ["freeze", "The last layers"],
  ["feature_extraction", "A new head alone"],
  ["bitfit", "BitFit: biases alone"],
  ["adapters", "Adapters: small layers between"],
  ["prompt", "Prompt tuning"],
  ["prefix", "Prefix tuning"],
  ["sparse", "Some weights, chosen by their gradients"],
];
/** As the command line does, where no validation rows are given. */
const HELD_OUT = "0.1";
const CHOSEN_BASE = "Chosen from the rows";
const GRADER = '{"method": "exact"}';
const LONGEST_NAME = 63;

/** Draw the form. */
export async function render(root, params, signal) {
  if (!may("develop")) {
    replace(root, h("h1", null, "New job"), h("p", { class: "box note" }, "This key may not create jobs."));
    return;
  }
  const { models } = await call("GET", "/api/v1/models", { signal });
  const form = new JobForm(models, params, signal);
  replace(root, h("h1", null, "New job"), form.element);
}

class JobForm {
  constructor(models, params, signal) {
    this.signal = signal;
    this.working = null;
    this.named = false;
    this.opened = new Date();
    const changed = () => this.forget();
    this.training = dataField({
      id: "training",
      label: "Training rows",
      signal,
      onChange: changed,
      help: "JSON Lines, CSV, Parquet or text. A key that ends with a slash stands for all files below it.",
    });
    this.validation = dataField({
      id: "validation",
      label: "Validation rows (if you have some)",
      signal,
      onChange: changed,
      help: "Rows that are never learned: the model is measured on them.",
    });
    const usable = models.filter((each) => each.status.toLowerCase() === "active");
    const start = params.query.get("base");
    this.base = modelField("base", usable, start, CHOSEN_BASE);
    this.teacher = modelField("teacher", usable, null);
    this.kind = h(
      "select",
      { id: "customization_type" },
      Object.entries(CUSTOMIZATIONS).map(([value, { name, about }]) => h("option", { value }, `${name}: ${about}`)),
    );
    this.grader = h("textarea", { id: "grader", rows: "4", spellcheck: "false", class: "code" }, GRADER);
    this.settings = SETTINGS.map(([name, label, kind]) => [
      name,
      label,
      h("input", { id: name, placeholder: "chosen for you", ...kind }),
    ]);
    this.heldOut = this.settings[0][2];
    this.heldOut.value = HELD_OUT;
    this.adaptation = h(
      "select",
      { id: "adaptation.method" },
      ADAPTATIONS.map(([value, label]) => h("option", { value }, label)),
    );
    this.further = h("textarea", {
      id: "settings",
      rows: "4",
      spellcheck: "false",
      class: "code",
      placeholder: '{"training": {"seed": 1}}',
    });
    this.name = h("input", {
      id: "name",
      type: "text",
      required: true,
      maxlength: LONGEST_NAME,
      autocomplete: "off",
      spellcheck: "false",
    });
    this.modelName = h("input", {
      id: "model_name",
      type: "text",
      required: true,
      maxlength: LONGEST_NAME,
      autocomplete: "off",
      spellcheck: "false",
    });
    this.buttons = {
      inspect: h("button", { type: "button", onclick: () => this.inspect() }, "Inspect the data"),
      estimate: h("button", { type: "button", onclick: () => this.estimate() }, "Estimate"),
      start: h("button", { type: "submit", class: "primary" }, "Start"),
    };
    this.outcome = h("div", { class: "outcome" });
    this.inspection = h("div", { tabindex: "-1" });
    this.estimation = h("div", { tabindex: "-1" });
    this.problem = h("div");
    this.element = this.draw();
    for (const each of [this.name, this.modelName]) each.addEventListener("input", () => (this.named = true));
    for (const each of [...this.settings.map(([, , field]) => field), this.adaptation, this.further, this.grader])
      each.addEventListener("change", () => replace(this.estimation));
    // What was found is of the settings before.
    for (const each of [this.kind, this.base]) each.addEventListener("change", () => this.forget());
    this.changed();
  }

  draw() {
    const row = (field, label, help) =>
      h(
        "div",
        null,
        h("label", { for: field.id }, label),
        field,
        help ? h("p", { class: "help" }, help) : null,
        h("p", { class: "problem", id: `problem-${field.id}`, hidden: true }),
      );
    this.teacherRow = row(this.teacher, "Teacher", "The model whose answers are learned.");
    this.graderRow = row(this.grader, "Grader", "How an answer is scored, as JSON.");
    return h(
      "form",
      { class: "new-job", onsubmit: (event) => this.start(event) },
      h(
        "fieldset",
        null,
        h("legend", null, "Data"),
        h("div", { class: "fields" }, this.training.element, this.validation.element),
      ),
      h(
        "fieldset",
        null,
        h("legend", null, "Model"),
        h(
          "div",
          { class: "fields" },
          row(this.base, "Base model"),
          row(this.kind, "What is learned"),
          this.teacherRow,
          this.graderRow,
        ),
      ),
      h(
        "fieldset",
        null,
        h("legend", null, "Settings"),
        h(
          "p",
          { class: "soft" },
          "Leave them empty, and they are chosen from the data and the model. The job says what was chosen, and why.",
        ),
        h(
          "div",
          { class: "fields" },
          this.settings.map(([, label, field]) => row(field, label)),
          row(this.adaptation, "Adaptation"),
        ),
        h(
          "details",
          { class: "further" },
          h("summary", null, "Further settings"),
          row(
            this.further,
            "Settings of a recipe, as JSON",
            "By group, as in a recipe. They go before the fields above where both name one.",
          ),
        ),
      ),
      h(
        "fieldset",
        null,
        h("legend", null, "Names"),
        h(
          "div",
          { class: "fields" },
          row(this.name, "Job", "No other job of the account has it."),
          row(this.modelName, "Model", "Letters, digits, - and _."),
        ),
      ),
      this.problem,
      h(
        "div",
        { class: "actions submit" },
        this.buttons.inspect,
        this.buttons.estimate,
        this.buttons.start,
      ),
      this.outcome,
      this.estimation,
      this.inspection,
    );
  }

  forget() {
    if (!this.working) for (const each of [this.outcome, this.estimation, this.inspection]) replace(each);
    this.changed();
  }

  changed() {
    this.heldOut.closest("div").hidden = this.validation.address() !== null;
    this.teacherRow.hidden = this.kind.value !== "DISTILLATION";
    this.graderRow.hidden = this.kind.value !== "REINFORCEMENT_FINE_TUNING";
    const ready = this.training.address() !== null && !this.training.busy() && !this.validation.busy() && !this.working;
    for (const button of Object.values(this.buttons)) button.disabled = !ready;
    const unknown = this.kind.value === "DISTILLATION";
    if (unknown) this.buttons.estimate.disabled = true;
    this.buttons.estimate.title = unknown ? "How long a distillation takes depends on what its teacher writes." : "";
    if (!this.named) {
      const name = proposeName(this.training.name(), nameOf(this.base), this.opened);
      this.name.value = this.modelName.value = name;
    }
  }

  /** Have the rows decide on the base model where nobody did; raises what keeps them from being learned. */
  async chooseBase(signal) {
    if (this.base.value.trim()) return;
    const { verdict, report } = await call("POST", "/api/v1/inspections", { body: this.inspected(), signal });
    if (verdict === "refused") throw new RefusedData(inspectionView(verdict, report));
    this.setBase(report.base);
  }

  setBase(name) {
    const options = [...(this.base.options ?? [])];
    this.base.value = options.find((each) => each.textContent === name)?.value ?? (options.length ? "" : name);
    if (!this.base.value) throw new InputProblem(`Choose a base model: there is no ${name} here.`, "base");
    this.changed();
  }

  inspected() {
    const body = { training: this.training.address() };
    if (this.base.value.trim()) body.base = this.base.value.trim();
    if (this.validation.address()) body.validation = this.validation.address();
    return body;
  }

  /** What both a job and an estimate are asked with; raises what a person has to mend. */
  async common(signal) {
    const settings = this.readSettings();
    await this.chooseBase(signal);
    const body = {
      base: this.base.value.trim(),
      customization_type: this.kind.value,
      validation: this.validation.address() ? [this.validation.address()] : [],
      settings,
    };
    if (this.kind.value === "REINFORCEMENT_FINE_TUNING") body.grader = parseObject(this.grader.value, "grader");
    return body;
  }

  readSettings() {
    const found = {};
    const set = (name, value) => {
      const [group, field] = name.split(".");
      (found[group] ??= {})[field] = value;
    };
    for (const [name, , field] of this.settings) {
      if (field.validity.badInput) throw new InputProblem("Write a number.", `settings.${name}`);
      if (field === this.heldOut && this.validation.address()) continue;
      if (field.value !== "") set(name, Number(field.value));
    }
    if (this.adaptation.value) set("adaptation.method", this.adaptation.value);
    if (this.further.value.trim()) {
      for (const [group, fields] of Object.entries(byGroup(parseObject(this.further.value, "settings")))) {
        found[group] = typeof fields === "object" && fields !== null ? { ...found[group], ...fields } : fields;
      }
    }
    return found;
  }

  inspect() {
    return this.ask("The data are being inspected", async (signal) => {
      const { verdict, report } = await call("POST", "/api/v1/inspections", { body: this.inspected(), signal });
      show(this.inspection, inspectionView(verdict, report));
    });
  }

  estimate() {
    return this.ask("A few real steps are being tried", async (signal) => {
      const body = { ...(await this.common(signal)), training: this.training.address() };
      show(this.estimation, estimateView((await call("POST", "/api/v1/estimates", { body, signal })).estimate));
    });
  }

  async start(event) {
    event.preventDefault();
    await this.ask(
      "The job is being started",
      async (signal) => {
        const body = {
          ...(await this.common(signal)),
          training: [this.training.address()],
          name: this.name.value.trim(),
          model_name: this.modelName.value.trim(),
        };
        if (this.kind.value === "DISTILLATION") body.teacher = this.teacher.value.trim();
        const job = await call("POST", "/api/v1/jobs", { body, signal });
        go("jobs", job.name);
      },
      () => [
        // The server may have made it before it heard of that.
        "You cancelled. The job may have been created all the same: look at ",
        h("a", { href: link("jobs") }, "the jobs"),
        ".",
      ],
    );
  }

  /** Do something that takes a while, one at a time; it can be cancelled, of which `cancelled` says what it means. */
  async ask(text, work, cancelled = () => "Cancelled.") {
    const working = new AbortController();
    const leave = () => working.abort();
    this.signal.addEventListener("abort", leave);
    this.working = working;
    this.changed();
    this.clearProblems();
    const began = Date.now();
    const clock = h("span");
    const tick = setInterval(() => (clock.textContent = `${Math.round((Date.now() - began) / 1000)} s`), 1000);
    replace(
      this.outcome,
      h(
        "p",
        { class: "box note", role: "status" },
        `${text} … `,
        clock,
        " ",
        h("button", { type: "button", class: "quiet", onclick: leave }, "Cancel"),
      ),
    );
    try {
      await work(working.signal);
      replace(this.outcome);
    } catch (error) {
      replace(this.outcome);
      if (error instanceof RefusedData) replace(this.inspection, error.view);
      if (error.name !== "AbortError") this.refuse(error);
      else if (!this.signal.aborted) {
        const said = h("p", { class: "soft" }, cancelled());
        replace(this.outcome, said);
        announce(said.textContent);
      }
    } finally {
      clearInterval(tick);
      this.signal.removeEventListener("abort", leave);
      this.working = null;
      this.changed();
    }
  }

  /** Show a refusal where the field is that it is about, if one is. */
  refuse(error) {
    error.message = withNames(error.message);
    const about = fieldOf(error.parameter);
    const place = document.getElementById(`problem-${about}`);
    if (about === "training") this.training.refuse(error.message);
    else if (about === "validation") this.validation.refuse(error.message);
    else if (place) {
      const field = document.getElementById(place.id.replace("problem-", ""));
      place.textContent = error.message;
      place.hidden = false;
      field.setAttribute("aria-invalid", "true");
      field.setAttribute("aria-describedby", place.id);
      field.closest("details")?.setAttribute("open", "");
      field.focus();
    }
    replace(
      this.problem,
      error instanceof InputProblem || error instanceof RefusedData
        ? h("div", { class: "box error", role: "alert" }, h("p", null, error.message))
        : errorBox(error),
    );
    this.problem.scrollIntoView({ block: "nearest" });
  }

  clearProblems() {
    replace(this.problem);
    for (const each of this.element.querySelectorAll(".problem")) each.hidden = true;
    for (const each of this.element.querySelectorAll("[aria-invalid]")) {
      each.removeAttribute("aria-invalid");
      each.removeAttribute("aria-describedby");
    }
  }
}

/** Show a result, scroll it into view and move the focus to it. */
function show(place, view) {
  replace(place, view);
  place.focus({ preventScroll: true });
  place.scrollIntoView({ block: "nearest" });
}

/**
 * The field of the form that a request's parameter is of.
 * @param {?string} parameter such as `training`, the rows, or `settings.training.seed`, of the group `training`
 * @returns {string} id of a field, where the form has it
 */
export function fieldOf(parameter) {
  const [first, ...rest] = (parameter ?? "").split(/[.[]/);
  if (first !== "settings") return first;
  const setting = rest.join(".");
  return [...SETTINGS.map(([name]) => name), "adaptation.method"].includes(setting) ? setting : "settings";
}

/** What a person wrote and no request could be made of. */
class InputProblem extends Error {
  constructor(message, parameter) {
    super(message);
    this.parameter = parameter;
  }
}

/** Rows that no model can learn from, with what was found in them. */
class RefusedData extends Error {
  constructor(view) {
    super("The rows cannot be learned from as they are.");
    this.parameter = "training";
    this.view = view;
  }
}

/**
 * Settings by group, of which some may be written as `--set` takes them.
 * @param {Object} settings such as `{"training.seed": 1}` or `{"training": {"seed": 1}}`
 * @returns {Object}
 */
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
    throw new InputProblem(`This is no JSON: ${error.message}.`, parameter);
  }
  if (typeof found !== "object" || found === null || Array.isArray(found))
    throw new InputProblem("Write a JSON object: { … }.", parameter);
  return found;
}

function modelField(id, models, chosen, none = null) {
  const group = (label, kind) => {
    const found = models.filter((each) => each.kind === kind);
    return found.length
      ? h(
          "optgroup",
          { label },
          found.map((each) => h("option", { value: kind === "custom" ? each.arn : each.id }, each.name)),
        )
      : null;
  };
  const open = none === null ? null : h("option", { value: "" }, none);
  const select = h("select", { id }, open, group("Base models", "foundation"), group("Your models", "custom"));
  const found = models.find((each) => chosen && [each.id, each.name, each.arn].includes(chosen));
  if (found) select.value = found.kind === "custom" ? found.arn : found.id;
  return select;
}

function nameOf(field) {
  if (!field.value) return "";
  return field.selectedOptions[0]?.textContent ?? "";
}

/** A free name for a job and its model, from the file or the base and the time at which the form was opened. */
function proposeName(file, base, now) {
  const two = (value) => String(value).padStart(2, "0");
  const moment = `${two(now.getMonth() + 1)}${two(now.getDate())}-${two(now.getHours())}${two(now.getMinutes())}${two(now.getSeconds())}`;
  return `${stemOf(file.split(".")[0] || base) || "model"}-${moment}`;
}

/**
 * A text as names of jobs may be written.
 * @param {string} text
 * @returns {string} empty where nothing of it can stand in one
 */
export function stemOf(text) {
  return text
    .normalize("NFKD")
    .replace(/\p{M}+/gu, "")
    .replace(/[^A-Za-z0-9]+/g, "-")
    .replace(/^-+|-+$/g, "")
    .slice(0, 40)
    .replace(/-+$/, "");
}
