// Requests to the server with the key of the user.

import { signal } from "./vendor/signals.js";

const KEY = "luthier.key";
/** Longest part of a stream, in characters. */
const LONGEST_EVENT = 1 << 24;
/** Longest wait before a throttled request is sent again, in seconds. */
const LONGEST_WAIT = 30;
/** Permissions of the key, as `GET /api/v1/whoami` names them. */
export const rights = signal(new Set());

/** An error of the API. */
export class ApiError extends Error {
  constructor(status, code, message, parameter = null) {
    super(message);
    Object.assign(this, { name: "ApiError", status, code, parameter });
  }
}

/** Input that cannot be sent. */
export class InputError extends Error {
  constructor(message, parameter = null) {
    super(message);
    Object.assign(this, { name: "InputError", parameter });
  }
}

/** Return the key of this tab, or null. */
export const key = () => sessionStorage.getItem(KEY);

/** Use a key until the tab is closed. */
export function signIn(value) {
  sessionStorage.setItem(KEY, value.trim());
}

/** Forget the key and report the reason, if the user did not ask to sign out. */
export function signOut(reason = "") {
  if (key() === null) return;
  // Pages send what waits while requests still have the key.
  window.dispatchEvent(new Event("luthier:signing-out"));
  // The next user of the tab starts without the forms of this user.
  sessionStorage.clear();
  window.dispatchEvent(new CustomEvent("luthier:signed-out", { detail: reason }));
}

/** Return whether the key has a permission such as `develop`. The server decides on each request. */
export const may = (permission) => rights.value.has(permission);

/** Return what is wrong with a key that no HTTP header can carry; null if the key can be tried. */
export function problemOfKey(value) {
  const odd = /[^\x20-\x7e]/u.exec(value.trim())?.[0];
  if (odd === undefined) return null;
  const shown = /[\p{L}\p{N}\p{P}\p{S}]/u.test(odd) ? `the character “${odd}”` : "an invisible character";
  return `The key contains ${shown}, which is not allowed in a key. Copy the key again.`;
}

/** Return the text of an error for the user. */
export function messageOf(error) {
  if (error instanceof ApiError || error instanceof InputError) return error.message;
  return `The console failed: ${error?.message ?? error}. Reload the page.`;
}

/** Return the address of an object such as a model in the API. */
export const pathOf = (kind, id) => `/api/v1/${kind}/${encodeURIComponent(id)}`;

/** Send a request with `{body, query, signal, keepalive}` and return the JSON of the answer; a Blob if `accept` is given. */
export async function call(method, path, { accept, ...options } = {}) {
  const response = await request(method, path, { accept, ...options });
  if (response.status === 204) return null;
  try {
    return accept ? await response.blob() : await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(response.status, "InvalidResponse", "The response is incomplete. Try again.");
  }
}

/** Yield the events `{id, kind, data}` of one of our streams until the server ends the stream. */
export async function* events(path, { query, signal: left } = {}) {
  const response = await request("GET", path, { query, signal: left, accept: "text/event-stream" });
  for await (const { id, event, data } of read(response)) {
    const found = parsed(data);
    if (found !== undefined) yield { id, kind: event || "message", data: found };
  }
}

/** Yield the chunks of an answer that an OpenAI endpoint streams. Errors within the stream are thrown. */
export async function* chat(path, body, { signal: left } = {}) {
  const response = await request("POST", path, { body: { ...body, stream: true }, signal: left, accept: "text/event-stream" });
  for await (const { data } of read(response)) {
    if (data === "[DONE]") return;
    const chunk = parsed(data);
    if (chunk === undefined) throw new ApiError(response.status, "InvalidResponse", "A part of the response is not valid JSON. Try again.");
    if (chunk.error) throw errorOf(response.status, chunk);
    yield chunk;
  }
}

