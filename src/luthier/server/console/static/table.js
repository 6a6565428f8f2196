// Tables. On a narrow screen each row is a block of lines, named by the columns (style.css).

import { h } from "./dom.js";

/**
 * @param {Object} options
 * @param {string} options.caption read out, and shown where `showCaption` is set
 * @param {boolean} [options.showCaption]
 * @param {Array<string|{name: string, kind?: string}>} options.columns `kind`: `number`, `code`, `nowrap`, `wide`
 * @param {Array<Array>} options.rows cells: text, numbers or nodes; the first of a row is its heading
 * @param {*} [options.empty] shown in place of a table without rows
 * @returns {HTMLElement}
 */
export function table({ caption, showCaption = false, columns, rows, empty = "There is nothing here yet." }) {
  if (!rows.length) return h("p", { class: "empty soft" }, empty);
  const kinds = columns.map((column) => column.kind ?? null);
  return h(
    // What scrolls can be reached by the keyboard.
    "div",
    { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    h(
      "table",
      null,
      h("caption", { class: showCaption ? null : "visually-hidden" }, caption),
      h(
        "thead",
        null,
        h(
          "tr",
          null,
          columns.map((column, index) => h("th", { scope: "col", class: kinds[index] }, column.name ?? column)),
        ),
      ),
      h(
        "tbody",
        null,
        rows.map((row) =>
          h(
            "tr",
            null,
            row.map((cell, index) =>
              index === 0
                ? h("th", { scope: "row", class: kinds[index], "data-name": nameOf(columns[index]) }, cell)
                : h("td", { class: kinds[index], "data-name": nameOf(columns[index]) }, cell),
            ),
          ),
        ),
      ),
    ),
  );
}

/** The name of a column as text; null for a column with a hidden name. */
function nameOf(column) {
  const name = column.name ?? column;
  return typeof name === "string" ? name : null;
}

/**
 * The heading of a column that needs none for who sees it.
 * @param {string} text
 * @returns {{name: HTMLElement}} a column
 */
export function hiddenName(text) {
  return { name: h("span", { class: "visually-hidden" }, text) };
}

/**
 * Names and values, as a list of facts.
 * @param {Array<[string, *]|null>} pairs those whose value is missing are left out
 * @returns {HTMLElement}
 */
export function facts(pairs) {
  const known = pairs.filter((pair) => pair && pair[1] !== null && pair[1] !== undefined && pair[1] !== "");
  return h(
    "dl",
    { class: "facts" },
    known.map(([name, value]) => h("div", null, h("dt", null, name), h("dd", null, value))),
  );
}
