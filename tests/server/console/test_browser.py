"""The console in a real browser, against a real server and a real job."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from browser import Browser, browser
from luthier_server import BASE, KEYS, ONE, OTHER, Served, home_with_tiny, until

from luthier.server.jobs.study_worker import report_of
from luthier.server.tables.database import Database
from luthier.server.tables.measurements import MeasuredModel, create
from luthier.server.tables.studies import Study as StudyTable
from luthier.workflows.study.cells import CellResult
from luthier.workflows.study.figures import draw_study
from luthier.workflows.study.grid import Configuration
from luthier.workflows.study.results import Study, StudyRow

HOSTILE = '<img src=x onerror="window.hit=1"><script>window.hit=1</script>\''
KEY = KEYS[ONE]["api_key"]


FAILING = """
window.asked = [];
window.failing = arguments[0];
const how = arguments[1] ?? {};
const real = window.fetch;
window.fetch = async (url, options) => {
  const { pathname } = new URL(url);
  window.asked.push(pathname);
  if (pathname !== window.failing) return real(url, options);
  const left = () => new DOMException("", "AbortError");
  if (how.hangs)
    return new Promise((_, no) => options.signal.addEventListener("abort", () => no(left())));
  return Response.json({ error: { message: "not today" } }, { status: how.status ?? 500 });
};
"""
"""Make one path fail from now on, with a status or without a response."""
SLOW = {
    "uploads": """
XMLHttpRequest.prototype.send = function () {};
XMLHttpRequest.prototype.abort = function () {
  setTimeout(() => this.onabort(), 100);
  setTimeout(() => (window.aborted = true), 200);
};
""",
    "answers": """
window.sent = [];
const real = window.fetch;
window.fetch = (url, options) => {
  if (!String(url).endsWith("/v1/chat/completions")) return real(url, options);
  window.sent.push(JSON.parse(options.body).messages.map((each) => each.content));
  const piece = { choices: [{ index: 0, delta: { content: "half" } }] };
  const chunk = `data: ${JSON.stringify(piece)}\\n\\n`;
  const start = (stream) => {
    stream.enqueue(new TextEncoder().encode(chunk));
    options.signal.addEventListener("abort", () => stream.error(new DOMException("", "AbortError")));
  };
  return Promise.resolve(new Response(new ReadableStream({ start })));
};
""",
}
"""Make uploads and chats hang from now on until they are aborted."""
ANSWERS = """
window.sent = [];
const real = window.fetch;
window.fetch = (url, options) => {
  if (!String(url).endsWith("/v1/chat/completions")) return real(url, options);
  window.sent.push(JSON.parse(options.body).messages.map((each) => each.content));
  const delta = { content: `answer ${window.sent.length}` };
  const piece = { choices: [{ index: 0, delta, finish_reason: "stop" }] };
  return Promise.resolve(new Response(`data: ${JSON.stringify(piece)}\\n\\ndata: [DONE]\\n\\n`));
};
"""
"""Answer chats with a number from now on."""
ISSUES = """
const real = window.fetch;
const issue = { file: "rows.csv", text: "a fox", label: "cat", likely_label: "dog", probability: 0.9 };
const answers = {
  "/api/v1/jobs/checked": {
    name: "checked", state: "Completed", base: "tiny", model_name: "checked", details: {}, recipe: {},
    created: "2026-01-01T00:00:00Z", result: { label_issues: { issues: 2, rows: 24 } },
  },
  "/api/v1/jobs/checked/label-issues": { issues: [2, 3].map((line) => ({ ...issue, line })) },
};
window.fetch = async (url, options) => {
  const answer = answers[new URL(url).pathname];
  return answer ? Response.json(answer) : real(url, options);
};
"""
"""Add a job with two label issues from now on."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Iterator[Served]:
    made = Served(home_with_tiny(tmp_path_factory.mktemp("console"), tiny_model_folder))
    made.start()
    yield made
    made.end()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """The browser of all tests: a start takes 2 s."""
    with browser(tmp_path_factory.mktemp("browser")) as made:
        yield made


