"""Loading of folders with invalid configurations and weights."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from luthier.data.tree import build_tree
from luthier.errors import CorruptFile, ModelRefused, UnknownModel
from luthier.models import load
from luthier.models.folder import DEFAULT_CONTEXT, ModelFolder
from luthier.models.load import as_network, load_model
from luthier.models.networks.heads import Head
from luthier.types import Example

CPU = torch.device("cpu")
EMBEDDING = Head("embedding")
Copy = Callable[..., Path]


@pytest.fixture
def copy(family_folder: Callable[[str], Path], tmp_path: Path) -> Copy:
    """Return ``copy(family, part.field=value)``: a folder of a family with a changed configuration."""

    def write(family: str, **changes: Any) -> Path:
        folder = shutil.copytree(family_folder(family), tmp_path / family, dirs_exist_ok=True)
        fields = json.loads((folder / "config.json").read_text())
        for name, value in changes.items():
            *parts, last = name.split(".")
            inside = fields
            for part in parts:
                inside = inside[part]
            inside[last] = value
        (folder / "config.json").write_text(json.dumps(fields))
        return folder

    return write


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(
    ("family", "name", "value", "rule"),
    [
        ("clip", "text_config.max_position_embeddings", 10**9, "model.weights"),
        ("clip", "text_config.num_hidden_layers", 10**6, "model.layers"),
        ("clip", "vision_config.num_hidden_layers", 0, "model.layers"),
        ("clip", "projection_dim", "12", ""),
        ("clip", "projection_dim", 0, ""),
        ("clip", "vision_config.patch_size", 0, ""),
        ("clip", "vision_config.image_size", 10**6, ""),
        ("clip", "vision_config.image_size", -16, ""),
        ("clip", "text_config.hidden_size", -16, ""),
        ("trocr", "encoder.patch_size", 0, ""),
        ("trocr", "decoder.vocab_size", 10**9, "model.weights"),
        ("small_cnn", "image_size", 10**6, ""),
        ("small_cnn", "hidden_sizes", "16", ""),
        ("vae", "latent_size", -4, ""),
        ("llama", "num_hidden_layers", 10**6, "model.layers"),
        ("llama", "num_hidden_layers", -3, "model.layers"),
        ("llama", "num_attention_heads", 0, ""),
        ("llama", "vocab_size", 10**9, "model.weights"),
        ("bert", "type_vocab_size", 10**9, "model.weights"),
    ],
)
def test_invalid_configurations_are_refused_before_building(
    family: str, name: str, value: Any, rule: str, copy: Copy
) -> None:
    folder = copy(family, **{name: value})
    started = time.process_time()
    with pytest.raises(ModelRefused if rule else UnknownModel) as refused:
        ModelFolder(folder).check()
    assert time.process_time() - started < 5
    assert not rule or refused.value.problem.rule == rule


def test_mismatched_configuration_is_refused_at_first_pass(copy: Copy) -> None:
    folder = copy("clip", **{"text_config.eos_token_id": 10**9})
    with pytest.raises(UnknownModel) as refused:
        as_network(load_model(folder, torch.float32, CPU, EMBEDDING), CPU, torch.float32)
    assert refused.value.rule == "config.rejected"


def test_a_network_is_described_once_for_each_opened_folder(
    copy: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    construct = load.sketch
    monkeypatch.setattr(load, "sketch", lambda *of: drawn.append(of) or construct(*of))
    opened = ModelFolder(copy("gpt2"))
    model = load_model(opened.path, torch.float32, CPU, opened=opened)
    opened.check()
    assert len(drawn) == 1
    assert opened.description.numbers == sum(each.numel() for each in model.parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("family", ["llama", "vae", "small_cnn"])
def test_non_finite_weights_are_refused(family: str, value: float, copy: Copy) -> None:
    folder = copy(family)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[-1]
    tensors[name].view(-1)[-1] = value
    save_file(tensors, path, metadata={"format": "pt"})
    head = {"llama": Head("causal_lm"), "vae": Head("autoencoding")}.get(family, EMBEDDING)
    with pytest.raises(CorruptFile) as refused:
        load_model(folder, torch.bfloat16, CPU, head)
    assert refused.value.rule == "weights.not_finite"


def plain_llama(tiny_llama: Callable[..., Any], folder: Path, **fields: Any) -> Path:
    tiny_llama(**fields).save_pretrained(folder)
    return folder


def hidden(folder: Path) -> torch.Tensor:
    network = as_network(load_model(folder, torch.float32, CPU).eval(), CPU, torch.float32)
    row = Example(np.arange(3, 12), np.arange(9).clip(max=1).astype(np.float32), 0)
    with torch.no_grad():
        return network.hidden(network.batch(build_tree([row])))


def test_missing_and_damaged_weights_are_refused(
    tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    folder = plain_llama(tiny_llama, tmp_path)
    path = folder / "model.safetensors"
    whole = load_file(path)
    save_file({n: w for n, w in whole.items() if n != "model.norm.weight"}, path)
    with pytest.raises(UnknownModel) as refused:
        load_model(folder, torch.float32, CPU)
    assert refused.value.rule == "model.weights_missing"
    nan = torch.full_like(whole["model.norm.weight"], torch.nan)
    save_file(whole | {"model.norm.weight": nan}, path)
    with pytest.raises(CorruptFile) as refused:
        load_model(folder, torch.float32, CPU)
    assert refused.value.rule == "weights.not_finite"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelRefused) as refused:
        load_model(folder, torch.float32, CPU)
    assert refused.value.rule == "model.weights"


def test_unlisted_weight_files_are_ignored(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    folder = plain_llama(tiny_llama, tmp_path)
    whole, expected = load_file(folder / "model.safetensors"), hidden(folder)
    for name in ("zz", "adapter_model", "model_old"):
        others = {name: torch.zeros_like(weight) for name, weight in whole.items()}
        save_file(others, folder / f"{name}.safetensors")
    assert torch.equal(hidden(folder), expected)
    # Shards are listed in the index.
    (folder / "model.safetensors").unlink()
    halves = [{n: w for i, (n, w) in enumerate(whole.items()) if i % 2 == half} for half in (0, 1)]
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for name, half in zip(names, halves, strict=True):
        save_file(half, folder / name, metadata={"format": "pt"})
    places = {key: name for name, half in zip(names, halves, strict=True) for key in half}
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(hidden(folder), expected)


@pytest.mark.parametrize(
    ("limit", "fields", "expected", "has_source"),
    [
        (512, {"max_position_embeddings": 64}, 64, False),
        (512, {}, 512, True),
        (int(1e30), {}, DEFAULT_CONTEXT, True),
        # The default of transformers' class for a Falcon.
        (512, {"model_type": "falcon"}, 2048, True),
    ],
)
def test_a_missing_context_length_is_replaced(
    limit: int, fields: dict[str, Any], expected: int, has_source: bool, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba", **fields}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": limit}))
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    context, source = ModelFolder(tmp_path).context_and_reason
    assert (context, bool(source)) == (expected, has_source)


def test_weights_without_prefix_are_loaded(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    folder = plain_llama(tiny_llama, tmp_path, tie_word_embeddings=True)
    path, expected = folder / "model.safetensors", hidden(folder)
    bare = {name.removeprefix("model."): weight for name, weight in load_file(path).items()}
    save_file(bare, path, metadata={"format": "pt"})
    assert torch.equal(hidden(folder), expected)


def test_network_with_non_finite_output_is_refused(
    tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    folder = plain_llama(tiny_llama, tmp_path)
    path = folder / "model.safetensors"
    huge = {n: w * 1e37 if "proj" in n else w for n, w in load_file(path).items()}
    save_file(huge, path, metadata={"format": "pt"})
    with pytest.raises(CorruptFile) as refused:
        hidden(folder)
    assert refused.value.rule == "weights.not_finite"


def test_a_configuration_of_more_than_is_stored_is_refused(
    tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    folder = plain_llama(tiny_llama, tmp_path)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"intermediate_size": 1 << 20}))
    with pytest.raises(ModelRefused) as refused:
        ModelFolder(folder).check()
    assert refused.value.rule == "model.weights"


@pytest.mark.slow
def test_concurrent_imports_of_transformers_succeed(
    tiny_llama: Callable[..., Any], tiny_model_folder: Path, tmp_path: Path
) -> None:
    code = (
        "import threading, torch; from pathlib import Path\n"
        "from luthier.models.load import load_model\n"
        "from luthier.models.tokenizer import load_tokenizer\n"
        f"folder = Path({str(plain_llama(tiny_llama, tmp_path))!r})\n"
        f"texts = Path({str(tiny_model_folder)!r})\n"
        "failed = []\n"
        "def run(work):\n"
        "    try: work()\n"
        "    except BaseException as error: failed.append(repr(error))\n"
        "load = lambda: load_model(folder, torch.float32, torch.device('cpu'))\n"
        "read = lambda: load_tokenizer(texts)(['a', 'b'])\n"
        "threads = [threading.Thread(target=run, args=[each]) for each in (load, read, read)]\n"
        "[each.start() for each in threads]; [each.join() for each in threads]; print(failed)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.stdout.strip() == "[]", ended.stdout + ended.stderr


@pytest.mark.slow
def test_networks_are_imported_before_any_is_drawn() -> None:
    """Imports must not count as memory of the created network."""
    code = (
        "import sys; from luthier.models.folder import import_transformers\n"
        "sys.modules['torch'] = None\n"
        "import_transformers(networks=False)  # a process that reads texts alone has no torch\n"
        "del sys.modules['torch']\n"
        "print('transformers.models.llama.modeling_llama' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.stdout.strip() == "False", ended.stderr
    code = (
        "import sys; from luthier.models.folder import import_transformers\n"
        "import_transformers()\n"
        "print({'transformers.models.auto.modeling_auto', 'transformers.models.llama.modeling_llama'}"
        " <= {*sys.modules})"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.stdout.strip() == "True", ended.stderr
