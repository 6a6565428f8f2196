"""Certificates: content, schema, and detection of changed bytes."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from short_runs import pairs, write_rows
from typer.testing import CliRunner

import luthier
from luthier.cli.app import app
from luthier.errors import CorruptFile, RecipeError
from luthier.files import hashes_of, read_json, sha256_of, write_json
from luthier.library.models import StoredModel, find
from luthier.library.reports import reports_of, write_report
from luthier.models.catalog import CATALOG
from luthier.models.formats import gguf_networks
from luthier.models.manifest import MANIFEST, Manifest
from luthier.workflows.certificate import certificate
from luthier.workflows.certificate.certificate import (
    Certificate,
    Relative,
    certificate_schema,
    make_certificate,
    read_certificate,
    training_flops,
)
from luthier.workflows.certificate.model_card import hub_name, model_card

ID = "tiny:x"


@pytest.fixture(scope="module")
def certified(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with ``tiny:x``, tuned for four steps, evaluated, compared and certified."""
    home = tmp_path_factory.mktemp("certified")
    shutil.copytree(tiny_model_folder, home / "models" / "base" / "tiny")
    files = hashes_of(tiny_model_folder)
    base = Manifest(id="tiny", kind="causal_lm", created="2026-01-01T00:00:00+00:00", files=files)
    base.write(home / "models" / "base" / "tiny")
    rows = write_rows(home / "rows.jsonl", pairs(24))
    test = write_rows(home / "test.jsonl", pairs(6, start=50))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUTHIER_HOME", str(home))
        settings = {"max_steps": 4, "batch_size": 8, "precision": "float32", "threads": 1}
        plain = {
            "base": "tiny", "name": "x", "data": {"train": str(rows), "validation_share": 0.2},
            "adaptation": {"method": "lora", "rank": 4}, "training": settings,
        }  # fmt: skip
        luthier.tune(luthier.Recipe.parse(plain))
        assert read_certificate(find(ID)).curves["train"]  # without being asked for
        actual = home / "runs" / "tiny" / "x" / "actual.json"
        estimate = {"seconds": {"value": 3.0, "low": 2.0, "high": 5.0}}
        write_json(actual, {**read_json(actual), "estimate": estimate})
        luthier.evaluate(ID, test, max_tokens=4, attach=True)
        ways = [{"name": ID, "technique": "fine-tuning", "score": 0.5, "interval": [0.4, 0.6]}]
        compared = {"contenders": ways, "verdict": "Tuning was <i>worth</i> it."}
        write_report(find(ID), "comparison", {}, compared)
        luthier.certificate(ID)
    return home


@pytest.fixture
def home(certified: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(certified, tmp_path / "home")
    monkeypatch.setenv("LUTHIER_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def folder(home: Path) -> Path:
    return home / "models" / "custom" / "tiny" / "x"


def test_certificate_has_known_facts_and_valid_schema(home: Path) -> None:
    before = find(ID).content_hash
    made = luthier.certificate(ID, watts=50)
    plain = json.loads((folder(home) / "certificate.json").read_text())
    validator = jsonschema.Draft202012Validator(certificate_schema())
    validator.check_schema(certificate_schema())
    validator.validate(plain)
    with pytest.raises(jsonschema.ValidationError):
        validator.validate({**plain, "version": 2})
    assert read_certificate(find(ID)) == made
    assert made.content_sha256 == find(ID).content_hash == before
    assert made.record.data is not None and made.record.data.rows == 19
    assert [(each.id, each.part) for each in made.lineage] == [("tiny", "base")]
    assert [step for step, _ in made.curves["train"]] == [1, 2, 3, 4]
    assert made.curves["validation"][0][0] == 0
    took = {each.quantity: each for each in made.forecast}
    assert (took["seconds"].estimate, took["seconds"].high) == (3.0, 5.0)
    assert took["seconds"].actual > 0 and took["tokens"].estimate is None
    kept = {each.report.kind: each.report for each in made.reports}
    assert kept.keys() == {"evaluation", "comparison"}
    assert kept["evaluation"].result["rows"] == 6 and len(kept["evaluation"].data) == 1
    assert made.missing == []


def test_operations_and_energy_follow_their_formulas(home: Path) -> None:
    made = luthier.certificate(ID, watts=50)
    metrics = made.record.metrics or {}
    tokens, weights = metrics["tokens"], metrics["weights"]
    assert made.compute.flops == (4 * weights + 2 * metrics["trained_weights"]) * tokens
    seconds = made.forecast[0].actual
    assert made.compute.kilowatt_hours == pytest.approx(seconds * 50 / 3.6e6)
    assert not made.compute.watts_assumed
    assert luthier.certificate(ID).compute.watts_assumed
    full = {"tokens": 10, "weights": 7, "trained_weights": 7}
    text = {"template": "chat", "stop_ids": ()}
    assert training_flops(Manifest(id="a", metrics=full, format=text)) == 6 * 7 * 10
    images = Manifest(id="a", metrics=full, format={"template": "none", "stop_ids": ()})
    assert training_flops(images) is None


def change(path: Path, old: bytes, new: bytes) -> None:
    content = path.read_bytes()
    assert len(old) == len(new) and content.count(old) >= 1
    path.write_bytes(content.replace(old, new, 1))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "alter"),
    [
        ("adapter_model.safetensors", flip),
        ("luthier.json", lambda path: change(path, b'"seed": 0', b'"seed": 1')),
        ("certificate.json", lambda path: change(path, b'"seed": 0', b'"seed": 1')),
        ("certificate.json", lambda path: change(path, b'"id": "tiny:x"', b'"id": "tiny:y"')),
        ("certificate.json", lambda path: path.write_bytes(path.read_bytes() + b" ")),
    ],
)  # fmt: skip
def test_verify_finds_file_with_altered_byte(
    home: Path, name: str, alter: Callable[[Path], Any]
) -> None:
    assert luthier.verify(ID).is_intact
    alter(folder(home) / name)
    found = luthier.verify(ID)
    assert not found.is_intact and all(str(folder(home)) in each for each in found.differences)
    assert any(f"/{name} " in each for each in found.differences)
    done = CliRunner().invoke(app, ["models", "verify", ID])
    assert done.exit_code == 1 and name in done.stdout


