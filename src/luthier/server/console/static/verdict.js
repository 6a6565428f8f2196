// The verdict on a finished job in one sentence, its picture, and three rows with the answers of both models.

import { call, pathOf } from "./api.js";
import { number, scoreText, words } from "./format.js";
import { Empty, ErrorBox, ExampleCard, announce, html, link, useAction, useSignal } from "./ui.js";

/** Half of a 95 % interval, in standard errors. */
const HALF = 1.96;
/** Standard errors from which a difference counts (luthier/evaluation/significance.py). */
const CHANCE = 2;
/** Characters of a question or an answer that are shown. */
const LONGEST_TEXT = 400;
const HEADLINES = {
  learned: "Better", still_improving: "Better, with room for more steps", overfitted: "Better", declined: "Better",
  hardly_learned: "Hardly better", worse: "No better",
};
const COLOURS = { learned: "good", still_improving: "good", overfitted: "good", declined: "warning", hardly_learned: "warning", worse: "error" };

/**
 * Return `{text, kind, measure, bars}` from the certificate's `metrics`, or null. `bars` are `{name, value, low, high, kind}`
 * of the model before training, the best simple method and the tuned model; `shares` and `errors` are sets of measures.
 */
export function verdictOf(metrics, rows, { shares, errors }) {
  const { outcome, before = {}, kept = {} } = metrics.verdict ?? {};
  if (!outcome) return null;
  if (outcome === "unmeasured")
    return { text: "Not measured: the job had no validation rows. Add a validation file and train again.", kind: "note", bars: [] };
  const { comparison } = metrics;
  const names = Object.keys(kept).filter((name) => typeof kept[name] === "number");
  const measure = names.find((name) => name === comparison?.measure) ?? names.find((name) => name !== "loss") ?? "loss";
  // Certificates of earlier versions have the measure absolute_error.
  const isLess = errors.has(measure) || (!shares.has(measure) && /(loss|error)$/.test(measure));
  const show = (value) => scoreText(measure, value, { shares, errors });
  const gain = (a, b) => (isLess ? b - a : a - b);
  const count = comparison?.rows ?? rows;
  const bar = (name, value, kind) => ({ name, kind, value, shown: show(value), ...intervalOf(measure, value, count) });
  const rival = measure === comparison?.measure &&
    comparison.baselines.reduce((best, each) => (best && gain(each.score, best.score) <= 0 ? best : each), null);
  const [first, last] = [before[measure], kept[measure]];
  const hasFirst = typeof first === "number";
  const bars = [
    hasFirst && bar("Before training", first, "base"),
    rival && bar(`Best simple method: ${rival.name}`, rival.score, "rival"),
    bar("This model", last, "tuned"),
  ].filter(Boolean);
  // The server compares beyond chance and has no verdict if the model is clearly better.
  const doubt = rival && comparison.verdict;
  const isWorse = doubt && gain(last, rival.score) < -CHANCE * rival.error;
  const fell = hasFirst && gain(last, first) < 0;
  const headline = isWorse ? "Worse than simple methods" : doubt ? "Not clearly better than simple methods"
    : fell ? HEADLINES.worse : HEADLINES[outcome];
  const noun = measure === "loss" ? "the loss" : words(measure).toLowerCase().replace("mean ", "");
  const course = !hasFirst ? "is" : show(first) === show(last) ? "stays at" : `went from ${show(first)} to`;
  const sample = count ? ` on ${number(count)} rows` : "";
  const other = rival ? `; simple methods reach ${show(rival.score)}` : "";
  return {
    text: `${headline}: ${noun} ${course} ${show(last)}${sample}${other}.`,
    kind: isWorse ? "error" : doubt ? "warning" : COLOURS[fell ? "worse" : outcome], measure: words(measure), bars, isLess,
  };
}

/** Return the 95 % interval of a share of right rows, with two right and two wrong rows added (Agresti and Coull 1998), as the server does. */
function intervalOf(measure, share, rows) {
  if (measure !== "accuracy" || !rows) return { low: null, high: null };
  const middle = (share * rows + 2) / (rows + 4);
  const half = HALF * Math.sqrt((middle * (1 - middle)) / (rows + 4));
  return { low: Math.max(0, middle - half), high: Math.min(1, middle + half) };
}

