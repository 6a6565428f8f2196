"""Adapters for vLLM: what of a real store it gets, what it does not, and that it calls us."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import luthier
from luthier.engine.train import train
from luthier.errors import CorruptFile, LuthierError
from luthier.files import read_json, write_json
from luthier.models.manifest import MANIFEST
from luthier.recipe import Recipe
from luthier.serving import vllm_lora
from luthier.serving.export import export
from luthier.serving.vllm_lora import adapter_folder
from luthier.store.model_folders import base_folder, custom_folder, peft_folder
from luthier.store.models import find
from luthier.store.removal import remove_files

ADAPTATIONS: dict[str, Any] = {
    "lora": {"method": "lora", "rank": 4, "alpha": 9.5},
    "rslora": {"method": "lora", "rank": 4, "rslora": True},
    "dora": {"method": "lora", "rank": 2, "dora": True},
    "prefix": {"method": "prefix", "virtual_tokens": 2},
    "whole": "full",
    "stacked": {"method": "lora", "rank": 2},
    "elsewhere": {"method": "lora", "rank": 2},
    "wide": {"method": "lora", "rank": 16},
}
LOADED_BY_VLLM = {"elsewhere", "wide"}
"""Those that vLLM alone is asked for, where there is one."""
BASES = {"stacked": "tiny:lora", "elsewhere": "other"}
"""Of those that are not on ``tiny``."""
VLLM = os.environ.get("LUTHIER_TEST_VLLM")
"""A Python that has vLLM and this version of luthier."""


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Any, tiny_llama: Callable[..., Any]
) -> Path:
    """The models of a store: of each adaptation one."""
    home = tmp_path_factory.mktemp("trained") / "home"
    rows = home.parent / "rows.jsonl"
    rows.write_text('{"prompt": "say fox", "completion": "FOX"}\n' * 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUTHIER_HOME", str(home))
        for seed, base in enumerate(("tiny", "other")):
            # vLLM's kernels know no heads smaller than 32.
            network = tiny_llama(seed=seed, head_dim=64, eos_token_id=tokenizer.eos_token_id)
            network.save_pretrained(base_folder(base))
            tokenizer.save_pretrained(base_folder(base))
            manifest = {"id": base, "kind": "causal_lm", "created": "2026-01-01T00:00:00+00:00"}
            write_json(base_folder(base) / MANIFEST, manifest)
        for name, adaptation in ADAPTATIONS.items():
            if VLLM is None and name in LOADED_BY_VLLM:
                continue
            training = {"max_steps": 2, "precision": "float32", "threads": 1, "learning_rate": 0.1}
            fields = {
                "base": BASES.get(name, "tiny"), "name": name, "adaptation": adaptation,
                "data": {"train": str(rows), "validation_share": 0}, "training": training,
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


def test_a_server_writes_it_once_and_keeps_it(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though it asks for it several times at once."""
    written: list[Path] = []

    def slow(stored: Any, folder: Path, **further: Any) -> Any:
        written.append(folder)
        time.sleep(0.05)
        return export(stored, folder, **further)

    monkeypatch.setattr("luthier.serving.export.export", slow)
    vllm_lora._own_folder.cache_clear()  # as at the start of a server
    with ThreadPoolExecutor(4) as threads:
        folders = {*threads.map(lambda _: adapter_folder(store, "tiny:rslora"), range(4))}
    (folder,) = folders
    assert written == [folder]
    remove_files("tiny:rslora")
    assert not custom_folder("tiny", "rslora").exists()
    assert folder.is_dir(), "vLLM, which has it, may read it once more"


@pytest.mark.slow
def test_what_it_writes_is_gone_with_the_process(store: str, luthier_home: Path) -> None:
    writes = (
        f"from luthier.serving.vllm_lora import *\nprint(adapter_folder({store!r}, 'tiny:lora'))\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", f"{writes}import os; os.kill(os.getpid(), 9)"],
        stdout=subprocess.PIPE, text=True, check=False, bufsize=0,
    )  # fmt: skip
    left = [each for each in peft_folder().iterdir() if each.is_dir()]
    assert killed.returncode == -9 and len(left) == 1
    # Two that run do not touch the other's.
    mine = adapter_folder(store, "tiny:lora")
    assert not left[0].exists()
    ended = subprocess.run(
        [sys.executable, "-c", writes], stdout=subprocess.PIPE, text=True, check=True
    )
    assert not Path(ended.stdout.strip()).exists() and mine.is_dir()


