"""Pre-training from raw text: parts, rejections, interruptions, resuming and use."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import luthier
from luthier.cli.models.app import remove_model
from luthier.data.files.corpus import Survey
from luthier.engine import model_writer
from luthier.engine.checkpoints import Checkpoints
from luthier.engine.metrics import Reporter
from luthier.engine.train import Trainer
from luthier.errors import (
    DataError,
    Interrupted,
    LuthierError,
    RecipeError,
    RunConflict,
    UnknownModel,
)
from luthier.files import read_json
from luthier.library.models import ancestors, find
from luthier.workflows import pretrain as engine
from luthier.workflows import pretrain_defaults as defaults
from luthier.workflows.pretrain_defaults import NetworkFacts
from luthier.workflows.pretrain_recipe import PretrainRecipe

SENTENCES = [
    f"{who} {does} {what} {when}."
    for who in ("The fox", "A dog", "My card", "The bike")
    for does in ("sees", "finds", "leaves", "brings")
    for what in ("the river", "a house", "old bread", "new cards")
    for when in ("today", "at night")
]
SMALL = {
    "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 64, "max_position_embeddings": 64, "tie_word_embeddings": True,
    "vocab_size": 300,
}  # fmt: skip
TRAINING = {"max_steps": 6, "batch_size": 4, "learning_rate": 5e-3, "precision": "float32",
            "threads": 1, "evaluate_every": 3}  # fmt: skip


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(SENTENCES * 6))
    return path


@pytest.fixture
def fields(text: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    (tmp_path / "config.json").write_text(json.dumps(SMALL))

    def build(training: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
        plain = {
            "name": "mine",
            "data": {"train": [str(text)], "validation_share": 0.1},
            "network": {"config": str(tmp_path / "config.json")},
            "training": {**TRAINING, **(training or {})},
        }
        return {**plain, **more}

    return build


def made(
    fields: dict[str, Any],
    resume: bool = False,
    reporter: Reporter | None = None,
    processes: int = 1,
) -> Any:
    return engine.pretrain(PretrainRecipe.parse(fields), resume, reporter, processes)


class Heard(Reporter):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.choices: dict[str, tuple[Any, str]] = {}

    def note(self, text: str) -> None:
        self.notes.append(text)

    def settings(self, defaults: Any) -> None:
        self.choices |= {name: (value, reason) for name, value, reason in defaults}


def weights_of(model_id: str) -> str:
    return str(find(model_id).manifest.trained_weights_sha256)


def test_pretrained_base_generates_exports_and_tunes(
    fields: Callable[..., dict[str, Any]], tmp_path: Path, luthier_home: Path
) -> None:
    result = made(fields({"max_steps": 40}))

    assert result.model_id == "mine" and result.steps == 40
    lines = [
        json.loads(s) for s in (Path(result.run_dir) / "metrics.jsonl").read_text().split("\n")[:-1]
    ]
    held = [line["loss"] for line in lines if line["event"] == "validation"]
    assert held[0] == pytest.approx(math.log(300), rel=0.1)  # random weights know nothing
    assert result.validation_loss < 0.75 * held[0]
    # Files needed only for a resume are removed.
    assert (
        not (Path(result.run_dir) / "tokens").exists()
        and not (Path(result.run_dir) / "start").exists()
    )

    stored = find("mine")
    assert stored.root == "mine" and stored.objective.method == "causal_lm"
    assert stored.manifest.parameters == 300 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 64 + 64) + 32
    reply = luthier.load("mine").generate(["The fox sees"], max_tokens=8)[0]
    assert reply.strip()

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from luthier.exports.writer import export

    folder = export(stored, tmp_path / "out", merged=False)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("The fox sees", return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(out, skip_special_tokens=True) == reply

    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "The fox", "completion": " runs"}\n' * 2)
    tuned = luthier.tune(
        rows, base="mine", name="more", training__max_steps=1, data__validation_share=0
    )
    assert tuned.model_id == "mine:more"
    with pytest.raises(RecipeError):
        remove_model("mine")
    remove_model("mine:more")
    remove_model("mine")
    with pytest.raises(UnknownModel):
        find("mine")
    assert not any((luthier_home / "pretraining").glob("mine"))


@pytest.mark.slow
def test_pretrained_encoder_fills_masks_and_is_tuned(text: Path, tmp_path: Path) -> None:
    training = {**TRAINING, "max_steps": 30}
    fields = {
        "name": "reads",
        "data": {"train": [str(text)], "validation_share": 0.1},
        "network": {"family": "bert", "size": "tiny", "context": 32},
        "training": training,
    }
    result = made(fields)

    lines = (Path(result.run_dir) / "metrics.jsonl").read_text().split("\n")[:-1]
    held = [each["loss"] for each in map(json.loads, lines) if each["event"] == "validation"]
    assert result.validation_loss < 0.75 * held[0]
    stored = find("reads")
    assert not stored.writes and stored.objective.method == "masked_lm"

    from transformers import AutoModelForMaskedLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(stored.folder)
    model: Any = AutoModelForMaskedLM.from_pretrained(stored.folder)
    encoded = tokenizer("The fox sees the<mask> today.", return_tensors="pt")
    assert tokenizer.mask_token_id in encoded.input_ids
    assert model(**encoded).logits.shape == (*encoded.input_ids.shape, len(tokenizer))

    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(
        json.dumps({"text": each, "label": str("today" in each)}) + "\n" for each in SENTENCES
    ))  # fmt: skip
    tuned = luthier.tune(rows, base="reads", name="when", training__max_steps=1)
    assert tuned.model_id == "reads:when"


@pytest.mark.slow
def test_pretrained_encoder_decoder_fills_gaps_and_is_tuned(text: Path, tmp_path: Path) -> None:
    result = made({
        "name": "fills",
        "data": {"train": [str(text)], "validation_share": 0.1},
        "network": {"family": "t5", "size": "tiny", "context": 32},
        "training": {**TRAINING, "max_steps": 30},
    })  # fmt: skip
    lines = (Path(result.run_dir) / "metrics.jsonl").read_text().split("\n")[:-1]
    held = [each["loss"] for each in map(json.loads, lines) if each["event"] == "validation"]
    assert result.validation_loss < 0.75 * held[0]
    assert find("fills").objective.method == "span_corruption"
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(
        json.dumps({"prompt": each, "completion": str("today" in each)}) + "\n"
        for each in SENTENCES
    ))  # fmt: skip
    tuned = luthier.tune(rows, base="fills", name="when", training__max_steps=1)
    assert tuned.model_id == "fills:when"


@pytest.mark.slow
def test_pretrained_lstm_generates(text: Path) -> None:
    result = made({
        "name": "recurs",
        "data": {"train": [str(text)], "validation_share": 0.1},
        "network": {"family": "lstm", "size": "tiny", "context": 32},
        "training": {**TRAINING, "max_steps": 30},
    })  # fmt: skip
    lines = (Path(result.run_dir) / "metrics.jsonl").read_text().split("\n")[:-1]
    held = [each["loss"] for each in map(json.loads, lines) if each["event"] == "validation"]
    assert result.validation_loss < 0.75 * held[0]
    prompts = ["The fox sees", "A dog"]
    alone = [luthier.load("recurs").generate([each], max_tokens=6)[0] for each in prompts]
    assert all(alone) and luthier.load("recurs").generate(prompts, max_tokens=6) == alone


@pytest.mark.slow
def test_continued_pretraining_keeps_tokenizer_of_base(
    fields: Callable[..., dict[str, Any]], text: Path, tmp_path: Path
) -> None:
    made(fields({"max_steps": 4}))
    start = find("mine")
    more = fields({"max_steps": 30}, name="gone-on", network={"base": "mine", "context": 32})
    heard = Heard()
    result = made(more, reporter=heard)
    stored = find(result.model_id)

    assert stored.id == stored.root == "gone-on" and stored.manifest.parent == "mine"
    assert stored.manifest.recipe is not None
    assert stored.manifest.recipe["network"] == {"base": "mine", "family": "llama", "context": 32}
    assert stored.manifest.recipe["objective"]["sequence_length"] == 32
    assert stored.manifest.context == start.manifest.context == 64
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (stored.folder / name).read_bytes() == (start.folder / name).read_bytes()
    assert weights_of("gone-on") != weights_of("mine")
    metrics = (Path(result.run_dir) / "metrics.jsonl").read_text().splitlines()
    held = [line["loss"] for line in map(json.loads, metrics) if line["event"] == "validation"]
    before = luthier.evaluate("mine", text).scores["loss"]
    assert held[0] == pytest.approx(before, rel=0.1)  # training starts from the weights of the base
    assert result.validation_loss is not None and result.validation_loss < held[0] - 0.2
    assert "network.size" not in heard.choices
    assert [each.id for each in ancestors(stored) if not isinstance(each, str)] == ["mine"]
    assert luthier.load("gone-on").generate(["The fox sees"], max_tokens=8)[0]


@pytest.mark.slow
@pytest.mark.parametrize("adaptation", ["full", "lora"])
def test_continued_pretraining_equals_tuning_bit_for_bit(
    fields: Callable[..., dict[str, Any]], text: Path, adaptation: str
) -> None:
    """A single document without held-out text gives both the same sequences."""
    made(fields({"max_steps": 2}))
    training = {"max_steps": 5, "weight_decay": 0.0, "beta2": 0.999, "shuffle": False}
    data = {"train": [str(text)], "validation_share": 0}
    network = {"base": "mine", "context": 32}
    more = {"network": network, "adaptation": adaptation}
    result = made(fields(training, name="gone-on", data=data, **more))
    tuned = luthier.tune(
        text, base="mine", name="tuned", data__validation_share=0, objective="causal_lm",
        objective__sequence_length=32, adaptation__method=adaptation,
        **{f"training__{name}": value for name, value in {**TRAINING, **training}.items()},
    )  # fmt: skip
    assert weights_of(result.model_id) == weights_of(tuned.model_id)


@pytest.mark.slow
def test_an_adapter_of_a_base_is_a_custom_model(
    fields: Callable[..., dict[str, Any]], luthier_home: Path
) -> None:
    made(fields({"max_steps": 4}))
    before = weights_of("mine")
    lora = {"method": "lora", "rank": 4}
    more = fields(name="more", network={"base": "mine", "context": 32}, adaptation=lora)
    result = made(more)
    stored = find("mine:more")
    assert result.model_id == stored.id and stored.manifest.saved == "adapter"
    assert stored.manifest.parity is not None and stored.manifest.parity.greedy_beside_base
    assert (stored.root, stored.manifest.parent) == ("mine", "mine")
    assert stored.adaptation.rank == 4
    assert result.trained_weights < result.weights / 5 and weights_of("mine") == before
    assert not (Path(result.run_dir) / "tokens").exists()
    assert not (luthier_home / "pretraining" / "more").exists()
    assert made(more, resume=True) == result
    assert luthier.load("mine:more").generate(["The fox sees"], max_tokens=8)[0]
    certificate = luthier.certificate("mine:more")
    assert certificate.curves["train"]
    remove_model("mine:more")
    with pytest.raises(RecipeError):
        made(fields(adaptation="lora"))


def train_losses(result: Any) -> list[float]:
    text = (Path(result.run_dir) / "metrics.jsonl").read_text()
    return [line["loss"] for line in map(json.loads, text.splitlines())]


@pytest.mark.slow
def test_two_processes_resume_with_loss_of_single_process(
    fields: Callable[..., dict[str, Any]],
) -> None:
    training = {"max_steps": 40, "evaluate_every": 20, "patience": 0}
    one = made(fields(training, name="one"))
    stopping, heard = Heard(), Heard()

    def stop(line: Any, steps: int) -> None:
        if line["event"] == "train" and line["step"] == 12:
            os.kill(os.getpid(), signal.SIGTERM)

    stopping.metrics = stop  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        made(fields(training, name="two"), reporter=stopping, processes=2)
    two = made(fields(training, name="two"), resume=True, reporter=heard, processes=2)
    assert any(note.startswith("resuming from step") for note in heard.notes)
    assert len(train_losses(one)) == 43
    assert train_losses(two) == pytest.approx(train_losses(one), rel=1e-5)
    assert (two.steps, two.tokens) == (one.steps, one.tokens)
    assert find("two").manifest.recipe == {**(find("one").manifest.recipe or {}), "name": "two"}
    assert made(fields(training, name="two"), resume=True, processes=2) == two


@pytest.mark.parametrize(
    "more",
    [
        {"network": {"base": "mine", "size": "tiny"}},
        {"network": {"base": "mine"}, "tokenizer": {"vocabulary": 300}},
        {"network": {"base": "no-such-model"}},
        {"network": {"base": "first", "context": 65}},
    ],
)
def test_invalid_base_for_continued_pretraining_is_refused(
    more: dict[str, Any], fields: Callable[..., dict[str, Any]], luthier_home: Path
) -> None:
    if more["network"]["base"] == "first":
        made(fields({"max_steps": 1}, name="first"))
    with pytest.raises(LuthierError):
        made(fields(**more))
    assert not any((luthier_home / "pretraining").glob("mine"))


@pytest.mark.parametrize("family", ["gpt2", pytest.param("palm", marks=pytest.mark.slow)])
def test_gpt2_and_palm_families_train(family: str, fields: Callable[..., dict[str, Any]]) -> None:
    result = luthier.pretrain(
        fields()["data"]["train"],
        name="mine",
        network={"family": family, "size": "tiny", "context": 32},
        training=TRAINING,
        data__validation_share=0.1,
    )
    model = luthier.load("mine").generator.network.model
    assert model.config.model_type == family and model.config.max_position_embeddings == 32
    assert result.validation_loss < math.log(512)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["build", "_encode", "step"])
def test_resumed_pretraining_ends_with_equal_bits(
    stage: str,
    fields: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made(fields(name="whole"))

    def die(*_: Any, **__: Any) -> None:
        raise OSError("cut short")

    with monkeypatch.context() as patch:
        if stage == "step":
            patch.setattr(Checkpoints, "due", lambda self, step, size: step == 3)
            patch.setattr(model_writer.ModelWriter, "write", die)
        else:
            patch.setattr(engine, stage, die)
        with pytest.raises((OSError, LuthierError)):
            made(fields(name="cut"))
    with pytest.raises(RunConflict):
        made(fields(name="cut"))
    heard = Heard()
    result = made(fields(name="cut"), resume=True, reporter=heard)
    assert weights_of("cut") == weights_of("whole")
    assert result.steps == 6
    assert made(fields(name="cut"), resume=True) == result  # finished runs are not run again


KILLED = """
import os, signal, sys
from luthier.engine import checkpoints, model_writer
from luthier.workflows import pretrain
from luthier.workflows.pretrain_recipe import PretrainRecipe
import json
where, fields = sys.argv[1], json.loads(sys.argv[2])
def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
if where == "tokens":
    close = pretrain.TokenWriter.close
    def half(self):
        close(self)
        die()
    pretrain.TokenWriter.close = half
