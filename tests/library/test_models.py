"""Finding models by id: custom models, the catalogue, local directories, the hub's cache."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.errors import CorruptFile, DownloadError, ModelRefused, RecipeError, UnknownModel
from luthier.files import hashes_of, write_json
from luthier.inference.generation import Generator
from luthier.inference.prediction import Predictor
from luthier.library import models as store
from luthier.library.folders import base_folder, custom_folder, short_name
from luthier.library.models import custom_models, find, load
from luthier.media.image_generation import ImageGenerator
from luthier.models.base_kinds import sole_objective
from luthier.models.catalog import CATALOG
from luthier.models.folder import ModelFolder
from luthier.models.manifest import MANIFEST, Manifest
from luthier.objectives import Objective

BASE = "smollm2-135m-instruct"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def make_custom(base: str, name: str, parent: str, saved: str = "network", **fields: Any) -> Path:
    """Create a custom model with the files that ``find`` reads."""
    folder = custom_folder(base, name)
    manifest = {"id": f"{short_name(base)}:{name}", "parent": parent, "saved": saved, **fields}
    write_json(folder / MANIFEST, manifest)
    return folder


def make_base(model_id: str) -> Path:
    folder = base_folder(model_id)
    write_json(folder / MANIFEST, {"id": model_id, "kind": "causal_lm"})
    return folder


def hub_snapshot(cache: Path, model_id: str, source: Path) -> Path:
    """Lay out ``source`` like a download in the huggingface_hub cache."""
    top = cache / f"models--{model_id.replace('/', '--')}"
    (top / "refs").mkdir(parents=True)
    (top / "refs" / "main").write_text(COMMIT)
    shutil.copytree(source, top / "snapshots" / COMMIT)
    return top / "snapshots" / COMMIT


@pytest.mark.parametrize(
    ("base", "name"),
    [
        ("smollm2-135m-instruct", "smollm2-135m-instruct"),
        ("org/Name-1B", "name-1b"),
        ("/some/where/Name 1B", "name-1b"),
        ("./Küche/", "k-che"),
        ("/", "model"),
        ("ÄÖ", "model"),
        ("a/..", "model"),
    ],
)
def test_short_names_are_safe_in_paths(base: str, name: str) -> None:
    assert short_name(base) == name


def test_find_returns_custom_model_with_lineage() -> None:
    base = make_base(BASE)
    first = make_custom(BASE, "one", BASE, "adapter")
    make_custom(BASE, "two", f"{BASE}:one", "adapter", root=BASE)
    found = find(f"{BASE}:two")
    assert found.parent is not None
    assert (found.id, found.parent.id, found.parent.folder) == (
        f"{BASE}:two", f"{BASE}:one", first
    )  # fmt: skip
    assert found.network_folder == base
    assert found.root == BASE
    assert found.parent.parent is not None
    assert found.parent.parent.root == BASE


def test_copied_model_folder_is_damaged() -> None:
    make_base(BASE)
    folder = make_custom(BASE, "one", BASE, "adapter")
    shutil.copytree(folder, folder.with_name("copy"))
    with pytest.raises(CorruptFile) as refused:
        find(f"{BASE}:copy")
    assert refused.value.rule == "file.corrupt"
    one, other = sorted(custom_models(), key=lambda model: model.id)
    assert (one.id, other.id) == (f"{BASE}:copy", f"{BASE}:one")
    assert "copied or renamed" in (one.damaged or "") and not other.damaged


def test_full_network_needs_no_parent() -> None:
    folder = make_custom(BASE, "one", "a model that is gone", "network")
    found = find(f"{BASE}:one")
    assert found.parent is None
    assert found.network_folder == folder


def test_find_prefers_custom_then_catalogue_then_folder_then_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hub: list[str] = []

    def from_hub(model_id: str) -> tuple[Path, str]:
        hub.append(model_id)
        return tmp_path / "hub", ""

    monkeypatch.setattr(store, "download_from_hub", from_hub)
    for name in (BASE, "org/name"):
        (tmp_path / name).mkdir(parents=True)
    base = make_base(BASE)
    custom = make_custom(BASE, "x", BASE)
    assert find(f"{BASE}:x").folder == custom
    assert find(BASE).folder == base  # the catalogue model, not the local folder
    assert find(f"./{BASE}").folder == tmp_path / BASE
    assert find("org/name").folder == tmp_path / "org" / "name"
    assert find("org/name").id == str(tmp_path / "org" / "name")
    assert hub == []
    assert find("org/other").folder == tmp_path / "hub"
    assert find("org/other").id == "org/other"
    assert hub == ["org/other", "org/other"]


def test_path_with_colon_is_found(tmp_path: Path) -> None:
    (tmp_path / "a:b").mkdir()
    assert find(str(tmp_path / "a:b")).folder == tmp_path / "a:b"


def test_missing_catalogue_model_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []

    def pull(entry: Any, target: Path, say: Any) -> None:
        fetched.append(entry.id)
        write_json(target / MANIFEST, {"id": entry.id})

    monkeypatch.setattr(store, "pull", pull)
    assert find(BASE).folder == base_folder(BASE)
    assert find(BASE).manifest.id == BASE
    assert fetched == [BASE]


@pytest.mark.parametrize("model_id", ["smollm", "./no/where", "/no/where", "a/b/c", ""])
def test_unknown_id_error_names_the_list_of_models(model_id: str) -> None:
    make_custom(BASE, "mine", BASE)
    with pytest.raises(UnknownModel) as caught:
        find(model_id)
    message = str(caught.value)
    assert repr(model_id) in message
    assert f"{len(CATALOG) + 1} models" in message
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", ["none", "..", "../..", "a/b", "", "."])
def test_unknown_custom_model_is_rejected(name: str) -> None:
    make_custom(BASE, "mine", BASE)
    with pytest.raises(UnknownModel) as refused:
        find(f"{BASE}:{name}")
    assert refused.value.rule == "model.unknown"


def test_model_name_cannot_leave_store(luthier_home: Path) -> None:
    write_json(luthier_home / "models" / "custom" / MANIFEST, {"id": "x", "saved": "network"})
    with pytest.raises(UnknownModel) as refused:
        find(f"{BASE}:..")
    assert refused.value.rule == "model.unknown"


def test_custom_models_are_sorted_by_age_without_unfinished_models(luthier_home: Path) -> None:
    assert custom_models() == []
    make_custom("b", "new", "b", created="2026-01-02")
    make_custom("a", "old", "a", created="2026-01-01")
    make_custom("a", ".tmp-x", "a", created="2026-01-01")
    assert [model.id for model in custom_models()] == ["a:old", "b:new"]
    (custom_folder("a", "old") / MANIFEST).write_text("{")
    with pytest.raises(CorruptFile):
        find("a:old")


def test_failed_hub_download_error_names_hub(tmp_path: Path) -> None:
    """The test uses the real hub client in offline mode."""
    script = (
        "import sys\n"
        "from luthier.errors import LuthierError\n"
        "from luthier.library.models import find\n"
        "for model in sys.argv[1:]:\n"
        "    try: print(find(model))\n"
        "    except LuthierError as e: print(type(e).__name__, e.exit_code, e)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "luthier-tests/none", "a--b/c"],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    missing, odd = done.stdout.splitlines()
    assert missing.startswith("DownloadError 1 ") and "luthier-tests/none" in missing
    assert odd.startswith("RecipeError 2 'a--b/c' is not a hub id")
    assert done.stderr == ""


def test_model_in_hub_cache_is_found_and_loads(
    tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = hub_snapshot(tmp_path / "hub", "luthier-tests/Tiny-Llama", tiny_model_folder)
    said: list[str] = []
    found = find("luthier-tests/Tiny-Llama", said.append)
    assert found.folder == snapshot
    assert said == ["Looking up luthier-tests/Tiny-Llama on the hub"]
    assert short_name(found.id) == "tiny-llama"
    network = load(found, torch.float32, torch.device("cpu"))
    assert sum(weight.numel() for weight in network.parameters()) > 1000
    with pytest.raises(DownloadError):
        find("luthier-tests/Other")
    with pytest.raises(RecipeError):
        find("a--b/c")


class Bomb:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("exploded",))


def test_pickled_weights_are_rejected_unopened(
    tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_model_folder, folder)
    (folder / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.pt"):
        (folder / name).write_bytes(pickle.dumps({"weight": Bomb()}))
    with pytest.raises(UnknownModel) as refused:
        load(find(str(folder)), torch.float32, torch.device("cpu"))
    assert refused.value.rule == "model.file_missing"
    assert not (tmp_path / "exploded").exists()


def test_code_in_model_folder_is_not_executed(
    tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from luthier.files import read_json

    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "custom"
    shutil.copytree(tiny_model_folder, folder)
    config = read_json(folder / "config.json")
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    write_json(folder / "config.json", {**config, "model_type": "evil", "auto_map": auto_map})
    (folder / "evil.py").write_text("import os; os.mkdir('exploded')")
    with pytest.raises(UnknownModel) as refused:
        load(find(str(folder)), torch.float32, torch.device("cpu"))
    assert refused.value.rule == "config.rejected"
    assert not (tmp_path / "exploded").exists()


def test_invalid_model_folder_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(UnknownModel) as refused:
        ModelFolder(tmp_path).check()
    assert refused.value.rule == "model.file_missing"
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "a.safetensors").write_bytes(b"")
    with pytest.raises(CorruptFile):
        ModelFolder(tmp_path).check()


def test_truncated_weights_are_rejected(tmp_path: Path, tiny_model_folder: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(tiny_model_folder, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ModelRefused) as refused:
        load(find(str(folder)), torch.float32, torch.device("cpu"))
    assert refused.value.rule == "model.weights"


def test_stored_model_with_flipped_bit_is_not_loaded(tiny_model_folder: Path) -> None:
    folder = make_custom(BASE, "whole", BASE)
    shutil.copytree(tiny_model_folder, folder, dirs_exist_ok=True)
    make_custom(BASE, "whole", BASE, files=hashes_of(folder, skip=(MANIFEST,)))
    machine = torch.float32, torch.device("cpu")
    stored = find(f"{BASE}:whole")
    load(stored, *machine)
    weights = folder / "model.safetensors"
    content, before = bytearray(weights.read_bytes()), weights.stat()
    content[-1] ^= 1
    weights.write_bytes(content)
    # A copy or restore can preserve modification times.
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(CorruptFile) as refused:
        load(stored, *machine)
    assert refused.value.rule == "file.changed"
    content[-1] ^= 1
    weights.write_bytes(content)
    load(stored, *machine)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CorruptFile) as refused:
        load(stored, *machine)
    assert refused.value.rule == "file.missing"


def test_missing_weights_are_not_initialized_randomly(
    tmp_path: Path, tiny_model_folder: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "headless"
    shutil.copytree(tiny_model_folder, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnknownModel) as refused:
        load(find(str(folder)), torch.float32, torch.device("cpu"))
    assert refused.value.rule == "model.weights_missing"


def test_unknown_model_error_suggests_few_models(luthier_home: Path) -> None:
    for number in range(30):
        folder = luthier_home / "models" / "custom" / "base" / f"run-{number}"
        folder.mkdir(parents=True)
        write_json(folder / MANIFEST, {"id": f"base:run-{number}"})
    with pytest.raises(UnknownModel) as refused:
        find("base:runn-17")
    message = str(refused.value)
    assert "Did you mean base:run-17 or " in message and message.count("base:run-") == 3
    assert "`luthier models list` shows all 30" in message


def test_suggestions_are_limited_to_capable_models(luthier_home: Path) -> None:
    for name, method in (
        ("mine-labels", "classification"),
        ("mine-text", "sft"),
        ("mine-vae", "vae"),
    ):
        folder = luthier_home / "models" / "custom" / "base" / name
        folder.mkdir(parents=True)
        recipe = {"objective": {"method": method}}
        write_json(folder / MANIFEST, {"id": f"base:{name}", "kind": "causal_lm", "recipe": recipe})

    def refusal(asked: str, is_able: Callable[[Objective], bool]) -> str:
        with pytest.raises(UnknownModel) as refused:
            find(asked, is_able=is_able)
        return str(refused.value)

    for asked in ("base:mine-lab", "mine"):
        named = refusal(asked, Predictor.is_able)
        assert "base:mine-labels" in named and "base:mine-vae" in named and "mine-text" not in named
        named = refusal(asked, Generator.is_able)
        assert "base:mine-text" in named and "labels" not in named and "vae" not in named
        named = refusal(asked, ImageGenerator.is_able)
        assert "base:mine-vae" in named and "text" not in named and "labels" not in named
    assert "smollm2-135m-instruct" not in refusal("smollm2", Predictor.is_able)
    assert "smollm2-135m-instruct" in refusal("smollm2", Generator.is_able)


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("all-minilm", "all-minilm-l6-v2"),
        ("SmolLM2-135M", "smollm2-135m-instruct"),
        ("smollm2:mine", f"{BASE}:mine"),
        (f"{BASE}/mine", f"{BASE}:mine"),
        (f"{BASE}:mime", f"{BASE}:mine"),
        ("mine", f"{BASE}:mine"),
        ("nine", f"{BASE}:mine"),
        ("e5", "multilingual-e5-small"),
        ("zzz", ""),
    ],
)
def test_unknown_id_suggests_similar_model(asked: str, meant: str) -> None:
    make_custom(BASE, "mine", BASE)
    with pytest.raises(UnknownModel) as refused:
        find(asked)
    message = str(refused.value)
    assert repr(asked) in message
    assert ("Did you mean" in message) == bool(meant)
    assert f"Did you mean {meant}" in message or not meant


@pytest.mark.parametrize(
    ("family", "kind", "method"),
    [
        ("vae", "autoencoding", "vae"),
        ("dcgan", "adversarial", "gan"),
        ("unet", "denoising", "diffusion"),
        ("stable_diffusion", "denoising", "diffusion"),
        ("clip", "image_text_encoder", "contrastive"),
        ("trocr", "image_to_text", "image_to_text"),
        ("small_cnn", None, None),
    ],
)
def test_folder_without_manifest_is_classified_by_network(
    family: str, kind: str | None, method: str | None, family_folder: Callable[[str], Path]
) -> None:
    folder = find(str(family_folder(family)))
    assert folder.manifest.kind is None
    assert folder.kind == kind
    assert sole_objective(kind) == method
    if method is not None:
        assert folder.objective.method == method


def test_concurrent_manifest_updates_are_serialized(luthier_home: Path) -> None:
    """Threads and processes read the manifest before writing."""
    make_custom("tiny", "x", "tiny")
    code = (
        "import sys\nfrom luthier.models.manifest import ExportRecord\n"
        "from luthier.library.models import find, update_record\n"
        "for number in range(20):\n"
        "    export = ExportRecord(format='gguf', quantization=f'{sys.argv[1]}-{number}', luthier='1',"
        " created='', files={}, compared_in=None)\n"
        "    update_record(find('tiny:x'), lambda record: record.with_export(export))\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, name]) for name in "abc"]
    assert [writer.wait(120) for writer in writers] == [0, 0, 0]
    found = {each.quantization for each in find("tiny:x").manifest.exports or ()}
    assert found == {f"{name}-{number}" for name in "abc" for number in range(20)}
    folder = custom_folder("tiny", "x")
    shutil.rmtree(folder)
    gone = store.StoredModel("tiny:x", folder, Manifest(id="tiny:x"))
    with pytest.raises(CorruptFile) as refused:
        store.update_record(gone, lambda record: record)
    assert refused.value.rule == "file.corrupt"
    assert not folder.exists()


@pytest.mark.parametrize(
    ("family", "method"),
    [("llama", "causal_lm"), ("bert", "contrastive"), ("resnet", "contrastive")],
)
def test_third_party_folder_is_classified_by_network(
    family: str, method: str, family_folder: Callable[[str], Path]
) -> None:
    stored = find(str(family_folder(family)))
    assert stored.manifest.kind is None
    assert stored.objective.method == method
    assert stored.writes == (method == "causal_lm")
    assert store.ignores_classes(stored) == (family == "resnet")