@pytest.fixture
def page(chromium: Browser, server: Served) -> Browser:
    """The console without a user, in a page of its own."""
    chromium.open_console(server.url)
    return chromium


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows <b>1.jsonl"
    lines = [
        {"prompt": f"Say {number}, {HOSTILE}", "completion": f"It is {number} {HOSTILE}"}
        for number in range(24)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def check_quiet(page: Browser) -> None:
    """Check that no hostile script ran and the browser logged no error."""
    assert page.script("return window.hit ?? null") is None
    assert [line for line in page.log() if line.startswith("SEVERE")] == []


@pytest.mark.slow
def test_console_trains_model_from_uploaded_file(server: Served, page: Browser, rows: Path) -> None:
    assert page.script("return location.pathname") == "/console/"
    page.sign_in(KEY)
    assert page.text("#account").startswith(ONE)
    page.until_text("Bring a file", "main")
    page.click('#navigation a[href="#/new"]')
    page.until("document.querySelector('#base option') !== null")
    page.write("#training-file", str(rows))
    page.until_text("is uploaded", ".drop")
    assert "rows <b>1.jsonl" in page.text(".drop")
    page.choose("#base", BASE)
    page.click("#own-settings summary")
    page.fill('[id="training.epochs"]', "4")
    page.fill('[id="training.batch_size"]', "4")
    page.fill('[id="training.learning_rate"]', "0.001")

    page.click(".submit button:first-child")
    page.until("document.querySelector('.inspection mark') !== null")
    assert HOSTILE in page.text(".inspection")
    assert page.texts(".inspection mark")

    page.fill("#name", "first")
    page.fill("#model_name", "made")
    page.click(".submit .primary")
    page.until("location.hash === '#/jobs/first'")
    page.until("document.querySelector('figure.chart canvas') !== null", 120)
    page.until_text("Completed", ".chip", 120)
    page.until("document.querySelector('#result.box') !== null")
    page.until_text("on 2 rows", "#result")
    page.click("#examples .primary")
    page.until("document.querySelectorAll('#examples figure').length > 0")
    page.until("document.querySelector('#examples .primary') === null")
    assert "It is" in page.text("#examples") and "…" not in page.text("#examples")
    assert "22" in page.text("main .facts")
    page.script("document.querySelectorAll('main details').forEach((each) => (each.open = true))")
    assert "from" in page.text("figure.chart:has(canvas) .visually-hidden")
    settings = page.text("main details .scroll table")
    assert "precision" in settings and "rows <b>1.jsonl" in page.text("main")
    assert not page.texts("main .error[role=alert]")

    page.click('a.primary[href="#/models/made"]')
    page.until_text("made", "h1")
    assert "tiny" in page.text("main")
    page.click('#navigation a[href="#/models"]')
    page.until("document.querySelector('td.number small')?.textContent")
    page.click('#navigation a[href="#/jobs"]')
    page.until_text("Completed", "tbody")
    page.choose("#state", "Failed")
    page.until_text("No job is failed")
    check_quiet(page)


def test_sample_opens_the_form_with_inspected_rows(server: Served, page: Browser) -> None:
    page.sign_in(KEY)
    page.until("document.querySelector('.samples button') !== null")
    page.click(".samples button")
    page.until("location.hash.startsWith('#/new?rows=')")
    page.until_text("train.jsonl", ".drop")
    page.until("document.querySelector('.inspection') !== null", 120)
    assert page.script("return document.querySelector('#name').value").startswith("route-messages")
    check_quiet(page)


@pytest.mark.slow
def test_form_has_fields_once_rows_are_chosen(server: Served, page: Browser, rows: Path) -> None:
    page.sign_in(KEY)
    page.click('#navigation a[href="#/home"]')
    page.until("document.querySelector('#rows-file') !== null")
    page.script("location.hash = '#/new'")
    page.until("document.querySelector('#base option') !== null")
    assert not page.script("return document.querySelector('#base').checkVisibility()")
    page.write("#training-file", str(rows))
    page.until("document.querySelector('#base').checkVisibility()")
    page.until("document.querySelector('.inspection') !== null", 120)
    page.click("#own-settings summary")
    page.fill('[id="training.epochs"]', "3")
    page.write("#name", "mine")
    page.click('#navigation a[href="#/data"]')
    page.until_text("Data", "h1")
    page.script("history.back()")
    epochs = """document.querySelector('[id="training.epochs"]')?.value"""
    name = "document.querySelector('#name').value"
    page.until(f"{epochs} === '3'")
    assert page.script(f"return {name}").endswith("mine")
    page.click("form [type=reset]")
    page.until(f"!{name}.endsWith('mine')")
    assert page.script(f"return {epochs}") == ""
    check_quiet(page)


def test_columns_of_a_table_are_chosen_in_menus(
    server: Served, page: Browser, tmp_path: Path
) -> None:
    table = tmp_path / "x.csv"
    lines = [f"number {n} {HOSTILE},i{n % 2},mon\n" for n in range(40)]
    table.write_text("utterance,intent,day\n" + "".join(lines))
    page.sign_in(KEY)
    page.click('#navigation a[href="#/new"]')
    page.until("document.querySelector('#base option') !== null")
    page.write("#training-file", str(table))
    page.until_text("utterance", ".columns .problem")
    for name, value in (("utterance", "text"), ("intent", "label"), ("day", "ignore:")):
        page.choose(f'select[aria-label="Read {name} as"]', value)
        page.until("document.querySelector(`select[aria-label='Read ${arguments[0]} as']`).value"
                   " === arguments[1]", 60, name, value)  # fmt: skip
    page.until("document.querySelector('.columns .problem') === null")
    page.click(".submit button:first-child")
    page.until("document.querySelector('.inspection') !== null")
    assert page.script("return document.querySelector('.inspection .box.refused')") is None
    assert "csv" in page.text(".inspection .facts")
    check_quiet(page)


def test_unknown_page_and_job_show_error(server: Served, page: Browser) -> None:
    page.sign_in(KEY)
    page.get(f"{server.url}/console/nothing")
    page.until_text("Page not found", "h1")
    page.script("location.hash = '#/jobs/nothing'")
    page.until_text("There is no job", "[role=alert]")
    assert "Try again" not in page.text("main")


def test_names_are_checked_at_their_fields_and_used_once(
    server: Served, page: Browser, rows: Path
) -> None:
    page.sign_in(KEY)
    page.click('#navigation a[href="#/new"]')
    page.until("document.querySelector('#base option') !== null")
    page.write("#training-file", str(rows))
    page.until_text("is uploaded", ".drop")
    page.choose("#base", BASE)
    page.fill("#name", HOSTILE)
    page.click(".submit .primary")
    assert page.script("return document.querySelector('#name').validity.patternMismatch")
    page.until("location.hash.includes('rows=')")
    address = page.script("return new URLSearchParams(location.hash.split('?')[1]).get('rows')")
    job = {"name": "taken", "model_name": "taken", "base": BASE, "training": [address]}
    assert server.ask("POST", "/api/v1/jobs", job)[0] == 201
    page.fill("#name", "taken")
    page.fill("#model_name", "own")
    page.click(".submit .primary")
    page.until("document.querySelector('#name').getAttribute('aria-invalid') === 'true'")
    assert page.text("#problem-name") and not page.texts("form .box.error")
    page.fill("#name", "fresh")
    page.click(".submit .primary")
    page.until("location.hash === '#/jobs/fresh'")
    for name in ("taken", "fresh"):
        server.ask("POST", f"/api/v1/jobs/{name}/stop")
    page.script("location.hash = '#/new'")
    page.until("document.querySelector('#name') !== null")
    for field, used in (("name", "fresh"), ("model_name", "own")):
        assert page.script(f"return document.querySelector('#{field}').value") not in ("", used)
    assert page.script("return window.hit ?? null") is None


@pytest.mark.slow
def test_fix_on_form_shows_all_rows_of_new_file(
    server: Served, page: Browser, tmp_path: Path
) -> None:
    table = with_copies(tmp_path / "crews.jsonl")
    page.sign_in(KEY)
    page.click('#navigation a[href="#/new"]')
    page.until("document.querySelector('#base option') !== null")
    page.write("#training-file", str(table))
    page.until("document.querySelector('.inspection details.rule button') !== null", 120)
    page.script("document.querySelectorAll('details').forEach((each) => (each.open = true))")
    copies = "each.innerText.includes('duplicate.exact')"
    rules = f"[...document.querySelectorAll('details.rule')].filter((each) => {copies})"
    page.script(f"{rules}[0].querySelector('button').click()")
    page.until_text("Rows of duplicate.exact", "#rows")
    page.script(f"[...{rules}[0].querySelectorAll('button')].at(-1).click()")
    page.until_text("crews-clean.jsonl", ".drop", 120)
    page.until_text("24 rows", "#found")
    assert "Rows of" not in page.text("#rows")
    check_quiet(page)


def test_decisions_on_label_issues_stay(server: Served, page: Browser) -> None:
    page.sign_in(KEY)
    page.script(ISSUES)
    page.script("location.hash = '#/jobs/checked'")
    page.click("#label-issues tbody tr:last-child td:last-child button:last-child")
    page.until_text("1 changed label", "#label-issues .primary")
    page.script("location.hash = '#/jobs'")
    page.until_text("Jobs", "h1")
    page.script("history.back()")
    page.until_text("1 changed label", "#label-issues .primary")
    page.click("#account button")
    page.until("document.querySelector('#key') !== null")
    assert page.script("return Object.keys(sessionStorage)") == []


@pytest.mark.slow
def test_eval_report_opens_in_browser(server: Served, page: Browser) -> None:
    item = {"type": "object", "properties": {"team": {"type": "string"}}}
    check = {
        "type": "string_check", "name": "team", "operation": "eq",
        "input": "{{sample.output_text}}", "reference": "{{item.team}}",
    }  # fmt: skip
    config = {"type": "custom", "item_schema": item, "include_sample_schema": True}
    sent = {"data_source_config": config, "testing_criteria": [check]}
    made = server.ask("POST", "/v1/evals", sent)[1]
    rows = [{"item": {"team": "one"}, "sample": {"output_text": text}} for text in ("one", HOSTILE)]
    source = {"type": "jsonl", "source": {"type": "file_content", "content": rows}}
    path = f"/v1/evals/{made['id']}/runs"
    run = server.ask("POST", path, {"name": "first", "data_source": source})[1]
    until(lambda: server.ask("GET", f"{path}/{run['id']}")[1]["status"] == "completed")
    page.get(run["report_url"])
    page.sign_in(KEY)
    page.until_text("first", "h1")
    assert page.script("return location.pathname + location.hash").startswith("/console/#/evals/")
    assert "50.0%" in page.text(".facts") and HOSTILE in page.text("main")
    assert len(page.texts("main table")) == 2
    check_quiet(page)


def measured(name: str, value: float) -> StudyRow:
    outcome = CellResult(
        measure="accuracy", value=value, error=0.01, processor_seconds=9 * value, is_share=True
    )
    return StudyRow(Configuration({}, name), [outcome])


def test_study_page_has_reasons_choice_and_pictures(
    server: Served, page: Browser, tmp_path: Path
) -> None:
    failed = StudyRow(Configuration({}, "bitfit"), [], "diverged")
    found = Study(
        "s", str(tmp_path), [measured(HOSTILE, 0.9), measured("full", 0.5), failed], [], 99
    )
    found = replace(found, pictures=draw_study(found, tmp_path))
    model = MeasuredModel(name="fasttext", arn="arn:x", stored_id="fasttext")
    request = {"training": "s3://bucket/rows.jsonl", "preset": "methods", "vary": []}
    database = Database(f"sqlite:///{server.home / 'luthier.db'}")
    with database.write() as session:
        row = create(session, StudyTable, ONE, request, [model], recipe={})
        row.state, row.result = "Completed", report_of(found) | {"keep": {"base": "fasttext"}}
        address = row.id
    database.close()
    page.sign_in(KEY)
    page.until_text("What would you like", "h1")
    page.script("location.hash = arguments[0]", f"#/studies/{address}")
    page.until_text(found.verdict(), "#summary")
    assert page.texts("main tbody tr > :first-child") == [HOSTILE, "full", "bitfit"]
    assert page.texts("main tbody strong") == [HOSTILE]
    assert "diverged" in page.texts("main tbody tr:last-child td")
    assert page.script("return document.querySelector('main img').naturalWidth") > 100
    assert any("Keep the winner" in text for text in page.texts("main button"))
    check_quiet(page)


def new_key(server: Served, role: str) -> str:
    """Create a user with a role and return an API key of the user."""
    server.command("admin", "users", "create", role, "--account", ONE, "--role", role)
    made = server.command("admin", "keys", "create", role, "--account", ONE, "--json")
    return str(json.loads(made.stdout)["api_key"])


BUTTONS = """
const wanted = "nav a, main button:not(thead button), main a.button, main form, main td a[aria-label]";
const visible = [...document.querySelectorAll(wanted)].filter((each) => each.checkVisibility());
return visible.map((each) => each.innerText);
"""


def test_pages_and_buttons_follow_the_rights_of_the_key(server: Served, page: Browser) -> None:
    def shown(place: str, text: str, selector: str = "main") -> list[str]:
        page.script("location.hash = arguments[0]", f"#/{place}")
        page.until_text(text, selector)
        return list(page.script(BUTTONS))

    page.sign_in(new_key(server, "read-only"))
    page.until_text("What would you like", "h1")
    menu = ["Home", "Data", "Jobs", "Models", "Evaluate", "Studies", "Deployments", "Usage"]
    assert shown("jobs", "All states", "#state") == menu
    assert shown("models", "Base models") == menu
    assert shown("models/luthier.tiny", "Use the model") == [*menu, "Copy"]
    assert shown("new", "no permission") == menu
    page.click("#account button")
    page.sign_in(new_key(server, "invoker"))
    page.until_text("Base models", "main")
    assert page.script("return location.hash") == "#/models"
    assert page.texts("nav a:not([hidden])") == ["Models", "Playground"]
    assert shown("models/luthier.tiny", "Use the model") == [
        "Models",
        "Playground",
        "Playground",
        "Copy",
    ]
    check_quiet(page)


def test_results_names_and_files_of_the_form_stay(
    server: Served, page: Browser, rows: Path
) -> None:
    page.sign_in(KEY)
    page.script("location.hash = '#/new'")
    page.until("document.querySelector('#base option') !== null")
    page.write("#training-file", str(rows))
    page.until_text("is uploaded", ".drop")
    # The browser writes "No file chosen" next to a field whose file was sent.
    assert page.script("return document.querySelector('#training-file').offsetWidth") == 1
    page.choose("#base", BASE)
    named = "return ['#name', '#model_name'].map((each) => document.querySelector(each).value)"
    names = page.script(named)
    page.until("document.querySelector('.estimate') !== null", 120)
    page.click(".submit button:first-child")
    page.until("document.querySelector('.inspection mark') !== null")
    page.script(FAILING, "/api/v1/nothing")
    page.click("#own-settings summary")
    page.choose('[id="adaptation.method"]', "full")
    page.until("document.querySelector('.estimate') === null")
    page.choose('[id="adaptation.method"]', "lora")
    page.until("document.querySelector('.estimate') !== null", 120)
    assert (
        page.script("return window.asked.filter((each) => each.endsWith('/estimates')).length") < 3
    )
    assert page.texts(".inspection mark") and len(page.texts(".estimate")) == 1
    assert page.script(named) == names
    check_quiet(page)


@pytest.mark.slow
def test_second_model_continues_conversation(server: Served, page: Browser) -> None:
    page.sign_in(KEY)
    page.script(ANSWERS)
    page.script("location.hash = arguments[0]", f"#/playground/{BASE}")
    page.until("document.querySelector('#message') !== null")
    page.fill("#message", "first")
    page.click(".ask .primary")
    page.until_text("answer 1", ".turn.model .said")
    page.until("document.querySelector('#beside').options.length > 1")
    page.script("document.querySelector('#beside').selectedIndex = 1")
    page.script("document.querySelector('#beside').dispatchEvent(new Event('change'))")
    page.until("document.querySelectorAll('.side').length === 2")
    assert page.texts(".turn.user .said") == ["first", "first"]
    page.fill("#message", "second")
    page.click(".ask .primary")
    page.until("window.sent.length === 3")
    assert page.script("return window.sent")[1:] == [["first", "answer 1", "second"]] * 2
    page.until_text("answer 3")
    page.until("!document.querySelector('#beside').disabled")
    names = page.texts(".side h2")
    page.click("#blind")
    page.fill("#message", "third")
    page.click(".ask .primary")
    page.until("document.querySelector('#vote') !== null")
    # Blind messages start new chats.
    assert page.texts(".side h2") == page.texts(".turn.model .who") == ["A", "B"]
    assert page.script("return window.sent")[3:] == [["third"], ["third"]]
    page.click("#vote button:last-child")
    page.until_text("equal 1", "#wins")
    assert sorted(page.texts(".side h2")) == sorted(names)
    page.choose("#beside", "")
    page.until("document.querySelectorAll('.side').length === 1")
    assert page.texts(".turn.user .said") == ["third"]
    check_quiet(page)


@pytest.mark.slow
def test_tables_show_all_columns_on_a_narrow_screen(server: Served, page: Browser) -> None:
    page.sign_in(KEY)
    page.script("location.hash = '#/models'")
    page.until_text("Use", "thead")
    page.resize(390, 844)
    edge = "each.getBoundingClientRect().right"
    cells = f"return [...document.querySelectorAll('tbody td')].map((each) => {edge})"
    assert max(page.script(cells)) <= 390
    cell = "document.querySelector('tbody td[data-name=\"Use\"]')"
    assert "Use" in page.script(f"return getComputedStyle({cell}, '::before').content")
    page.resize(1280, 900)
    assert page.script(f"return getComputedStyle({cell}, '::before').content") == "none"


@pytest.mark.slow
def test_cancelled_upload_and_requests_do_not_reappear(
    server: Served, page: Browser, rows: Path
) -> None:
    page.sign_in(KEY)
    page.script(SLOW["uploads"])
    page.script("location.hash = '#/new'")
    page.until("document.querySelector('#base option') !== null")
    page.write("#training-file", str(rows))
    page.until_text("Uploading rows", ".drop")
    page.fill("#training-address", put(server, rows))
    page.script("document.querySelector('#training-address').blur()")
    page.until("window.aborted")
    assert "at this address" in page.text(".drop")
    assert page.script("return !document.querySelector('.submit .primary').disabled")

    # Other rows end the inspection of earlier rows and are inspected.
    page.script(FAILING, "/api/v1/inspections", {"hangs": True})
    page.click(".submit button:first-child")
    inspections = "window.asked.filter((each) => each === window.failing).length === arguments[0]"
    page.until(inspections, 20, 1)
    page.fill("#training-address", "s3://data/")
    page.script("document.querySelector('#training-address').blur()")
    page.until(inspections, 20, 2)

    # An aborted request may have created the job.
    page.script("window.failing = '/api/v1/jobs'")
    page.script("document.querySelector('#base').selectedIndex = 1")
    page.click(".submit .primary")
    page.until_text("Starting the job", ".outcome")
    assert page.script("return document.querySelector('fieldset').inert")
    page.click(".outcome button")
    page.until("document.querySelector('.outcome a') !== null")
    page.script("window.failing = ''")

    page.script(SLOW["answers"])
    page.script("location.hash = arguments[0]", f"#/playground/{BASE}")
    page.until("document.querySelector('#message') !== null")
    for question in ("first", "second"):
        page.fill("#message", question)
        page.click(".ask .primary")
        page.until_text("half", ".turn.model .said")
        page.script("[...document.querySelectorAll('.ask button')].at(-1).click()")
        page.until("document.querySelectorAll('.turn').length === 0")
    assert page.script("return window.sent") == [["first"], ["second"]]
    check_quiet(page)


def test_sign_in_with_expired_and_invalid_keys(server: Served, page: Browser) -> None:
    # No address signs anybody in: the history of the browser would keep the key.
    page.get(f"{server.url}/console/#key={KEY}")
    page.script("location.reload()")
    page.until_text("Sign in", "h1")
    page.fill("#key", f"{KEY}…")
    page.click(".sign-in button")
    page.until_text("“…”", "[role=alert]")
    page.sign_in(KEY)
    assert page.script("return location.hash") == "#/home"
    page.script("sessionStorage.setItem('luthier.key', 'sk-gone')")
    page.click('#navigation a[href="#/models"]')
    page.until_text("rejects this key", "[role=alert]")
    assert page.script("return sessionStorage.getItem('luthier.key')") is None
    page.fill("#key", "wrong")
    page.click(".sign-in button")
    page.until_text("rejects this key", "[role=alert]")
    page.sign_in(KEYS[OTHER]["api_key"])
    assert page.text("#account").startswith(OTHER)
    page.click("#account button")
    page.until_text("Sign in", "h1")


@pytest.mark.slow
def test_job_page_during_server_stop(tmp_path: Path, tiny_model_folder: Path, rows: Path) -> None:
    server = Served(home_with_tiny(tmp_path / "home", tiny_model_folder))
    with browser(tmp_path / "browser") as page:
        server.start("--no-workers")
        try:
            watch_until_it_stops(server, page, rows)
        finally:
            server.kill()


def watch_until_it_stops(server: Served, page: Browser, rows: Path) -> None:
    # Without workers, the job stays queued and its event stream open.
    job = {"name": "waits", "model_name": "waits", "base": BASE, "training": [put(server, rows)]}
    assert server.ask("POST", "/api/v1/jobs", job)[0] == 201
    page.get(f"{server.url}/console/")
    page.sign_in(KEY)
    page.get(f"{server.url}/console/#/jobs/waits")
    page.until_text("The job was created.", ".messages")
    # The error and the retry button stay while the page polls.
    page.script(FAILING, "/api/v1/jobs/waits/pause")
    page.script("document.querySelector('main .actions button').focus()")
    page.click("main .actions button:first-child")
    page.until_text("not today", ".box.error")
    polled = page.script("return window.asked.length")
    page.until(f"window.asked.length > {polled + 1}")
    assert page.text(".box.error").startswith("not today")
    focused = "return [document.activeElement.textContent, document.activeElement.disabled]"
    assert page.script(focused) == ["Pause", False]
    page.script("window.failing = ''")

    page.script("location.hash = '#/jobs'")
    page.until_text("Queued", "tbody")
    page.script("document.querySelector('.scroll').focus()")
    assert server.ask("POST", "/api/v1/jobs/waits/pause")[0] == 200
    page.until_text("Paused", "tbody")
    assert page.script("return document.activeElement.className") == "scroll"
    page.script("document.querySelector('#state').focus()")
    page.choose("#state", "Failed")
    page.until_text("No job is failed")
    assert page.script("return document.activeElement.id") == "state"
    assert page.script("return location.hash") == "#/jobs?state=Failed"
    page.script("history.back()")
    page.until_text("Paused", "tbody")
    page.script("location.hash = '#/jobs/waits'")
    page.until_text("Paused", ".chip")
    # A narrow screen scrolls down alone.
    page.resize(360, 740)
    assert page.script("return document.documentElement.scrollWidth <= innerWidth")
    page.click("main button.danger")
    page.until_text("Stop the job waits?", "dialog")
    page.click("dialog .danger")
    page.until_text("Stopped", ".chip")
    assert server.ask("GET", "/api/v1/jobs/waits")[1]["state"] == "Stopped"

    again = {**job, "name": "waits-2", "model_name": "waits-2"}
    assert server.ask("POST", "/api/v1/jobs", again)[0] == 201
    page.get(f"{server.url}/console/#/jobs/waits-2")
    page.until_text("The job was created.", ".messages")
    server.kill()
    page.until_text("unreachable", "[role=alert]")
    assert page.script("return sessionStorage.getItem('luthier.key')") == KEY


def with_copies(path: Path) -> Path:
    """Write 24 rows of two teams and two copies to ``path``, and return ``path``."""
    lines = [{"text": f"{HOSTILE} {n}", "label": f"team {n % 2}"} for n in range(24)]
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, *lines[:2]]))
    return path


