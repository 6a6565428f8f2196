import { h, replace } from "./dom.js";

/** Draw the page. */
export async function render(root) {
  replace(root, h("h1", null, "usage"));
}