elif where == "training":
    checkpoints.Checkpoints.due = lambda self, step, size: step == 3
    model_writer.ModelWriter.write = die
pretrain.pretrain(PretrainRecipe.parse(fields), resume=where != "tokens")
"""


@pytest.mark.slow
def test_a_killed_run_ends_at_the_same_bits(fields: Callable[..., dict[str, Any]]) -> None:
    """kill -9 in the middle of the token file, again before the model is stored, then to the end."""
    made(fields(name="whole"))
    for where in ("tokens", "training", "nowhere"):
        done = subprocess.run(
            [sys.executable, "-c", KILLED, where, json.dumps(fields(name="killed"))],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        wanted = 0 if where == "nowhere" else -signal.SIGKILL
        assert done.returncode == wanted, done.stderr
    assert weights_of("killed") == weights_of("whole")


def test_pretraining_reads_sequences_on_demand(
    fields: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training reads only a few sequences at a time."""
    from luthier.data.tokens import TokenFile

    read: list[int] = []
    item = TokenFile.__getitem__

    def counted(self: TokenFile, index: Any) -> Any:
        if isinstance(index, int):
            read.append(index)
        return item(self, index)

    monkeypatch.setattr(TokenFile, "__getitem__", counted)
    made(fields({"max_steps": 2, "batch_size": 2}))
    assert 0 < len(set(read)) < 60
    assert find("mine").manifest.plain()["data"]["examples"] > 60