def put(server: Served, path: Path) -> str:
    """Put a file into a bucket and return the address."""
    s3 = server.client("s3")
    s3.create_bucket(Bucket="data")
    until(lambda: s3.upload_file(str(path), "data", "rows.jsonl") is None)
    return "s3://data/rows.jsonl"


@pytest.mark.slow
def test_data_page_shows_findings_and_writes_cleaned_file(
    server: Served, page: Browser, tmp_path: Path
) -> None:
    table = with_copies(tmp_path / "teams.jsonl")
    page.sign_in(KEY)
    page.click('#navigation a[href="#/data"]')
    page.until("document.querySelector('#opened-file') !== null")
    page.write("#opened-file", str(table))
    page.until_text("26 rows", "#found")
    page.fill("#search", "' 7")
    page.until_text("1 of 26 rows", "#found")
    page.write("#search", "\b\b\b")
    page.choose("#label", "team 1")
    page.until_text("13 of 26 rows", "#found")
    page.until("document.querySelector('.inspection details.rule') !== null", 120)
    page.script("document.querySelectorAll('details').forEach((each) => (each.open = true))")
    copies = "each.innerText.includes('duplicate.exact')"
    rules = f"[...document.querySelectorAll('details.rule')].filter((each) => {copies})"
    page.script(f"[...{rules}[0].querySelectorAll('button')].at(-1).click()")
    page.until_text("teams-clean.jsonl", "h1", 120)
    page.until_text("24 rows", "#found")
    check_quiet(page)
