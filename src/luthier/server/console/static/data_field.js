// A field for rows: a new file, a file that was uploaded before, or an address.

import { call, upload } from "./api.js";
import { addressOf, remember } from "./files.js";
import { bytes, percent, shortName } from "./format.js";
import { html, options, useData, useLeaving, useRef, useSignal } from "./ui.js";

const EARLIER = 100;
/** The value of a field: the address of the rows or null, a name to show, and the state of the upload. */
export const EMPTY = { address: null, name: "", said: "", busy: false, problem: "" };

/** Endings of files with rows. */
const ROWS = ".jsonl,.json,.csv,.tsv,.txt,.md,.parquet,.gz,.zst";

/** The field; `field` is a signal with its value, `onchange` is called after each choice. */
export function DataField({ id, label, help, field, accept = ROWS, onchange = () => {} }) {
  const over = useSignal(false);
  const sending = useRef(null);
  const [file, earlier, address] = [useRef(null), useRef(null), useRef(null)];
  const left = useLeaving();
  const files = useData(async (signal) => {
    const found = await call("GET", "/v1/files", { query: { limit: EARLIER, purpose: "fine-tune" }, signal });
    found.data.forEach(remember);
    return found.data;
  });
  const choose = (value) => {
    field.value = { ...EMPTY, ...value };
    onchange();
  };
  /** Stop an upload because the user chose something else. */
  const clear = (...others) => {
    sending.current?.abort();
    sending.current = null;
    for (const each of [file, ...others]) each.current.value = "";
  };

  const send = async (chosen) => {
    clear(earlier, address);
    const own = (sending.current = new AbortController());
    left.addEventListener("abort", () => own.abort(), { once: true });
    const progress = (sent, of) => {
      const said = html`<${Sending} file=${chosen} sent=${sent} of=${of} cancel=${() => own.abort()} />`;
      field.value = { ...EMPTY, busy: true, said };
    };
    progress(0, chosen.size);
    onchange();
    let found;
    try {
      const onProgress = (...sent) => sending.current === own && progress(...sent);
      const kept = await upload(chosen, { signal: own.signal, onProgress });
      remember(kept);
      const said = `${kept.filename} is uploaded (${bytes(kept.bytes)}).`;
      found = { address: addressOf(kept.id), name: kept.filename, said };
    } catch (error) {
      found = error.name === "AbortError" ? { said: "The upload was cancelled." } : { problem: error.message };
    }
    // Another choice was made during the upload.
    if (sending.current !== own) return;
    clear();
    choose(found);
  };
  const drop = (event) => {
    event.preventDefault();
    over.value = event.type !== "drop";
    if (event.type !== "drop") return;
    const dropped = event.dataTransfer.files;
    if (dropped.length > 1)
      field.value = { ...field.value, problem: "Drop one file. For several files, write an address that ends with a slash." };
    else if (dropped.length) send(dropped[0]);
  };
  const chooseEarlier = () => {
    clear(address);
    const name = earlier.current.selectedOptions[0].textContent;
    choose(earlier.current.value ? { address: addressOf(earlier.current.value), name, said: `Selected: ${name}.` } : {});
  };
  const chooseAddress = () => {
    clear(earlier);
    const value = address.current.value.trim();
    choose(value ? { address: value, name: shortName(value), said: "The file at this address is used." } : {});
  };
  const { said, problem } = field.value;
  return html`
    <div class="data-field" role="group" aria-labelledby=${`${id}-label`}>
      <label for=${`${id}-file`} id=${`${id}-label`}>${label}</label>
      <div class=${`drop ${over.value ? "over" : ""}`} ondragenter=${drop} ondragover=${drop} ondrop=${drop}
        ondragleave=${() => (over.value = false)}>
        <label class="button">
          Choose a file
          <input type="file" id=${`${id}-file`} class="visually-hidden" ref=${file} aria-describedby=${`${id}-help`}
            accept=${accept} onchange=${(event) => event.target.files[0] && send(event.target.files[0])} />
        </label>
        <span class="soft"> or drop a file here.</span>
        <p class="help" role="status">${said}</p>
      </div>
      <div class="fields others">
        <div>
          <label for=${`${id}-earlier`} class="visually-hidden">${label}: uploaded earlier</label>
          <select id=${`${id}-earlier`} ref=${earlier} disabled=${files.error !== null} onchange=${chooseEarlier}>
            <option value="">Uploaded earlier …</option>
            ${options((files.data ?? []).map((each) => [each.id, `${each.filename} (${bytes(each.bytes)})`]))}
          </select>
        </div>
        <div>
          <label for=${`${id}-address`} class="visually-hidden">${label}: address</label>
          <input type="text" id=${`${id}-address`} ref=${address} placeholder="s3://bucket/key" spellcheck="false"
            autocomplete="off" onchange=${chooseAddress} />
        </div>
      </div>
      ${problem && html`<p class="problem" id=${`${id}-problem`}>${problem}</p>`}
      <p class="help" id=${`${id}-help`}>${help}</p>
    </div>
  `;
}

function Sending({ file, sent, of, cancel }) {
  return html`
    Uploading ${file.name} (${bytes(file.size)}) <span>${sent < of ? percent(sent / of) : "The server stores the file …"}</span>
    <button type="button" class="quiet" onclick=${cancel}>Cancel</button>
    <progress max="1" value=${of ? sent / of : 0} aria-label=${`Uploading ${file.name}`} />
  `;
}
