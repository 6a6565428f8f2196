// Which page is shown: routes by the fragment of the address, each page a module that is loaded when wanted.

import { may, messageOf } from "./api.js";
import { announce, h, replace } from "./dom.js";

/** Patterns of routes, the titles and modules of their pages. A segment with a colon is a parameter. */
const ROUTES = [
  ["jobs", "Jobs", () => import("./jobs.js")],
  ["jobs/:name", "Job", () => import("./job.js")],
  ["new", "New job", () => import("./new_job.js")],
  ["models", "Models", () => import("./models.js")],
  ["models/:id", "Model", () => import("./model.js")],
  ["playground/:id", "Playground", () => import("./playground.js")],
  ["evals/:eval/runs/:run", "Eval run", () => import("./eval_run.js")],
  ["usage", "Usage", () => import("./usage.js")],
];

let leave = null;
/** The page that was shown last, without its query. */
let shown = null;

/** @returns {string} address of the first page that the key may see */
export function home() {
  return link(may("read") ? "jobs" : "models");
}

/**
 * The address of a page.
 * @param {...string} segments such as `"jobs", name`
 * @returns {string}
 */
export function link(...segments) {
  return `#/${segments.map(encodeURIComponent).join("/")}`;
}

/**
 * Go to a page.
 * @param {...string} segments
 */
export function go(...segments) {
  window.location.hash = link(...segments);
}

/**
 * Show the page that the address names, say its title and move the focus to it; the page before is told by its
 * signal that it is left. A page's `render` ends when the page stands: what keeps it up to date goes on beside it.
 * @param {Element} root
 */
export async function show(root) {
  const hash = window.location.hash;
  if (hash === "" || hash === "#" || hash === "#/") {
    window.location.replace(home());
    return;
  }
  // Other fragments are places within the page.
  if (!hash.startsWith("#/")) return;
  stop();
  const path = hash.split("?")[0];
  // A control that shows the same page in another way keeps the focus.
  const field = path === shown && root.contains(document.activeElement) ? document.activeElement.id : "";
  shown = path;
  const found = match(hash);
  if (!found) {
    document.title = "Not found – luthier";
    replace(root, h("h1", null, "There is no such page"), h("p", null, h("a", { href: home() }, "To the first page")));
    arrive(root, field);
    return;
  }
  const leaving = new AbortController();
  leave = leaving;
  const { title, load, params, section } = found;
  document.title = `${title} – luthier`;
  markSection(section);
  // Each page has an element of its own: one that is left late draws where nobody looks.
  const page = h("div", { class: "page" });
  replace(root, page);
  try {
    const module = await load();
    if (leaving.signal.aborted) return;
    await module.render(page, params, leaving.signal);
    if (!leaving.signal.aborted) arrive(page, field);
  } catch (error) {
    if (leaving.signal.aborted || error?.name === "AbortError") return;
    if (!(error instanceof Error && error.name === "ApiError")) console.error(error);
    replace(
      page,
      h("h1", null, title),
      errorBox(error, () => show(root)),
    );
    arrive(page, field);
  }
}

/** Tell people who hear the page or use the keyboard that another one is there. */
function arrive(page, field) {
  announce(document.title);
  // Who was quicker than the rest of the page stays where they are.
  if (page.contains(document.activeElement)) return;
  const same = field ? document.getElementById(field) : null;
  const heading = page.querySelector("h1");
  heading?.setAttribute("tabindex", "-1");
  (same ?? heading)?.focus();
}

/** Leave the page that is shown. */
export function stop() {
  leave?.abort();
  leave = null;
}

/**
 * An error as pages show it.
 * @param {Error} error
 * @param {?function()} [again] tries again
 * @returns {HTMLElement}
 */
export function errorBox(error, again = null) {
  return h(
    "div",
    { class: "box error", role: "alert" },
    h("p", null, messageOf(error)),
    error?.parameter ? h("p", { class: "soft" }, "It is about ", h("code", null, error.parameter), ".") : null,
    again ? h("button", { type: "button", onclick: again }, "Try again") : null,
  );
}

/**
 * Wait for some seconds, and then until the tab is looked at where it is hidden.
 * @param {number} seconds 3 at least, however little is asked for
 * @param {AbortSignal} signal
 * @returns {Promise<boolean>} whether the page is still there
 */
export async function pause(seconds, signal) {
  await wait(Math.max(3, seconds) * 1000, signal);
  // Nobody looks at a hidden tab: it asks nothing of the server until it is seen.
  while (document.hidden && !signal.aborted) {
    await new Promise((resolve) => {
      const done = () => {
        document.removeEventListener("visibilitychange", done);
        signal.removeEventListener("abort", done);
        resolve();
      };
      document.addEventListener("visibilitychange", done);
      signal.addEventListener("abort", done);
    });
  }
  return !signal.aborted;
}

function wait(milliseconds, signal) {
  return new Promise((resolve) => {
    if (signal.aborted) {
      resolve();
      return;
    }
    const done = () => {
      clearTimeout(timer);
      signal.removeEventListener("abort", done);
      resolve();
    };
    const timer = setTimeout(done, milliseconds);
    signal.addEventListener("abort", done);
  });
}

function match(hash) {
  const [path, query] = hash.replace(/^#\//, "").split("?");
  const given = path.split("/");
  for (const [pattern, title, load] of ROUTES) {
    const wanted = pattern.split("/");
    if (wanted.length !== given.length) continue;
    const params = { query: new URLSearchParams(query ?? "") };
    const fits = wanted.every((part, index) => {
      if (!part.startsWith(":")) return part === given[index];
      params[part.slice(1)] = decode(given[index]);
      return params[part.slice(1)] !== "";
    });
    if (fits) return { title, load, params, section: wanted[0] };
  }
  return null;
}

function decode(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

function markSection(section) {
  const shown = section === "playground" ? "models" : section;
  for (const each of document.querySelectorAll("#navigation a")) {
    if (each.getAttribute("href") === `#/${shown}`) each.setAttribute("aria-current", "page");
    else each.removeAttribute("aria-current");
  }
}
