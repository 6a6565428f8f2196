// Everything that the console asks of the server, with the key of its user.

const KEY = "luthier.key";
/** Permissions of the key, as `GET /api/v1/whoami` names them. */
let permissions = new Set();
/** Events and answers that come in one piece of a stream at most, in characters. */
const LONGEST_EVENT = 1 << 24;

/** What the API refused or failed at, in its own words. */
export class ApiError extends Error {
  constructor(status, code, message, parameter) {
    super(message);
    this.name = "ApiError";
    this.status = status;
    this.code = code;
    this.parameter = parameter ?? null;
  }
}

/** @returns {?string} the key of this tab */
export function key() {
  return sessionStorage.getItem(KEY);
}

/**
 * Use a key in this tab until it is closed.
 * @param {string} value
 */
export function signIn(value) {
  sessionStorage.setItem(KEY, value.trim());
}

/**
 * Set what the key of this tab may do.
 * @param {Array<string>} allowed permissions, as `GET /api/v1/whoami` names them
 */
export function setRights(allowed) {
  permissions = new Set(allowed);
}

/**
 * @param {string} permission such as `develop`
 * @returns {boolean} whether the key has it; the server decides on each request
 */
export function may(permission) {
  return permissions.has(permission);
}

/**
 * What no key can have, as no header can: what else was copied with it, or what a program made of its letters.
 * @param {string} value
 * @returns {?string} what is wrong with it; null where it can be tried
 */
export function problemOfKey(value) {
  const odd = /[^\x20-\x7e]/u.exec(value.trim())?.[0];
  if (odd === undefined) return null;
  const shown = /[\p{L}\p{N}\p{P}\p{S}]/u.test(odd) ? ` “${odd}”` : " that is not shown";
  return `There is a character${shown} in this key, which no key has. Copy it again, whole, from where it was printed.`;
}

/**
 * Forget the key.
 * @param {string} [message] why, where the person did not ask for it
 */
export function signOut(message = "") {
  if (key() === null) return;
  sessionStorage.removeItem(KEY);
  window.dispatchEvent(new CustomEvent("luthier:signed-out", { detail: message }));
}

/**
 * Ask for one thing.
 * @param {string} method
 * @param {string} path such as `/api/v1/jobs`
 * @param {{body?: *, query?: Object, signal?: AbortSignal, accept?: string}} [options] `body` is sent as JSON, or
 *   as it is where it is FormData or a Blob; with `accept` other than JSON, the answer is a Blob
 * @returns {Promise<*>} the answer
 * @throws {ApiError}
 */
export async function call(method, path, { body, query, signal, accept } = {}) {
  const response = await request(method, path, { body, query, signal, accept });
  if (response.status === 204) return null;
  try {
    return accept && accept !== "application/json" ? await response.blob() : await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(response.status, "Unreadable", "The answer of the server was cut short. Try again.");
  }
}

/**
 * The events of one of our streams, until the server ends it.
 * @param {string} path
 * @param {{query?: Object, signal?: AbortSignal}} [options]
 * @yields {{id: string, kind: string, data: *}}
 */
export async function* events(path, { query, signal } = {}) {
  const response = await request("GET", path, { query, signal, accept: "text/event-stream" });
  for await (const event of read(response)) {
    let data;
    try {
      data = JSON.parse(event.data);
    } catch {
      continue;
    }
    yield { id: event.id, kind: event.event || "message", data };
  }
}

/**
 * The pieces of an answer that an OpenAI endpoint streams.
 * @param {string} path such as `/v1/chat/completions`
 * @param {Object} body `stream` is added
 * @param {{signal?: AbortSignal}} [options]
 * @yields {Object} chunks as OpenAI has them
 * @throws {ApiError} also for an error within the stream
 */
export async function* chat(path, body, { signal } = {}) {
  const sent = { ...body, stream: true };
  const response = await request("POST", path, { body: sent, signal, accept: "text/event-stream" });
  for await (const event of read(response)) {
    if (event.data === "[DONE]") return;
    let chunk;
    try {
      chunk = JSON.parse(event.data);
    } catch {
      throw new ApiError(
        response.status,
        "Unreadable",
        "What came in the middle of the answer cannot be read. Try again.",
      );
    }
    if (chunk.error) throw errorOf(response.status, chunk);
    yield chunk;
  }
}

/**
 * Upload a file to the OpenAI face; the server keeps it for jobs.
 * @param {File} file
 * @param {{purpose?: string, signal?: AbortSignal, onProgress?: function(number, number)}} [options] bytes sent, of all
 * @returns {Promise<Object>} the file object: `id`, `filename`, `bytes`
 * @throws {ApiError}
 */
