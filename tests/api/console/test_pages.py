"""What the console's pages about models ask of the native face, and their logic without a browser."""

from __future__ import annotations

import json
import os
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

from luthier.api.service import Service
from luthier.api.settings import Settings
from luthier.engine.train import train
from luthier.models.catalog import CATALOG
from luthier.recipe import Recipe
from luthier.serving.abilities import abilities_of, abilities_of_base
from luthier.store.custom_models import ACTIVE, CREATING, CustomModel
from luthier.store.database import new_id, now
from luthier.store.models import find
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
    """A store with a writer, a classifier, and a model whose files are not there yet."""
    home = tmp_path_factory.mktemp("home")
    (home / "rows.jsonl").write_text('{"prompt": "say fox", "completion": "fox fox"}\n' * 3)
    (home / "labels.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    sources = {
        "writer": ("rows.jsonl", str(tiny_model_folder), {"method": "lora", "rank": 4}),
        "labeller": ("labels.jsonl", str(family_folder("bert")), {"method": "full"}),
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
        assert service.issued is not None
        (home / "keys.json").write_text(json.dumps(vars(service.issued)))
        (home / "stored.json").write_text(json.dumps(stored))
        service.close()
    return home


@pytest.fixture
def url(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("LUTHIER_HOME", str(home))
    service = Service(Settings(work=False))
    with served(service.application) as url:
        yield url
    service.close()


@pytest.fixture
def root_key(home: Path) -> str:
    return str(json.loads((home / "keys.json").read_text())["api_key"])


@pytest.fixture
def get(url: str, root_key: str) -> Get:
    """``get(path)``: status and bytes of what the server answers to the root user."""

    def ask(path: str) -> tuple[int, bytes]:
        headers = {"Authorization": f"Bearer {root_key}"}
        request = urllib.request.Request(f"{url}/api/v1/{path}", None, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as refused:
            return refused.code, refused.read()

    return ask


def test_a_model_says_what_it_can_be_asked_for(get: Get) -> None:
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


def test_the_bytes_of_a_certificate_are_those_that_are_certified(get: Get, home: Path) -> None:
    stored = json.loads((home / "stored.json").read_text())
    status, raw = get("models/writer/certificate.json")
    certificate = read_certificate(find(stored["writer"]))
    assert status == 200 and raw == certificate.text().encode()
    assert json.loads(raw)["sha256"] == certificate.digest()
    # A browser would write 32.0 as 32, which has another hash.
    assert b": 8.0" in raw or b".0," in raw
    for name, refused in {"coming": 409, "nobody": 404, "small-dcgan": 404}.items():
        assert get(f"models/{name}/certificate.json")[0] == refused
        assert get(f"models/{name}/certificate")[0] == refused


def test_what_a_base_model_does_is_told_without_fetching_it(
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
    # An autoencoder of time series finds what is unusual, and makes no images.
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
def test_what_models_of_other_tools_do(
    family: str, does: tuple[str, ...], reads: tuple[str, ...], family_folder: Callable[[str], Path]
) -> None:
    found = abilities_of(find(str(family_folder(family))))
    assert (found.does, found.reads) == (does, reads)


def test_a_model_in_a_browser(url: str, root_key: str, tmp_path: Path) -> None:
    with browser(tmp_path) as page:
        page.open(f"{url}/console/")
        page.until_text("Sign in", "h1")
        page.fill("#key", root_key)
        page.click(".sign-in button")
        page.until_text("Sign out", "#account")

        def show(place: str, text: str, selector: str = "main") -> None:
            page.script("location.hash = arguments[0]", f"#/{place}")
            page.until_text(text, selector)

        show("models", "labeller")
        page.fill("#filter", "writ")
        page.until("!document.querySelector('main').textContent.includes('labeller')")

        show("models/writer", "Did it learn?")
        said = page.text("main")
        assert "This model, SHA-256" in said and "Trained on 3 rows" in said
        snippet = "return document.querySelector('details.rule pre').textContent"
        assert f"{url}/v1" in page.script(snippet)

        show("playground/writer", "Ask side by side")
        page.fill("#message", f"say fox {HOSTILE}")
        page.click(".ask .primary")
        page.until_text("first token after", ".turn.model")
        assert HOSTILE in page.text(".turn.user")
        page.script("document.querySelector('main details').open = true")
        page.fill("#temperature", "9")
        page.fill("#message", "again")
        page.click(".ask .primary")
        page.until_text("Expected a value <= 2", ".turn.model:last-child [role=alert]")
        assert page.script("return document.querySelector('#message').value") == "again"

        show("playground/labeller", "Text", "#try label")
        page.click(".ask .primary")
        page.until_text("Write a text first.", "[role=alert]")
        page.fill("#input", HOSTILE)
        page.click(".ask .primary")
        page.until_text("Label:")
        assert sorted(page.texts(".bars .name")) == ["cat", "dog"]

        show("playground/coming", "is creating and cannot be asked")
        show("models/nobody", "There is no model 'nobody'.", "[role=alert]")
        show("usage", "Custom models")
        assert page.script("return window.hit ?? null") is None


def test_the_logic_of_the_modules(tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed, by which the console's modules are tested")
    # Browsers take what a module is from its element, node from the package above it.
    (tmp_path / "package.json").write_text('{"type": "module"}')
    for each in resources.files("luthier.api.console").joinpath("static").iterdir():
        if each.name.endswith(".js"):
            (tmp_path / each.name).write_bytes(each.read_bytes())
    script = Path(__file__).with_name("modules.test.mjs")
    modules = {**os.environ, "CONSOLE_MODULES": str(tmp_path)}
    found = subprocess.run(
        [node, "--test", str(script)], env=modules, capture_output=True, text=True, timeout=120
    )
    assert found.returncode == 0, found.stdout + found.stderr
    for module in sorted(tmp_path.glob("*.js")):
        checked = subprocess.run([node, "--check", str(module)], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr
