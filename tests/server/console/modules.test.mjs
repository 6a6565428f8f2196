// Logic of the console's modules that needs no browser; tests/server/console/test_pages.py runs it by `node --test`.

import assert from "node:assert/strict";
import { test } from "node:test";

const folder = process.env.CONSOLE_MODULES;
const { StreamedAnswer, cosine, likeliest, nearestText, spansOf, turnsOf } = await import(`${folder}/answers.js`);
const { chosenFor, withColumn } = await import(`${folder}/columns.js`);
const { roundsBetween, writes } = await import(`${folder}/models.js`);
const { Queue } = await import(`${folder}/review.js`);
const { datesBetween } = await import(`${folder}/usage.js`);
const { pythonString, shellWord, snippets } = await import(`${folder}/snippets.js`);
const { age, bytes, duration, number, percent, scoreText, shortName } = await import(`${folder}/format.js`);
const { differences, flattened } = await import(`${folder}/job_differences.js`);
const { labelsByFile } = await import(`${folder}/label_issues.js`);
const { widen } = await import(`${folder}/charts.js`);

test("a column is read as a key, ignored, or read automatically", () => {
  let columns = withColumn({}, "utterance", "text");
  columns = withColumn(withColumn(columns, "intent", "label"), "day", "ignore:");
  assert.deepEqual(columns, { text: "utterance", label: "intent", day: "" });
  assert.deepEqual(["utterance", "intent", "day", "x"].map((name) => chosenFor(columns, name)), ["text", "label", "ignore:", ""]);
  assert.deepEqual(withColumn(columns, "topic", "label"), { text: "utterance", day: "", label: "topic" });
  assert.deepEqual(withColumn(columns, "day", ""), { text: "utterance", label: "intent" });
});

const joined = (spans) => spans.map((each) => each.text).join("");

test("tags are cut at code points, and nothing of the text is lost", () => {
  const text = "The 😀 polyposis coli <img src=x onerror=alert(1)> שלום";
  const start = Array.from(text).indexOf("p");
  const spans = spansOf(text, [{ label: "Disease", start, end: start + 14 }]);
  assert.deepEqual(
    spans.find((each) => each.label),
    { text: "polyposis coli", label: "Disease" },
  );
  assert.equal(joined(spans), text);
});

test("entities that overlap, lie outside or are no numbers leave the text whole", () => {
  const wrong = [
    { label: "A", start: 0, end: 3 },
    { label: "B", start: 2, end: 5 },
    { label: "C", start: 4, end: 400 },
    { label: "D", start: -3, end: 1 },
    { label: "E", start: 4, end: 4 },
    { label: "F", start: NaN, end: 5 },
    { label: "G" },
  ];
  const spans = spansOf("abcdef", wrong);
  assert.deepEqual(spans, [
    { text: "abc", label: "A" },
    { text: "def", label: null },
  ]);
  assert.deepEqual(spansOf("", []), []);
});

test("scores are shown from the likeliest, and those left out are counted", () => {
  const scores = Object.fromEntries(Array.from({ length: 77 }, (_, n) => [`label ${n}`, n / 100]));
  const { shown, further } = likeliest(scores, 5);
  assert.deepEqual(
    shown.map(([name]) => name),
    ["label 76", "label 75", "label 74", "label 73", "label 72"],
  );
  assert.equal(further, 72);
  assert.deepEqual(likeliest({ a: null, b: "x", c: 1 }).shown, [["c", 1]]);
});

test("the nearest text has the fewest changed letters, in any letter case", () => {
  const labels = ["card_arrival", "card_linking", "exchange_rate"];
  assert.equal(nearestText("card_arival", labels), "card_arrival");
  assert.equal(nearestText("Exchange rate", labels), "exchange_rate");
  assert.equal(nearestText("lost_card", labels), undefined);
  assert.equal(nearestText("", ["b", "ab"]), "b");
  assert.equal(nearestText("a", []), undefined);
});

