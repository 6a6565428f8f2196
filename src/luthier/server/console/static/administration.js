// Administration: users with their keys, and the audit log.

import { call, pathOf } from "./api.js";
import { age, dateOf, number, time } from "./format.js";
import {
  Age, Chip, DataTable, ErrorBox, Field, Heading, PageButtons, Pending, Section, Table, confirmed, html, link, options, toast, useAction,
  useData, useEffect, usePages, useRef, useSignal,
} from "./ui.js";

const ROLES = ["administrator", "developer", "invoker", "reviewer", "read-only"];
const ABOUT = {
  administrator: "everything", developer: "everything but administration", invoker: "queries models", reviewer: "rates answers", "read-only": "reads only",
};
const LIFETIMES = [["30", "30 days"], ["90", "90 days"], ["365", "a year"], ["", "no limit"]];
const PAGE = 50;
const UNUSED = { requests: 0, tokens: 0, models: new Set() };

/** The page. */
export function Administration() {
  const { data, error, read } = useData((signal) => call("GET", "/api/v1/users", { signal }));
  const made = useSignal(null);
  const usage = useData(usageOfUsers);
  const usedBy = ({ name }) => usage.data && (usage.data[name] ?? UNUSED);
  if (!data) return html`<${Pending} title="Administration" error=${error} read=${read} />`;
  const { users } = data;
  const keys = users.flatMap((user) => user.keys.map((each) => ({ ...each, user: user.name, isOwn: each.id === data.key })));
  return html`
    <${Heading} title="Administration"><a class="button" href=${link("usage")}>Usage and quotas</a><//>
    <${ErrorBox} error=${error} again=${read} />
    <h2>Users</h2>
    <${ErrorBox} error=${usage.error} again=${usage.read} />
    <${DataTable} caption="Users" rows=${users} columns=${[
      { name: "Name", value: (each) => each.name },
      { name: "Role", value: (each) => each.role, show: (each) => html`${each.role} <small class="soft">${ABOUT[each.role]}</small>` },
      { name: "State", value: (each) => (each.disabled ? "disabled" : "active") },
      { name: "Keys", kind: "number", value: (each) => each.keys.length },
      { name: "Requests, 30 days", kind: "number", value: (each) => usedBy(each)?.requests, show: (each) => number(usedBy(each)?.requests) },
      { name: "Tokens, 30 days", kind: "number", value: (each) => usedBy(each)?.tokens, show: (each) => number(usedBy(each)?.tokens) },
      { name: "Models, 30 days", value: (each) => [...(usedBy(each)?.models ?? [])].join(", ") || "–" },
      { name: "Created", kind: "nowrap", value: (each) => each.created, show: (each) => html`<${Age} at=${each.created} />` },
    ]} />
    <${NewUser} done=${read} />
    <h2>Keys</h2>
    <${Keys} keys=${keys} made=${made} done=${read} />
    <${NewKey} users=${users} made=${made} done=${read} />
    <${Secret} made=${made} />
    <${Audit} users=${users} />
  `;
}

/** Return requests, tokens and models of each user in the last 30 days. */
async function usageOfUsers(signal) {
  const { days } = await call("GET", "/api/v1/usage/days", { signal });
  const found = {};
  for (const { user, model, requests, prompt_tokens: read, generated_tokens: written } of days) {
    const total = (found[user] ??= { requests: 0, tokens: 0, models: new Set() });
    total.requests += requests;
    total.tokens += read + written;
    if (model) total.models.add(model);
  }
  return found;
}

function NewUser({ done }) {
  const { busy, error, run } = useAction(async (event) => {
    const { name, role } = event.target.elements;
    await call("POST", "/api/v1/users", { body: { name: name.value.trim(), role: role.value } });
    toast(`The user ${name.value.trim()} was created. Create a key next.`);
    event.target.reset();
    await done();
  });
  return html`
    <details class="rule">
      <summary>New user</summary>
      <form class="inside" onsubmit=${run}>
        <div class="fields">
          <${Field} id="user-name" label="Name"><input id="user-name" name="name" required maxlength="64" autocomplete="off" spellcheck="false" /><//>
          <${Field} id="user-role" label="Role">
            <select id="user-role" name="role" defaultValue="read-only">
              ${ROLES.map((each) => html`<option value=${each} selected=${each === "read-only"}>${each}: ${ABOUT[each]}</option>`)}
            </select>
          <//>
        </div>
        <${ErrorBox} error=${error} />
        <div class="actions"><button type="submit" class="primary" disabled=${busy}>Create the user</button></div>
      </form>
    </details>
  `;
}

/** A new key, which the server shows once. */
function Secret({ made }) {
  const box = useRef(null);
  useEffect(() => box.current?.focus(), [made.value]);
  return made.value && html`
    <div class="box warning" role="status" tabindex="-1" ref=${box}>
      <p>Copy the key now. The server does not show the key again.</p>
      <p><code id="secret">${made.value.api_key}</code></p>
      <button type="button" onclick=${() => (made.value = null)}>Hide the key</button>
    </div>
  `;
}

