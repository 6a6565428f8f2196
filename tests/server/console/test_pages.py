"""Requests of the console's model pages, and the page logic without a browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from browser import browser
from served import served

from luthier.engine.metrics import DISTANCES, SCORES
from luthier.engine.train import train
from luthier.library.models import find
from luthier.models.catalog import CATALOG
from luthier.recipe import Recipe
from luthier.server.native.model_operations import abilities_of, abilities_of_base
from luthier.server.service import Service
from luthier.server.settings import Settings
from luthier.server.tables.custom_models import ACTIVE, CREATING, CustomModel
from luthier.server.tables.database import new_id, now
from luthier.server.tables.usage import Usage, add_usage
from luthier.workflows.certificate.certificate import read_certificate

ACCOUNT = "000000000000"
HOSTILE = '<img src=x onerror="window.hit=1">\''
ROWS = [{"text": f"fox {n}", "label": ("cat", "dog")[n % 2]} for n in range(12)]
Get = Callable[[str], tuple[int, bytes]]
TRAINING = {"max_steps": 1, "batch_size": 4, "precision": "float32", "threads": 1}


@pytest.fixture(scope="module")
def home(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model_folder: Path,
    family_folder: Callable[[str], Path],
) -> Path:
    """A store with a generative model, a classifier, and a model without files yet."""
    home = tmp_path_factory.mktemp("home")
    (home / "rows.jsonl").write_text('{"prompt": "say fox", "completion": "fox fox"}\n' * 3)
    (home / "labels.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    sources = {
        "writer": ("rows.jsonl", str(tiny_model_folder), {"method": "lora", "rank": 4}),
        "labeller": ("labels.jsonl", str(family_folder("bert")), {"method": "full"}),
        "sorter": ("labels.jsonl", str(tiny_model_folder), {"method": "lora", "rank": 4}),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUTHIER_HOME", str(home))
        stored: dict[str, str | None] = {"coming": None}
        for name, (file, base, adaptation) in sources.items():
            fields: dict[str, Any] = {"base": base, "name": name, "training": TRAINING}
            fields |= {"data": {"train": str(home / file)}, "adaptation": adaptation}
            stored[name] = train(Recipe.parse(fields)).model_id
        service = Service(Settings())
        with service.database.write() as session:
            for name, stored_id in stored.items():
                model = CustomModel(
                    id=new_id(), account=ACCOUNT, name=name, foundation="luthier.x", root="luthier.x",
                    base_model="", stored_id=stored_id, status=ACTIVE if stored_id else CREATING,
                    created=now(),
                )  # fmt: skip
                session.add(model)
            used = {
                (now().date(), ACCOUNT, "root", name): Usage(requests=7) for name in ("one", "two")
            }
            add_usage(session, used)
        assert service.issued is not None
        (home / "keys.json").write_text(json.dumps(vars(service.issued)))
        (home / "stored.json").write_text(json.dumps(stored))
        service.close()
    return home


@pytest.fixture
def url(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("LUTHIER_HOME", str(home))
    service = Service(Settings(run_jobs=False))
    service.start()
    with served(service.application) as url:
        yield url
    service.close()


@pytest.fixture
def root_key(home: Path) -> str:
    return str(json.loads((home / "keys.json").read_text())["api_key"])


@pytest.fixture
def get(url: str, root_key: str) -> Get:
    """Return ``get(path)``, which returns status and body for the root user."""

    def ask(path: str) -> tuple[int, bytes]:
        headers = {"Authorization": f"Bearer {root_key}"}
        request = urllib.request.Request(f"{url}/api/v1/{path}", None, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as refused:
            return refused.code, refused.read()

    return ask


def test_model_view_returns_abilities(get: Get) -> None:
    def abilities(name: str) -> Any:
        return json.loads(get(f"models/{name}")[1]).get("abilities")

    expected = {
        "method": "sft",
        "does": ["write"],
        "reads": ["text"],
        "labels": [],
        "reads_prompts": False,
    }
    assert abilities("writer") == expected
    assert abilities("labeller") == {**expected, "method": "classification", "does": ["predict"]}
    assert abilities("coming") is None
    assert abilities("small-dcgan")["does"] == ["make_images"]
    listed = json.loads(get("models")[1])["models"]
    assert len(listed) > 3 and not any("abilities" in each for each in listed)
    assert {each["name"]: each["base_kind"] for each in listed}["small-unet"] == "denoising"


def test_model_list_has_pages_newest_first(get: Get) -> None:
    first = json.loads(get("models?limit=3")[1])
    rest = json.loads(get(f"models?limit=3&position={first['next']}")[1])
    named = [[each["name"] for each in page["models"]] for page in (first, rest)]
    assert named[0][-3:] == ["sorter", "labeller", "writer"]
    assert named[1] == ["coming"] and "next" not in rest


def test_model_list_marks_text_generators(get: Get) -> None:
    listed = json.loads(get("models")[1])["models"]
    told = {each["name"]: each["writes"] for each in listed}
    # A classifier tuned from a generative model cannot chat.
    assert (told["writer"], told["labeller"], told["sorter"]) == (True, False, False)
    kinds = {each["name"]: each["base_kind"] for each in listed}
    assert kinds["sorter"] == kinds["writer"] == kinds["coming"] == "causal_lm"
    for each in listed:
        found = json.loads(get(f"models/{each['id']}")[1])
        assert found["writes"] == each["writes"]
        if found.get("abilities"):
            assert each["writes"] == ("write" in found["abilities"]["does"]), each["name"]


def test_certificate_view_classifies_shares_and_errors(get: Get) -> None:
    view = json.loads(get("models/writer/certificate")[1])
    assert {"accuracy", "agreement", "cer", "entity_f1"} <= {*view["shares"]}
    lower = {*view["lower_is_better"]}
    assert "loss" not in view["shares"] and {"loss", *DISTANCES, "mean_absolute_error"} <= lower
    # The verdict and the comparison with simple methods name the error of a rating alike.
    assert "mean_absolute_error" in SCORES


def test_certificate_download_matches_certified_bytes(get: Get, home: Path) -> None:
    stored = json.loads((home / "stored.json").read_text())
    status, raw = get("models/writer/certificate.json")
    certificate = read_certificate(find(stored["writer"]))
    assert status == 200 and raw == certificate.text().encode()
    assert json.loads(raw)["sha256"] == certificate.digest()
    # A browser would write 32.0 as 32, which has another hash.
    assert re.search(rb'"alpha": ?32\.0[,\s}]', raw)
    for name, refused in {"coming": 409, "nobody": 404, "small-dcgan": 404}.items():
        assert get(f"models/{name}/certificate.json")[0] == refused
        assert get(f"models/{name}/certificate")[0] == refused


def test_base_model_abilities_need_no_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LUTHIER_HOME", str(tmp_path))
    found = {name: abilities_of_base(name) for name in CATALOG}
    assert not any(tmp_path.rglob("*.safetensors"))
    told = {name: (each.does, each.reads) for name, each in found.items()}
    assert told["smollm2-135m-instruct"] == (("write",), ("text",))
    assert told["all-minilm-l6-v2"] == (("embed",), ("text",))
    assert told["small-audio-cnn"] == (("embed",), ("audio",))
    assert told["small-vae"] == (("predict", "make_images", "reconstruct"), ("image",))
    # An autoencoder of time series detects anomalies and generates no images.
    assert told["small-window-vae"] == (("predict",), ("window",))


@pytest.mark.parametrize(
    ("family", "does", "reads"),
    [
        ("clip", ("embed",), ("image", "text")),
        ("vae", ("predict", "make_images", "reconstruct"), ("image",)),
        ("t5", ("write",), ("text",)),
        ("unet", ("make_images",), ("image",)),
    ],
)
def test_abilities_of_third_party_models(
    family: str, does: tuple[str, ...], reads: tuple[str, ...], family_folder: Callable[[str], Path]
) -> None:
    found = abilities_of(find(str(family_folder(family))))
    assert (found.does, found.reads) == (does, reads)


@pytest.mark.slow
def test_model_pages_in_browser(url: str, root_key: str, tmp_path: Path) -> None:
    with browser(tmp_path) as page:
        page.get(f"{url}/console/")
        page.sign_in(root_key)

        def show(place: str, text: str, selector: str = "main") -> None:
            page.script("location.hash = arguments[0]", f"#/{place}")
            page.until_text(text, selector)

        show("models", "labeller")
        page.fill(".filter", "writ")
        page.until("!document.querySelector('main').textContent.includes('labeller')")

        show("models/writer", "Verdict")
        said = page.text("main")
        assert "This model, SHA-256" in said and "Training rows" in said
        snippet = "return document.querySelector('details.rule pre').textContent"
        assert f"{url}/v1" in page.script(snippet)

        show("playground/writer", "Compare with")
        page.fill("#message", f"say fox {HOSTILE}")
        page.click(".ask .primary")
        page.until_text("first token after", ".turn.model")
        assert HOSTILE in page.text(".turn.user")
        page.script("document.querySelector('main details').open = true")
        page.fill("#temperature", "9")
        page.fill("#message", "again")
        page.click(".ask .primary")
        page.until_text("'temperature'", ".turn.model:last-child [role=alert]")
        assert page.script("return document.querySelector('#message').value") == "again"

        show("playground/labeller", "Text", "#try label")
        page.click(".ask .primary")
        page.until("document.querySelector('#answer [role=alert]') !== null")
        page.fill("#input", HOSTILE)
        page.click(".ask .primary")
        page.until_text("Label:", "#answer")
        assert sorted(page.texts(".bars .name")) == ["cat", "dog"]

        show("playground/coming", "Creating", ".box.note")
        show("models/nobody", "'nobody'", "[role=alert]")
        show("usage", "Custom models")
        page.until_text("Usage – luthier", "#status")
        assert page.script("return document.activeElement.textContent") == "Usage"
        page.until("document.querySelector('figure.chart canvas') !== null")
        assert {"one", "two"} <= {*"\n".join(page.texts("figure.chart .u-label")).split("\n")}
        # Each bar has its colour.
        assert all(count > 0 for count in page.script(PIXELS, ["series-0", "series-1"]))
        page.choose("#measure", "training_seconds")
        page.until("document.querySelector('figure.chart') === null")
        for place, heading in {"models": "Models", "models/writer": "writer"}.items():
            show(place, heading, "h1")
            page.until("document.activeElement.tagName === 'H1'")
            page.until_text(page.script("return document.title"), "#status")
        assert page.script("return window.hit ?? null") is None


def test_deployments_health_and_review_in_browser(
    url: str, root_key: str, get: Get, home: Path, tmp_path: Path
) -> None:
    with browser(tmp_path) as page:
        page.get(f"{url}/console/")
        page.sign_in(root_key)

        page.click('#navigation a[href="#/review"]')
        page.until_text("No answer is captured yet", "main")
        page.click(".heading .primary")
        page.until_text("Names are not hidden", ".heading")
        page.choose(".heading select", "0")
        page.until_text("number of raters is stored", ".toast")
        page.script("location.hash = '#/playground/labeller'")
        for number in range(3):
            page.until("document.querySelector('#input') !== null")
            page.fill("#input", f"fox {number} {HOSTILE}")
            page.click(".ask .primary")
            page.until_text("Label:", "#answer")
        page.until_text("Rate this prediction", "#answer")
        page.click('#navigation a[href="#/home"]')
        page.until_text("3 answers to rate", "main")
        page.click('#navigation a[href="#/review"]')
        page.until_text("0 rated by you, 3 to rate", "#progress")
        assert "fox 2" in page.text("#card") and HOSTILE in page.text("#card")
        keyboard = "document.dispatchEvent(new KeyboardEvent('keydown', { key: arguments[0] }))"
        for key, shown in (
            ("u", "1 rated by you, 2 to rate"),
            ("z", "0 rated by"),
            ("u", "1 rated by"),
        ):
            page.script(keyboard, key)
            page.until_text(shown, "#progress")
        page.script(keyboard, "e")
        page.until("document.querySelector('#corrected') !== null")
        page.fill("#corrected", "dgo")
        page.click("main form .primary")
        page.until_text("“dog”", "dialog .primary")
        page.click("dialog [value=no]")
        page.fill("#corrected", "wolf")
        page.click("main form .primary")
        page.click("dialog .primary")
        page.until_text("2 rated by you, 1 to rate", "#progress")
        page.script("document.querySelector('main details.rule').open = true")
        page.choose("#rows-kind", "classification")
        page.click("main details.rule .primary")
        page.until_text("2 rows from 2 rated answers", "[role=status].box")
        listed = json.loads(get("review?model=labeller")[1])
        assert listed["rated"] == 2 and "fox 0" in listed["answers"][0]["prompt"]
        page.click("main details.rule .box a")
        page.until_text("review-classification.jsonl", ".drop")
        page.script("location.hash = '#/health/labeller'")
        page.until_text("Too few requests", "#summary")
        assert "0 %" in page.text("main tbody")

        page.click('#navigation a[href="#/deployments"]')
        page.until_text("Nothing is deployed yet", "main")
        page.fill("#deployment-name", "router")
        page.until("document.querySelector('#deployment-model').options.length > 2")
        page.script("document.querySelector('#deployment-model').value = arguments[0]",
                    json.loads(get("models/labeller")[1])["id"])  # fmt: skip
        page.click("main form .primary")
        page.until_text("Ready", ".chip")
        page.choose("#promoted", "writer")
        page.click("#promotion .primary")
        page.click("dialog .primary")
        page.until_text("a different task", "#promotion [role=alert]")
        page.choose("#promoted", "sorter")
        page.click("#promotion .primary")
        page.click("dialog .primary")
        page.until_text("sorter", ".facts")
        page.click(".heading .danger:not(#delete)")
        page.click("dialog .danger")
        page.until_text("labeller", ".facts")
        states = json.loads(get("deployments/router")[1])["history"]
        assert [each["action"] for each in states] == ["create", "promote", "rollback"]
        listed = json.loads(get("deployments")[1])["deployments"]
        assert [(each["deployment"], each["model"]) for each in listed] == [("router", "labeller")]
        page.until_text("router", "main pre")
        page.click("#new-schedule summary")
        page.choose("#every", "week")
        page.write("#scheduled-file", str(home / "labels.jsonl"))
        page.until_text("is uploaded", ".drop")
        page.click("#new-schedule .primary")
        page.until_text("Evaluations each week", "main")
        assert json.loads(get("deployments/router/schedule")[1])["every"] == "week"
        page.click("#end-schedule")
        page.click("dialog .danger")
        page.until("document.querySelector('#new-schedule') !== null")
        page.click('#navigation a[href="#/home"]')
        page.until_text("Answers now", "main")
        page.script("location.hash = '#/playground/router'")
        page.until_text("About this deployment", ".heading")
        page.script("location.hash = '#/models/labeller'")
        page.until_text("router", "#deletion")
        page.click("#deletion a")
        page.until("document.querySelector('#delete') !== null")
        page.click("#delete")
        page.fill("#typed-name", "router")
        page.click("dialog .danger")
        page.until_text("Nothing is deployed yet", "main")
        assert json.loads(get("deployments")[1])["deployments"] == []
        assert page.script("return window.hit ?? null") is None


def test_models_playground_evaluation_and_keys_in_browser(
    url: str, root_key: str, get: Get, home: Path, tmp_path: Path
) -> None:
    with browser(tmp_path) as page:
        page.get(f"{url}/console/")
        page.sign_in(root_key)

        page.click('#navigation a[href="#/models"]')
        page.until_text("Apache-2.0", "main")
        page.click(".scroll:last-of-type thead th:nth-child(3) button")
        first = "return document.querySelector('.scroll:last-of-type tbody th').innerText"
        most = max(
            (each for each in json.loads(get("models")[1])["models"] if each.get("facts")),
            key=lambda each: each["facts"]["parameters"],
        )
        page.until_text(most["name"], ".scroll:last-of-type tbody tr:first-child th")
        assert page.script(first) == most["name"]
        page.script("location.hash = arguments[0]", f"#/models/{most['id']}")
        page.until_text(most["facts"]["licence"], ".facts")
        page.until_text("This model has no evaluations yet", "#evaluations")

        page.click('#navigation a[href="#/playground"]')
        page.until_text("writer", "main tbody")
        page.fill("main .filter", "writer")
        page.click("main tbody a")
        page.until("document.querySelector('#message') !== null")
        page.script("document.querySelector('main details').open = true")
        page.fill("#schema", "{type: object}")
        page.fill("#message", "say fox")
        page.click(".ask .primary")
        page.until_text("not valid JSON", ".problem")
        page.fill("#schema", "")
        page.click(".ask .primary")
        page.until_text("Good answer", ".turn.model")
        page.click(".turn.model .actions button")
        page.until("document.querySelector('.toast, .turn.model [role=alert]') !== null")

        page.click('#navigation a[href="#/evaluations"]')
        page.until_text("There are no evaluations yet", "main")
        page.write("#held-file", str(home / "labels.jsonl"))
        page.until_text("is uploaded", ".drop")
        page.choose("#measured", "labeller")
        page.click("main form .primary")
        page.until_text("Waiting for a worker", "main")
        page.click(".heading .danger")
        page.until_text("Stopped", ".chip")
        page.click(".heading .danger")
        page.click("dialog .danger")
        page.until_text("There are no evaluations yet", "main")

        page.click('#navigation a[href="#/administration"]')
        page.until_text("Audit log", "main")
        page.script(
            "document.querySelectorAll('main details').forEach((each) => (each.open = true))"
        )
        page.fill("#user-name", "rita")
        page.choose("#user-role", "reviewer")
        page.click("main details form .primary")
        page.until(
            "[...document.querySelector('#key-user').options].some((each) => each.value === 'rita')"
        )
        page.choose("#key-user", "rita")
        page.click("#new-key .primary")
        page.until_text("sk-", "#secret")
        secret = page.text("#secret")
        assert secret.encode() not in get("users")[1]
        page.click("[aria-label^='Rotate'][aria-label$='rita']")
        page.click("dialog .primary")
        page.until("document.querySelector('#secret').textContent !== arguments[0]", 60, secret)
        page.until("document.querySelectorAll(`.danger[aria-label$='of rita']`).length === 2")
        page.click("button.danger[aria-label$='of root']")
        page.until_text("signed in with this key", "dialog")
        page.click("dialog button[value='no']")
        page.click("button.danger[aria-label$='of rita']")
        page.click("dialog .danger")
        page.until("document.querySelectorAll(`.danger[aria-label$='of rita']`).length === 1")
        page.fill("#audit-action", "deletekey")
        page.script("document.querySelector('#audit-action').dispatchEvent(new Event('change'))")
        page.until("document.querySelectorAll('section tbody tr').length === 1")
        assert page.script("return window.hit ?? null") is None


PIXELS = """
const canvas = document.querySelector("figure.chart canvas");
const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
return arguments[0].map((name) => {
  const style = getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const [red, green, blue] = style.match(/[0-9a-f]{2}/gi).map((each) => parseInt(each, 16));
  let count = 0;
  for (let at = 0; at < data.length; at += 4)
    count += data[at] === red && data[at + 1] === green && data[at + 2] === blue;
  return count;
});
"""
"""Return the number of pixels of a chart in each of some colours."""

STUBBED = """
return (async () => {
  const asked = [];
  const answers = {};
  const { html, render } = await import("/console/ui.js");
  const root = document.createElement("div");
  document.body.append(root);
  const wait = (seconds) => new Promise((done) => setTimeout(done, 1000 * seconds));
  const until = async (what) => { for (let n = 0; n < 200 && !what(); n += 1) await wait(0.1); };
  const real = window.fetch;
  window.fetch = async (url, options) => {
    asked.push(`${options.method} ${url.pathname}${url.search}`);
    const found = await answers[`${options.method} ${url.pathname}`](url, options.signal);
    options.signal?.throwIfAborted();
    return new Response(JSON.stringify(found), { headers: { "Content-Type": "application/json" } });
  };
  try { %s } finally { window.fetch = real; render(null, root); root.remove(); }
})();
"""
"""A script with stub responses in place of the server's."""

