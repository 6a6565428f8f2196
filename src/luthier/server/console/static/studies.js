// Studies: trainings with different settings of a job, side by side, with table, pictures and the winner.

import { call, may } from "./api.js";
import { shortName } from "./format.js";
import { ReportList, ReportPage } from "./reports.js";
import { Empty, ErrorBox, Field, Heading, Said, Section, Table, bound, html, link, options, useAction, useData, useSignal } from "./ui.js";

/** Newest jobs in the menu of a new study. */
const MOST_JOBS = 100;
const QUESTIONS = [
  ["methods", "Which method is best?"], ["layers", "How many layers need training?"],
  ["rate", "Is the learning rate right?"], ["rows", "Would more rows help?"],
  ["augmentation", "Do random changes help?"], ["bits", "What do fewer bits cost?"],
  ["", "Other fields"],
];
const TRAININGS = {
  methods: "Trains in full, with LoRA and DoRA, with the lower half of the layers frozen, and biases only.",
  layers: "Trains all layers, and the upper three, two and one quarters.",
  rate: "Trains with a tenth, a third, once and three times the rate.",
  rows: "Trains on an eighth of the rows, and more, up to all rows.",
  augmentation: "Trains with each kind of change that fits the rows, and without.",
  bits: "Trains LoRA on 16, 8 and 4 bits (NF4 and FP4).",
  "": "To compare two methods: adaptation.method=lora,full",
};
/** Groups and fields of a recipe that the study takes from a job. */
const GROUPS = ["training", "adaptation", "objective"];
const DATA = ["long_rows", "validation_share", "columns", "severity", "augmentation"];
/** Questions that set the method. */
const METHODS = ["methods", "layers", "bits"];
const TITLES = { cost: "Score against cost", forgotten: "Score against drift", earlier: "Score against the earlier task", line: "Score by value" };

/** The list of studies, and a form. */
export function Studies({ query }) {
  return html`
    <${Heading} title="Studies" />
    ${may("develop") && html`<${NewStudy} chosen=${query.get("job")} />`}
    <${ReportList} kind="studies" title="Studies" rowsField="training" columns=${["Base", "Varied"]}
      cells=${(each) => [each.models.map(shortName).join(", "), topicOf(each.request)]} empty="There are no studies yet. Choose a job and a question." />
  `;
}

const topicOf = ({ preset, vary }) => preset ?? vary.join(", ");

function NewStudy({ chosen }) {
  const preset = useSignal(QUESTIONS[0][0]);
  const jobs = useData(async (signal) => {
    const { jobs, next } = await call("GET", "/api/v1/jobs", { query: { limit: MOST_JOBS }, signal });
    return { next, found: jobs.filter((each) => each.customization_type === "FINE_TUNING" && each.details.sources?.length === 1) };
  });
  const { busy, error, run } = useAction(async (event) => {
    const { job, vary, seeds, minutes } = event.target.elements;
    const found = jobs.data.found.find((each) => each.id === job.value);
    const body = {
      ...settingsOf(found, preset.value, vary.value), seeds: Number(seeds.value),
      ...(minutes.value && { max_minutes: Number(minutes.value) }),
      ...(preset.value ? { preset: preset.value } : { vary: vary.value.split("\n").map((each) => each.trim()).filter(Boolean) }),
    };
    const made = await call("POST", "/api/v1/studies", { body });
    return link("studies", made.id);
  });
  if (jobs.data?.found.length === 0)
    return html`
      <${Empty} text=${`A study repeats a fine-tuning job on one file with other settings. ${jobs.data.next ? `None of the newest ${MOST_JOBS} jobs is such a job.` : "This account has no such job yet."}`}>
        <a class="button primary" href=${link("new")}>New job</a>
      <//>
    `;
  return html`
    <section class="box">
      <form onsubmit=${run}>
        <div class="fields">
          <${Field} id="job" label="Rows and settings of the job">
            <select id="job" name="job" required>
              ${(jobs.data?.found ?? []).map((each) => html`<option value=${each.id} selected=${[each.id, each.name].includes(chosen)}>${each.name}</option>`)}
            </select>
          <//>
          <${Field} id="preset" label="Question" help=${TRAININGS[preset.value]}><select id="preset" ...${bound(preset)}>${options(QUESTIONS)}</select><//>
          <${Field} id="vary" label="Varied fields" hidden=${preset.value !== ""} help="One field per line, with values: training.epochs=1,3">
            <textarea id="vary" name="vary" rows="3" class="code" spellcheck="false" />
          <//>
          <${Field} id="seeds" label="Trainings of each combination" help="With 3, differences include the chance of the training.">
            <input id="seeds" name="seeds" type="number" min="1" max="10" value="1" required />
          <//>
          <${Field} id="minutes" label="Time limit in minutes (optional)"><input id="minutes" name="minutes" type="number" min="1" step="any" /><//>
        </div>
        <${ErrorBox} error=${jobs.error} again=${jobs.read} /><${ErrorBox} error=${error} />
        <div class="actions"><button type="submit" class="primary" disabled=${busy || !jobs.data}>Start</button></div>
      </form>
    </section>
  `;
}