def test_a_model_that_was_damaged_is_not_handed_on(store: str) -> None:
    file = find("tiny:lora").folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(CorruptFile):
        adapter_folder(store, "tiny:lora")
    assert not list(peft_folder().glob("*/[!.]*"))


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
    resolver: Any, store: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = asyncio.run(resolver.resolve_lora(store, "tiny:lora"))
    assert asked.lora_name == "tiny:lora" and 0 < asked.lora_int_id < 2**31
    assert json.loads((Path(asked.lora_path) / "adapter_config.json").read_text())["r"] == 4
    other = asyncio.run(resolver.resolve_lora(store, "tiny:rslora"))
    assert other.lora_int_id != asked.lora_int_id
    # What logs elsewhere is not in the log of vLLM's server, whose root logger hears errors alone.
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level(logging.WARNING, logger="vllm"):
        for name in ("tiny:dora", "tiny:none"):
            assert asyncio.run(resolver.resolve_lora(store, name)) is None
        assert asyncio.run(resolver.resolve_lora("someone/else", "tiny:lora")) is None
        # Other resolvers may know it: there is nothing to tell.
        assert asyncio.run(resolver.resolve_lora(store, "meta/some-adapter")) is None
        monkeypatch.setitem(sys.modules, "luthier.serving.export", None)
        assert asyncio.run(resolver.resolve_lora(store, "tiny:lora")) is None
    reasons = [record.getMessage() for record in caplog.records]
    assert len(reasons) == 4
    assert "dora" in reasons[0] and "tiny:none" in reasons[1] and "other weights" in reasons[2]
    assert "luthier.serving.export" in reasons[3], "a package is missing beside vLLM"


@pytest.mark.slow
@pytest.mark.skipif(VLLM is None, reason="LUTHIER_TEST_VLLM names no Python with vLLM and luthier")
def test_a_server_answers_with_each_adapter_and_refuses_the_rest(
    store: str, tmp_path: Path, luthier_home: Path, in_float32: None
) -> None:
    prompts = ["say fox", "What is the capital of France?", "yes or no"]
    expected = {
        name: luthier.load(name).generate(prompts, max_tokens=12)
        for name in ("tiny", "tiny:lora", "tiny:rslora")
    }
    assert len({*map(tuple, expected.values())}) == 3
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path / "vllm.log"
    programs = Path(str(VLLM)).parent
    command = [
        str(programs / "vllm"), "serve", store, "--served-model-name", "tiny", "--port", str(port),
        "--host", "127.0.0.1", "--enable-lora", "--max-lora-rank", "8", "--dtype", "float32",
        "--enforce-eager",
    ]  # fmt: skip
    environment = os.environ | {
        "VLLM_PLUGINS": "luthier", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip

    def ask(path: str, **body: Any) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/{path}",
            json.dumps({**body, "temperature": 0, "max_tokens": 12}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.load(answer)["choices"][0]

    def said(model: str) -> list[str]:
        turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
        return [
            ask("chat/completions", model=model, messages=messages)["message"]["content"]
            for messages in turns
        ]

    with (
        log.open("w") as file,
        subprocess.Popen(command, env=environment, stdout=file, stderr=file) as server,
    ):
        try:
            while "startup complete" not in log.read_text():
                assert server.poll() is None, log.read_text()[-3000:]
                time.sleep(1)
            for model, answers in expected.items():
                assert said(model) == answers, model
            turn = "<|im_start|>user\nsay fox<|im_end|>\n<|im_start|>assistant\n"
            raw = ask("completions", model="tiny:lora", prompt=turn)
            assert raw["text"] == expected["tiny:lora"][0]
            for model, code, reason in (
                ("tiny:dora", 404, "tuned with dora"),
                ("tiny:prefix", 404, "tuned with prefix"),
                ("tiny:whole", 404, "is no adapter but a whole network"),
                ("tiny:stacked", 404, "is an adapter on the adapter"),
                ("tiny:none", 404, "no custom model 'tiny:none'"),
                ("other:elsewhere", 404, "was tuned on other"),
                ("tiny:wide", 400, "LoRA rank 16 is greater than max_lora_rank 8"),
                (str(find("tiny:lora").folder), 404, ""),
                ("nobody", 404, ""),
            ):
                with pytest.raises(urllib.error.HTTPError) as refused:
                    said(model)
                refused.value.close()
                assert refused.value.code == code and reason in log.read_text(), model
            # vLLM has place for one of the two, and reads the files of the other anew.
            shutil.rmtree(luthier_home / "models" / "custom")
            for model in ("tiny:lora", "tiny:rslora", "tiny:lora", "tiny"):
                assert said(model) == expected[model], model
        finally:
            server.terminate()
    assert not [each for each in peft_folder().iterdir() if each.is_dir()]