EXPORTS = """
const { Exports } = await import("/console/exports.js");
const made = { format: "gguf", output: "s3://b/", created: "2026-01-01T00:00:00Z" };
const row = (id, state) => ({ id, state, ...made });
const show = () => render(html`<${Exports} model=${{ id: "m", arn: "arn:m" }} />`, root);
let now = [row("one", "Running")];
answers["GET /api/v1/exports"] = () => ({ exports: now });
show();
await until(() => root.querySelector("[data-export]"));
root.querySelector("[data-export]").focus();
now = [row("one", "Completed")];
await until(() => root.innerText.includes("Completed"));
const focused = document.activeElement.className;

render(null, root);
let late;
answers["GET /api/v1/exports"] = () => new Promise((done) => { late ??= () => done({ exports: [] }); });
show();
await until(() => late);
answers["POST /api/v1/models/m/exports"] = () => row("two", "Queued");
answers["GET /api/v1/exports"] = () => ({ exports: [row("two", "Stopped")] });
root.querySelector("details").open = true;
root.querySelector("#export-output").value = "s3://b/";
root.querySelector("form").requestSubmit();
await until(() => asked.some((each) => each.startsWith("POST")));
await wait(0.2);
late();
await until(() => root.innerText.includes("Stopped"));
return { asked, focused, text: root.innerText };
"""

