"""Verification of endpoints: luthier's server with the right model and with four wrong ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served import served
from typer.testing import CliRunner

import luthier
from luthier.cli.app import app
from luthier.errors import LuthierError, RecipeError
from luthier.exports.writer import export
from luthier.files import write_json
from luthier.library.folders import base_folder
from luthier.library.models import find
from luthier.models.manifest import MANIFEST

WORDS = ("sky", "grass", "coal", "snow", "rose", "sea")
COLOURS = ("blue", "green", "black", "white", "red", "dark")
ID = "tiny:colours"
TEMPLATE = (
    "{% for message in messages %}<<{{ message['role'] }}>> {{ message['content'] }} <|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<<assistant>> {% endif %}"
)


def write(path: Path, answers: tuple[str, ...]) -> Path:
    rows = [
        {"prompt": f"What is the colour of {word}?", "completion": f"It is {answer}."}
        for word, answer in zip(WORDS, answers, strict=True)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def store(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters of ``tiny``, and base models that are what a server may make of the first."""
    home = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUTHIER_HOME", str(home))
        # A base that answers in words: what random weights write is no text that a tokenizer makes.
        words = write(home / "words.jsonl", ("nice",) * 6)
        learn(words, str(tiny_model_folder), "words", "full", 0.005)
        export(find("tiny-llama:words"), base_folder("tiny"), merged=True)
        serve("tiny")
        for name, answers in (("colours", COLOURS), ("others", COLOURS[::-1])):
            learn(write(home / f"{name}.jsonl", answers), "tiny", name, "lora", 0.02)
        export(find(ID), base_folder("right"), merged=True)
        export(find("tiny:others"), base_folder("other-adapter"), merged=True)
        shutil.copytree(base_folder("tiny"), base_folder("no-effect"))
        shutil.copytree(base_folder("right"), base_folder("template"))
        (base_folder("template") / "chat_template.jinja").write_text(TEMPLATE)
        shutil.copytree(tiny_model_folder, base_folder("stranger"))
        for name in ("right", "other-adapter", "no-effect", "template", "stranger"):
            serve(name)
    return home


def learn(rows: Path, base: str, name: str, adaptation: str, rate: float) -> None:
    luthier.tune(
        rows, base=base, name=name, data__validation_share=0, adaptation__method=adaptation,
        training__max_steps=30, batch_size=6, learning_rate=rate, training__schedule="constant",
        training__threads=1, training__precision="float32",
    )  # fmt: skip


def serve(name: str) -> None:
    manifest = {"id": name, "kind": "causal_lm", "created": "2026-01-01T00:00:00+00:00"}
    write_json(base_folder(name) / MANIFEST, manifest)


@pytest.fixture
def url(
    store: Path, luthier_home: Path, monkeypatch: pytest.MonkeyPatch, request: Any
) -> Iterator[str]:
    shutil.copytree(store, luthier_home)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-one")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with served(request.getfixturevalue("service").application) as address:
        yield f"{address}/v1"


def test_only_the_model_itself_is_reported_as_served(url: str) -> None:
    for name in ("right", "no-effect", "template", "other-adapter", "stranger"):
        found = luthier.verify(ID, endpoint=url, endpoint_model=name, max_tokens=12)
        assert found.endpoint is not None and found.is_intact
        assert found.holds is (name == "right"), (name, found.endpoint)
        assert found.endpoint.prompts == 6 and not found.endpoint.failures
        assert len(found.endpoint.differences) == 6 - found.endpoint.same
        # The server merges the adapter: a near tie may change a reply.
        assert found.endpoint.same >= 4 or name != "right"


@pytest.mark.slow
def test_the_command_says_what_is_served_and_ends_so(url: str, tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", COLOURS)
    asked = ["models", "verify", ID, "--endpoint", url, "--max-tokens", "12", "--data", str(rows)]
    right = CliRunner().invoke(app, [*asked, "--endpoint-model", "right"])
    assert right.exit_code == 0 and "of 6 greedy replies" in right.stdout, right.stdout
    wrong = CliRunner().invoke(app, [*asked, "--endpoint-model", "no-effect", "--json"])
    assert wrong.exit_code == 1
    differences = json.loads(wrong.stdout)["endpoint"]["differences"]
    assert all(each["expected"] != each["received"] for each in differences)
    for changed, text in (
        (["--endpoint-model", "nobody"], "`endpoint_model`"),
        (
            ["--endpoint-model", "right", "--key-env", "NO_SUCH_KEY"],
            "NO_SUCH_KEY",
        ),
        (["--endpoint-model", "right", "--endpoint", "http://10.1.2.3/v1"], "10.1.2.3"),
        (["--endpoint-model", "right", "--data", str(tmp_path / "no.jsonl")], "no.jsonl"),
    ):
        refused = CliRunner().invoke(app, [*asked, *changed])
        assert refused.exit_code == 2 and text in refused.output, refused.output
    with pytest.raises(RecipeError, match="3 to 256, not 0"):
        luthier.verify(ID, endpoint=url, prompts=0)
    with pytest.raises(RecipeError, match="1 to 512, not 0"):
        luthier.verify(ID, endpoint=url, endpoint_model="right", max_tokens=0)


@pytest.mark.usefixtures("in_float32")
def test_an_endpoint_that_answers_fewer_than_three_prompts(
    store: Path, luthier_home: Path, endpoint: Any
) -> None:
    shutil.copytree(store, luthier_home)
    endpoint.action = lambda prompt: (400, {})
    with pytest.raises(LuthierError, match="answered 0 of 6 prompts"):
        luthier.verify(ID, endpoint=endpoint.url)
    with pytest.raises(LuthierError) as refused:
        luthier.verify(ID, endpoint="http://127.0.0.1:9/v1")
    assert refused.value.rule == "endpoint.unreachable"


def test_a_model_that_does_not_write_is_refused(luthier_home: Path, tiny_encoder: str) -> None:
    with pytest.raises(RecipeError, match="does not generate"):
        luthier.verify(tiny_encoder, endpoint="http://127.0.0.1:9/v1")
