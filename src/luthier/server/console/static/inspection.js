// What the data gate says: the verdict, each rule with its places, and rows as the model will learn them.

import { h } from "./dom.js";
import { withNames } from "./files.js";
import { number, words } from "./format.js";
import { facts } from "./table.js";

const VERDICTS = {
  passed: "The data can be learned from. Nothing speaks against it.",
  warnings: "The data can be learned from. Look at the warnings first.",
  refused: "The data cannot be learned from as they are. Mend the errors.",
};
const ORDER = ["error", "warning", "note"];
const MOST_ROWS = 3;
/** Tokens of a row that are shown: from its start, and before its end. */
const HEAD = 120;
const TAIL = 240;

/**
 * @param {string} verdict `passed`, `warnings` or `refused`
 * @param {Object} report as the API gives it
 * @returns {HTMLElement}
 */
export function inspectionView(verdict, report) {
  const splits = report.summaries?.learning?.splits ?? {};
  const rules = [...report.rules].sort((a, b) => ORDER.indexOf(a.severity) - ORDER.indexOf(b.severity));
  const count = (name) =>
    report.rules.filter((rule) => rule.severity === name).reduce((sum, rule) => sum + rule.count, 0);
  return h(
    "section",
    { class: "inspection" },
    h("h2", null, "Inspection"),
    h("p", { class: `box ${verdict}` }, h("strong", null, words(verdict)), ". ", VERDICTS[verdict]),
    facts([
      ["Training rows", number(report.rows.train)],
      ["Validation rows", report.rows.validation === undefined ? null : number(report.rows.validation)],
      ["Tokens to learn from", splits.train ? number(splits.train.tokens) : null],
      ["Errors", number(count("error"))],
      ["Warnings", number(count("warning"))],
      ["Taken for", report.forms?.train],
      ["Read for", report.base ? withNames(report.base) : null],
    ]),
    rules.length ? h("h3", null, "What was found") : null,
    rules.map(ruleView),
    Object.entries(splits).map(([split, found]) => rowsView(split, found.shown ?? [])),
    Object.keys(report.left_out ?? {}).length
      ? h(
          "p",
          { class: "soft" },
          "Not looked at: ",
          Object.entries(report.left_out)
            .map(([name, why]) => `${name} (${why})`)
            .join(", "),
          ".",
        )
      : null,
  );
}

function ruleView(rule) {
  const times = rule.count === 1 ? "once" : `${number(rule.count)} times`;
  return h(
    "details",
    { class: "rule", open: rule.severity === "error" },
    h(
      "summary",
      null,
      h("span", { class: `chip ${rule.severity}` }, words(rule.severity)),
      " ",
      rule.about,
      " ",
      h("span", { class: "soft" }, `${times} · `, h("code", null, rule.rule)),
    ),
    h(
      "div",
      { class: "inside" },
      rule.why ? h("p", null, h("strong", null, "Why: "), rule.why) : null,
      rule.fix ? h("p", null, h("strong", null, "Fix: "), rule.fix) : null,
      h(
        "ul",
        { class: "places" },
        rule.places.map((place) =>
          h(
            "li",
            null,
            h("code", null, placeOf(place)),
            " ",
            withNames(place.message ?? ""),
            // Of some rules each place has a fix of its own.
            place.fix && place.fix !== rule.fix ? [" ", h("strong", null, "Fix: "), withNames(place.fix)] : null,
            place.excerpt ? h("pre", { class: "row" }, place.excerpt) : null,
          ),
        ),
      ),
      rule.places.length < rule.count
        ? h("p", { class: "soft" }, `${number(rule.places.length)} of ${number(rule.count)} are shown.`)
        : null,
    ),
  );
}

function placeOf({ file, line }) {
  const name = withNames(file ?? "")
    .split("/")
    .pop();
  return line ? `${name}:${line}` : name;
}

function rowsView(split, rows) {
  if (!rows.length) return null;
  return h(
    "div",
    null,
    h("h3", null, split === "train" ? "Rows as the model reads them" : `Rows of ${split}`),
    h("p", { class: "soft" }, "What is marked is learned; the rest is read."),
    rows
      .slice(0, MOST_ROWS)
      .map((row) =>
        h(
          "figure",
          { class: "example" },
          h(
            "figcaption",
            { class: "soft" },
            placeOf(row),
            row.taught ? [" · learned: ", h("mark", null, String(row.taught))] : null,
          ),
          h("pre", { class: "row" }, tokensView(row.tokens ?? [], row.learned ?? [])),
        ),
      ),
  );
}

/** Tokens, with those that are learned marked, in as few pieces as there are changes. */
function tokensView(tokens, learned) {
  const cut = tokens.length > HEAD + TAIL;
  const parts = cut
    ? [
        [0, HEAD],
        [tokens.length - TAIL, tokens.length],
      ]
    : [[0, tokens.length]];
  const found = [];
  parts.forEach(([from, to], index) => {
    if (index) found.push(h("em", null, ` … ${number(tokens.length - HEAD - TAIL)} tokens … `));
    for (let at = from; at < to;) {
      let end = at;
      while (end < to && learned[end] === learned[at]) end += 1;
      const text = tokens.slice(at, end).join("");
      found.push(learned[at] ? h("mark", null, text) : text);
      at = end;
    }
  });
  return found;
}
