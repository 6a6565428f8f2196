"""``luthier models``: list, show, pull, export and remove."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from command_line import MODEL, Answer, memorise
from stored_files import files_in

from luthier.cli.models.export import print_readers
from luthier.cli.service.database import open_database
from luthier.engine.runs import Run
from luthier.exports.export import Export
from luthier.files import read_json, sha256_of, write_json
from luthier.library.folders import gguf_folder
from luthier.models.catalog import CATALOG, PackageSource
from luthier.models.manifest import MANIFEST
from luthier.server.tables.custom_models import ACTIVE, CustomModel
from luthier.server.tables.database import now
from luthier.server.tables.endpoints import PROVISIONED, Endpoint


def test_list_names_bases_and_custom_models(
    tuned: tuple[Path, dict[str, Any], str, str], home: Path
) -> None:
    report = Answer("models", "list", "--json").good().json()
    assert [base["id"] for base in report["base"]] == list(CATALOG)
    assert not any(base["here"] for base in report["base"])
    assert {base["source"].partition(":")[0] for base in report["base"]} == {
        "pypi",
        "hub",
        "random",
    }
    (custom,) = report["custom"]
    assert custom["id"] == MODEL
    assert (custom["objective"], custom["adaptation"]) == ("sft", "full")
    assert custom["validation_loss"] == tuned[1]["validation_loss"]
    text = Answer("models", "list").good().out
    assert all(name in text for name in CATALOG)
    (line,) = [line for line in text.splitlines() if line.startswith(MODEL)]
    assert line.rstrip().endswith(custom["created"][:16].replace("T", " "))


@pytest.mark.parametrize(
    ("kind", "why"),
    [("none", "does not exist"), ("file", "is not a folder"), ("closed", "is not readable")],
)
def test_unreadable_store_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, why: str
) -> None:
    named = tmp_path / "store"
    if kind == "file":
        named.write_text("")
    elif kind == "closed":
        named.mkdir()
        access = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: path != named and access(path, mode))
    monkeypatch.setenv("LUTHIER_HOME", str(named))
    listed = Answer("models", "list").good()
    assert str(named) in listed.err and why in listed.err and listed.err.count("\n") == 1
    assert Answer("models", "list", "--json").good().json()["custom"] == []
    for command in ("show", "remove"):
        assert listed.err.strip() in Answer("models", command, "x:y").refused()
    assert listed.err.strip() in Answer("generate", "x:y", "hi").refused()
    if kind == "file":
        assert "LUTHIER_HOME" in Answer("admin", "models", "list").refused(1)


def test_copied_run_folder_is_not_listed_as_interrupted(luthier_home: Path) -> None:
    for name in ("good", "good (copy)"):
        folder = luthier_home / "runs" / "fasttext" / name
        folder.mkdir(parents=True)
        (folder / "request.json").write_text("{}")
    listed = Answer("models", "list").good().out
    assert "fasttext:good" in listed and "(copy)" not in listed


def test_missing_default_store_prints_no_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LUTHIER_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Answer("models", "list").good().err == ""
    assert Answer("models", "list", "--json").good().json()["custom"] == []
    shown = Answer("models", "show", "x:y", "--json")
    shown.refused()
    assert shown.json()["error"]["type"] == "UnknownModel"


def test_list_shows_refit_and_unchanged_models(own_home: Path) -> None:
    path = own_home / "models" / "custom" / "tiny-llama" / "colours" / "luthier.json"
    record = json.loads(path.read_text())
    record["metrics"]["refit"] = {"rows": 24, "held_out": 4, "steps": 9}
    path.write_text(json.dumps(record))
    (custom,) = Answer("models", "list", "--json").good().json()["custom"]
    assert custom["refit_rows"] == 24 and "unchanged" not in custom
    assert "before the refit" in " ".join(Answer("models", "list").good().out.split())
    record["metrics"] |= {
        "refit": None,
        "verdict": record["metrics"]["verdict"] | {"unchanged": True},
    }
    path.write_text(json.dumps(record))
    text = " ".join(Answer("models", "list").good().out.split())
    assert "unchanged" in text and "before the refit" not in text
    (custom,) = Answer("models", "list", "--json").good().json()["custom"]
    assert custom["unchanged"] is True


def test_list_marks_withheld_model(own_home: Path) -> None:
    record = own_home / "models" / "custom" / "tiny-llama" / "colours" / "luthier.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"withheld": "it forgot"}))
    text = Answer("models", "list").good().out
    (line,) = [line for line in text.splitlines() if line.startswith(MODEL)]
    assert line.rstrip().endswith("withheld")


def test_list_creates_no_database_and_tolerates_corrupt_database(
    own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LUTHIER_DATABASE", f"sqlite:///{own_home / 'absent.db'}")
    assert "service" not in Answer("models", "list", "--json").good().json()["custom"][0]
    assert not (own_home / "absent.db").exists()
    monkeypatch.delenv("LUTHIER_DATABASE")
    (own_home / "luthier.db").write_text("no database" * 100)
    listed = Answer("models", "list").good()
    assert MODEL in listed.out and "DatabaseError" in listed.err


def test_unknown_id_error_lists_job_models(own_home: Path) -> None:
    folder = own_home / "models" / "custom" / "tiny-llama"
    shutil.copytree(folder / "colours", folder / "job-1")
    record = read_json(folder / "job-1" / MANIFEST)
    write_json(folder / "job-1" / MANIFEST, record | {"id": "tiny-llama:job-1"})
    message = Answer("generate", "tiny-llama:support", "hello").refused()
    assert "tiny-llama:job-1" in message


def test_list_of_empty_store_suggests_tune() -> None:
    assert "luthier tune DATA" in Answer("models", "list").good().out
    assert Answer("models", "list", "--json").good().json()["custom"] == []


@pytest.mark.parametrize("text", ["{", "[]", '{"id": "tiny-llama:colours"}'])
def test_damaged_model_does_not_hide_intact_models(own_home: Path, text: str) -> None:
    folder = own_home / "models" / "custom" / "tiny-llama"
    (folder / "broken").mkdir()
    (folder / "broken" / "luthier.json").write_text(text)
    listed = Answer("models", "list", "--json").good().json()["custom"]
    assert sum("damaged" in model for model in listed) == 1
    assert MODEL in [model["id"] for model in listed if "damaged" not in model]
    assert "damaged" in Answer("models", "list").good().out


def test_show_reports_file_hashes_and_damage(own_home: Path, tiny_model_folder: Path) -> None:
    shown = Answer("models", "show", MODEL, "--json").good().json()
    assert shown["lineage"] == [MODEL, str(tiny_model_folder)]
    folder = own_home / "models" / "custom" / "tiny-llama" / "colours"
    assert shown["folder"] == str(folder)
    weights = shown["files"]["model.safetensors"]
    assert weights["path"] == str(folder / "model.safetensors")
    assert weights["bytes"] == (folder / "model.safetensors").stat().st_size
    assert weights["sha256"] == sha256_of(folder / "model.safetensors")
    assert all(file["intact"] for file in shown["files"].values())
    (folder / "tokenizer.json").write_text("{}")
    (folder / "loss.png").unlink()
    (folder / "extra").write_text("x")
    damaged = Answer("models", "show", MODEL).good().out
    assert "loss.png, tokenizer.json\n" in damaged
    files = Answer("models", "show", MODEL, "--json").good().json()["files"]
    assert files["tokenizer.json"]["intact"] is False
    assert files["loss.png"]["intact"] is False
    assert files["loss.png"]["sha256"] is None
    assert files["extra"]["intact"] is None
    assert files["model.safetensors"]["intact"] is True


def test_show_summarizes_model(home: Path, tiny_model_folder: Path) -> None:
    lines = Answer("models", "show", MODEL).good().out.splitlines()
    shown = {line[2:15].strip(): line[16:] for line in lines[1:-1]}
    assert (lines[0], shown["base"]) == (MODEL, str(tiny_model_folder))
    assert shown["learned"].split()[0] == "sft" and "validation loss" in shown["result"]
    assert re.findall(r"\d+|\S+\.jsonl", shown["rows"]) == ["4", "colours.jsonl", "4"]
    assert shown["files"].endswith(" MB, intact") and shown["folder"].startswith(str(home))
    assert lines[-1].endswith(f"luthier models show {MODEL} --json") and len(lines) < 20
    pulled = Answer("models", "show", "smollm2-135m-instruct").good().out
    assert "134,515,008\n" in pulled and "luthier models pull smollm2-135m-instruct" in pulled


def test_show_of_catalogue_model_needs_no_download(luthier_home: Path) -> None:
    shown = Answer("models", "show", "smollm2-135m-instruct", "--json").good().json()
    assert shown["here"] is False
    source = CATALOG["smollm2-135m-instruct"].source
    assert isinstance(source, PackageSource) and shown["source_sha256"] == source.sha256
    shown = Answer("models", "show", "bert-base-uncased", "--json").good().json()
    assert shown["source"] == "hub:google-bert/bert-base-uncased" and not shown["files"]
    assert not luthier_home.exists()
    unknown = Answer("models", "show", "none", "--json")
    unknown.refused()
    assert unknown.json()["error"]["type"] == "UnknownModel"


def test_failed_pull_leaves_no_files(
    luthier_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (
        ("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", str(tmp_path)), ("PIP_CONFIG_FILE", os.devnull)
    ):  # fmt: skip
        monkeypatch.setenv(name, value)
    answer = Answer("models", "pull", "smollm2-135m-instruct", "--json")
    answer.refused(1)
    assert answer.json()["error"]["type"] == "DownloadError"
    assert files_in(luthier_home) == ["models/base/.smollm2-135m-instruct.lock"]
    unknown = Answer("models", "pull", "none", "--json")
    unknown.refused()
    assert unknown.json()["error"]["type"] == "UnknownModel"


def test_pull_repairs_damaged_base(
    tiny_model_folder: Path, luthier_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The download is replaced; tests of the catalogue cover downloads."""
    from luthier.files import hashes_of
    from luthier.library import models as store

    fetched: list[str] = []

    def fetch(entry: Any, target: Path, say: Callable[[str], None]) -> None:
        fetched.append(entry.id)
        shutil.copytree(tiny_model_folder, target)
        write_json(target / MANIFEST, {"id": entry.id, "files": hashes_of(target)})

    monkeypatch.setattr(store, "pull", fetch)
    name = "smollm2-135m-instruct"
    folder = luthier_home / "models" / "base" / name
    assert Answer("models", "pull", name, "--json").good().json() == {
        "id": name, "folder": str(folder)
    }  # fmt: skip
    assert str(folder) in Answer("models", "pull", name).good().out
    assert fetched == [name]
    (folder / "model.safetensors").write_bytes(b"x")
    answer = Answer("models", "pull", name).good()
    assert "damaged" in answer.err
    assert fetched == [name, name]
    assert sha256_of(folder / "model.safetensors") == sha256_of(
        tiny_model_folder / "model.safetensors"
    )