test("the chunks of a stream become one answer with its counts and times", () => {
  const answer = new StreamedAnswer(1000);
  const chunk = (delta, more = {}) => ({ choices: [{ index: 0, delta, finish_reason: null, ...more }], usage: null });
  assert.deepEqual(answer.add(chunk({ role: "assistant", content: "" }), 1200), { text: "", reasoning: "" });
  assert.equal(answer.firstTokenSeconds, null);
  answer.add(chunk({ reasoning_content: "hm" }), 1500);
  answer.add(chunk({ content: "Hel" }), 2000);
  assert.deepEqual(answer.add(chunk({ content: "lo 😀" }), 2500), { text: "lo 😀", reasoning: "" });
  answer.add({ choices: [{ index: 1, delta: { content: "of another answer" } }] }, 2600);
  answer.add(chunk({}, { finish_reason: "length" }), 2700);
  answer.add({ choices: [], usage: { prompt_tokens: 9, completion_tokens: 5 } }, 2800);
  assert.equal(answer.text, "Hello 😀");
  assert.equal(answer.reasoning, "hm");
  assert.equal(answer.finish, "length");
  assert.equal(answer.firstTokenSeconds, 0.5);
  assert.equal(answer.tokensPerSecond, 4);
});

test("calls of tools are put together, and chunks of other forms change nothing", () => {
  const answer = new StreamedAnswer(0);
  const call = (part) => answer.add({ choices: [{ delta: { tool_calls: [part] } }] }, 10);
  call({ index: 0, function: { name: "weather", arguments: '{"city"' } });
  call({ index: 0, function: { arguments: ': "Hue"}' } });
  assert.deepEqual(answer.tools, [{ name: "weather", given: '{"city": "Hue"}' }]);
  for (const odd of [
    null,
    undefined,
    {},
    { choices: null },
    { choices: [{}] },
    { choices: [{ delta: { content: 5 } }] },
  ])
    answer.add(odd, 20);
  assert.equal(answer.text, "");
});

test("empty instructions are not sent", () => {
  const history = [
    { role: "user", content: "a" },
    { role: "assistant", content: "b" },
  ];
  assert.deepEqual(
    turnsOf(history, "  ", "c").map((each) => each.role),
    ["user", "assistant", "user"],
  );
  assert.deepEqual(turnsOf([], "Be brief.", "c")[0], { role: "system", content: "Be brief." });
});

test("cosines", () => {
  assert.equal(cosine([1, 0], [1, 0]), 1);
  assert.equal(cosine([1, 0], [0, 2]), 0);
  assert.equal(cosine([1, 2], [-1, -2]).toFixed(6), "-1.000000");
  assert.ok(Number.isNaN(cosine([0, 0], [1, 1])) && Number.isNaN(cosine([1], [1, 2])));
});

test("what is pasted into a shell or Python stays one text", () => {
  assert.equal(shellWord("it's $HOME `x`"), "'it'\\''s $HOME `x`'");
  assert.equal(shellWord("base:name"), "base:name");
  assert.equal(pythonString('a"b\n'), '"a\\"b\\n"');
});

test("each model is called with its own id and this server's address", () => {
  const origin = "https://luthier.example:8443";
  const arn = "arn:aws:bedrock:eu-west-1:000000000000:custom-model/x.y/abc123def456";
  const model = (abilities) => ({ id: "abc123def456", name: "support", arn, kind: "custom", abilities });
  const of = (abilities) => snippets({ origin, model: model(abilities), storedId: "base:support" });
  const writer = of({ does: ["write"], reads: ["text"] });
  assert.deepEqual(
    writer.map((each) => each.name),
    ["openai client", "curl", "boto3", "CLI"],
  );
  assert.ok(writer.slice(0, 3).every((each) => each.code.includes(origin)));
  assert.ok(writer[2].code.includes("eu-west-1") && writer[2].code.includes(arn));
  const sounds = of({ does: ["predict"], reads: ["audio"] });
  assert.ok(sounds[0].code.includes("audio/wav") && sounds[0].code.includes("/api/v1/models/abc123def456/predictions"));
  assert.deepEqual(of({ does: [], reads: ["text"] }), []);
  assert.deepEqual(snippets({ origin, model: model(null), storedId: "base:support" }), []);
});

test("of too many days the newest are kept", () => {
  assert.deepEqual(datesBetween("2024-02-28", "2024-03-01", 9), ["2024-02-28", "2024-02-29", "2024-03-01"]);
  const days = datesBetween("2000-01-01", "2026-01-01", 400);
  assert.deepEqual([days.length, days[0], days.at(-1)], [400, "2024-11-28", "2026-01-01"]);
  assert.deepEqual(datesBetween("2026-01-02", "2026-01-01", 9), []);
  assert.deepEqual(datesBetween("", "2026-01-01", 9), []);
});

test("long lists of models are asked for less often, and only who writes chats", () => {
  assert.deepEqual([0, 200, 201, 1000, 10_000].map(roundsBetween), [1, 1, 2, 5, 20]);
  assert.deepEqual([{ writes: true }, { writes: false }, { base_kind: "causal_lm" }].map(writes), [true, false, false]);
});

