"""Llama without transformers: the same bits, or not taken."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import luthier
from luthier.adaptations import ADAPTATIONS
from luthier.adaptations.lora_layer import LoRALinear
from luthier.data.tree import build_tree
from luthier.errors import CorruptFile, ModelRefused, UnknownModel
from luthier.models.bottom import Bottom
from luthier.models.description import check_folder, described_network
from luthier.models.heads import prompt_ids
from luthier.models.kv_cache import CHUNK
from luthier.models.layouts import Flat, Layout
from luthier.models.llama import LlamaConfig, LlamaForCausalLM, load_llama, sketch_llama
from luthier.models.load import as_network, load_model
from luthier.models.save import load_adapter, save_adapter
from luthier.models.torch_backend import FlatBackend
from luthier.objectives.logprobs import weighted_nll
from luthier.types import Example

CPU = torch.device("cpu")
PROMPT = np.random.default_rng(0).integers(3, 300, CHUNK + 70)
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "other heads": {"head_dim": 16, "num_key_value_heads": 4},
    "longer context": {"rope_parameters": LLAMA3},
}


@pytest.fixture(scope="module")
def write_llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``write_llama(**fields)``: the folder of a tiny one with other fields."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def write(**fields: Any) -> Path:
        size = {
            "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
        }  # fmt: skip
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**size | fields))
        for name, weight in model.named_parameters():
            torch.nn.init.normal_(weight, std=0.2)
            if "norm" in name:
                weight.data += 1
        folder = tmp_path_factory.mktemp("llama")
        model.save_pretrained(folder)
        return folder

    return write


def written(model: Any, dtype: torch.dtype, exact: bool) -> torch.Tensor:
    """Logits behind a prompt and behind three tokens that are written after it."""
    backend = FlatBackend(as_network(model.eval(), CPU, dtype), 1024, exact)
    state = backend.open(np.concatenate([np.array(prompt_ids(model), dtype=np.int64), PROMPT]))
    while (logits := backend.prefill([state])[0]) is None:
        pass
    rows = [logits, *(backend.step([state], [token])[0] for token in (5, 6, 7))]
    backend.close()
    return torch.stack(rows)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exact", [False, True])
def test_the_bits_are_those_of_transformers(
    form: str, dtype: torch.dtype, exact: bool, write_llama: Callable[..., Path]
) -> None:
    folder = write_llama(**FORMS[form])
    ours = load_model(folder, dtype, CPU, savable=False)
    assert isinstance(ours, LlamaForCausalLM)
    theirs = load_model(folder, dtype, CPU)
    assert not isinstance(theirs, LlamaForCausalLM)
    assert {n: w.shape for n, w in ours.named_parameters()} == {
        n: w.shape for n, w in theirs.named_parameters()
    }
    assert torch.equal(written(ours, dtype, exact), written(theirs, dtype, exact))


ATTACHED = [
    name
    for name, kind in sorted(ADAPTATIONS.items())
    if not kind.model_validate({"method": name}).stores_network
]


@pytest.mark.parametrize("method", ATTACHED)
def test_adapters_find_their_places(
    method: str, write_llama: Callable[..., Path], tmp_path: Path
) -> None:
    adaptation = ADAPTATIONS[method].model_validate({"method": method})
    folder = write_llama(attention_bias=method == "bitfit")
    tuned = load_model(folder, torch.float32, CPU)
    torch.manual_seed(1)
    adaptation.attach(tuned)
    for weight in tuned.parameters():
        if weight.requires_grad:
            weight.data.normal_(std=0.05)
    tmp_path.joinpath("adapter").mkdir()
    save_adapter(tuned, adaptation, {}, tmp_path / "adapter")
    found = []
    for savable in (True, False):
        model = load_model(folder, torch.float32, CPU, savable=savable)
        load_adapter(model, adaptation, tmp_path / "adapter")
        if adaptation.mergeable:
            adaptation.merge(model)
        found.append(written(model, torch.float32, exact=False))
    plain = written(load_model(folder, torch.float32, CPU), torch.float32, exact=False)
    assert torch.equal(*found)
    assert not torch.equal(found[0], plain)


@pytest.mark.parametrize("method", ["lora", "prefix", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_learned_has_the_bits_of_transformers(
    method: str,
    dtype: torch.dtype,
    write_llama: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Of fewer nodes, and of layers together, sums are in another order.
    monkeypatch.setattr(Flat, "run_nodes", Layout.run_nodes)
    monkeypatch.setattr(LoRALinear, "read_together", lambda layers, x: None)
    folder = write_llama(tie_word_embeddings=True)
    adaptation = ADAPTATIONS[method].model_validate({"method": method})
    tokens = np.random.default_rng(1).integers(3, 300, (4, 60))
    tokens[:, :20] = tokens[0, :20]  # a prefix that the rows share
    rows = [
        Example(row, np.where(np.arange(60) < 30, 0, 1).astype(np.float32), place)
        for place, row in enumerate(tokens)
    ]
    gradients = []
    for savable in (True, False):
        model = load_model(folder, dtype, CPU, savable=savable)
        assert isinstance(model, LlamaForCausalLM) is not savable
        network = as_network(model, CPU, dtype)
        torch.manual_seed(1)
        adaptation.attach(model)
        adaptation.calibrate(network, lambda _: pytest.fail("no gradients are needed"))
        trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
        for weight in trained.values():
            weight.data += 0.05 * torch.randn_like(weight)
        model.train()
        for batch in network.batches(rows, 128):
            weighted_nll(network, batch).backward()
        gradients.append({name: each.grad for name, each in trained.items()})
    theirs, ours = gradients
    assert theirs.keys() == ours.keys()
    for name, gradient in theirs.items():
        assert (
            gradient is not None and gradient.count_nonzero() and torch.equal(gradient, ours[name])
        )


def test_a_few_nodes_of_a_network_whose_layers_were_all_computed_ahead(
    write_llama: Callable[..., Path],
) -> None:
    tokens = np.random.default_rng(1).integers(3, 300, (6, 60))
    weight_T = np.where(np.arange(60) < 56, 0, 1).astype(np.float32)
    rows = [Example(row, weight_T, place) for place, row in enumerate(tokens)]
    model = load_model(write_llama(), torch.float32, CPU, savable=False)
    network = as_network(model.requires_grad_(False), CPU, torch.float32)
    batch = network.batch(build_tree(rows))
    expected = network.hidden(batch, batch.source_S)
    network.bottom = Bottom.of(network, 3, rows, 1024, None)
    torch.testing.assert_close(network.hidden(batch, batch.source_S), expected)


@pytest.mark.parametrize("method", ["lora", "prefix", "full"])
def test_the_last_layer_of_a_few_nodes_is_that_of_all(
    method: str, write_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    adaptation = ADAPTATIONS[method].model_validate({"method": method})
    tokens = np.random.default_rng(1).integers(3, 300, (6, 60))
    tokens[:, :20] = tokens[0, :20]  # a prefix that the rows share
    weight_T = np.where(np.arange(60) < 56, 0, 1).astype(np.float32)
    rows = [Example(row, weight_T, place) for place, row in enumerate(tokens)]
    model = load_model(write_llama(), torch.float32, CPU, savable=False)
    torch.manual_seed(2)
    adaptation.attach(model)
    adapted = [each for each in model.parameters() if each.requires_grad]
    for weight in adapted:
        weight.data += 0.05 * torch.randn(weight.shape)
    network = as_network(model, CPU, torch.float32)
    batch = network.batch(build_tree(rows))
    looking: list[int] = []
    network.model.base_model.layers[-1].self_attn.q_proj.register_forward_pre_hook(
        lambda _module, given: looking.append(given[0].shape[-2])
    )

    def learn() -> list[torch.Tensor]:
        loss = weighted_nll(network, batch) + network.row_states(batch, "last").square().sum()
        return [loss.detach(), *torch.autograd.grad(loss, adapted)]

    few = learn()
    nodes = torch.tensor([[70, 3], [3, 250]])  # in any order and shape
    states = network.hidden(batch, nodes)
    assert looking == [32, 32, 32]
    monkeypatch.setattr(Flat, "run_nodes", Layout.run_nodes)
    for mine, whole in zip(few, learn(), strict=True):
        torch.testing.assert_close(mine, whole, rtol=1e-4, atol=1e-4 * float(whole.abs().max()))
    torch.testing.assert_close(states, network.hidden(batch, nodes), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "mistral"},
        {"architectures": ["LlamaForSequenceClassification"]},
        {"hidden_act": "gelu"},
        {"quantization_config": {"bits": 4}},
        {"sliding_window": 64},
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        {"num_attention_heads": 0},
        {"num_key_value_heads": 3},
        {"num_hidden_layers": -1},
        {"hidden_size": "32"},
        {"rms_norm_eps": float("nan")},
        {"attention_dropout": 0.1},
        {"pretraining_tp": 2},
        {"vocab_size": None},
        {"rope_parameters": {k: v for k, v in LLAMA3.items() if k != "factor"}},
        {
            "rope_parameters": {
                k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"
            }
        },
        {"rope_parameters": {"rope_type": "default", "factor": 2.0}},
        {"rope_parameters": [["rope_type", "default"]]},
        {"attention_bias": None},
        {"rms_norm_eps": None},
        {"rms_norm_eps": 1},
        {"use_cache": "x"},
        {"initializer_range": -5},
        {"dtype": "nope"},
        {"dtype": ["float32"]},
        {"pad_token_id": 320},
        {"something_new": 1},
    ],
)
def test_what_is_not_known_is_left_to_transformers(
    fields: dict[str, Any], write_llama: Callable[..., Path]
) -> None:
    known = json.loads((write_llama() / "config.json").read_text())
    assert LlamaConfig.of(known) is not None
    assert LlamaConfig.of(known | fields) is None


def test_fields_from_before_transformers_5(write_llama: Callable[..., Path]) -> None:
    now = json.loads((write_llama(rope_parameters=LLAMA3) / "config.json").read_text())
    rope = dict(now.pop("rope_parameters"))
    before = now | {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    assert LlamaConfig.of(before) is not None
    assert LlamaConfig.of(before) == LlamaConfig.of(now | {"rope_parameters": LLAMA3})


@pytest.mark.parametrize("form", FORMS)
def test_it_is_counted_as_transformers_counts_it(
    form: str, write_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_llama(**FORMS[form])
    ours = described_network(folder, memory=False)
    monkeypatch.setattr("luthier.models.description.LlamaConfig.of", lambda fields: None)
    assert described_network(folder, memory=True) == ours


def test_weights_that_are_missing_or_damaged(write_llama: Callable[..., Path]) -> None:
    folder = write_llama()
    path = folder / "model.safetensors"
    whole = load_file(path)
    config = LlamaConfig.of(json.loads((folder / "config.json").read_text()))
    assert config is not None

    save_file({n: w for n, w in whole.items() if n != "model.norm.weight"}, path)
    assert load_llama(config, folder, torch.float32, CPU) is None  # transformers says which
    with pytest.raises(UnknownModel, match=r"missing or of another shape, model\.norm\.weight"):
        load_model(folder, torch.float32, CPU, savable=False)
    save_file(
        whole | {"model.norm.weight": torch.full_like(whole["model.norm.weight"], torch.nan)}, path
    )
    with pytest.raises(CorruptFile, match=r"model\.norm\.weight .* not finite"):
        load_model(folder, torch.float32, CPU, savable=False)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelRefused, match="no whole safetensors file"):
        load_model(folder, torch.float32, CPU, savable=False)
    tied = config.model_copy(update={"tie_word_embeddings": True})
    save_file(whole, path)
    assert load_llama(tied, folder, torch.float32, CPU) is None


def test_other_files_beside_the_weights_are_not_read(write_llama: Callable[..., Path]) -> None:
    folder = write_llama()
    whole = load_file(folder / "model.safetensors")
    expected = written(load_model(folder, torch.float32, CPU), torch.float32, exact=False)
    for name in ("zz", "adapter_model", "model_old"):
        others = {name: torch.zeros_like(weight) for name, weight in whole.items()}
        save_file(others, folder / f"{name}.safetensors")
    ours = load_model(folder, torch.float32, CPU, savable=False)
    assert torch.equal(written(ours, torch.float32, exact=False), expected)
    # In shards: those that the index names. Without one, transformers says what is missing.
    (folder / "model.safetensors").unlink()
    halves = [{n: w for i, (n, w) in enumerate(whole.items()) if i % 2 == half} for half in (0, 1)]
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for name, half in zip(names, halves, strict=True):
        save_file(half, folder / name)
    places = {key: name for name, half in zip(names, halves, strict=True) for key in half}
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    ours = load_model(folder, torch.float32, CPU, savable=False)
    assert isinstance(ours, LlamaForCausalLM)
    assert torch.equal(written(ours, torch.float32, exact=False), expected)
    (folder / "model.safetensors.index.json").unlink()
    config = LlamaConfig.of(json.loads((folder / "config.json").read_text()))
    assert config is not None and load_llama(config, folder, torch.float32, CPU) is None


def test_weights_by_other_names_are_loaded_by_transformers(
    write_llama: Callable[..., Path],
) -> None:
    folder = write_llama(tie_word_embeddings=True)
    path = folder / "model.safetensors"
    expected = written(load_model(folder, torch.float32, CPU), torch.float32, exact=False)
    bare = {name.removeprefix("model."): weight for name, weight in load_file(path).items()}
    save_file(bare, path, metadata={"format": "pt"})
    loaded = load_model(folder, torch.float32, CPU, savable=False)
    assert not isinstance(loaded, LlamaForCausalLM)
    assert torch.equal(written(loaded, torch.float32, exact=False), expected)


def test_a_network_that_answers_no_numbers_is_refused(write_llama: Callable[..., Path]) -> None:
    folder = write_llama()
    path = folder / "model.safetensors"
    huge = {n: w * 1e37 if "proj" in n else w for n, w in load_file(path).items()}
    save_file(huge, path, metadata={"format": "pt"})
    loaded = load_model(folder, torch.float32, CPU, savable=False)
    with pytest.raises(CorruptFile, match="answers with numbers that are not finite"):
        as_network(loaded.eval(), CPU, torch.float32)


@pytest.mark.slow
def test_threads_import_transformers_one_after_the_other(
    write_llama: Callable[..., Path], tiny_model_folder: Path
) -> None:
    code = (
        "import threading, torch; from pathlib import Path\n"
        "from luthier.models.load import load_model\n"
        "from luthier.models.tokenizer import load_tokenizer\n"
        f"folder, texts = Path({str(write_llama())!r}), Path({str(tiny_model_folder)!r})\n"
        "failed = []\n"
        "def run(work):\n"
        "    try: work()\n"
        "    except BaseException as error: failed.append(repr(error))\n"
        "load = lambda: load_model(folder, torch.float32, torch.device('cpu'), savable=True)\n"
        "read = lambda: load_tokenizer(texts)(['a', 'b'])\n"
        "threads = [threading.Thread(target=run, args=[each]) for each in (load, read, read)]\n"
        "[each.start() for each in threads]; [each.join() for each in threads]; print(failed)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.stdout.strip() == "[]", ended.stdout + ended.stderr


@pytest.mark.slow
def test_networks_are_imported_before_any_is_drawn() -> None:
    """What they import is not to count as the memory of the one that is drawn."""
    code = (
        "import sys; from luthier.models.description import import_transformers\n"
        "sys.modules['torch'] = None\n"
        "import_transformers(networks=False)  # a process that reads texts alone has no torch\n"
        "del sys.modules['torch']\n"
        "print('transformers.models.llama.modeling_llama' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.stdout.strip() == "False", ended.stderr
    code = (
        "import sys; from luthier.models.description import import_transformers\n"
        "import_transformers()\n"
        "print({'transformers.models.auto.modeling_auto', 'transformers.models.llama.modeling_llama'}"
        " <= {*sys.modules})"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.stdout.strip() == "True", ended.stderr


def test_a_configuration_of_more_than_is_stored_is_refused(
    write_llama: Callable[..., Path],
) -> None:
    folder = write_llama()
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"intermediate_size": 1 << 20}))
    with pytest.raises(ModelRefused, match="describes a network of"):
        check_folder(folder)
    assert next(sketch_llama(LlamaConfig.of(fields)).parameters()).device.type == "meta"  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("is_adapter", [False, True])
def test_generating_imports_no_transformers(
    is_adapter: bool, tiny_model_folder: Path, luthier_home: Path, tmp_path: Path
) -> None:
    model = str(tiny_model_folder)
    if is_adapter:
        rows = tmp_path / "rows.jsonl"
        rows.write_text('{"prompt": "Hello", "completion": "Hi"}\n' * 4)
        model = luthier.tune(rows, base=model, name="x", training__max_steps=1).model_id
    code = (
        "import sys; from luthier.cli.app import app\n"
        f"sys.argv = ['luthier', 'generate', {model!r}, 'Hi', '--max-tokens', '4']\n"
        "try: app()\n"
        "except SystemExit as ended: assert not ended.code, ended.code\n"
        "print({'transformers', 'peft', 'torch._dynamo'} & {*sys.modules})"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.rstrip().endswith("set()")