/** Upload a file and return its file object. `onProgress` gets the bytes sent and the bytes of all. */
export function upload(file, { signal: left, onProgress }) {
  // fetch() does not report the bytes that were sent.
  return new Promise((resolve, reject) => {
    const sending = new XMLHttpRequest();
    const form = new FormData();
    const purpose = "fine-tune";
    form.append("purpose", purpose);
    form.append("file", file);
    sending.open("POST", "/v1/files");
    sending.setRequestHeader("Authorization", `Bearer ${key() ?? ""}`);
    sending.upload.onprogress = (event) => onProgress(event.loaded, event.total);
    sending.onload = () => {
      const answer = parsed(sending.responseText);
      if (sending.status < 300 && answer) return resolve(answer);
      if (sending.status === 401) expired(key());
      return reject(errorOf(sending.status, answer));
    };
    sending.onerror = () => reject(unreachable());
    sending.onabort = () => reject(new DOMException("The upload was cancelled.", "AbortError"));
    left.addEventListener("abort", () => sending.abort(), { once: true });
    sending.send(form);
  });
}

async function request(method, path, { body, query, signal: left, keepalive, accept = "application/json", tries = 3 }) {
  const used = key();
  const url = new URL(path, window.location.origin);
  for (const [name, value] of Object.entries(query ?? {})) if ((value ?? "") !== "") url.searchParams.set(name, value);
  const headers = { Authorization: `Bearer ${used ?? ""}`, Accept: accept };
  // The server does not count the console's own requests as requests of the account.
  if (method === "GET") headers["X-Luthier-Console"] = "1";
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const safe = { cache: "no-store", credentials: "omit", redirect: "error", referrerPolicy: "no-referrer" };
  let response;
  try {
    response = await fetch(url, { method, headers, body: JSON.stringify(body), signal: left, keepalive, ...safe });
  } catch (error) {
    throw error.name === "AbortError" ? error : unreachable();
  }
  if (response.ok) return response;
  const seconds = Number(response.headers.get("Retry-After"));
  if (response.status === 429 && tries > 1 && seconds > 0 && seconds <= LONGEST_WAIT) {
    await new Promise((done) => {
      setTimeout(done, 1000 * seconds);
      left?.addEventListener("abort", done, { once: true });
    });
    return request(method, path, { body, query, signal: left, keepalive, accept, tries: tries - 1 });
  }
  const answer = await response.json().catch(() => null);
  if (response.status === 401) expired(used);
  // A 403 means an unknown key or a missing permission; whoami distinguishes the two.
  if (response.status === 403 && path.endsWith("/whoami")) expired(used);
  else if (response.status === 403)
    await request("GET", "/api/v1/whoami", { signal: left }).catch((error) => {
      if (error.name === "AbortError") throw error;
    });
  throw errorOf(response.status, answer);
}

function expired(used) {
  // The answer to an earlier key does not matter for the current key.
  if (used === key()) signOut("The server rejects this key. Sign in with another key.");
}

function unreachable() {
  return new ApiError(0, "Unreachable", "The server is unreachable. Check that the server is running, then try again.");
}

function errorOf(status, answer) {
  const { message, code = "Unknown", parameter, param } = answer?.error ?? {};
  return new ApiError(status, code, message ?? `The server returned status ${status} without a message.`, parameter ?? param);
}

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

/** Yield server-sent events as the HTML standard defines them (section 9.2.6), without reconnecting. */
async function* read(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let event = { id: "", event: "", data: [] };
  try {
    for (;;) {
      const piece = await reader.read().catch((error) => {
        throw error.name === "AbortError" ? error : new ApiError(0, "Interrupted", "The connection to the server was interrupted.");
      });
      if (piece.done) return;
      rest += piece.value;
      if (rest.length > LONGEST_EVENT) throw new ApiError(0, "TooLong", "The server sent an event that is too long.");
      const lines = rest.split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (event.data.length) yield { ...event, data: event.data.join("\n") };
          event = { id: event.id, event: "", data: [] };
          continue;
        }
        const [, field, value = ""] = /^([^:]*)(?:: ?(.*))?$/s.exec(line);
        if (field === "data") event.data.push(value);
        else if (field === "event" || field === "id") event[field] = value;
      }
    }
  } finally {
    // Ends the request, also if the reader stopped early.
    reader.cancel().catch(() => {});
  }
}