test("numbers, sizes and times in words", () => {
  assert.equal(number(1234567), "1,234,567");
  assert.equal(number(0.00012345), "1.23e-4");
  assert.equal(number(1234.5), "1,235");
  assert.equal(number(NaN), "–");
  assert.equal(bytes(999), "999 bytes");
  assert.equal(bytes(1_342_710), "1.34 MB");
  assert.equal(duration(125), "2 min 5 s");
  assert.equal(duration(null), "–");
  assert.deepEqual([7199, 7140, 3600, 86399, 172799, 172800, 90000].map(duration), [
    "2 h",
    "1 h 59 min",
    "1 h",
    "1 d",
    "2 d",
    "2 d",
    "1 d 1 h",
  ]);
  assert.deepEqual([999.6, 999_499, 999_999, 999_999_999, 0].map(bytes), ["1 kB", "999 kB", "1 MB", "1 GB", "0 bytes"]);
  assert.equal(percent(0.045), "4.5 %");
  assert.equal(shortName("arn:aws:bedrock:us-east-1::foundation-model/x.y"), "x.y");
  assert.equal(age("no date"), "–");
});

test("a score is a share or a number by its name and range", () => {
  const sets = { shares: new Set(["cer"]), errors: new Set(["cer", "mean_absolute_error"]) };
  const show = (name, value) => scoreText(name, value, sets).replace("\u00a0", " ");
  assert.deepEqual([show("accuracy", 0.884), show("recall_at_1", 0.9996), show("cer", 1.2)], ["88.4 %", "100.0 %", "120.0 %"]);
  assert.deepEqual([show("psnr", 25.3), show("pearson", 0.8), show("mean_absolute_error", 0.5)], ["25.3", "0.8", "0.5"]);
  assert.equal(show("accuracy", undefined), "–");
});

test("axes have room, also if all values are equal but for rounding", () => {
  const wide = widen([0.6931471805599453, 0.6931471805599454], 0.06);
  assert.ok(wide[0] < 0.4 && wide[1] > 1);
  assert.deepEqual(widen([0, 0], 0), [-0.5, 0.5]);
  assert.deepEqual(widen([-100, 0], 0.1), [-110, 10]);
});

test("what is refused stands at the field that it is about", async () => {
  const { fieldOf } = await import(`${folder}/new_job.js`);
  assert.equal(fieldOf("settings.training.seed"), "settings");
  assert.equal(fieldOf("settings.training.epochs"), "training.epochs");
  assert.equal(fieldOf("settings.adaptation.method"), "adaptation.method");
  assert.equal(fieldOf("settings.training"), "settings");
  assert.equal(fieldOf("settings"), "settings");
  assert.equal(fieldOf("training"), "training");
  assert.equal(fieldOf("validation[0]"), "validation");
  assert.equal(fieldOf("model_name"), "model_name");
  assert.equal(fieldOf(null), "");
});

test("names are made of letters without their accents", async () => {
  const { stemOf } = await import(`${folder}/new_job.js`);
  assert.equal(stemOf("Müller & Søn"), "Muller-S-n");
  assert.equal(stemOf("été"), "ete");
  assert.equal(stemOf("שלום"), "");
});

test("a key that no header can carry is told before it is sent", async () => {
  const { problemOfKey } = await import(`${folder}/api.js`);
  assert.equal(problemOfKey(" sk-0aZ_~ \n"), null);
  assert.match(problemOfKey("sk-abc…"), /“…”/);
  assert.match(problemOfKey("‘sk-abc’"), /“‘”/);
  assert.match(problemOfKey("sk-\u200babc"), /invisible/);
});

test("names of files are asked for again after a failure, and forgotten with the key", async () => {
  const tab = new EventTarget();
  const asked = [];
  let answer = new Response("{}", { status: 500 });
  globalThis.window = Object.assign(tab, { location: { origin: "http://luthier.example" } });
  globalThis.addEventListener = tab.addEventListener.bind(tab);
  Object.defineProperty(globalThis, "sessionStorage", { value: { getItem: () => "sk-1" }, configurable: true });
  const fetched = globalThis.fetch;
  globalThis.fetch = async (url) => {
    asked.push(String(url));
    return answer;
  };
  try {
    const { addressOf, learnNames, withNames } = await import(`${folder}/files.js?alone`);
    const text = `rows of ${addressOf("file-1")}`;
    await learnNames([text]);
    assert.equal(withNames(text), text);
    answer = Response.json({ id: "file-1", filename: "a.csv" });
    await learnNames([text]);
    await learnNames([text]);
    assert.equal(withNames(text), "rows of a.csv");
    assert.equal(asked.length, 2);
    tab.dispatchEvent(new Event("luthier:signed-out"));
    assert.equal(withNames(text), text);
    answer = Response.json({}, { status: 404 });
    await learnNames([text]);
    await learnNames([text]);
    assert.equal(asked.length, 3);
  } finally {
    globalThis.fetch = fetched;
  }
});

