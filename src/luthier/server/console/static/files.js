// Names of uploaded files. Jobs know them by addresses; people know them as they called them.

import { call } from "./api.js";

const ADDRESS = /s3:\/\/luthier-files\/(file-[A-Za-z0-9]+)/g;
const names = new Map();
// Another account may be used next in this tab.
globalThis.addEventListener?.("luthier:signed-out", () => names.clear());

/**
 * @param {string} id of an uploaded file
 * @returns {string} how jobs name it
 */
export function addressOf(id) {
  return `s3://luthier-files/${id}`;
}

/**
 * Remember what a file is called.
 * @param {{id: string, filename: string}} file
 */
export function remember(file) {
  names.set(file.id, file.filename);
}

/**
 * Find out the names of all files that texts mention.
 * @param {Array<string>} texts
 * @param {AbortSignal} [signal]
 */
export async function learnNames(texts, signal) {
  const ids = new Set(texts.flatMap((text) => [...text.matchAll(ADDRESS)].map((found) => found[1])));
  const unknown = [...ids].filter((id) => !names.has(id));
  await Promise.all(
    unknown.map(async (id) => {
      try {
        remember(await call("GET", `/v1/files/${encodeURIComponent(id)}`, { signal }));
      } catch (error) {
        if (error.name === "AbortError") throw error;
        // A file that is gone, or that this key may not see, keeps its address; after other failures it is asked again.
        if (error.status === 403 || error.status === 404) names.set(id, null);
      }
    }),
  );
}

/**
 * A text with the names of files in place of their addresses, as far as they are known.
 * @param {string} text
 * @returns {string}
 */
export function withNames(text) {
  return text.replace(ADDRESS, (address, id) => names.get(id) ?? address);
}