def test_an_altered_certificate_of_a_signed_model_is_rejected(home: Path) -> None:
    path = folder(home) / "certificate.json"
    (folder(home) / "model.sig").write_text("{}")
    path.write_text(path.read_text().replace('"technique": "fine-tuning"', '"technique": "RAG"'))
    done = CliRunner().invoke(app, ["models", "certificate", ID, "--card", str(home / "README.md")])
    assert done.exit_code != 0
    assert not (home / "README.md").exists()


def test_verify_finds_symbolic_link_and_folder(home: Path, tmp_path: Path) -> None:
    weights = folder(home) / "adapter_model.safetensors"
    weights.rename(tmp_path / "elsewhere")
    weights.symlink_to(tmp_path / "elsewhere")
    (difference,) = luthier.verify(ID).differences
    assert str(weights) in difference and str(tmp_path / "elsewhere") in difference
    weights.unlink()
    (tmp_path / "elsewhere").rename(weights)
    assert luthier.verify(ID).is_intact
    (folder(home) / "certificate.json").unlink()
    (folder(home) / "certificate.json").mkdir()
    (difference,) = luthier.verify(ID).differences
    assert str(folder(home) / "certificate.json") in difference


def test_broken_report_is_refused_before_evaluation(home: Path) -> None:
    (broken, *_) = sorted((folder(home) / "reports").glob("*.json"))
    broken.write_text("{")
    before = sorted((folder(home) / "reports").iterdir())
    with pytest.raises(CorruptFile):
        luthier.evaluate(ID, home / "test.jsonl", max_tokens=4, attach=True)
    assert sorted((folder(home) / "reports").iterdir()) == before
    broken.unlink()
    luthier.evaluate(ID, home / "test.jsonl", max_tokens=4, attach=True)


@pytest.mark.slow
def test_trained_or_repeated_test_rows_are_remarked(home: Path) -> None:
    luthier.evaluate(ID, home / "rows.jsonl", max_tokens=2)
    assert not any("trained on" in r for r in luthier.evaluate(ID, home / "test.jsonl").remarks)
    # Ten training rows and a test row; held-out rows are not trained on.
    record = find(ID).manifest.data
    assert record is not None
    ((source, _apart),) = record.held_out.items()
    lines = Path(source).read_text().splitlines(keepends=True)
    some = home / "some.jsonl"
    some.write_text("".join(lines[:10]) + (home / "test.jsonl").read_text().splitlines()[0] + "\n")
    assert len(luthier.evaluate(ID, some, max_tokens=2).remarks) > 1
    Path(source).write_text("".join(lines) + lines[0])
    try:  # the file no longer equals the training file
        assert source not in " ".join(luthier.evaluate(ID, some, max_tokens=2).remarks)
    finally:
        Path(source).write_text("".join(lines))
    twice = home / "twice.jsonl"
    twice.write_text((home / "test.jsonl").read_text() * 2)
    assert luthier.evaluate(ID, twice, max_tokens=2).remarks


