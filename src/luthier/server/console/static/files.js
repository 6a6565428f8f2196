// Names of uploaded files. Jobs store the addresses of files.

import { call } from "./api.js";
import { shortName } from "./format.js";

const ADDRESS = /s3:\/\/luthier-files\/(file-[A-Za-z0-9]+)/g;
const names = new Map();
// The next user of the tab may have another account.
globalThis.addEventListener?.("luthier:signed-out", () => names.clear());

/** Return the address of an uploaded file. */
export function addressOf(id) {
  return `s3://luthier-files/${id}`;
}

/** Return the id of an uploaded file, or undefined for another address. */
export const idOf = (address) => new RegExp(`^${ADDRESS.source}$`).exec(address)?.[1];

/** Store the name of a file object. */
export function remember(file) {
  names.set(file.id, file.filename);
}

/** Load the names of all files that texts mention. */
export async function learnNames(texts, signal) {
  const ids = new Set(texts.flatMap((text) => [...text.matchAll(ADDRESS)].map((found) => found[1])));
  const load = async (id) => {
    try {
      remember(await call("GET", `/v1/files/${encodeURIComponent(id)}`, { signal }));
    } catch (error) {
      if (error.name === "AbortError") throw error;
      // A file that was deleted or that the key may not read keeps its address. Other failures are tried again.
      if (error.status === 403 || error.status === 404) names.set(id, null);
    }
  };
  await Promise.all([...ids].filter((id) => !names.has(id)).map(load));
}

/** Return a text with the known names of files instead of their addresses. */
export const withNames = (text) => text.replace(ADDRESS, (address, id) => names.get(id) ?? address);

/**
 * Return a text with the names of a job's training files. Jobs store the files of the first source as `t01-00001.csv`,
 * `t01-00002.csv` and so on. Files of a folder keep these names.
 */
export const withSources = (text, sources) =>
  text.replace(/\bt(\d{2,})-\d{5}(\.\w+)*/g, (own, number) => {
    const address = sources[number - 1] ?? "/";
    return address.endsWith("/") ? own : shortName(withNames(address));
  });

/** Return the name of a file with the line, or with the number of a row that is no line. */
export function placeOf({ file, line, row }) {
  const name = shortName(withNames(file ?? ""));
  return row ? `${name} row ${row}` : line ? `${name}:${line}` : name;
}

/** Return a message of the server as a complete sentence. */
export function sentence(message) {
  const text = withNames(message).trim();
  return `${text.charAt(0).toUpperCase()}${text.slice(1)}${/[.!?]$/.test(text) ? "" : "."}`;
}
