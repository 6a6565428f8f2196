// A field for rows: a file that is uploaded, one that was uploaded before, or an address.

import { call, upload } from "./api.js";
import { h, replace } from "./dom.js";
import { addressOf, remember } from "./files.js";
import { bytes, percent } from "./format.js";

const EARLIER = 100;

/**
 * @param {{id: string, label: string, help: string, signal: AbortSignal, onChange: function()}} options
 * @returns {{element: HTMLElement, address: function(): ?string, busy: function(): boolean, name: function(): string,
 *   refuse: function(string)}} `address` is null where nothing was chosen
 */
export function dataField({ id, label, help, signal, onChange }) {
  const state = { address: null, name: "", sending: null };
  const input = h("input", {
    type: "file",
    id: `${id}-file`,
    class: "visually-hidden",
    accept: ".jsonl,.json,.csv,.tsv,.txt,.md,.parquet,.gz,.zst",
    "aria-describedby": `${id}-help`,
  });
  const earlier = h("select", { id: `${id}-earlier` }, h("option", { value: "" }, "Uploaded earlier …"));
  const address = h("input", {
    type: "text",
    id: `${id}-address`,
    placeholder: "s3://bucket/key",
    spellcheck: "false",
    autocomplete: "off",
  });
  const status = h("p", { class: "help", role: "status" });
  const problem = h("p", { class: "problem", id: `${id}-problem`, hidden: true });
  const drop = h(
    "div",
    { class: "drop" },
    // The browser's own text beside the field says "No file chosen" once a file is uploaded.
    h("label", { class: "button" }, "Choose a file", input),
    h("span", { class: "soft" }, " or drop one here."),
    status,
  );

  const choose = (value, name, said) => {
    state.address = value;
    state.name = name;
    replace(status, said);
    problem.hidden = true;
    onChange();
  };

  /** Give up an upload for something else that was chosen; what it still says is not listened to. */
  const giveUp = () => {
    state.sending?.abort();
    state.sending = null;
    input.value = "";
  };

  async function send(file) {
    state.sending?.abort();
    const sending = new AbortController();
    const leave = () => sending.abort();
    signal.addEventListener("abort", leave);
    state.sending = sending;
    earlier.value = address.value = "";
    const bar = h("progress", { max: 1, value: 0, "aria-label": `Uploading ${file.name}` });
    const done = h("span", null, "0 %");
    const cancel = h("button", { type: "button", class: "quiet", onclick: () => sending.abort() }, "Cancel");
    choose(null, "", [`Uploading ${file.name} (${bytes(file.size)}) `, done, " ", cancel, bar]);
    try {
      const kept = await upload(file, {
        signal: sending.signal,
        onProgress: (sent, of) => {
          bar.value = of ? sent / of : 0;
          done.textContent = sent < of ? percent(sent / of) : "kept by the server …";
        },
      });
      if (state.sending !== sending) return;
      remember(kept);
      choose(addressOf(kept.id), kept.filename, `${kept.filename} is uploaded (${bytes(kept.bytes)}).`);
    } catch (error) {
      if (state.sending !== sending) return;
      if (error.name === "AbortError") choose(null, "", "The upload was cancelled.");
      else {
        choose(null, "", "");
        refuse(error.message);
      }
    } finally {
      signal.removeEventListener("abort", leave);
      if (state.sending === sending) {
        state.sending = null;
        input.value = "";
        onChange();
      }
    }
  }

  function refuse(text) {
    problem.textContent = text;
    problem.hidden = false;
  }

  input.addEventListener("change", () => input.files[0] && send(input.files[0]));
  for (const kind of ["dragenter", "dragover"]) {
    drop.addEventListener(kind, (event) => {
      event.preventDefault();
      drop.classList.add("over");
    });
  }
  drop.addEventListener("dragleave", () => drop.classList.remove("over"));
  drop.addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    const files = event.dataTransfer.files;
    if (files.length > 1) refuse("Drop one file. Several are named by an address that ends with a slash.");
    else if (files.length) send(files[0]);
  });
  earlier.addEventListener("change", () => {
    giveUp();
    address.value = "";
    const name = earlier.selectedOptions[0].textContent;
    if (earlier.value) choose(addressOf(earlier.value), name, `${name} is used.`);
    else choose(null, "", "");
  });
  address.addEventListener("change", () => {
    giveUp();
    earlier.value = "";
    const value = address.value.trim();
    choose(
      value || null,
      value.replace(/\/+$/, "").split("/").pop(),
      value ? "The rows at this address are used." : "",
    );
  });
  fillEarlier(earlier, signal);

  return {
    element: h(
      "div",
      { class: "data-field", role: "group", "aria-labelledby": `${id}-label` },
      h("label", { for: `${id}-file`, id: `${id}-label` }, label),
      drop,
      h(
        "div",
        { class: "fields others" },
        h(
          "div",
          null,
          h("label", { for: `${id}-earlier`, class: "visually-hidden" }, `${label}: uploaded earlier`),
          earlier,
        ),
        h("div", null, h("label", { for: `${id}-address`, class: "visually-hidden" }, `${label}: address`), address),
      ),
      problem,
      h("p", { class: "help", id: `${id}-help` }, help),
    ),
    address: () => state.address,
    busy: () => state.sending !== null,
    name: () => state.name,
    refuse,
  };
}

async function fillEarlier(select, signal) {
  try {
    const found = await call("GET", "/v1/files", { query: { limit: EARLIER, purpose: "fine-tune" }, signal });
    for (const file of found.data) {
      remember(file);
      select.append(h("option", { value: file.id }, `${file.filename} (${bytes(file.bytes)})`));
    }
  } catch {
    // Who may not list files can still upload one, or name an address.
    select.disabled = true;
  }
}