def test_weights_below_an_adapter_and_reports_are_checked(home: Path) -> None:
    flip(home / "models" / "base" / "tiny" / "model.safetensors")
    (difference,) = luthier.verify(ID).differences
    assert "base/tiny/model.safetensors" in difference
    flip(home / "models" / "base" / "tiny" / "model.safetensors")
    assert luthier.verify(ID).is_intact
    path = home / "models" / "base" / "tiny" / MANIFEST
    base = read_json(path)
    base["files"]["config.json"] = "0" * 64
    write_json(path, base)
    assert any(" tiny " in each for each in luthier.verify(ID).differences)


def test_report_file_name_contains_hash(home: Path) -> None:
    kept = reports_of(find(ID))
    path = folder(home) / kept[0].name
    change(path, b'"luthier": "0', b'"luthier": "1')
    assert any(path.name in each for each in luthier.verify(ID).differences)
    with pytest.raises(CorruptFile) as refused:
        luthier.certificate(ID)
    assert refused.value.rule == "report.changed"
    path.unlink()
    assert any(str(path) in each for each in luthier.verify(ID).differences)
    luthier.certificate(ID)
    assert luthier.verify(ID).is_intact
    luthier.evaluate(ID, home / "test.jsonl", max_tokens=1, attach=True)
    assert len(read_certificate(find(ID)).reports) == len(reports_of(find(ID)))


def test_certificate_grows_until_model_is_signed(home: Path) -> None:
    path, signature = folder(home) / "certificate.json", folder(home) / "model.sig"
    luthier.certificate(ID, watts=123)
    luthier.evaluate(ID, home / "test.jsonl", max_tokens=2, attach=True)
    made = read_certificate(find(ID))
    assert made.compute.watts == 123 and not made.compute.watts_assumed
    assert luthier.verify(ID).remarks == []
    signature.write_text("{}")
    signed = path.read_bytes()
    luthier.evaluate(ID, home / "test.jsonl", max_tokens=2, slices=["length"], attach=True)
    assert path.read_bytes() == signed and signature.read_text() == "{}"
    signature.unlink()
    path.unlink()
    assert read_certificate(find(ID)).id == ID  # a model of a version without certificates


def test_certificate_of_model_without_record_is_refused(
    home: Path, tiny_model_folder: Path
) -> None:
    with pytest.raises(RecipeError):
        luthier.certificate(str(tiny_model_folder))
    with pytest.raises(RecipeError):
        luthier.evaluate(str(tiny_model_folder), home / "test.jsonl", attach=True)
    assert not os.path.exists(tiny_model_folder / "reports")
    (folder(home) / "certificate.json").unlink()
    found = luthier.verify(ID)
    assert found.is_intact


def test_certificate_lists_removed_run_as_missing(home: Path) -> None:
    shutil.rmtree(home / "runs")
    made = make_certificate(find(ID))
    assert made.curves == {} and made.machine is None
    assert len(made.missing) == 1
    assert Certificate.model_validate_json(made.text()) == made


def test_commands(home: Path) -> None:
    printed = json.loads(CliRunner().invoke(app, ["models", "certificate", ID, "--json"]).stdout)
    assert printed["id"] == ID
    assert (
        json.loads(CliRunner().invoke(app, ["models", "verify", ID, "--json"]).stdout)["intact"]
        is True
    )
    exported = CliRunner().invoke(app, ["models", "export", ID, str(home / "out")])
    assert exported.exit_code == 0
    assert (
        not (home / "out" / "certificate.json").exists() and not (home / "out" / "reports").exists()
    )


