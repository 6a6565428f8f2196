"""Certificates: what they gather, that others can read them, and that a changed byte is found."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from short_runs import pairs, write_rows
from typer.testing import CliRunner

import luthier
from luthier.cli.app import app
from luthier.errors import CorruptFile, RecipeError
from luthier.files import hashes_of, read_json, write_json
from luthier.models.manifest import MANIFEST, Manifest
from luthier.store.models import StoredModel, content_hash, find
from luthier.store.reports import reports_of, write_report
from luthier.workflows.certificate.certificate import (
    Certificate,
    certificate_schema,
    make_certificate,
    read_certificate,
)
from luthier.workflows.certificate.compute import base_flops, training_flops
from luthier.workflows.certificate.page import page

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
        actual = home / "runs" / "tiny" / "x" / "actual.json"
        estimate = {"seconds": {"value": 3.0, "low": 2.0, "high": 5.0}}
        write_json(actual, {**read_json(actual), "estimate": estimate})
        luthier.evaluate(ID, test, max_tokens=4, attach=True)
        ways = [{"name": ID, "technique": "tuned", "score": 0.5, "interval": [0.4, 0.6]}]
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


def test_a_certificate_holds_what_is_known_and_follows_its_schema(home: Path) -> None:
    before = content_hash(find(ID))
    made = luthier.certificate(ID, watts=50)
    plain = json.loads((folder(home) / "certificate.json").read_text())
    validator = jsonschema.Draft202012Validator(certificate_schema())
    validator.check_schema(certificate_schema())
    validator.validate(plain)
    with pytest.raises(jsonschema.ValidationError):
        validator.validate({**plain, "version": 2})
    assert read_certificate(find(ID)) == made
    assert made.content_sha256 == content_hash(find(ID)) == before
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


def test_operations_and_energy_are_what_their_formulas_say(home: Path) -> None:
    made = luthier.certificate(ID, watts=50)
    metrics = made.record.metrics or {}
    tokens, weights = metrics["tokens"], metrics["weights"]
    assert made.compute.flops == (4 * weights + 2 * metrics["trained_weights"]) * tokens
    assert made.compute.ratio is None and made.compute.above_one_third is None
    assert "unknown" in made.compute.base_counted_as
    seconds = made.forecast[0].actual
    assert made.compute.kilowatt_hours == pytest.approx(seconds * 50 / 3.6e6)
    assert not made.compute.watts_assumed
    assert luthier.certificate(ID).compute.watts_assumed
    known = Manifest(id="smollm2-135m-instruct")
    flops, said = base_flops(StoredModel(known.id, Path(), known))
    assert flops == pytest.approx(6 * 134_515_008 * 2e12) and "2e+12 tokens" in said
    full = {"tokens": 10, "weights": 7, "trained_weights": 7}
    texts = {"template": "chat", "stop_ids": ()}
    assert training_flops(Manifest(id="a", metrics=full, format=texts))[0] == 6 * 7 * 10
    images = Manifest(id="a", metrics=full, format={"template": "none", "stop_ids": ()})
    assert training_flops(images)[0] is None


def test_a_model_above_a_third_of_its_base_is_called_so(home: Path) -> None:
    path = home / "models" / "base" / "tiny" / MANIFEST
    base = read_json(path)
    own = luthier.certificate(ID).compute.flops or 0
    for share, above in ((2, True), (4, False)):
        tokens = own * share / 600
        base["metrics"] = {"tokens": tokens, "weights": 100, "trained_weights": 100}
        base["format"] = {"template": "chat", "stop_ids": [2]}
        write_json(path, base)
        found = luthier.certificate(ID).compute
        assert found.ratio == pytest.approx(1 / share, rel=0.01)
        assert found.above_one_third is above


def test_the_page_shows_lineage_curves_and_reports(home: Path) -> None:
    made = luthier.certificate(ID)
    html = page(made)
    assert html.count("<rect") == 2 and "this model" in html and "<polyline" in html
    assert "with 95 % confidence" in html and "Tuning was &lt;i&gt;worth" in html
    assert "3 s" in html and "2 s to 5 s" in html
    assert "Not known" not in html and "<script" not in html
    evil = made.model_copy(update={"id": "tiny:<b>x", "missing": ["Nothing <i>."]})
    assert "<b>x" not in page(evil) and "Nothing &lt;i&gt;." in page(evil)


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
def test_one_altered_byte_is_found_and_its_file_named(
    home: Path, name: str, alter: Callable[[Path], Any]
) -> None:
    assert luthier.verify(ID).is_intact
    alter(folder(home) / name)
    found = luthier.verify(ID)
    assert not found.is_intact and all(str(folder(home)) in each for each in found.differences)
    assert any(f"/{name} " in each for each in found.differences)
    done = CliRunner().invoke(app, ["verify", ID])
    assert done.exit_code == 1 and name in done.stdout and "is intact" not in done.stdout


def test_weights_below_an_adapter_and_reports_are_checked(home: Path) -> None:
    flip(home / "models" / "base" / "tiny" / "model.safetensors")
    (difference,) = luthier.verify(ID).differences
    assert "base/tiny/model.safetensors is not what was recorded" in difference
    flip(home / "models" / "base" / "tiny" / "model.safetensors")
    assert luthier.verify(ID).is_intact
    path = home / "models" / "base" / "tiny" / MANIFEST
    base = read_json(path)
    base["files"]["config.json"] = "0" * 64
    write_json(path, base)
    assert any("not the model that was certified" in e for e in luthier.verify(ID).differences)


def test_a_report_is_named_by_its_hash(home: Path) -> None:
    kept = reports_of(find(ID))
    path = folder(home) / kept[0].name
    change(path, b'"luthier": "0', b'"luthier": "1')
    assert any(path.name in each for each in luthier.verify(ID).differences)
    with pytest.raises(CorruptFile, match=path.name):
        luthier.certificate(ID)
    path.unlink()
    assert f"{path} is missing." in luthier.verify(ID).differences
    luthier.certificate(ID)
    assert luthier.verify(ID).is_intact
    luthier.evaluate(ID, home / "test.jsonl", max_tokens=1, attach=True)
    assert "since the certificate was made" in luthier.verify(ID).remarks[0]


def test_what_has_no_record_is_refused(home: Path, tiny_model_folder: Path) -> None:
    with pytest.raises(RecipeError, match="no record"):
        luthier.certificate(str(tiny_model_folder))
    with pytest.raises(RecipeError, match="not in the store"):
        luthier.evaluate(str(tiny_model_folder), home / "test.jsonl", attach=True)
    assert not os.path.exists(tiny_model_folder / "reports")
    (folder(home) / "certificate.json").unlink()
    found = luthier.verify(ID)
    assert found.is_intact and "no certificate" in found.remarks[0]


def test_a_run_that_is_gone_is_said_to_be(home: Path) -> None:
    shutil.rmtree(home / "runs")
    made = make_certificate(find(ID))
    assert made.curves == {} and made.machine is None
    assert "The folder of the run is gone, and with it its curves." in made.missing
    assert Certificate.model_validate_json(made.text()) == made
    assert "<polyline" not in page(made)


def test_commands(home: Path) -> None:
    target = home / "page.html"
    done = CliRunner().invoke(app, ["certificate", ID, "--html", str(target)])
    assert done.exit_code == 0 and "made from tiny" in done.stdout and target.is_file()
    printed = json.loads(CliRunner().invoke(app, ["certificate", ID, "--json"]).stdout)
    assert printed["id"] == ID
    assert json.loads(CliRunner().invoke(app, ["verify", ID, "--json"]).stdout)["intact"] is True
    exported = CliRunner().invoke(app, ["models", "export", ID, str(home / "out")])
    assert exported.exit_code == 0
    assert (
        not (home / "out" / "certificate.json").exists() and not (home / "out" / "reports").exists()
    )