test("settings may be written by group or as --set takes them", async () => {
  const { byGroup } = await import(`${folder}/new_job.js`);
  assert.deepEqual(byGroup({ "training.seed": 1, training: { epochs: 2 }, adaptation: { rank: 4 } }), {
    training: { seed: 1, epochs: 2 },
    adaptation: { rank: 4 },
  });
  assert.deepEqual(byGroup({ base: "x" }), { base: "x" });
});

test("a verdict is one sentence of at most twenty words", async () => {
  const { verdictOf } = await import(`${folder}/verdict.js`);
  const sets = { shares: new Set(["accuracy"]), errors: new Set(["mean_absolute_error"]) };
  const judge = (verdict, comparison) => verdictOf({ verdict, comparison }, 80, sets);
  const rival = (measure, score, more) => ({ measure, rows: 80, baselines: [{ name: "naive Bayes", score, error: 0.02 }], ...more });
  const cases = [
    [{ outcome: "learned", before: { accuracy: 0.05 }, kept: { accuracy: 0.9 } }, rival("accuracy", 0.8), "Better", "good"],
    [{ outcome: "learned", before: { accuracy: 0.7 }, kept: { accuracy: 0.8 } }, rival("accuracy", 0.8, { verdict: "as good" }), "Not clearly", "warning"],
    [{ outcome: "learned", before: { accuracy: 0.05 }, kept: { accuracy: 0.6 } }, rival("accuracy", 0.8, { verdict: "better" }), "Worse", "error"],
    [
      { outcome: "still_improving", before: { mean_absolute_error: 2 }, kept: { mean_absolute_error: 1 } },
      rival("mean_absolute_error", 0.9, { verdict: "better" }), "Worse", "error",
    ],
    [{ outcome: "learned", before: { absolute_error: 2 }, kept: { loss: 0.1, absolute_error: 0.5 } }, undefined, "Better", "good"],
    [{ outcome: "worse", before: { loss: 1 }, kept: { loss: 1.5 } }, undefined, "No better", "error"],
  ];
  for (const [verdict, comparison, start, kind] of cases) {
    const found = judge(verdict, comparison);
    assert.ok(found.text.startsWith(start), found.text);
    assert.ok(found.text.split(" ").length <= 20, found.text);
    assert.equal(found.kind, kind);
    assert.equal(found.bars.length, comparison ? 3 : 2);
  }
  const [before, , tuned] = judge(cases[0][0], cases[0][1]).bars;
  assert.ok(tuned.low > 0.8 && tuned.high < 1 && before.low < 0.05 && before.high > 0.05);
  // The interval of a perfect score is no point.
  const [perfect] = judge({ outcome: "learned", kept: { accuracy: 1 } }).bars;
  assert.ok(perfect.low > 0.9 && perfect.low < 0.99 && perfect.high === 1);
  assert.equal(judge(undefined), null);
  assert.deepEqual(judge({ outcome: "unmeasured" }).bars, []);
});

test("examples without text or messages are left out", async () => {
  const { readable } = await import(`${folder}/verdict.js`);
  const rows = [{ tokens: ["a"], wanted: ["O"] }, { image: "a.png", wanted: "b" }, { text: "", wanted: "a" }, { messages: [], wanted: "b" }];
  assert.deepEqual(readable(rows), rows.slice(2));
  assert.deepEqual(readable(undefined), []);
});

test("two jobs show the values that differ, with settings by dotted name", () => {
  const first = flattened({ training: { epochs: 2, seed: null }, data: { train: ["a"] }, base: "x" });
  assert.deepEqual(first, { "training.epochs": "2", "data.train": '["a"]', base: "x" });
  const second = { ...first, "training.epochs": "4", "adaptation.rank": "8" };
  assert.deepEqual(differences(first, second), [["training.epochs", "2", "4"], ["adaptation.rank", "–", "8"]]);
  assert.equal(differences(first, second, true).length, 4);
});

