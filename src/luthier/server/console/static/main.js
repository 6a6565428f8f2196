// The start of the console: signs its user in, and shows the page that the address names.

import { call, key, may, messageOf, problemOfKey, setRights, signIn, signOut } from "./api.js";
import { h, replace } from "./dom.js";
import { errorBox, home, show, stop } from "./router.js";

const root = document.getElementById("main");
const navigation = document.getElementById("navigation");
const account = document.getElementById("account");
let signingIn = false;

function showSignIn(message = "") {
  stop();
  signingIn = true;
  document.title = "Sign in – luthier";
  navigation.hidden = true;
  replace(account);
  const field = h("input", {
    type: "password",
    id: "key",
    name: "key",
    autocomplete: "off",
    spellcheck: "false",
    required: true,
    "aria-describedby": "key-help",
  });
  const problem = h("p", { class: "box error", role: "alert", hidden: !message }, message);
  const button = h("button", { type: "submit", class: "primary" }, "Sign in");
  const submit = async (event) => {
    event.preventDefault();
    button.disabled = true;
    try {
      const wrong = problemOfKey(field.value);
      problem.textContent = wrong ?? "";
      if (!wrong) await enter(field.value);
    } catch (error) {
      problem.textContent = refusal(error);
    }
    problem.hidden = !problem.textContent;
    button.disabled = false;
    if (!problem.hidden && field.isConnected) field.focus();
  };
  replace(
    root,
    h(
      "form",
      { class: "sign-in", onsubmit: submit },
      h("h1", null, "Sign in"),
      problem,
      h("label", { for: "key" }, "API key"),
      field,
      h(
        "p",
        { id: "key-help", class: "soft" },
        "The key that ",
        h("code", null, "luthier serve"),
        " printed as ",
        h("code", null, "OPENAI_API_KEY"),
        ", or one that ",
        h("code", null, "luthier admin"),
        " made. It stays in this tab, and is forgotten when you close it.",
      ),
      button,
    ),
  );
  field.focus();
}

function isRefusal(error) {
  return error.status === 401 || error.status === 403;
}

function refusal(error) {
  return isRefusal(error)
    ? "The server does not take this key. Check that it is whole, and of this server."
    : messageOf(error);
}

/** Try a key, and use it where it opens an account. */
async function enter(value) {
  const before = key();
  signingIn = true;
  signIn(value);
  let who;
  try {
    who = await call("GET", "/api/v1/whoami");
  } catch (error) {
    // A server that is away says nothing of the key that was good before, which is kept.
    if (isRefusal(error) || before === null) signOut();
    else signIn(before);
    throw error;
  }
  signingIn = false;
  welcome(who);
}

function welcome(who) {
  setRights(who.permissions);
  navigation.hidden = false;
  for (const each of navigation.querySelectorAll("[data-permission]")) each.hidden = !may(each.dataset.permission);
  document.querySelector(".brand").href = home();
  replace(
    account,
    h("span", { class: "soft", title: who.arn }, `${who.account} · ${who.user}`),
    h("button", { type: "button", class: "quiet", onclick: leaveAccount }, "Sign out"),
  );
  // Only `#/` names a page; what else an address ends with would leave the form standing here.
  if (!window.location.hash.startsWith("#/")) history.replaceState(null, "", home());
  show(root);
}

function leaveAccount() {
  // The next user starts at a page of their own.
  history.replaceState(null, "", window.location.pathname);
  signOut();
}

async function start() {
  if (!key()) {
    showSignIn();
    return;
  }
  try {
    await enter(key());
  } catch (error) {
    if (key()) replace(root, h("h1", null, "luthier"), errorBox(error, start));
    else showSignIn(refusal(error));
  }
}

document.querySelector(".skip").addEventListener("click", (event) => {
  // The fragment of the address names the page.
  event.preventDefault();
  root.focus();
});

window.addEventListener("hashchange", () => {
  if (key() && !signingIn) show(root);
});
window.addEventListener("luthier:signed-out", (event) => {
  if (!signingIn) showSignIn(event.detail);
});
start();
