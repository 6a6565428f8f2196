// Start of the console: sign-in and routing.

import { Administration } from "./administration.js";
import { InputError, call, key, may, messageOf, problemOfKey, rights, signIn, signOut } from "./api.js";
import { Data, Files } from "./data.js";
import { Deployment, Deployments } from "./deployments.js";
import { Comparison, Evaluation, Evaluations } from "./evaluate.js";
import { EvalRun } from "./eval_run.js";
import { HealthPage } from "./health.js";
import { Home } from "./home.js";
import { Job } from "./job.js";
import { JobDifferences } from "./job_differences.js";
import { Jobs } from "./jobs.js";
import { Model } from "./model.js";
import { Models } from "./models.js";
import { NewJob } from "./new_job.js";
import { ChooseModel, Playground } from "./playground.js";
import { Review } from "./review.js";
import { Studies, StudyPage } from "./studies.js";
import { ErrorBox, Heading, Overlays, html, link, render, signal, useAction, useEffect, useRef } from "./ui.js";
import { Usage } from "./usage.js";
import { useErrorBoundary } from "./vendor/preact-hooks.js";

/** Patterns of addresses with their pages. A segment with a colon is a parameter. */
const ROUTES = [
  ["home", Home],
  ["jobs", Jobs],
  ["jobs/:name", Job],
  ["jobs/:name/with/:other", JobDifferences],
  ["new", NewJob],
  ["data", Files],
  ["data/:address", Data],
  ["models", Models],
  ["models/:id", Model],
  ["playground", ChooseModel],
  ["playground/:id", Playground],
  ["evaluations", Evaluations],
  ["evaluations/:id", Evaluation],
  ["comparisons/:id", Comparison],
  ["studies", Studies],
  ["studies/:id", StudyPage],
  ["administration", Administration],
  ["evals/:eval/runs/:run", EvalRun],
  ["deployments", Deployments],
  ["deployments/:name", Deployment],
  ["health/:name", HealthPage],
  ["review", Review],
  ["usage", Usage],
];
/** Pages of the side bar with the permission that each needs; the pages of daily work come first. */
const DAILY = [
  ["home", "Home", "read"], ["data", "Data", "read"], ["jobs", "Jobs", "read"], ["models", "Models", "identify"], ["playground", "Playground", "invoke"],
  ["review", "Review", "review"],
];
const OTHERS = [
  ["evaluations", "Evaluate", "read"], ["studies", "Studies", "read"], ["deployments", "Deployments", "read"], ["usage", "Usage", "read"],
  ["administration", "Administration", "administer"],
];
/** Width from which the side bar is next to the page. */
const WIDE = window.matchMedia("(min-width: 60rem)");
const FOLDED = "luthier.folded";
const folded = signal(!WIDE.matches || sessionStorage.getItem(FOLDED) === "yes");
const REFUSED = "The server rejects this key. Check that the key is complete and belongs to this server.";
/** `who` is signed in; without `who`, the sign-in form shows `message`, or the page shows `error`. `isNew` until the stored key is tried. */
const session = signal({ who: null, message: "", error: null, isNew: key() !== null });
const address = signal(window.location.hash);
/** True while another key is tried and until a reload. */
let isSwitching = false;

/** Try a key. The key stays in use if the server accepts the key. */
async function enter(value) {
  const before = key();
  isSwitching = true;
  try {
    signIn(value);
    const who = await call("GET", "/api/v1/whoami");
    rights.value = new Set(who.permissions);
    // Only `#/` names a page.
    if (!window.location.hash.startsWith("#/")) history.replaceState(null, "", home());
    address.value = window.location.hash;
    session.value = { who, message: "", error: null };
  } catch (error) {
    // An unreachable server is no reason to forget a key that worked before.
    if (isRefusal(error) || before === null) signOut();
    else signIn(before);
    throw error;
  } finally {
    isSwitching = false;
  }
}

async function start() {
  if (!key()) return;
  try {
    await enter(key());
  } catch (error) {
    session.value = key() ? { who: null, error } : { who: null, message: textOf(error) };
  }
}

const isRefusal = (error) => error.status === 401 || error.status === 403;

const textOf = (error) => (isRefusal(error) ? REFUSED : messageOf(error));

const home = () => link(may("read") ? "home" : may("review") ? "review" : "models");

function leave() {
  // The next user starts at the first page.
  history.replaceState(null, "", window.location.pathname);
  // Requests and messages of this user end with the reload; the form appears after the reload only.
  isSwitching = true;
  signOut();
  window.location.reload();
}

