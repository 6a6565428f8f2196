// The form that every model but one that writes is asked by, and files as they are sent.

import { h, replace } from "./dom.js";
import { errorBox } from "./router.js";

/** Bytes of a file that are sent: base64 is a third longer, and the server refuses larger bodies. */
const LARGEST_FILE = 18_000_000;

/**
 * A form with one button, and the answer or the error below.
 * @param {Element} root
 * @param {*} fields
 * @param {string} verb of the button
 * @param {AbortSignal} signal
 * @param {function(): Promise<*>} ask gives what is shown; a RangeError is told as it is
 */
export function asking(root, fields, verb, signal, ask) {
  const result = h("div", { "aria-live": "polite" });
  const button = h("button", { type: "submit", class: "primary" }, verb);
  const submit = async (event) => {
    event.preventDefault();
    button.disabled = true;
    replace(result, h("p", { class: "soft" }, "The model works…"));
    try {
      replace(result, await ask());
    } catch (error) {
      if (error.name === "AbortError") return;
      replace(
        result,
        error instanceof RangeError ? h("p", { class: "box error", role: "alert" }, error.message) : errorBox(error),
      );
    } finally {
      button.disabled = false;
    }
  };
  replace(root, h("form", { class: "ask", onsubmit: submit }, fields, h("div", { class: "actions" }, button)), result);
}

/**
 * A file as base64.
 * @param {?File} file
 * @param {string} noun what it should be
 * @returns {Promise<string>}
 */
export async function base64Of(file, noun) {
  if (!file) throw new RangeError(`Choose an ${noun} first.`.replace("an sound", "a sound"));
  if (file.size > LARGEST_FILE)
    throw new RangeError(`The ${noun} is larger than ${LARGEST_FILE / 1e6} MB. Choose a smaller one.`);
  let bytes;
  try {
    bytes = new Uint8Array(await file.arrayBuffer());
  } catch {
    throw new RangeError(`The ${noun} cannot be read: the file was moved or changed. Choose it again.`);
  }
  let text = "";
  // Arguments of a call are limited.
  for (let at = 0; at < bytes.length; at += 0x8000) text += String.fromCharCode(...bytes.subarray(at, at + 0x8000));
  return btoa(text);
}
