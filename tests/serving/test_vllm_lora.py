"""Adapters for vLLM: what of a real store it gets, what it does not, and that it calls us."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import sys
import tomllib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from luthier.engine.train import train
from luthier.errors import CorruptFile, LuthierError
from luthier.files import read_json, write_json
from luthier.models.manifest import MANIFEST
from luthier.recipe import Recipe
from luthier.serving import vllm_lora
from luthier.serving.vllm_lora import adapter_folder
from luthier.store.model_folders import base_folder, peft_folder
from luthier.store.models import content_hash, find, remove_derived

ADAPTATIONS: dict[str, Any] = {
    "lora": {"method": "lora", "rank": 4, "alpha": 9.5},
    "rslora": {"method": "lora", "rank": 4, "rslora": True},
    "dora": {"method": "lora", "rank": 2, "dora": True},
    "prefix": {"method": "prefix", "virtual_tokens": 2},
    "whole": "full",
    "stacked": {"method": "lora", "rank": 2},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    """The models of a store: of each adaptation one."""
    home = tmp_path_factory.mktemp("trained") / "home"
    rows = home.parent / "rows.jsonl"
    rows.write_text('{"prompt": "say fox", "completion": "FOX"}\n' * 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUTHIER_HOME", str(home))
        shutil.copytree(tiny_model_folder, base_folder("tiny"))
        manifest = {"id": "tiny", "kind": "causal_lm", "created": "2026-01-01T00:00:00+00:00"}
        write_json(base_folder("tiny") / MANIFEST, manifest)
        for name, adaptation in ADAPTATIONS.items():
            fields = {
                "base": "tiny:lora" if name == "stacked" else "tiny", "name": name,
                "data": {"train": str(rows), "validation_share": 0}, "adaptation": adaptation,
                "training": {"max_steps": 2, "precision": "float32", "threads": 1},
            }  # fmt: skip
            train(Recipe.parse(fields))
    return home


@pytest.fixture(autouse=True)
def store(trained: Path, luthier_home: Path) -> str:
    """The folder of the base that vLLM serves."""
    shutil.copytree(trained / "models", luthier_home / "models")
    return str(base_folder("tiny"))


@pytest.mark.parametrize("name", ["lora", "rslora"])
def test_the_adapter_is_what_was_stored_and_peft_reads_it(store: str, name: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    stored = find(f"tiny:{name}")
    folder = adapter_folder(store, stored.id)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (folder / file).read_bytes() == (stored.folder / file).read_bytes()
    config = read_json(folder / "adapter_config.json")
    assert (config["peft_type"], config["r"], config["use_rslora"]) == ("LORA", 4, name == "rslora")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(store), folder)
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


def test_it_is_written_once_and_anew_where_it_was_changed(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []
    module = import_module("luthier.serving.export")
    honest = module.export

    def export(stored: Any, target: Path, merged: bool) -> Path:
        written.append(target)
        return Path(honest(stored, target, merged))

    monkeypatch.setattr(module, "export", export)
    folder = adapter_folder(store, "tiny:lora")
    assert adapter_folder(store, "tiny:lora") == folder and len(written) == 1
    (folder / "adapter_model.safetensors").write_bytes(b"something else")
    assert adapter_folder(store, "tiny:lora") == folder and len(written) == 2
    (folder / "adapter_config.json").unlink()
    adapter_folder(store, "tiny:lora")
    assert len(written) == 3
    stored = find("tiny:lora")
    assert folder == peft_folder(content_hash(stored))
    remove_derived(stored)
    assert not folder.exists()


def test_a_model_that_was_damaged_is_not_handed_on(store: str) -> None:
    file = find("tiny:lora").folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(CorruptFile):
        adapter_folder(store, "tiny:lora")
    assert not list(peft_folder("x").parent.glob("[!.]*"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tiny:dora", "dora"),
        ("tiny:prefix", "prefix"),
        ("tiny:whole", "no adapter but a whole network"),
        ("tiny:stacked", "is an adapter on the adapter"),
        ("tiny:none", "no custom model"),
        ("tiny", "no id of a custom model"),
        ("../models/custom/tiny/lora", "no id of a custom model"),
        ("/etc:passwd", "no id of a custom model"),
    ],
)
def test_what_vllm_cannot_put_on_its_base_is_refused(store: str, name: str, words: str) -> None:
    with pytest.raises(LuthierError, match=words):
        adapter_folder(store, name)


def test_a_withheld_model_is_refused(store: str) -> None:
    path = find("tiny:lora").folder / MANIFEST
    write_json(path, {**read_json(path), "withheld": "it forgot too much"})
    with pytest.raises(LuthierError, match="withheld"):
        adapter_folder(store, "tiny:lora")


def test_the_base_is_known_by_id_folder_or_weights(
    store: str, tmp_path: Path, tiny_llama: Callable[..., Any]
) -> None:
    elsewhere = tmp_path / "exported"
    shutil.copytree(store, elsewhere)
    link = tmp_path / "link"
    link.symlink_to(store)
    folder = adapter_folder(store, "tiny:lora")
    for served in ("tiny", f"{store}/", str(elsewhere), str(link)):
        assert adapter_folder(served, "tiny:lora") == folder
    other = tmp_path / "other"
    tiny_llama(seed=7).save_pretrained(other)
    for served in (str(other), "someone/else", str(tmp_path / "nothing")):
        with pytest.raises(LuthierError, match=r"tiny:lora was tuned on tiny, .* serve "):
            adapter_folder(served, "tiny:lora")


def test_the_entry_point_names_what_is_there() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    (name, value), *others = project["entry-points"]["vllm.general_plugins"].items()
    module, _, attribute = value.partition(":")
    assert not others and name == vllm_lora.RESOLVER
    assert callable(getattr(import_module(module), attribute))


@pytest.fixture(params=["vllm", "its interface"])
def resolver(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The resolver in the registry of vLLM; beside it in one of the same interface."""
    if request.param == "vllm":
        pytest.importorskip("vllm.lora.resolver", reason="vLLM is not installed")
    else:
        registry: dict[str, Any] = {}
        resolvers, requests = ModuleType("vllm.lora.resolver"), ModuleType("vllm.lora.request")
        resolvers.LoRAResolver = type("LoRAResolver", (), {})  # type: ignore[attr-defined]
        resolvers.LoRAResolverRegistry = SimpleNamespace(  # type: ignore[attr-defined]
            register_resolver=registry.__setitem__, get_resolver=registry.__getitem__
        )
        requests.LoRARequest = SimpleNamespace  # type: ignore[attr-defined]
        for name, module in (
            ("vllm", ModuleType("vllm")), ("vllm.lora", ModuleType("vllm.lora")),
            ("vllm.lora.resolver", resolvers), ("vllm.lora.request", requests),
        ):  # fmt: skip
            monkeypatch.setitem(sys.modules, name, module)
    vllm_lora.register_resolver()
    vllm_lora.register_resolver()  # vLLM loads plugins in several processes, and may do so twice
    return import_module("vllm.lora.resolver").LoRAResolverRegistry.get_resolver("luthier")


def test_vllm_gets_a_request_for_what_there_is_and_a_reason_for_the_rest(
    resolver: Any, store: str, caplog: pytest.LogCaptureFixture
) -> None:
    asked = asyncio.run(resolver.resolve_lora(store, "tiny:lora"))
    assert asked.lora_name == "tiny:lora" and 0 < asked.lora_int_id < 2**31
    assert json.loads((Path(asked.lora_path) / "adapter_config.json").read_text())["r"] == 4
    other = asyncio.run(resolver.resolve_lora(store, "tiny:rslora"))
    assert other.lora_int_id != asked.lora_int_id
    with caplog.at_level(logging.WARNING, logger=vllm_lora.__name__):
        for name in ("tiny:dora", "tiny:none"):
            assert asyncio.run(resolver.resolve_lora(store, name)) is None
        assert asyncio.run(resolver.resolve_lora("someone/else", "tiny:lora")) is None
        # Other resolvers may know it: there is nothing to tell.
        assert asyncio.run(resolver.resolve_lora(store, "meta/some-adapter")) is None
    reasons = [record.getMessage() for record in caplog.records]
    assert len(reasons) == 3
    assert "dora" in reasons[0] and "tiny:none" in reasons[1] and "other weights" in reasons[2]