/** Return the fields of a study with rows, base and settings of a job. Questions about methods replace the job's method. */
function settingsOf({ base, recipe, details }, preset, vary) {
  const variesMethod = METHODS.includes(preset) || /^\s*adaptation\.method\s*=/m.test(vary);
  const groups = GROUPS.filter((group) => recipe[group] && !(group === "adaptation" && variesMethod));
  const settings = Object.fromEntries(groups.map((group) => [group, recipe[group]]));
  const data = Object.fromEntries(DATA.filter((name) => recipe.data?.[name] !== undefined).map((name) => [name, recipe.data[name]]));
  return { base, training: details.sources[0], settings: { ...settings, ...(Object.keys(data).length && { data }) } };
}

/** The page of one study. */
export const StudyPage = ({ params }) => html`
  <${ReportPage} kind="studies" id=${params.id} rowsField="training" noun="study" list=${["studies", "Studies"]} tab="Study"
    title=${({ request, models }) => `${topicOf(request)} on ${models.map(shortName).join(", ")}`}
    actions=${({ report }) => report?.keep && may("develop") && html`<${Keep} keep=${report.keep} name=${report.chosen} />`}
    renderReport=${({ report }) => html`<${Report} report=${report} />`} />
`;

function Report({ report }) {
  const { rows, table, verdict, remarks, pictures } = report;
  const columns = Object.keys(table);
  const cells = rows.map((row, index) => [
    row.name === report.chosen ? html`<strong>${row.name}</strong>` : row.name,
    ...columns.map((name, place) => (row.reason ? (place ? "" : row.reason) : table[name][index])),
  ]);
  return html`
    <div class="box note" id="summary">
      <p><strong>${verdict}</strong></p>
      ${remarks.map((each) => html`<p><${Said} text=${each} /></p>`)}
    </div>
    <${Table} caption="Configurations; the choice is bold" columns=${["", ...columns.map((name) => ({ name, kind: "number" }))]} rows=${cells} />
    <p class="help">
      A star marks configurations within chance of the best. Steps, CPU s and GB (memory) are of the training, trained counts the
      weights that change, MB is the stored model, ms is the time of an answer.
    </p>
    ${Object.entries(pictures).map(([name, { light, dark }]) => html`
      <${Section} title=${TITLES[name] ?? name}>
        <picture>
          <source media="(prefers-color-scheme: dark)" srcset=${addressOf(dark)} />
          <img src=${addressOf(light)} alt=${`${TITLES[name] ?? name}: the figures of the table`} class="study" />
        </picture>
      <//>
    `)}
  `;
}

const addressOf = (svg) => `data:image/svg+xml;charset=utf-8,${encodeURIComponent(svg)}`;

/** Train the choice as a custom model. */
function Keep({ keep, name }) {
  const { busy, error, run } = useAction(async () => {
    const model = `study-${new Date().toISOString().replace(/\D/g, "").slice(2, 14)}`;
    await call("POST", "/api/v1/jobs", { body: { ...keep, name: model, model_name: model } });
    return link("jobs", model);
  });
  return html`
    <button type="button" class="primary" disabled=${busy} title=${`Train ${name} as a model`} onclick=${run}>Keep the winner: ${name}</button>
    <${ErrorBox} error=${error} />
  `;
}