REPORTS = """
const { Comparison, Evaluation } = await import("/console/evaluate.js");
const request = { rows: "s3://b/rows.jsonl" };
const made = {
  id: "one", state: "Completed", models: ["m"], request, lower_is_better: ["cer"],
  created: "2026-01-01T00:00:00Z",
};
const report = {
  model: "m", rows: 80, scores: { accuracy: 0.9 }, errors: { accuracy: 0.03 },
  intervals: { accuracy: [0.83, 0.96] }, mistakes: [{ label: "a", answer: "b", rows: 3 }],
  slices: [{ by: "label", value: "a", rows: 9, scores: { accuracy: 0.5 }, interval: [0.2, 0.8] }],
  labels: { a: { recall: 0.5, rows: 9 }, b: { rows: 2 } }, remarks: ["A remark."],
  worst: [{ row: "s3://b/rows.jsonl:7", input: "x", expected: "a", answer: "b", confidence: "99.1%" }],
};
answers["GET /api/v1/evaluations/one"] = () => ({ ...made, report });
render(html`<${Evaluation} params=${{ id: "one" }} />`, root);
await until(() => root.querySelector("#summary"));
const evaluation = root.innerText;
const matrix = [...root.querySelectorAll(".matrix tbody tr")].map((each) => each.innerText.split("\t"));
const contender = (name, score) => ({
  name, score, interval: [score - 0.05, score + 0.05], scores: {}, seconds: 0.01, memory_bytes: 1e6,
  technique: name === "m" ? "fine-tuning" : "base model",
});
const contenders = [contender("m", 0.9), contender("base", 0.5)];
const compared = { measure: "accuracy", rows: 80, worth_it: true, verdict: "Tuning pays.", contenders };
answers["GET /api/v1/comparisons/one"] = () => ({ ...made, report: compared });
render(html`<${Comparison} params=${{ id: "one" }} />`, root);
await until(() => root.querySelector("svg.tuned line"));
return { evaluation, matrix, comparison: root.innerText };
"""