export function upload(file, { purpose = "fine-tune", signal, onProgress } = {}) {
  // fetch() tells nothing of the bytes that were sent; XMLHttpRequest does.
  return new Promise((resolve, reject) => {
    const sending = new XMLHttpRequest();
    const form = new FormData();
    form.append("purpose", purpose);
    form.append("file", file);
    const abort = () => sending.abort();
    if (signal?.aborted) {
      reject(new DOMException("The page was left.", "AbortError"));
      return;
    }
    signal?.addEventListener("abort", abort, { once: true });
    sending.open("POST", "/v1/files");
    sending.setRequestHeader("Authorization", `Bearer ${key() ?? ""}`);
    sending.upload.onprogress = (event) => onProgress?.(event.loaded, event.total);
    sending.onload = () => {
      let answer = null;
      try {
        answer = JSON.parse(sending.responseText);
      } catch {
        // What follows says that there is no answer.
      }
      if (sending.status < 300 && answer) {
        resolve(answer);
        return;
      }
      if (sending.status === 401) expired(key());
      reject(errorOf(sending.status, answer));
    };
    sending.onerror = () => reject(unreachable());
    sending.onabort = () => reject(new DOMException("The upload was stopped.", "AbortError"));
    sending.onloadend = () => signal?.removeEventListener("abort", abort);
    sending.send(form);
  });
}

/**
 * What to show of an error.
 * @param {Error} error
 * @returns {string}
 */
export function messageOf(error) {
  if (error instanceof ApiError) return error.message;
  return `The console failed: ${error?.message ?? error}. Reload the page.`;
}

async function request(method, path, { body, query, signal, accept = "application/json" }) {
  const used = key();
  const url = new URL(path, window.location.origin);
  for (const [name, value] of Object.entries(query ?? {})) {
    if (value !== null && value !== undefined && value !== "") url.searchParams.set(name, value);
  }
  const headers = { Authorization: `Bearer ${used ?? ""}`, Accept: accept };
  // Pages and their refreshing are no use of the API: the server counts them as no request of the account.
  if (method === "GET") headers["X-Luthier-Console"] = "1";
  let sent = body;
  if (body !== undefined && !(body instanceof FormData) && !(body instanceof Blob)) {
    headers["Content-Type"] = "application/json";
    sent = JSON.stringify(body);
  }
  let response;
  try {
    response = await fetch(url, {
      method,
      headers,
      body: sent,
      signal,
      cache: "no-store",
      credentials: "omit",
      redirect: "error",
      referrerPolicy: "no-referrer",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw unreachable();
  }
  if (response.ok) return response;
  const answer = await response.json().catch(() => null);
  if (response.status === 401) expired(used);
  else if (response.status === 403 && !path.endsWith("/whoami")) await checkKey(used, signal);
  else if (response.status === 403) expired(used);
  throw errorOf(response.status, answer);
}

/** A 403 is told of a key that opens nothing, and of one that may not do this; `whoami` tells them apart. */
async function checkKey(used, signal) {
  await request("GET", "/api/v1/whoami", { signal }).catch((error) => {
    if (error.name === "AbortError") throw error;
  });
}

function expired(used) {
  // What was asked with an older key says nothing of the one that is used now.
  if (used === key()) signOut("The server does not take this key, or takes it no longer. Sign in with another one.");
}

function unreachable() {
  return new ApiError(0, "Unreachable", "The server does not answer. Check that it runs, then try again.");
}

function errorOf(status, answer) {
  const error = answer?.error;
  const message = error?.message ?? `The server answered with status ${status} and no explanation.`;
  return new ApiError(status, error?.code ?? "Unknown", message, error?.parameter ?? error?.param);
}

/** Server-sent events as the standard has them (HTML, section 9.2.6), without reconnecting. */
async function* read(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let event = { id: "", event: "", data: [] };
  try {
    for (;;) {
      let piece;
      try {
        piece = await reader.read();
      } catch (error) {
        if (error.name === "AbortError") throw error;
        throw new ApiError(0, "Interrupted", "The connection to the server was interrupted.");
      }
      if (piece.done) return;
      rest += piece.value;
      if (rest.length > LONGEST_EVENT) throw new ApiError(0, "TooLong", "The server sent a line without end.");
      const lines = rest.split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (event.data.length) yield { ...event, data: event.data.join("\n") };
          event = { id: event.id, event: "", data: [] };
          continue;
        }
        const at = line.indexOf(":");
        const field = at < 0 ? line : line.slice(0, at);
        const value = at < 0 ? "" : line.slice(at + 1).replace(/^ /, "");
        if (field === "data") event.data.push(value);
        else if (field === "event" || field === "id") event[field] = value;
      }
    }
  } finally {
    // Ends the request, also where who reads has stopped in the middle.
    reader.cancel().catch(() => {});
  }
}