/** Bars with 95 % intervals. */
export function ScoreBars({ verdict }) {
  const { bars, measure, isLess } = verdict;
  if (bars.length < 2) return null;
  const top = Math.max(...bars.map((each) => Math.max(each.value, each.high ?? 0))) || 1;
  const most = !isLess && top <= 1 ? 1 : top;
  const at = (value) => `${Math.min(100, Math.max(0, (100 * value) / most))}%`;
  const range = ({ low, high }) => low !== null && `, 95 % interval ${number(low)} to ${number(high)}`;
  return html`
    <figure class="chart">
      <figcaption>${measure}${isLess ? ", lower is better" : ""}</figcaption>
      <div class="bars" role="list">
        ${bars.map((each) => html`
          <div role="listitem">
            <bdi class="name">${each.name}</bdi>
            <svg class=${each.kind} aria-hidden="true" height="22" width="100%">
              <rect y="3" height="16" width=${at(each.value)} rx="3" />
              ${each.low !== null && html`<line x1=${at(each.low)} x2=${at(each.high)} y1="11" y2="11" />`}
            </svg>
            <span class="figure">${each.shown}<span class="visually-hidden">${range(each)}</span></span>
          </div>
        `)}
      </div>
      ${bars.some((each) => each.low !== null) && html`<p class="help">Lines are 95 % intervals.</p>`}
    </figure>
  `;
}

/** Return the rows with a text or a conversation: jobs of earlier versions have other rows, such as words with tags. */
export const readable = (rows) => (rows ?? []).filter((row) => typeof row.text === "string" || Array.isArray(row.messages));

/** Rows that the model has not learned, with the answers of the base and of the model after a click. */
export function HeldOut({ job, rows: all, base, refitted }) {
  const rows = readable(all);
  const answers = useSignal(null);
  const { busy, error, run } = useAction(async () => {
    announce("Both models answer …");
    answers.value = await Promise.all(rows.map(async (row) => ({
      before: base?.writes && row.messages ? await replyOf(base.id, row) : null,
      after: await answerOf(job.model_name, row),
    })));
    announce("The answers are complete.");
  });
  if (!rows.length)
    return html`
      <${Empty} text=${`${refitted ? "The model learned the held-out rows after the measurement." : "No held-out row has a short text and a wanted answer."} Try your own text.`}>
        <a class="button" href=${link("playground", job.model_name)}>Open the playground</a>
      <//>
    `;
  const before = (index) => answers.value?.[index].before ?? (!base?.writes ? "The base model has no labels." : answers.value ? "–" : "…");
  const same = (text, row) => text.trim().toLowerCase() === textOf(row.wanted).trim().toLowerCase();
  return html`
    <p class="soft">The model has not learned these rows.</p>
    ${rows.map((row, index) => {
      const after = answers.value?.[index].after ?? "…";
      const kind = answers.value && (same(after, row) ? "good" : null);
      const parts = [["Before", shorten(before(index))], ["After", shorten(after), kind], ["Wanted", textOf(row.wanted)]];
      return html`<${ExampleCard} title=${questionOf(row)} parts=${parts} />`;
    })}
    <${ErrorBox} error=${error} />
    ${!answers.value && html`
      <button type="button" class="primary" disabled=${busy} onclick=${run}>${busy ? "Waiting for the models …" : "Show the answers"}</button>
    `}
  `;
}

async function answerOf(model, row) {
  if (row.messages) {
    const found = await replyOf(model, row).catch((error) => (error.status === 400 ? null : Promise.reject(error)));
    if (found !== null) return found;
  }
  const inputs = [{ text: row.text ?? row.messages.at(-1).content }];
  const { answers: [{ label, rating, score, tags, text }] } = await call("POST", `${pathOf("models", model)}/predictions`, { body: { inputs } });
  return textOf(label ?? rating ?? tags ?? text ?? score);
}

async function replyOf(model, { messages, wanted }) {
  const body = { model, messages, temperature: 0, max_tokens: Math.min(512, 64 + textOf(wanted).length) };
  return (await call("POST", "/v1/chat/completions", { body })).choices[0].message.content ?? "";
}

const questionOf = ({ text, messages }) => shorten(text ?? messages.map((each) => each.content).join("\n"));

const textOf = (value) => (typeof value === "number" ? number(value) : Array.isArray(value) ? value.join(" ") : String(value ?? "–"));

export const shorten = (text) => (text.length > LONGEST_TEXT ? `${text.slice(0, LONGEST_TEXT)}…` : text);