DAYS = """
const { Usage } = await import("/console/usage.js");
answers["GET /api/v1/usage"] = () => ({ account: "a", quotas: {} });
const counts = { requests: 1, prompt_tokens: 0, generated_tokens: 0, bytes_in: 0, bytes_out: 0 };
const day = (model, day) => ({ model, day, ...counts });
const report = (first, last, ...days) => ({ first, last, days });
const today = day("today", "2026-01-01");
answers["GET /api/v1/usage/days"] = () => report("2020-01-01", "2026-01-01", today);
render(html`<${Usage} />`, root);
await until(() => root.querySelector("canvas"));
const long = root.querySelector("figure").outerHTML;
const cut = root.innerText.includes("400 days");
const choose = (value) => {
  const from = root.querySelector("#from");
  from.value = value;
  from.dispatchEvent(new Event("change"));
};
let aborted = false;
answers["GET /api/v1/usage/days"] = async (url, given) => {
  const from = url.searchParams.get("from");
  if (from !== "2026-01-02") return report("2026-01-03", "2026-01-04", day("new", "2026-01-03"));
  given.addEventListener("abort", () => { aborted = true; });
  await wait(1);
  return report("2026-01-02", "2026-01-04", day("old", "2026-01-02"));
};
choose("2026-01-02");
await until(() => asked.at(-1).includes("from=2026-01-02"));
choose("2026-01-03");
await wait(1.5);
return { long, cut, aborted, text: root.innerText };
"""

