"""Exported folders, opened by the software they are meant for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file

from luthier.cli.models.app import remove_model
from luthier.engine.train import train
from luthier.errors import CorruptFile, LuthierError, RecipeError, RunConflict
from luthier.exports import writer
from luthier.exports.peft_parity import check_peft
from luthier.exports.writer import export, export_gguf
from luthier.files import hashes_of
from luthier.inference.generation import Generator
from luthier.library.models import find, load
from luthier.models.decoding.sampling import Sampling
from luthier.models.formats import gguf_networks
from luthier.models.formats.save import save_network
from luthier.models.networks.heads import prompt_ids
from luthier.models.networks.prefix import prefix_tokens
from luthier.recipe import Recipe

CPU = torch.device("cpu")
PROMPTS = ["say fox", "The quick brown", "What is the capital of France?"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Iterator[Path]:
    """Return a store with models tuned in float32.

    The models are ``adapter``, ``whole``, ``plain``, ``stacked``, and ``prefix`` and ``prompt``,
    whose rows all follow learned tokens.
    """
    home = tmp_path_factory.mktemp("home")
    data = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"prompt": f"say {word}", "completion": word.upper()} for word in ("fox", "dog", "cat")]
    data.write_text("\n".join(json.dumps(row) for row in rows))
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUTHIER_HOME", str(home))
        for name, base, adaptation, template in (
            (
                "adapter",
                str(tiny_model_folder),
                {"method": "lora", "rank": 4, "alpha": 9.5},
                "auto",
            ),
            ("whole", str(tiny_model_folder), "full", "auto"),
            ("plain", str(tiny_model_folder), "full", "plain"),
            ("stacked", "tiny-llama:adapter", {"method": "lora", "rank": 2}, "auto"),
            ("prefix", str(tiny_model_folder), {"method": "prefix", "virtual_tokens": 7}, "auto"),
            ("prompt", str(tiny_model_folder), {"method": "prompt", "virtual_tokens": 7}, "auto"),
        ):
            fields = {
                "base": base, "name": name, "data": {"train": str(data), "validation_share": 0},
                "adaptation": adaptation, "objective": {"method": "sft", "template": template},
                "training": {
                    "max_steps": 5, "learning_rate": 0.02, "precision": "float32", "threads": 1
                },
            }  # fmt: skip
            train(Recipe.parse(fields))
    torch.set_num_threads(threads)
    return home


@pytest.fixture(autouse=True)
def store(home: Path, in_float32: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_HOME", str(home))


def greedy(folder: Path, prompt: str, tokens: int = 16) -> list[int]:
    """Generate greedily with transformers only."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": prompt}]
        encoded = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        encoded = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**encoded, max_new_tokens=tokens, do_sample=False)
    return list(out[0, encoded["input_ids"].shape[1] :].tolist())


def text(folder: Path, ids: list[int]) -> str:
    from transformers import AutoTokenizer

    return str(AutoTokenizer.from_pretrained(folder).decode(ids, skip_special_tokens=True))


def text_of(generator: Generator, ids: list[int]) -> str:
    """The whole characters before the first stop token."""
    stops = [place for place, token in enumerate(ids) if token in generator.chat.stop_ids]
    return generator.chat.replies.decode(ids[: stops[0]] if stops else ids).rstrip("\ufffd")


@pytest.mark.parametrize(
    "name", ["adapter", "stacked", "whole", pytest.param("plain", marks=pytest.mark.slow)]
)
def test_merged_exports_give_the_same_tokens_in_transformers(name: str, tmp_path: Path) -> None:
    stored = find(f"tiny-llama:{name}")
    folder = export(stored, tmp_path / "out", merged=True)
    weights = load_file(folder / "model.safetensors")
    served = load(stored, torch.float32, CPU).state_dict()
    assert weights.keys() <= served.keys()
    assert all(torch.equal(weights[key], served[key]) for key in weights)
    generator = Generator.open(stored)
    for prompt in PROMPTS:
        served_text = generator.replies([prompt], Sampling(max_tokens=16))[0]
        assert text(folder, greedy(folder, prompt)).rstrip("\ufffd") == served_text
    base = Generator.open(find(str(stored.root)))
    assert base.replies(PROMPTS, Sampling(max_tokens=16)) != generator.replies(
        PROMPTS, Sampling(max_tokens=16)
    )