def test_everything_left_open_is_chosen_with_a_reason(
    fields: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainers: list[Trainer] = []

    def stop(self: Trainer, *given: Any) -> None:
        trainers.append(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "run", stop)
    heard = Heard()
    plain = fields(network={"context": 32})
    plain["training"] = {"precision": "float32"}
    plain["data"].pop("validation_share")
    with pytest.raises(KeyboardInterrupt):
        made(plain, reporter=heard)
    (trainer,) = trainers
    assert all(reason for _, reason in heard.choices.values())
    assert heard.choices["network.size"][0] == "tiny"
    assert heard.choices["tokenizer.vocabulary"][0] == 512
    assert heard.choices["training.epochs"][0] == 4.0
    assert "Kaplan" in heard.choices["training.learning_rate"][1]
    assert any("Hoffmann" in note for note in heard.notes)
    training = trainer.job.recipe.training
    assert training.weight_decay == 0.1 and training.beta2 == 0.95


def test_validation_files_replace_held_out_text(
    fields: Callable[..., dict[str, Any]], text: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("\n".join(SENTENCES[:20]))
    made(fields(data={"train": [str(text)], "validation": [str(other)]}))
    data = find("mine").manifest.plain()["data"]
    assert set(data["sha256"]) == {str(text), str(other)}
    assert data["tokens"] > 5 * data["validation_rows"] * 64


def test_refused_text_leaves_no_files(
    fields: Callable[..., dict[str, Any]], tmp_path: Path, luthier_home: Path
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"text": 3}\n')
    with pytest.raises(DataError) as refused:
        made(fields(data={"train": [str(bad)]}))
    assert refused.value.rule == "field.type"
    with pytest.raises(DataError) as refused:
        made(fields(data={"train": [str(tmp_path / "nowhere.txt")]}))
    assert refused.value.rule == "file.missing"
    assert not list((luthier_home / "pretraining").glob("*"))


@pytest.mark.parametrize(
    "change",
    [
        {"network": {}, "tokenizer": {"vocabulary": 256}},
        {"network": {"family": "t5"}, "tokenizer": {"vocabulary": 357}},
        {"name": "all-minilm-l6-v2"},
        {"name": "Not/good"},
        {"data": {"train": []}},
        {"network": {"config": "x", "size": "tiny"}},
        {"network": {"famly": "palm"}},
        {"network": {"size": "7b"}},
    ],
)
def test_invalid_pretraining_recipes_are_refused(
    change: dict[str, Any], fields: Callable[..., dict[str, Any]]
) -> None:
    with pytest.raises(RecipeError):
        PretrainRecipe.parse({**fields(), **change})


@pytest.mark.parametrize(
    "size",
    [None, pytest.param(100, marks=pytest.mark.slow), pytest.param("many", marks=pytest.mark.slow)],
)
def test_a_configuration_with_too_small_a_vocabulary_is_refused(
    size: Any, fields: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**SMALL, "vocab_size": size}))
    with pytest.raises(RecipeError) as refused:
        made(fields())
    assert refused.value.problem.setting == "tokenizer.vocabulary"
    assert "None" not in str(refused.value)
    made(fields(tokenizer={"vocabulary": 280}))
    assert find("mine").manifest.plain()["recipe"]["tokenizer"]["vocabulary"] == 280