function Keys({ keys, made, done }) {
  const rotate = useAction(async (key) => {
    const text = `The new key of ${key.user} has the same role and purpose. The old key is valid until you revoke it.`;
    if (!(await confirmed({ title: "Create a key to replace this key?", text, verb: "Create the key" }))) return;
    const body = { label: key.label, ...(key.role && { role: key.role }) };
    if (key.expires) body.days = Math.max(1, Math.ceil((dateOf(key.expires) - dateOf(key.created)) / 86_400_000));
    made.value = await call("POST", `${pathOf("users", key.user)}/keys`, { body });
    await done();
  });
  const { error, run } = useAction(async (key) => {
    const own = key.isOwn ? " You are signed in with this key: the console signs you out." : "";
    const text = `Requests with the key ${key.begins}… of ${key.user} are refused from now on.${own}`;
    if (!(await confirmed({ title: "Revoke this key?", text, verb: "Revoke", danger: true }))) return;
    await call("DELETE", pathOf("keys", key.id));
    toast("The key was revoked.");
    await done();
  });
  return html`
    <${ErrorBox} error=${error} /><${ErrorBox} error=${rotate.error} />
    <${DataTable} caption="Keys" filter="user or label" rows=${keys} empty="There are no keys." columns=${[
      { name: "Key", value: (each) => each.begins, show: (each) => html`<code>${each.begins}…</code> ${each.label}${each.isOwn && html` <${Chip}>signed in<//>`}` },
      { name: "User", value: (each) => each.user },
      { name: "Kind", value: (each) => (each.kind === "api" ? "API key" : "access key") },
      { name: "Role", value: (each) => each.role ?? "–" },
      { name: "Expires", kind: "nowrap", value: (each) => each.expires, show: (each) => (each.expires ? time(each.expires) : "never") },
      { name: "Created", kind: "nowrap", value: (each) => each.created, show: (each) => age(each.created) },
      {
        name: "Revoke", hidden: true,
        show: (each) => html`
          ${each.kind === "api" && html`<button type="button" aria-label=${`Rotate the key ${each.begins} of ${each.user}`} onclick=${() => rotate.run(each)}>Rotate</button> `}
          <button type="button" class="danger" aria-label=${`Revoke the key ${each.begins} of ${each.user}`} onclick=${() => run(each)}>Revoke</button>
        `,
      },
    ]} />
  `;
}

function NewKey({ users, made, done }) {
  const { busy, error, run } = useAction(async (event) => {
    const { user, label, days } = event.target.elements;
    const body = { label: label.value.trim(), ...(days.value && { days: Number(days.value) }) };
    made.value = await call("POST", `${pathOf("users", user.value)}/keys`, { body });
    await done();
  });
  return html`
    <details class="rule" id="new-key">
      <summary>New key</summary>
      <form class="inside" onsubmit=${run}>
        <div class="fields">
          <${Field} id="key-user" label="User"><select id="key-user" name="user">${options(users.map((each) => [each.name, each.name]))}</select><//>
          <${Field} id="key-label" label="Purpose"><input id="key-label" name="label" maxlength="128" autocomplete="off" /><//>
          <${Field} id="key-days" label="Valid for"><select id="key-days" name="days">${options(LIFETIMES)}</select><//>
        </div>
        <${ErrorBox} error=${error} />
        <div class="actions"><button type="submit" class="primary" disabled=${busy}>Create the key</button></div>
      </form>
    </details>
  `;
}

function Audit({ users }) {
  const [user, action] = [useSignal(""), useSignal("")];
  const pages = usePages();
  const position = pages.value.at(-1);
  const query = { limit: PAGE, position, user: user.value, action: action.value.trim() };
  const { data, error, read } = useData((signal) => call("GET", "/api/v1/audit", { query, signal }), Object.values(query));
  const filtered = (value) => ({
    value: value.value,
    onchange: (event) => {
      value.value = event.target.value;
      pages.value = [null];
    },
  });
  return html`
    <${Section} title="Audit log">
      <div class="fields">
        <${Field} id="audit-user" label="User">
          <select id="audit-user" ...${filtered(user)}>${options([["", "all users"], ...users.map((each) => [each.name, each.name])])}</select>
        <//>
        <${Field} id="audit-action" label="Action"><input type="search" id="audit-action" placeholder="part of the name" ...${filtered(action)} /><//>
      </div>
      <${ErrorBox} error=${error} again=${read} />
      ${data && html`
        <${Table} caption="Audit log, newest first" columns=${[{ name: "Time", kind: "nowrap" }, "User", "Action", "Resource", "Outcome", "Address"]}
          rows=${data.entries.map((each) => [
            time(each.at), each.user || "–", html`<code>${each.action}</code>`, html`<code>${each.resource}</code>`,
            html`<${Chip} kind=${each.outcome === "ok" ? "good" : "error"}>${each.outcome}<//>`, each.address || "–",
          ])} empty="No entry fits. Change the filter." />
        <${PageButtons} pages=${pages} next=${data.next} noun="audit log" />
      `}
    <//>
  `;
}