LEAVING = """
const { useAction } = await import("/console/ui.js");
let finish;
const Button = () => {
  const { run } = useAction(() => new Promise((done) => { finish = done; }));
  return html`<button onclick=${run}>Start</button>`;
};
const press = async (isLeft, address) => {
  render(html`<${Button} />`, root);
  await wait(0.2);
  root.querySelector("button").click();
  if (isLeft) render(null, root);
  await wait(0.2);
  finish(address);
  await wait(0.2);
  return location.hash;
};
return [await press(true, "#/usage"), await press(false, "#/data")];
"""

SOUNDS = """
const { Prediction } = await import("/console/predictions.js");
const [made, freed] = [[], []];
const { createObjectURL, revokeObjectURL } = URL;
URL.createObjectURL = (file) => { made.push(createObjectURL(file)); return made.at(-1); };
URL.revokeObjectURL = (address) => { freed.push(address); revokeObjectURL(address); };
let sent = 0;
answers["POST /api/v1/models/m/predictions"] = () => ({ answers: [{ label: `l${sent++}` }] });
render(html`<${Prediction} model=${{ id: "m", abilities: { reads: ["audio"] } }} />`, root);
const files = new DataTransfer();
files.items.add(new File(["x"], "x.wav"));
root.querySelector("input").files = files.files;
const counts = [];
for (let n = 0; n < 2; n += 1) {
  root.querySelector("form").requestSubmit();
  await until(() => root.innerText.includes(`l${n}`) && made.length > n && root.querySelector("audio"));
  counts.push(freed.length);
}
render(null, root);
await until(() => freed.length === 2);
Object.assign(URL, { createObjectURL, revokeObjectURL });
return { counts, made, freed };
"""

