// Replies of models, prepared for display without the DOM.

/** Why an answer ended early. */
export const ENDINGS = {
  length: "truncated at the maximum number of tokens or at the context length",
  content_filter: "stopped by a content filter",
};

/**
 * Split a text at entities `{label, start, end}` whose positions count code points, as Python does. Returns all parts
 * of the text as `{text, label}`; overlapping entities are left out.
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

/** Return `most` pairs of label and score, the highest score first, and the number of `further` labels. */
export function likeliest(scores, most = 20) {
  const all = Object.entries(scores ?? {})
    .filter(([, score]) => Number.isFinite(score))
    .sort((a, b) => b[1] - a[1]);
  return { shown: all.slice(0, most), further: Math.max(0, all.length - most) };
}

/** Return the text of `known` with the fewest changed letters; undefined if more than two and a third of the letters differ. */
export function nearestText(text, known) {
  const changes = new Map(known.map((each) => [each, changedLetters(text.toLowerCase(), each.toLowerCase())]));
  const [nearest] = [...known].sort((a, b) => changes.get(a) - changes.get(b));
  return changes.get(nearest) <= Math.max(2, text.length / 3) ? nearest : undefined;
}

/** Return the Levenshtein distance of two texts. */
function changedLetters(first, second) {
  let row = [...second, ""].map((_, at) => at);
  for (const [index, letter] of [...first].entries()) {
    const next = [index + 1];
    [...second].forEach((other, at) => next.push(Math.min(row[at] + (letter !== other), row[at + 1] + 1, next[at] + 1)));
    row = next;
  }
  return row.at(-1);
}

/** Return the cosine of two vectors; NaN for a zero vector or different lengths. */
export function cosine(first, second) {
  if (first.length !== second.length) return NaN;
  const dot = (a, b) => a.reduce((sum, value, index) => sum + value * b[index], 0);
  return dot(first, second) / Math.sqrt(dot(first, first) * dot(second, second));
}

/** An answer that grows by the chunks of a chat stream. Times are in milliseconds. */
export class StreamedAnswer {
  constructor(sent) {
    this.sent = sent;
    this.text = "";
    this.reasoning = "";
    this.tools = [];
    this.finish = null;
    this.usage = null;
    this.id = null;
    this.model = null;
    this.firstAt = null;
    this.lastAt = null;
  }

  /** Add a chunk of the OpenAI API and return its text and reasoning. */
  add(chunk, now) {
    if (chunk?.usage) this.usage = chunk.usage;
    this.id ??= chunk?.id ?? null;
    this.model ??= chunk?.model ?? null;
    const choice = chunk?.choices?.find((each) => (each.index ?? 0) === 0);
    if (!choice) return { text: "", reasoning: "" };
    if (choice.finish_reason) this.finish = choice.finish_reason;
    const text = textOf(choice.delta?.content);
    const reasoning = textOf(choice.delta?.reasoning_content);
    const calls = choice.delta?.tool_calls ?? [];
    for (const { index = 0, function: called } of calls) {
      const { name, given } = this.tools[index] ?? { name: "", given: "" };
      this.tools[index] = { name: name + textOf(called?.name), given: given + textOf(called?.arguments) };
    }
    if (text || reasoning || calls.length) {
      this.firstAt ??= now;
      this.lastAt = now;
    }
    this.text += text;
    this.reasoning += reasoning;
    return { text, reasoning };
  }

  get firstTokenSeconds() {
    return this.firstAt === null ? null : (this.firstAt - this.sent) / 1000;
  }

  /** Tokens per second after the first token; null for fewer than two tokens. */
  get tokensPerSecond() {
    const count = this.usage?.completion_tokens ?? 0;
    const seconds = ((this.lastAt ?? 0) - (this.firstAt ?? 0)) / 1000;
    return count > 1 && seconds > 0 ? (count - 1) / seconds : null;
  }
}

/** Return the turns of a request: the system prompt unless empty, the history and the new message. */
export function turnsOf(history, system, message) {
  const first = system.trim() ? [{ role: "system", content: system }] : [];
  return [...first, ...history, { role: "user", content: message }];
}

const textOf = (value) => (typeof value === "string" ? value : "");