def test_exported_model_has_end_of_turn_token(tmp_path: Path) -> None:
    """The model was trained with an end-of-turn token after ``fox``."""
    folder = export(find("tiny-llama:whole"), tmp_path / "out", merged=True)
    settings = json.loads((folder / "generation_config.json").read_text())
    assert settings["eos_token_id"] == find("tiny-llama:whole").chat.stop_ids[0]
    assert settings["pad_token_id"] is not None


def test_an_adapter_loads_with_peft(tmp_path: Path, tiny_model_folder: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    stored = find("tiny-llama:adapter")
    folder = export(stored, tmp_path / "out", merged=False)
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names
    assert "model.safetensors" not in names
    assert "luthier.json" not in names
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_model_folder)
    assert (config["r"], config["lora_alpha"]) == (4, 9.5)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    model: Any = PeftModel.from_pretrained(base, folder).eval()
    ids = AutoTokenizer.from_pretrained(folder)(PROMPTS[0], return_tensors="pt").input_ids
    with torch.no_grad():
        ours = load(stored, torch.float32, CPU).eval()(ids).logits
        theirs = model(ids).logits
        with model.disable_adapter():
            plain = model(ids).logits
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert not torch.allclose(ours, plain, atol=1e-2)


def test_adapter_misread_by_peft_is_refused(tmp_path: Path) -> None:
    """PEFT raises no error for a layer missing in ``target_modules`` or for another scale."""
    stored = find("tiny-llama:adapter")
    folder = export(stored, tmp_path / "out", merged=False)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    layer = "model.layers.1.mlp.up_proj"
    assert layer in config["target_modules"]
    rest = [name for name in config["target_modules"] if name != layer]
    path.write_text(json.dumps({**config, "target_modules": rest}))
    with pytest.raises(RecipeError) as refused:
        check_peft(stored, folder)
    assert refused.value.rule == "export.modules"
    path.write_text(json.dumps({**config, "lora_alpha": 2 * config["lora_alpha"]}))
    with pytest.raises(RecipeError) as refused:
        check_peft(stored, folder)
    assert refused.value.rule == "export.differs"


def test_adapter_of_earlier_versions_is_exported_with_full_names(tmp_path: Path) -> None:
    """Earlier versions stored the ends of names."""
    stored = find("tiny-llama:adapter")
    path = stored.folder / "adapter_config.json"
    before = path.read_bytes()
    files = {**stored.manifest.files}
    files.pop("adapter_config.json")
    old = replace(stored, manifest=stored.manifest.model_copy(update={"files": files}))
    try:
        path.write_text(json.dumps({**json.loads(before), "target_modules": ["q_proj"]}))
        folder = export(old, tmp_path / "out", merged=False)
    finally:
        path.write_bytes(before)
    written = json.loads((folder / "adapter_config.json").read_text())["target_modules"]
    assert written == json.loads(before)["target_modules"]