CERTIFICATE = """
const { Certificate } = await import("/console/certificate.js");
const kept = { cer: 0.25, accuracy: 0.9996, reward: 0.5 };
const compared = (measure, tuned, other) =>
  ({ measure, rows: 9, tuned, baselines: [{ name: "other", score: other, error: 0.1, seconds: 1 }] });
const draw = (comparison) => {
  const metrics = { verdict: { text: "it learned", kept, kept_step: 3 }, comparison };
  const certificate = { record: { metrics } };
  const view = { certificate, lineage: [], shares: ["accuracy", "cer"], lower_is_better: ["cer"] };
  render(html`<${Certificate} view=${view} models=${[]} />`, root);
  return [...root.querySelectorAll("tbody tr")].map((each) => each.innerText);
};
const remark = "wrong most often: <b>travel</b> for sports (2 of 25), sports for travel (1 of 40)";
const result = {
  rows: 204, scores: { accuracy: 0.8382 }, intervals: { accuracy: [0.7799, 0.8836] },
  mistakes: [{ label: "travel", answer: "sports", rows: 4 }], labels: { travel: { rows: 40 } },
  remarks: [remark],
};
const data = { "/a/t.jsonl": "0" };
const report = { kind: "evaluation", created: "2026-01-01T00:00:00Z", data, result };
const reports = [{ file: "reports/evaluation-0.json", report }];
const view = { certificate: { record: {}, reports }, lineage: [], shares: [], lower_is_better: [] };
render(html`<${Certificate} view=${view} models=${[]} />`, root);
root.querySelector("summary").click();
const texts = (name) => [...root.querySelectorAll(name)].map((each) => each.innerText);
const [facts, rows, said] = ["details .facts > div", "details tbody tr", "details p"].map(texts);
const opened = { facts, rows, said };
return { opened, error: draw(compared("cer", 0.4, 0.2)), share: draw(compared("accuracy", 0.25, 0.5)) };
"""