@pytest.mark.slow
def test_mismatching_tokenizer_is_refused(
    fields: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    made(fields())
    made(fields(name="wide", tokenizer={"vocabulary": 320}))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(find("wide").folder / file, find("mine").folder / file)
    with pytest.raises(RecipeError):
        luthier.tune(fields()["data"]["train"][0], base="mine", name="x")


def test_existing_base_name_is_not_overwritten(fields: Callable[..., dict[str, Any]]) -> None:
    made(fields())
    before = weights_of("mine")
    with pytest.raises(RunConflict):
        made(fields({"seed": 1}))
    with pytest.raises(RunConflict):
        made(fields({"seed": 1}), resume=True)
    assert weights_of("mine") == before


def test_default_learning_rate_matches_paper() -> None:
    """Kaplan et al. 2020, D.1; Brown et al. 2020 used 6e-4 for 125 million (85 without embeddings)."""
    assert defaults.learning_rate(85_000_000)[0] == pytest.approx(
        0.003239 - 0.0001395 * math.log(85_000_000), rel=0.01
    )
    assert 5e-4 < defaults.learning_rate(85_000_000)[0] < 8e-4
    assert defaults.learning_rate(10**13)[0] >= 1e-4


def test_lstm_has_a_higher_learning_rate() -> None:
    rates = []
    for family in ("lstm", "llama"):
        facts = NetworkFacts(1_000_000, embedding=0, context=128, tokens=1000, family=family)
        training, _ = defaults.choose(PretrainRecipe.model_fields["training"].default, facts)
        rates.append(training.learning_rate or 0)
    assert rates[0] > 5 * rates[1]


@pytest.mark.parametrize(
    ("tokens", "passes"), [(20_000_000, 1.0), (19_999_999, 2.0), (7_000_000, 3.0), (1000, 4.0)]
)
def test_short_text_has_more_epochs(tokens: int, passes: float) -> None:
    facts = NetworkFacts(weights=1_000_000, embedding=0, context=128, tokens=tokens)
    training, _ = defaults.choose(PretrainRecipe.model_fields["training"].default, facts)
    assert training.epochs == passes
    batch = (training.batch_size or 0) * 128
    assert defaults.SMALLEST_BATCH <= batch <= defaults.LARGEST_BATCH
    assert bool(defaults.shortage(facts, training)) == (tokens == 1000)


def test_the_size_grows_with_the_text() -> None:
    recipe = PretrainRecipe.parse({"name": "x", "data": {"train": ["a"]}})
    found = {
        characters: defaults.plan(recipe, Survey(1, characters))[0]
        for characters in (1000, 10**6, 10**8, 10**9, 10**12)
    }
    assert [r.network.size for r in found.values()] == ["tiny", "tiny", "3m", "30m", "30m"]
    assert [r.tokenizer.vocabulary for r in found.values()] == [512, 2048, 4096, 16384, 16384]
    shares = [r.data.validation_share or 0 for r in found.values()]
    assert shares[0] == 0 and shares[1] == 0.1 and shares[1:] == sorted(shares[1:], reverse=True)


@pytest.mark.slow
def test_perplexity_matches_validation_loss(
    fields: Callable[..., dict[str, Any]], text: Path
) -> None:
    from luthier.data.rows import load_rows
    from luthier.workflows.evaluate import perplexity

    made(fields({"max_steps": 20}, data={"train": [str(text)], "validation": [str(text)]}))
    found = perplexity(find("mine"), load_rows(text))
    expected = read_json(find("mine").folder / "luthier.json")["metrics"]["validation_loss"]
    loss = found.scores["loss"]
    assert loss == pytest.approx(expected, rel=0.02)
    assert found.scores["perplexity"] == pytest.approx(math.exp(loss))
    characters = len(text.read_text())
    assert found.scores["bits_per_character"] == pytest.approx(
        loss / math.log(2) * found.tokens / characters
    )
    low, high = found.intervals["perplexity"]
    assert low < found.scores["perplexity"] < high