@pytest.mark.parametrize(
    ("precision", "expected"),
    [(None, torch.bfloat16), ("f32", torch.float32), ("f16", torch.float16)],
)
def test_merged_weights_have_the_precision_of_the_base(
    precision: str | None, expected: torch.dtype, tmp_path: Path, tiny_model_folder: Path
) -> None:
    """The precision does not depend on the exporting machine, where float32 is used."""
    base = tmp_path / "base"
    shutil.copytree(tiny_model_folder, base)
    weights = load_file(base / "model.safetensors")
    save_file(
        {k: w.bfloat16() for k, w in weights.items()}, base / "model.safetensors", {"format": "pt"}
    )
    adapter = find("tiny-llama:adapter")
    stored = replace(adapter, parent=find(str(base)))
    folder = export(stored, tmp_path / "out", merged=True, precision=precision)
    found = load_file(folder / "model.safetensors")
    assert {weight.dtype for weight in found.values()} == {expected}
    assert json.loads((folder / "config.json").read_text())["dtype"] == str(expected)[6:]
    served = load(stored, expected if precision is None else torch.float32, CPU).state_dict()
    for name, weight in found.items():
        assert torch.equal(weight, served[name].to(expected)), name


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
@pytest.mark.parametrize("name", ["prefix", "prompt"])
def test_prefix_and_prompt_tuning_export_to_peft(
    name: str, tmp_path: Path, tiny_model_folder: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    stored = find(f"tiny-llama:{name}")
    with pytest.raises(RecipeError) as refused:
        export(stored, tmp_path / "merged", merged=True)
    assert refused.value.rule == "export.unmergeable"
    folder = export(stored, tmp_path / "out", merged=False)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    model: Any = PeftModel.from_pretrained(base, folder).eval()
    generator, sampling = Generator.open(stored), Sampling(max_tokens=12)
    plain = Generator.open(find(str(stored.root))).replies(PROMPTS, sampling)
    replies = generator.replies(PROMPTS, sampling)
    assert replies != plain
    for prompt, reply in zip(PROMPTS, replies, strict=True):
        ids = torch.from_numpy(generator._encode(prompt, sampling, 0))[None]
        ids = ids[:, len(generator.prompt_ids) :]
        settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 1}
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
        assert reply == text_of(generator, out[0, ids.shape[1] :].tolist())


@pytest.mark.parametrize("name", ["prefix", "prompt"])
def test_second_prefix_or_prompt_adapter_is_refused(name: str, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "say fox", "completion": "FOX"}\n' * 3)
    fields = {
        "base": f"tiny-llama:{name}", "name": "again", "data": {"train": str(data)},
        "adaptation": name, "training": {"max_steps": 2, "precision": "float32", "threads": 1},
    }  # fmt: skip
    with pytest.raises(RecipeError) as refused:
        train(Recipe.parse(fields))
    assert refused.value.rule == "adapter.occupied"
    assert find(f"tiny-llama:{name}").added_tokens == 7
    further = Recipe.parse({**fields, "adaptation": {"method": "lora", "rank": 2}})
    train(further)
    both = find("tiny-llama:again")
    assert both.added_tokens == 7
    model: Any = load(both, torch.float32, CPU)
    assert len(prompt_ids(model)) + prefix_tokens(model) == 7
    with pytest.raises(RecipeError) as refused:
        export(both, tmp_path / "merged", merged=True)
    assert refused.value.rule == "export.unmergeable"
    remove_model("tiny-llama:again")