POLICY = """
return (async () => {
  const found = new Set();
  document.addEventListener("securitypolicyviolation", (event) => found.add(event.effectiveDirective));
  const add = (tag, values, text = "") => {
    const made = Object.assign(document.createElement(tag), values);
    made.textContent = text;
    document.body.append(made);
    return made;
  };
  const elsewhere = "http://127.0.0.1:9/x";
  add("script", {}, "window.hit = 1");
  add("script", { src: `${elsewhere}.js` });
  add("script", { src: "data:text/javascript,window.hit=1" });
  add("style", {}, "body { color: red }");
  add("img", { src: elsewhere });
  add("iframe", { src: elsewhere });
  add("base", { href: elsewhere });
  const handled = add("div", {});
  handled.setAttribute("onclick", "window.hit = 1");
  handled.click(); // newer browsers check a handler only when an event reaches the handler
  add("form", { action: elsewhere, target: "_blank" }).requestSubmit();
  await fetch(elsewhere).catch(() => {});
  // The driver's own scripts may make code of texts; what runs later is not the driver's.
  setTimeout("window.hit = 1");
  await new Promise((done) => setTimeout(done, 500));
  return { found: [...found], hit: window.hit ?? null };
})();
"""


@pytest.mark.slow
def test_pages_handle_rare_responses(url: str, root_key: str, tmp_path: Path) -> None:
    with browser(tmp_path) as page:
        page.get(f"{url}/console/")
        page.sign_in(root_key)
        page.until_text("Bring a file", "main")
        page.script("location.hash = '#/jobs'")
        page.until_text("There are no jobs yet", "main")

        found = page.script(STUBBED % REPORTS)
        evaluated, compared = (
            found[name].replace("\xa0", " ") for name in ("evaluation", "comparison")
        )
        assert "Accuracy 90.0 % on 80 rows (95 % interval 83.0 % to 96.0 %)" in evaluated
        assert "label: a" in evaluated and "20.0 % to 80.0 %" in evaluated
        assert "rows.jsonl:7, confidence 99.1%" in evaluated
        assert found["matrix"] == [["a", "6", "3"], ["b", "", "2"]]
        assert "Tuning pays." in compared and "45.0 % to 55.0 %" in compared

        found = page.script(STUBBED % EXPORTS)
        assert found["focused"] == "scroll"
        assert "Stopped" in found["text"]
        listed = [each for each in found["asked"] if each.startswith("GET /api/v1/exports")]
        assert {*listed} == {"GET /api/v1/exports?model=arn%3Am"} and len(listed) == 4

        found = page.script(STUBBED % DAYS)
        assert "NaN" not in found["long"] and "<canvas" in found["long"] and found["cut"]
        assert found["aborted"] and "new" in found["text"] and "old" not in found["text"]

        found = page.script(STUBBED % SOUNDS)
        assert found["counts"] == [0, 1] and found["made"] == found["freed"]

        found = page.script(STUBBED % CERTIFICATE)
        scores = ["Cer\t–\t25.0\xa0%", "Accuracy\t–\t100.0\xa0%", "Reward\t–\t0.5"]
        assert found["error"][:3] == scores
        assert [each.split("\t")[:2] for each in found["error"][3:]] == [
            ["other", "20.0\xa0% ± 10.0\xa0%"], ["this model", "40.0\xa0%"],
        ]  # fmt: skip
        assert [each.split("\t")[:2] for each in found["share"][3:]] == [
            ["other", "50.0\xa0% ± 10.0\xa0%"], ["this model", "25.0\xa0%"],
        ]  # fmt: skip

        opened = found["opened"]
        assert {"Rows\n204", "Accuracy\n0.8382", "Accuracy\n0.7799, 0.8836"} <= {*opened["facts"]}
        assert "Measured on\nt.jsonl" in opened["facts"]
        assert opened["rows"] == ["travel\tsports\t4", "travel\t40"]
        assert [said for said in opened["said"] if "<b>travel</b> for sports" in said]

        assert page.script(STUBBED % LEAVING) == ["#/jobs", "#/data"]

        found = page.script(POLICY)
        assert found["hit"] is None
        assert {*found["found"]} == {
            "script-src-elem", "script-src-attr", "style-src-elem", "img-src", "frame-src", "base-uri",
            "form-action", "connect-src", "script-src",
        }  # fmt: skip


def test_javascript_modules_pass_node_tests(tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed, by which the console's modules are tested")
    # Browsers detect modules by the script element, node by package.json.
    (tmp_path / "package.json").write_text('{"type": "module"}')
    with resources.as_file(resources.files("luthier.server.console") / "static") as static:
        shutil.copytree(static, tmp_path, dirs_exist_ok=True)
    script = Path(__file__).with_name("modules.test.mjs")
    modules = {**os.environ, "CONSOLE_MODULES": str(tmp_path)}
    found = subprocess.run(
        [node, "--test", str(script)], env=modules, capture_output=True, text=True, timeout=120
    )
    assert found.returncode == 0, found.stdout + found.stderr
    for module in sorted(tmp_path.glob("*.js")):
        checked = subprocess.run([node, "--check", str(module)], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr
