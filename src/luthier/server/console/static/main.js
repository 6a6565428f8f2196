// Start of the console: sign-in and routing.

import { InputError, call, key, may, messageOf, problemOfKey, rights, signIn, signOut } from "./api.js";
import { EvalRun } from "./eval_run.js";
import { Home } from "./home.js";
import { Job } from "./job.js";
import { Jobs } from "./jobs.js";
import { Model } from "./model.js";
import { Models } from "./models.js";
import { NewJob } from "./new_job.js";
import { Playground } from "./playground.js";
import { ErrorBox, Heading, html, link, render, signal, useAction, useEffect, useRef } from "./ui.js";
import { Usage } from "./usage.js";
import { useErrorBoundary } from "./vendor/preact-hooks.js";

/** Patterns of addresses with their pages. A segment with a colon is a parameter. */
const ROUTES = [
  ["home", Home],
  ["jobs", Jobs],
  ["jobs/:name", Job],
  ["new", NewJob],
  ["models", Models],
  ["models/:id", Model],
  ["playground/:id", Playground],
  ["evals/:eval/runs/:run", EvalRun],
  ["usage", Usage],
];
const REFUSED = "The server rejects this key. Check that the key is complete and belongs to this server.";
/** `who` is signed in; without `who`, the sign-in form shows `message`, or the page shows `error`. */
const session = signal({ who: null, message: "", error: null });
const address = signal(window.location.hash);
let entering = false;

/** Try a key. The key stays in use if the server accepts the key. */
async function enter(value) {
  const before = key();
  entering = true;
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
    entering = false;
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

const home = () => link(may("read") ? "home" : "models");

function leave() {
  // The next user starts at the first page.
  history.replaceState(null, "", window.location.pathname);
  signOut();
}

function App() {
  const { who, message, error } = session.value;
  const main = useRef(null);
  const skip = (event) => {
    // The fragment of the address names the page.
    event.preventDefault();
    main.current.focus();
  };
  return html`
    <a class="skip" href="#main" onclick=${skip}>Skip to content</a>
    <header class="top">
      <a class="brand" href=${home()}>luthier</a>
      <${Menu} who=${who} />
      <div id="account" class="account">
        ${who && html`
          <span class="soft" title=${who.arn}>${who.account} · ${who.user}</span>
          <button type="button" class="quiet" onclick=${leave}>Sign out</button>
        `}
      </div>
    </header>
    <main id="main" tabindex="-1" ref=${main}>
      ${who ? html`<${Shown} hash=${address.value} />`
        : error ? html`<${Heading} title="luthier" /><${ErrorBox} error=${error} again=${start} />`
        : html`<${SignIn} key=${message} message=${message} />`}
    </main>
  `;
}

function Menu({ who }) {
  if (!who) return null;
  const shown = address.value.split(/[/?]/)[1];
  const item = (section, label) => {
    const current = section === shown || (section === "models" && shown === "playground");
    return html`<a href=${`#/${section}`} aria-current=${current ? "page" : null}>${label}</a>`;
  };
  return html`
    <nav aria-label="Main" id="navigation">
      ${may("read") && item("home", "Home")} ${may("read") && item("jobs", "Jobs")} ${may("develop") && item("new", "New job")}
      ${item("models", "Models")} ${may("read") && item("usage", "Usage")}
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
        The key that <code>luthier serve</code> printed as <code>OPENAI_API_KEY</code>, or a key created with${" "}
        <code>luthier admin</code>. The key stays in this tab until you close the tab.
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

window.addEventListener("hashchange", () => {
  if (!session.value.who) return;
  const { hash } = window.location;
  // Other fragments are locations within the page.
  if (["", "#", "#/"].includes(hash)) window.location.replace(home());
  else if (hash.startsWith("#/")) address.value = hash;
});
window.addEventListener("luthier:signed-out", (event) => {
  if (!entering) session.value = { who: null, message: event.detail };
});
render(html`<${App} />`, document.getElementById("app"));
start();