@pytest.mark.slow
def test_exports_stand_in_the_record_and_the_certificate(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_float32: None
) -> None:
    before = find(ID).content_hash
    for name, quantization in (("a", "q8_0"), ("b", "f16"), ("c", "q8_0")):
        written = luthier.export(ID, tmp_path / name, format="gguf", quantization=quantization)
        assert written.is_recorded and written.record is not None
    made = read_certificate(find(ID))
    exports = {each.name: each for each in made.record.exports or ()}
    assert list(exports) == ["gguf f16", "gguf q8_0"] and made.record == find(ID).manifest
    assert exports["gguf q8_0"] == written.record
    assert exports["gguf q8_0"].files == hashes_of(tmp_path / "c")
    assert luthier.verify(ID).is_intact and find(ID).content_hash == before
    assert made.content_sha256 == before and len(made.reports) == 2
    installed = find_spec("xllamacpp") is not None
    told = "equal predictions at" if installed else "not compared"
    said = CliRunner().invoke(app, ["models", "certificate", ID]).stdout
    assert told in said
    jsonschema.validate(json.loads(made.text()), certificate_schema())
    # The record of a signed model does not change.
    (folder(home) / "model.sig").write_text("{}")
    record = (folder(home) / MANIFEST).read_bytes()
    assert not luthier.export(ID, tmp_path / "d", format="gguf").is_recorded
    assert (folder(home) / MANIFEST).read_bytes() == record


def test_gguf_with_different_output_enters_no_record(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_float32: None
) -> None:
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed")
    monkeypatch.setattr(gguf_networks, "interleaved_order", lambda size, heads: torch.arange(size))
    with pytest.raises(RecipeError):
        luthier.export(ID, tmp_path / "wrong", format="gguf")
    assert find(ID).manifest.exports is None and not (tmp_path / "wrong").exists()


def test_export_of_replaced_model_enters_no_record(
    home: Path, tmp_path: Path, in_float32: None
) -> None:
    stored = find(ID)
    path = folder(home) / "README.md"
    path.write_text("of another one")
    files = {**stored.manifest.files, "README.md": sha256_of(path)}
    stored.manifest.model_copy(update={"files": files}).write(stored.folder)
    luthier.export(stored, tmp_path / "old", format="gguf")
    assert find(ID).manifest.exports is None


def lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_model_card_is_read_by_the_hub_s_own_library(home: Path) -> None:
    from huggingface_hub import ModelCard

    made = luthier.certificate(ID)
    card = ModelCard(model_card(made))
    scores = {each.metric_type: each for each in card.data.eval_results}
    kept = next(each.report for each in made.reports if each.report.kind == "evaluation")
    assert {name: each.metric_value for name, each in scores.items()} == kept.result["scores"]
    assert scores["exact"].dataset_name == "test.jsonl"
    assert card.data.base_model == "tiny" and card.data.library_name == "peft"
    assert card.data.pipeline_tag == "text-generation"
    assert made.content_sha256 in card.text and "rows.jsonl" in card.text


def test_hub_name_of_packaged_base_is_repository() -> None:
    for name, repository in {
        "smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "all-minilm-l6-v2": "sentence-transformers/all-MiniLM-L6-v2",
        "small-cnn": "small-cnn",
    }.items():
        known = CATALOG[name].manifest()
        assert hub_name(Relative(id=name, part="parent", source=known.source)) == repository
    # The name refers to a different model here.
    other = Relative(id="all-minilm-l6-v2", part="parent", source="hub:anna/other")
    assert hub_name(other) == "anna/other"
    assert hub_name(other.model_copy(update={"source": None})) == "all-minilm-l6-v2"


def test_the_command_writes_a_card_and_keeps_a_signature(home: Path) -> None:
    (folder(home) / "model.sig").write_text("{}")
    before = (folder(home) / "certificate.json").read_bytes()
    card = home / "README.md"
    done = CliRunner().invoke(app, ["models", "certificate", ID, "--card", str(card)])
    assert done.exit_code == 0 and card.read_text().startswith("---\n")
    assert (folder(home) / "certificate.json").read_bytes() == before
    assert (folder(home) / "model.sig").exists()


def test_concurrent_certificates_include_all_reports(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gathers, may_end = threading.Event(), threading.Event()

    def slow(model: StoredModel, watts: float | None = None) -> Certificate:
        made = make_certificate(model, watts)
        if not gathers.is_set():
            gathers.set()
            may_end.wait(1)
        return made

    monkeypatch.setattr(certificate, "make_certificate", slow)
    write_report(find(ID), "evaluation", {}, {"rows": 1})
    first = threading.Thread(target=certificate.certify, args=(ID,))
    first.start()
    assert gathers.wait(10)
    write_report(find(ID), "evaluation", {}, {"rows": 2})
    second = threading.Thread(target=certificate.certify, args=(ID,))
    second.start()
    second.join(0.3)
    may_end.set()
    for each in (first, second):
        each.join()
    counts = [each.report.result.get("rows") for each in read_certificate(find(ID)).reports]
    assert {1, 2} <= {*counts}