def test_an_adapter_on_an_adapter_is_exported_merged_only(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as refused:
        export(find("tiny-llama:stacked"), tmp_path / "out", merged=False)
    assert refused.value.rule == "export.stacked"
    assert list(tmp_path.glob("*out*")) == []


@pytest.mark.parametrize("merged", [True, False])
def test_base_model_is_exported_unchanged(
    tmp_path: Path, tiny_model_folder: Path, merged: bool
) -> None:
    folder = export(find(str(tiny_model_folder)), tmp_path / "out", merged)
    before, after = (load_file(f / "model.safetensors") for f in (tiny_model_folder, folder))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert greedy(folder, PROMPTS[0]) == greedy(tiny_model_folder, PROMPTS[0])


def test_plain_model_is_exported_without_chat_template(tmp_path: Path) -> None:
    """A model trained without chat template is exported without chat template."""
    folder = export(find("tiny-llama:plain"), tmp_path / "out", merged=False)
    from transformers import AutoTokenizer

    assert not AutoTokenizer.from_pretrained(folder).chat_template
    assert AutoTokenizer.from_pretrained(
        export(find("tiny-llama:whole"), tmp_path / "other", merged=False)
    ).chat_template


def test_an_export_can_be_tuned_and_served_as_a_local_model(tmp_path: Path) -> None:
    folder = export(find("tiny-llama:adapter"), tmp_path / "out", merged=True)
    sampling = Sampling(max_tokens=12)
    again = Generator.open(find(str(folder))).replies(PROMPTS, sampling)
    assert again == Generator.open(find("tiny-llama:adapter")).replies(PROMPTS, sampling)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    stored = find("tiny-llama:adapter")
    full, file, empty = tmp_path / "full", tmp_path / "file", tmp_path / "empty"
    full.mkdir()
    (full / "mine").write_text("x")
    file.write_text("x")
    empty.mkdir()
    for target in (full, file):
        with pytest.raises(RunConflict) as refused:
            export(stored, target, merged=False)
        assert refused.value.rule == "run.conflict"
    with pytest.raises(LuthierError) as refused:
        export(stored, file / "below", merged=False)
    assert refused.value.rule == "file.unwritable"
    assert export(stored, empty, merged=False) == empty
    assert (empty / "adapter_config.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "full"]
    assert [path.name for path in full.iterdir()] == ["mine"]


def test_export_progress_has_phases_and_sizes(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    export(find("tiny-llama:stacked"), tmp_path / "out", True, lambda *part: told.append(part))
    weights = load_file(tmp_path / "out" / "model.safetensors").values()
    total = sum(weight.nbytes for weight in weights)
    merged = [("merge", done, 3) for done in range(4)]
    written = [("write", 0, total), ("write", total, total)]
    assert told == [*merged, *written, ("compare", 0, 1), ("compare", 1, 1)]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "elsewhere")
    export(find("tiny-llama:adapter"), link, merged=False)
    assert link.is_symlink() and (tmp_path / "elsewhere" / "adapter_config.json").is_file()


def test_target_created_during_export_is_preserved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from luthier.exports import writer as module

    honest, target = module.save_format, tmp_path / "out"

    def slow(*given: Any) -> None:
        honest(*given)
        target.mkdir()
        (target / "mine").write_text("x")

    monkeypatch.setattr(module, "save_format", slow)
    with pytest.raises(RunConflict) as refused:
        export(find("tiny-llama:adapter"), target, merged=False)
    assert refused.value.rule == "run.conflict"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in target.iterdir()] == ["mine"]


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_changed_model_files_are_not_exported(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from luthier.exports import writer as module

    stored = find("tiny-llama:adapter")
    file = stored.folder / "adapter_model.safetensors"
    whole, honest = file.read_bytes(), module.save_format
    changed = whole[:-1] + bytes([whole[-1] ^ 1])

    def slow(*given: Any) -> None:
        honest(*given)
        file.write_bytes(changed)

    monkeypatch.setattr(module, "save_format", slow)
    if when == "before":
        file.write_bytes(changed)
    try:
        with pytest.raises(CorruptFile) as refused:
            export(stored, tmp_path / "out", merged=False)
        assert refused.value.rule == "file.changed"
    finally:
        file.write_bytes(whole)
    assert not list(tmp_path.iterdir())


def test_a_failed_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from luthier.exports import writer as module

    def fail(*arguments: Any) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(module, "save_network", fail)
    with pytest.raises(RuntimeError):
        export(find("tiny-llama:adapter"), tmp_path / "out", merged=True)
    assert list(tmp_path.iterdir()) == [tmp_path / "luthier-home"] or not list(tmp_path.iterdir())


def test_gguf_export_matches_model_in_llama_cpp(tmp_path: Path) -> None:
    record = export_gguf(find("tiny-llama:adapter"), tmp_path / "out", quantization="Q8_0")
    parity = record.tokens
    assert record.name == "gguf q8_0" and record.files == hashes_of(tmp_path / "out")
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["Modelfile", "tiny-llama-adapter-Q8_0.gguf"]
    lines = (tmp_path / "out" / "Modelfile").read_text().splitlines()
    assert lines[0] == "FROM ./tiny-llama-adapter-Q8_0.gguf"
    known = GGUFReader(tmp_path / "out" / files[1]).fields
    assert known["general.name"].contents() == "tiny-llama:adapter"
    assert known["luthier.model.sha256"].contents() == find("tiny-llama:adapter").content_hash
    if find_spec("xllamacpp") is None:
        assert parity is None
        pytest.skip("llama.cpp is not installed")
    assert parity is not None and parity.agreement > 0.9 and parity.tokens > 20


def test_lora_adapter_is_exported_to_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = export_gguf(find("tiny-llama:adapter"), tmp_path / "out", merged=False)
    parity = record.tokens
    assert record.name == "gguf f32 adapter"
    folder = tmp_path / "out"
    adapter = "tiny-llama-adapter-F32-LoRA.gguf"
    assert sorted(path.name for path in folder.iterdir()) == ["Modelfile", adapter]
    lines = (folder / "Modelfile").read_text().splitlines()
    assert lines[1:3] == ["FROM ./tiny-llama-F16.gguf", f"ADAPTER ./{adapter}"]
    reader = GGUFReader(folder / adapter)
    known = {name: each.contents() for name, each in reader.fields.items()}
    assert (known["general.type"], known["adapter.type"]) == ("adapter", "lora")
    assert known["adapter.lora.alpha"] == 9.5
    tensors = {each.name: each.data for each in reader.tensors}
    saved = load_file(find("tiny-llama:adapter").folder / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
    assert np.array_equal(tensors["blk.0.ffn_up.weight.lora_b"], saved[name].numpy())
    if find_spec("xllamacpp") is None:
        pytest.skip("llama.cpp is not installed")
    assert parity is not None and parity.mean_kl < 1e-4
    monkeypatch.setattr(gguf_networks, "interleaved_order", lambda size, heads: torch.arange(size))
    with pytest.raises(RecipeError) as refused:
        export_gguf(find("tiny-llama:adapter"), tmp_path / "wrong", merged=False)
    assert refused.value.rule == "export.differs"
    assert not (tmp_path / "wrong").exists()


def test_gguf_export_of_unsupported_model_is_refused(
    tmp_path: Path, family_folder: Callable[[str], Path]
) -> None:
    for model, rule, given in (
        ("tiny-llama:whole", "export.no_adapter", {"merged": False}),
        ("tiny-llama:stacked", "export.stacked", {"merged": False}),
        ("tiny-llama:prefix", "export.unmergeable", {"merged": False}),
        ("tiny-llama:adapter", "export.precision", {"merged": False, "quantization": "q8_0"}),
        ("tiny-llama:prefix", "export.unmergeable", {}),
        ("tiny-llama:whole", "gguf.type", {"quantization": "q3"}),
        (str(family_folder("bert")), "export.task", {}),
        (str(family_folder("palm")), "gguf.network", {}),
    ):
        with pytest.raises(RecipeError) as refused:
            export_gguf(find(model), tmp_path / "none", **given)
        assert refused.value.rule == rule
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("damage", ["lost", "changed", "setting"])
@pytest.mark.parametrize("name", ["adapter", "whole"])
def test_export_misread_by_transformers_is_removed(
    damage: str,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def spoil(folder: Path) -> None:
        path = folder / "model.safetensors"
        weights, weight = load_file(path), "model.layers.0.mlp.up_proj.weight"
        if damage == "lost":
            del weights[weight]
        if damage == "changed":
            weights[weight] = weights[weight] * 1.1
        save_file(weights, path, metadata={"format": "pt"})
        if damage == "setting":
            fields = json.loads((folder / "config.json").read_text())
            text = json.dumps({**fields, "hidden_act": "gelu"})
            (folder / "config.json").write_text(text)

    def save(model: Any, chat: Any, folder: Path) -> None:
        save_network(model, chat, folder)
        spoil(folder)

    copy = writer._copy

    def copy_and_spoil(source: Path, folder: Path) -> None:
        copy(source, folder)
        spoil(folder)

    monkeypatch.setattr(writer, "save_network", save)
    monkeypatch.setattr(writer, "_copy", copy_and_spoil)
    with pytest.raises(RecipeError) as refused:
        export(find(f"tiny-llama:{name}"), tmp_path / "out", merged=True)
    assert refused.value.rule == "export.differs"
    assert ("up_proj" in str(refused.value)) == (damage == "lost")
    assert not (tmp_path / "out").exists()


def test_export_unloadable_by_transformers_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(model: Any, chat: Any, folder: Path) -> None:
        save_network(model, chat, folder)
        (folder / "model.safetensors").unlink()

    monkeypatch.setattr(writer, "save_network", save)
    with pytest.raises(LuthierError):
        export(find("tiny-llama:adapter"), tmp_path / "out", merged=True)
    assert not (tmp_path / "out").exists()
