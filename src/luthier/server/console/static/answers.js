// What models answer, made ready to be shown: no element is touched here, so that it is tested without a browser.

/**
 * Cut a text at the entities that a tagger found in it.
 * @param {string} text as it was sent
 * @param {Array<{label: string, start: number, end: number}>} entities places in code points, as Python counts
 * @returns {Array<{text: string, label: ?string}>} the whole text in order; what overlaps an earlier one is left out
 */
export function spansOf(text, entities) {
  // An emoji is one code point and two units of a JavaScript string.
  const letters = Array.from(text);
  const found = [];
  let at = 0;
  for (const { label, start, end } of [...entities].sort((a, b) => a.start - b.start)) {
    if (!(start >= at && end > start && end <= letters.length)) continue;
    if (start > at) found.push({ text: letters.slice(at, start).join(""), label: null });
    found.push({ text: letters.slice(start, end).join(""), label: String(label) });
    at = end;
  }
  if (at < letters.length) found.push({ text: letters.slice(at).join(""), label: null });
  return found;
}

/**
 * Scores by class, the likeliest first.
 * @param {Object<string, number>} scores
 * @param {number} [most]
 * @returns {{shown: Array<[string, number]>, further: number}} `further` classes are left out
 */
export function likeliest(scores, most = 20) {
  const all = Object.entries(scores ?? {})
    .filter(([, score]) => typeof score === "number" && Number.isFinite(score))
    .sort((a, b) => b[1] - a[1]);
  return { shown: all.slice(0, most), further: Math.max(0, all.length - most) };
}

/**
 * @param {Array<number>} first
 * @param {Array<number>} second as long
 * @returns {number} cosine of the angle between both, from -1 to 1; NaN where one is zero or another length
 */
export function cosine(first, second) {
  if (first.length !== second.length) return NaN;
  let [dot, one, two] = [0, 0, 0];
  for (let i = 0; i < first.length; i += 1) {
    dot += first[i] * second[i];
    one += first[i] ** 2;
    two += second[i] ** 2;
  }
  return dot / Math.sqrt(one * two);
}

/** An answer that grows by the chunks of a chat stream. */
export class StreamedAnswer {
  /** @param {number} sent when the question was sent, in milliseconds */
  constructor(sent) {
    this.sent = sent;
    this.text = "";
    this.reasoning = "";
    /** Names of the tools that the model calls, with what it gives them. */
    this.tools = [];
    this.finish = null;
    this.usage = null;
    this.firstAt = null;
    this.lastAt = null;
  }

  /**
   * Add what one chunk brought.
   * @param {Object} chunk as OpenAI has it
   * @param {number} now in milliseconds
   * @returns {{text: string, reasoning: string}} what is new
   */
  add(chunk, now) {
    if (chunk?.usage) this.usage = chunk.usage;
    const choice = chunk?.choices?.find((each) => (each.index ?? 0) === 0);
    if (!choice) return { text: "", reasoning: "" };
    if (choice.finish_reason) this.finish = choice.finish_reason;
    const text = textOf(choice.delta?.content);
    const reasoning = textOf(choice.delta?.reasoning_content);
    const calls = choice.delta?.tool_calls ?? [];
    for (const call of calls) {
      const place = call.index ?? 0;
      const known = this.tools[place] ?? { name: "", given: "" };
      this.tools[place] = {
        name: known.name + textOf(call.function?.name),
        given: known.given + textOf(call.function?.arguments),
      };
    }
    if (text || reasoning || calls.length) {
      this.firstAt ??= now;
      this.lastAt = now;
    }
    this.text += text;
    this.reasoning += reasoning;
    return { text, reasoning };
  }

  /** @returns {?number} seconds to the first token */
  get firstTokenSeconds() {
    return this.firstAt === null ? null : (this.firstAt - this.sent) / 1000;
  }

  /** @returns {?number} tokens a second after the first; none of fewer than two */
  get tokensPerSecond() {
    const count = this.usage?.completion_tokens ?? 0;
    const seconds = ((this.lastAt ?? 0) - (this.firstAt ?? 0)) / 1000;
    return count > 1 && seconds > 0 ? (count - 1) / seconds : null;
  }
}

/** Why an answer ended, where a person should know it. */
export const ENDINGS = {
  length: "cut at the most tokens that were asked for, or at the end of the model's context",
  content_filter: "held back by a filter",
};

/**
 * The turns that are sent with a new message.
 * @param {Array<{role: string, content: string}>} history
 * @param {string} system instructions; left out where empty
 * @param {string} message
 * @returns {Array<{role: string, content: string}>}
 */
export function turnsOf(history, system, message) {
  const first = system.trim() ? [{ role: "system", content: system }] : [];
  return [...first, ...history, { role: "user", content: message }];
}

function textOf(value) {
  return typeof value === "string" ? value : "";
}