function App() {
  const { who, message, error, isNew } = session.value;
  const main = useRef(null);
  const skip = (event) => {
    // The fragment of the address names the page.
    event.preventDefault();
    main.current.focus();
  };
  return html`
    <a class="skip" href="#main" onclick=${skip}>Skip to content</a>
    <header class="top">
      ${who && html`
        <button type="button" class="quiet" aria-expanded=${String(!folded.value)} aria-controls="navigation" onclick=${fold}>Menu</button>
      `}
      <a class="brand" href=${home()}>luthier</a>
      <div id="account" class="account">
        ${who && html`
          <span class="soft" title=${who.arn}>${who.account} · ${who.user}</span>
          <button type="button" class="quiet" onclick=${leave}>Sign out</button>
        `}
      </div>
    </header>
    <div class="frame">
      ${who && html`<${Menu} />`}
      <main id="main" tabindex="-1" ref=${main}>
        ${who ? html`<${Shown} hash=${address.value} />`
          : error ? html`<${Heading} title="luthier" /><${ErrorBox} error=${error} again=${start} />`
          : isNew ? html`<p class="soft">Loading …</p>`
          : html`<${SignIn} key=${message} message=${message} />`}
      </main>
    </div>
    <${Overlays} />
  `;
}

function fold() {
  folded.value = !folded.value;
  if (WIDE.matches) sessionStorage.setItem(FOLDED, folded.value ? "yes" : "no");
}

/** Pages that belong to another entry of the side bar. */
const WITHIN = { comparisons: "evaluations", evals: "evaluations", health: "deployments" };

function Menu() {
  const page = address.value.split(/[/?]/)[1];
  const shown = WITHIN[page] ?? page;
  const items = (pages) =>
    pages.filter(([, , permission]) => may(permission)).map(([section, label]) => html`
      <a href=${`#/${section}`} aria-current=${section === shown ? "page" : null}>${label}</a>
    `);
  const others = items(OTHERS);
  return html`
    <nav aria-label="Main" id="navigation" hidden=${folded.value}>
      ${may("develop") && html`<a class="button primary" href="#/new" aria-current=${shown === "new" ? "page" : null}>New job</a>`}
      ${items(DAILY)} ${others.length > 0 && html`<hr />`} ${others}
    </nav>
  `;
}

function SignIn({ message }) {
  const field = useRef(null);
  useEffect(() => {
    document.title = "Sign in – luthier";
    field.current.focus();
  }, []);
  const { busy, error, run } = useAction(async () => {
    const wrong = problemOfKey(field.current.value);
    field.current.focus();
    if (wrong) throw new InputError(wrong);
    await enter(field.current.value);
  });
  const problem = error ? textOf(error) : !busy && message;
  return html`
    <form class="sign-in" onsubmit=${run}>
      <h1>Sign in</h1>
      ${problem && html`<p class="box error" role="alert">${problem}</p>`}
      <label for="key">API key</label>
      <input type="password" id="key" autocomplete="off" spellcheck="false" required ref=${field}
        aria-describedby="key-help" />
      <p id="key-help" class="soft">
        <code>OPENAI_API_KEY</code> of the first start of <code>luthier serve</code>, in the terminal or in the file of keys that the
        terminal or log names, or a key created with <code>luthier admin</code>. The key stays in this tab until you close the tab.
      </p>
      <button type="submit" class="primary" disabled=${busy}>Sign in</button>
    </form>
  `;
}

/** The page that an address names. */
function Shown({ hash }) {
  const [path, query] = hash.replace(/^#\//, "").split("?");
  const given = path.split("/");
  for (const [pattern, page] of ROUTES) {
    const wanted = pattern.split("/");
    if (wanted.length !== given.length || wanted.some((part, index) => !part.startsWith(":") && part !== given[index]))
      continue;
    const params = Object.fromEntries(wanted.map((part, index) => [part.slice(1), decode(given[index])]));
    return html`<${Guarded} key=${path} page=${page} params=${params} query=${new URLSearchParams(query)} />`;
  }
  return html`<${Heading} title="Page not found" /><p><a href=${home()}>Go to the start page</a></p>`;
}

/** A page, or the error that stopped the page. */
function Guarded({ page, ...props }) {
  const [error, again] = useErrorBoundary((failure) => console.error(failure));
  return error ? html`<${ErrorBox} error=${error} again=${again} />` : html`<${page} ...${props} />`;
}

function decode(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

WIDE.addEventListener("change", () => (folded.value = !WIDE.matches || sessionStorage.getItem(FOLDED) === "yes"));
window.addEventListener("hashchange", () => {
  if (!session.value.who) return;
  const { hash } = window.location;
  // Other fragments are locations within the page.
  if (["", "#", "#/"].includes(hash)) window.location.replace(home());
  else if (hash.startsWith("#/")) {
    address.value = hash;
    if (!WIDE.matches) folded.value = true;
  }
});
window.addEventListener("luthier:signed-out", (event) => {
  if (!isSwitching) session.value = { who: null, message: event.detail };
});
render(html`<${App} />`, document.getElementById("app"));
start();