test("a later model of the same name has no certificate of the job", async () => {
  const { certificateOf } = await import(`${folder}/jobs.js`);
  const fetched = globalThis.fetch;
  globalThis.fetch = async () => Response.json({ certificate: { id: "second" } });
  try {
    const of = (id) => certificateOf({ model_name: "m", result: { stored_id: id } });
    assert.equal(await of("first"), null);
    assert.equal((await of("second")).certificate.id, "second");
  } finally {
    globalThis.fetch = fetched;
  }
});

test("training files have the names of the sources, files of folders keep theirs", async () => {
  const { withSources } = await import(`${folder}/files.js`);
  const sources = ["s3://bucket/intents.csv", "s3://bucket/more/"];
  assert.equal(withSources("t01-00001.csv:12", sources), "intents.csv:12");
  for (const name of ["t02-00003.jsonl", "h01-00001.jsonl", "rows.csv"]) assert.equal(withSources(name, sources), name);
  assert.equal(withSources("t01-00001.csv", []), "t01-00001.csv");
});

test("corrected labels are grouped by file", () => {
  const issues = [{ file: "a", line: 3, likely_label: "x" }, { file: "b", row: 1, likely_label: "y" }, { file: "a", line: 9, likely_label: "z" }];
  assert.deepEqual(labelsByFile(issues), { a: { 3: "x", 9: "z" }, b: { 1: "y" } });
});

/** Answer the requests of a test with `answer`; returns the list of their options. */
function stubFetch(t, answer) {
  const sent = [];
  const { fetch } = globalThis;
  t.after(() => (globalThis.fetch = fetch));
  Object.defineProperty(globalThis, "sessionStorage", { value: { getItem: () => "key" }, configurable: true });
  globalThis.window = { location: { origin: "http://127.0.0.1" } };
  globalThis.fetch = async (url, options) => {
    sent.push(options);
    return answer(url, options);
  };
  return sent;
}

test("an answer whose rating fails returns behind the answer that is edited", async (t) => {
  const sent = stubFetch(t, () => Response.json({ error: { message: "busy" } }, { status: 503 }));
  const queue = new Queue("");
  queue.update({ answers: ["a", "b", "c", "d", "e"].map((request) => ({ request, position: 0 })) });
  queue.rate({ thumb: "up" });
  await queue.send();
  const { answers, done, error } = queue.state.value;
  assert.deepEqual([answers.map((each) => each.request).join(""), done, error.status], ["bcdea", 0, 503]);
  assert.deepEqual(sent.map(({ body }) => JSON.parse(body)), [{ request: "a", position: 0, thumb: "up" }]);
});

test("the last rating can be undone until the next rating, however late", async (t) => {
  const sent = stubFetch(t, () => Response.json({}));
  globalThis.document = { getElementById: () => null };
  t.after(() => delete globalThis.document);
  t.mock.timers.enable({ apis: ["setTimeout"] });
  const queue = new Queue("");
  queue.update({ answers: ["a", "b", "c", "d", "e"].map((request) => ({ request, position: 0 })) });
  const first = () => queue.state.value.answers[0].request;
  queue.rate({ thumb: "up" });
  t.mock.timers.tick(3_600_000);
  queue.undo();
  assert.deepEqual([first(), sent.length], ["a", 0]);
  queue.rate({ thumb: "down" });
  queue.rate({ thumb: "up" });
  queue.undo();
  queue.undo();
  assert.deepEqual([first(), queue.state.value.done], ["b", 1]);
  assert.deepEqual(sent.map(({ body }) => JSON.parse(body)), [{ request: "a", position: 0, thumb: "down" }]);
});

test("the next rating clears the error, and a sign-out sends the rating with the key", async (t) => {
  const sent = stubFetch(t, () => Response.json({}));
  const tab = Object.assign(new EventTarget(), { location: { origin: "http://127.0.0.1" } });
  const kept = { "luthier.key": "sk-1" };
  globalThis.window = tab;
  const clear = () => Object.keys(kept).forEach((name) => delete kept[name]);
  const storage = { getItem: (name) => kept[name] ?? null, clear };
  Object.defineProperty(globalThis, "sessionStorage", { value: storage, configurable: true });
  const queue = new Queue("");
  queue.update({ answers: ["a", "b", "c", "d", "e"].map((request) => ({ request, position: 0 })), error: new Error("busy") });
  queue.rate({ thumb: "up" });
  assert.equal(queue.state.value.error, null);
  tab.addEventListener("luthier:signing-out", () => queue.send(true));
  const { signOut } = await import(`${folder}/api.js`);
  signOut();
  assert.deepEqual(sent.map(({ headers, keepalive }) => [headers.Authorization, keepalive]), [["Bearer sk-1", true]]);
  assert.deepEqual(kept, {});
});