def test_merged_export_generates_same_tokens_in_transformers(home: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "out"
    report = Answer("models", "export", MODEL, str(folder), "--merged", "--json").good().json()
    assert (report["id"], report["folder"]) == (MODEL, str(folder))
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(report["files"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    for prompt in ("colour of snow?", "something else entirely"):
        encoded = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True, return_tensors="pt", return_dict=True,
        )  # fmt: skip
        out = model.generate(**encoded, max_new_tokens=12, do_sample=False)
        ids = out[0, encoded["input_ids"].shape[1] :]
        served = Answer("generate", MODEL, prompt, "--max-tokens", "12", "--json").good().json()
        assert tokenizer.decode(ids, skip_special_tokens=True) == served["completion"]


@pytest.mark.slow
def test_export_of_an_adapter_loads_with_peft(
    own_home: Path, data: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    command = memorise(tiny_model_folder, data, "thin", "lora", 0.02)
    Answer(*command, "--set", "training.precision=float32", "--json").good()
    folder = tmp_path / "adapter"
    text = Answer("models", "export", "tiny-llama:thin", str(folder)).good().out
    assert str(folder) in text
    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    model: Any = PeftModel.from_pretrained(base, folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer.apply_chat_template(
        [{"role": "user", "content": "colour of sky?"}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )  # fmt: skip
    out = model.generate(**encoded, max_new_tokens=12, do_sample=False)
    ids = out[0, encoded["input_ids"].shape[1] :]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "blue"
    assert Answer("generate", "tiny-llama:thin", "colour of sky?").good().out == "blue\n"
    again = Answer("models", "export", "tiny-llama:thin", str(folder))
    assert str(folder) in again.refused()


def test_export_of_a_base(tiny_model_folder: Path, tmp_path: Path) -> None:
    Answer("models", "export", str(tiny_model_folder), str(tmp_path / "out")).good()
    assert (tmp_path / "out" / "model.safetensors").is_file()
    Answer("models", "export", "none", str(tmp_path / "other")).refused()
    assert not (tmp_path / "other").exists()


def test_export_of_luthier_network_names_reader(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = Answer("models", "export", "small-cnn", str(tmp_path / "out")).good().out
    assert "`luthier.models.networks.classic.register()`" in text
    assert text.endswith("luthier models export small-cnn FOLDER --format onnx\n")
    adapter = Export("a:b", tmp_path, "safetensors", ["adapter_config.json"], "small_cnn")
    write_json(tmp_path / "adapter_config.json", {})
    for suits in (False, True):
        capsys.readouterr()
        print_readers(replace(adapter, suits_onnx=suits))
        text = capsys.readouterr().out
        assert "small_cnn" in text and text.endswith("--format onnx\n") == suits
        assert "--merged\n" in text and "classic.register()" in text


def test_gguf_export_prints_llama_cpp_instructions(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ("--format", "gguf", "--quantization", "q8_0")
    answer = Answer("models", "export", MODEL, str(tmp_path / "out"), *given).good()
    text = answer.out
    installed = find_spec("xllamacpp") is not None
    file = next((tmp_path / "out").glob("*-Q8_0.gguf"))
    assert file.name in text and f"-f {tmp_path / 'out' / 'Modelfile'}" in text
    assert ("pip install" in text) != installed
    monkeypatch.setattr("luthier.exports.writer.llama_cpp_library", lambda: None)
    text = Answer("models", "export", MODEL, str(tmp_path / "two"), *given).good().out
    assert "pip install 'luthier[llama-cpp]'" in text
    report = Answer("models", "export", MODEL, str(tmp_path / "3"), *given, "--json").good().json()
    assert report["parity"] is None and report["files"] == ["Modelfile", file.name]
    for more in (
        ("--quantization", "q8_0"),
        ("--format", "gguf", "--quantization", "q3"),
        ("--format", "onnx", "--adapter"),
        ("--format", "onnx"),
    ):
        answer = Answer("models", "export", MODEL, str(tmp_path / "no"), *more, "--json")
        answer.refused()
        assert answer.json()["error"]["type"] == "RecipeError"
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
def test_remove_deletes_model_and_run(own_home: Path, data: Path) -> None:
    child = ["tune", str(data), "--base", MODEL, "--name", "child", "--epochs", "1", "--json"]
    Answer(*child).good()
    other = gguf_folder("tiny-llama:child-2", "0" * 64, "f32")
    for made in (other, gguf_folder("tiny-llama:child", "1" * 64, "f32")):
        write_json(made / "parity.json", {})
    assert "tiny-llama:child" in Answer("models", "remove", MODEL).refused()
    assert Answer("models", "remove", "tiny-llama:child", "--json").good().json()["removed"]
    assert Answer("models", "remove", MODEL, "--json").good().json() == {
        "id": MODEL, "removed": True
    }  # fmt: skip
    assert not files_in(own_home)
    assert [path.name for path in other.parent.glob("[!.]*")] == [other.name]
    Answer("models", "remove", MODEL).refused()


def test_service_model_must_be_unregistered_before_removal(own_home: Path) -> None:
    names = {"name": "support", "foundation": "luthier.tiny-llama", "root": "luthier.tiny-llama"}
    row = CustomModel(
        id="abcdefghijkl", account="000000000000", base_model="", stored_id=MODEL, status="Active",
        created=now(), **names,
    )  # fmt: skip
    with open_database(None) as database, database.write() as session:
        session.add(row)
    refused = Answer("models", "remove", MODEL).refused()
    assert "000000000000" in refused and "luthier admin models unregister" in refused
    with open_database(None) as database, database.write() as session:
        session.delete(session.get_one(CustomModel, 1))
    Answer("models", "remove", MODEL).good()


def test_remove_works_without_server_extra(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    specs = find_spec
    monkeypatch.setattr(
        "luthier.cli.models.app.find_spec",
        lambda name: None if name == "sqlalchemy" else specs(name),
    )
    for name in ("stores.removal", "tables.database"):
        monkeypatch.setitem(sys.modules, f"luthier.server.{name}", None)
    assert Answer("models", "remove", MODEL, "--json").good().json()["removed"]


@pytest.mark.parametrize(
    "model_id",
    ["tiny-llama:", "tiny-llama:.", "tiny-llama:..", "tiny-llama:../..", "tiny-llama:../tiny-llama",
     "tiny-llama", "smollm2-135m-instruct", ":", ":colours", "", "x:colours"],
)  # fmt: skip
def test_remove_of_unknown_id_deletes_nothing(own_home: Path, model_id: str) -> None:
    before = files_in(own_home)
    refused = Answer("models", "remove", model_id).refused()
    assert model_id in refused and MODEL in refused
    assert files_in(own_home) == before


def test_unknown_id_error_suggests_similar_model(own_home: Path) -> None:
    for command in ("remove", "show", "pull", "capabilities"):
        asked = Answer("models", command, "tiny-llama:colour").refused()
        assert f"Did you mean {MODEL}?" in asked
    assert f"Did you mean {MODEL}?" in Answer("models", "samples", "tiny-llama:colour").refused()


def test_base_with_dependent_model_is_removed_only_with_force(own_home: Path) -> None:
    folder = own_home / "models" / "base" / "smollm2-135m-instruct"
    write_json(folder / MANIFEST, {})
    derived = gguf_folder(folder.name, "0" * 64, "f32")
    write_json(derived / "parity.json", {})
    record = own_home / "models" / "custom" / "tiny-llama" / "colours" / MANIFEST
    child = f"{folder.name}:mine"
    write_json(
        own_home / "models" / "custom" / folder.name / "mine" / MANIFEST,
        read_json(record) | {"id": child, "parent": folder.name},
    )
    refused = Answer("models", "remove", folder.name).refused()
    assert child in refused and "--force" in refused and folder.is_dir()
    Answer("models", "remove", folder.name, "--force").good()
    assert not folder.exists() and not derived.exists()
    assert (own_home / "models" / "custom" / folder.name / "mine" / MANIFEST).is_file()
    assert folder.name in Answer("models", "remove", folder.name).refused()


def test_base_used_by_account_is_removed_only_with_force(own_home: Path) -> None:
    folder = own_home / "models" / "base" / "smollm2-135m-instruct"
    write_json(folder / MANIFEST, {})
    foundation, ended = (
        f"huggingfacetb.{folder.name}",
        "arn:aws:bedrock:us-east-1::foundation-model/",
    )
    with open_database(None) as service, service.write() as session:
        session.add(
            Endpoint(
                id="abcdefghijkl", account="111111111111", kind=PROVISIONED, name="always", units=1,
                foundation=foundation, model=ended + foundation, created=now(), modified=now(),
            )
        )  # fmt: skip
    refused = Answer("models", "remove", folder.name).refused()
    assert "always" in refused and "111111111111" in refused
    assert "--force" in refused and folder.is_dir()
    with open_database(None) as service, service.write() as session:
        session.delete(session.query(Endpoint).one())
        session.add(
            CustomModel(
                id="abcdefghijkl", account="111111111111", name="theirs", foundation=foundation,
                root=foundation, base_model=ended + foundation, stored_id=f"{folder.name}:job-x",
                status=ACTIVE, created=now(),
            )
        )  # fmt: skip
    refused = Answer("models", "remove", folder.name).refused()
    assert "theirs" in refused and "111111111111" in refused
    Answer("models", "remove", folder.name, "--force").good()
    assert not folder.exists()


def test_base_of_active_run_cannot_be_removed(own_home: Path) -> None:
    folder = own_home / "models" / "base" / "smollm2-135m-instruct"
    write_json(folder / MANIFEST, {})
    run = Run(folder.name, "mine")
    write_json(run.folder / "request.json", {})
    with run.lock():
        for more in ([], ["--force"]):
            refused = Answer("models", "remove", folder.name, *more).refused()
            assert run.model_id in refused and "--force" not in refused
    refused = Answer("models", "remove", folder.name).refused()
    assert run.model_id in refused and "--force" in refused
    assert folder.is_dir()
    Answer("models", "remove", folder.name, "--force").good()
    assert not folder.exists()


def test_export_of_adapter_unsupported_by_peft_prints_note(
    luthier_home: Path, family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    import numpy as np

    np.savez(
        tmp_path / "rows.npz",
        images=np.arange(4 * 9 * 7, dtype=np.uint8).reshape(4, 9, 7),
        labels=np.array(["a", "b"] * 2),
    )
    base = str(family_folder("small_cnn"))
    tuned = Answer(
        "tune", str(tmp_path / "rows.npz"), "--base", base, "--name", "x", "--adaptation", "adapters",
        "--set", "training.max_steps=1", "--set", "data.validation_share=0", "--json",
    )  # fmt: skip
    assert tuned.code == 0, tuned.err
    model_id, target = json.loads(tuned.out)["model_id"], tmp_path / "out"
    answer = Answer("models", "export", model_id, str(target))
    assert answer.code == 0 and "PEFT" in answer.out, answer.err
    assert read_json(target / "adapter_config.json")["luthier"]["method"] == "adapters"
    refused = Answer("models", "export", model_id, str(tmp_path / "whole"), "--merged", "--json")
    assert refused.code == 2 and refused.json()["error"]["type"] == "RecipeError"
