"""Reinforcement learning end to end: sampling, grading, rejections, measurements and stored
records."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from thinking_models import THOUGHT
from typer.testing import CliRunner

import luthier
from luthier.chat_models.base import SamplingSpec
from luthier.cli.app import app
from luthier.data.conversations.reasoning import DecodedReply
from luthier.data.shapes.conversations import Conversation, PromptCompletion, PromptOnly
from luthier.engine.dataset import prepare
from luthier.engine.metrics import Reporter
from luthier.engine.train import train
from luthier.errors import DataError, GradingFailed, RecipeError
from luthier.graders import GRADERS, Answer, Grader, Number
from luthier.models.load import as_network, load_model
from luthier.models.networks.network import Network
from luthier.models.tokenizer import load_chat_format
from luthier.objectives import GRPO, PPO, logprobs
from luthier.objectives.reinforcement import rollout_checks
from luthier.objectives.reinforcement.rollout_checks import advice, precheck
from luthier.objectives.reinforcement.rollouts import Reinforcement, fixed_generator, sample_record
from luthier.objectives.reinforcement.scoring import write_replies
from luthier.recipe import DataSpec, Recipe
from luthier.types import Example, Message

CPU = torch.device("cpu")
WORDS = ("yes", "no", "fox", "dog", "card", "Paris", "lazy", "quick")


class Share(Grader):
    """Share of the letter in the reply."""

    method: Literal["share"] = "share"
    letter: str = "e"
    needs_expected = False
    has_time_limit: ClassVar[bool] = False

    def score(self, answer: Answer) -> float:
        return answer.reply.count(self.letter) / max(1, len(answer.reply))


class Broken(Share):
    """Grader that raises for the first row."""

    method: Literal["broken"] = "broken"  # type: ignore[assignment]

    def score(self, answer: Answer) -> float:
        if answer.row.line == 1:
            raise ValueError("no such thing")
        return super().score(answer)


@pytest.fixture(autouse=True)
def _graders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GRADERS.built_in, "share", Share)
    monkeypatch.setitem(GRADERS.built_in, "broken", Broken)


class Notes(Reporter):
    """Reporter with all notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.lines: list[dict[str, Any]] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def metrics(self, line: Mapping[str, Any], steps: int) -> None:
        self.lines.append(dict(line))


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Say {word}"}) + "\n" for word in WORDS))
    return path


def recipe_of(folder: Path, rows: Path, objective: Mapping[str, Any], **training: Any) -> Recipe:
    fields = {"grader": "share", "max_completion_tokens": 10, **objective}
    return Recipe.parse(
        {
            "base": str(folder),
            "name": "custom",
            "data": {"train": rows, "validation": rows, "severity": {"leakage.many": "note"}},
            "objective": fields,
            "adaptation": "full",
            "training": {
                "epochs": 99,
                "learning_rate": 4e-3,
                "precision": "float32",
                "patience": 0,
                "evaluate_every": 100,
                **training,
            },
        }
    )


def network_of(folder: Path) -> Network:
    network = as_network(load_model(folder, torch.float32, CPU), CPU, torch.float32)
    network.chat = load_chat_format(folder)
    return network


def prompts(objective: Reinforcement, network: Network, count: int = 4) -> list[Example]:
    assert network.chat is not None
    rows = [
        PromptCompletion("f.jsonl", n + 1, prompt=f"Say {WORDS[n]}", completion="e")
        for n in range(count)
    ]
    return [objective.encode(row, n, network.chat) for n, row in enumerate(rows)]


@pytest.mark.slow
def test_a_reward_rises(tiny_model_folder: Path, rows_file: Path, luthier_home: Path) -> None:
    notes = Notes()
    result = train(
        recipe_of(tiny_model_folder, rows_file, {"method": "grpo", "beta": 0.01}, max_steps=20),
        reporter=notes,
    )
    steps = [line for line in notes.lines if line["event"] == "train"]
    first, last = (sum(s["reward"] for s in part) / 3 for part in (steps[:3], steps[-3:]))
    assert last > 3 * first
    held = [line for line in notes.lines if line["event"] == "validation"]
    assert held[-1]["reward"] == -held[-1]["loss"] > 2 * held[0]["reward"]
    assert result.validation_loss == pytest.approx(-max(line["reward"] for line in held))
    for step in steps:
        assert step["measure"] == "reward" and step["completions"] == 32
        assert 1 <= step["completion_tokens"] <= 10 and 0 <= step["truncated"] <= 1
        # Sampler and trainer say the same of the same tokens, in float32 to 1e-5 nats.
        assert step["sampler_difference"] < 1e-5
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-6) and steps[-1]["kl"] > 1e-3
    run = Path(result.run_dir)
    assert {"reward.png", "reward.svg", "loss.png"} <= {path.name for path in run.iterdir()}
    shown = CliRunner().invoke(app, ["models", "samples", result.model_id, "--json"])
    found = json.loads(shown.stdout)
    rewards = [sample["reward"] for sample in found["samples"]]
    assert rewards == sorted(rewards, reverse=True) and len(rewards) == 20
    assert found["trend"][0]["steps"] == "1-5" and len(found["trend"]) == 4
    assert found["trend"][-1]["reward"] > found["trend"][0]["reward"]
    best = found["samples"][0]
    assert best["completion"].count("e") / len(best["completion"]) == best["reward"]
    assert best["prompt"] in [f"Say {word}" for word in WORDS] and best["kl"] is not None
    table = CliRunner().invoke(
        app, ["models", "samples", str(run), "--worst-first", "--full", "--count", "3"]
    )
    assert table.stdout.split()[0] == "reward"  # not squeezed out by the texts
    assert table.exit_code == 0 and "16-20" in table.stdout


@pytest.mark.slow
def test_grader_sees_text_without_reasoning(thinking_folder: Callable[[str], Path]) -> None:
    """With a rule-based reward, and with a local model as judge."""
    network = network_of(thinking_folder("is opened"))
    objective = GRPO(
        grader=GRADERS.built_in["exact"](), max_completion_tokens=120, temperature=1e-9
    )
    assert network.chat is not None
    row = PromptCompletion("f.jsonl", 1, prompt="sky?", completion="blue")
    examples = [objective.encode(row, 0, network.chat)]
    (rollout, other) = objective.roll_out(network, examples, 2, fixed_generator()).each
    assert (rollout.reply, rollout.score) == (DecodedReply(THOUGHT, "blue"), 1.0)
    assert (
        len(rollout) > len(network.chat.text_tokenizer.tokens("blue", first=False))
        and other.score == 1.0
    )
    record = sample_record(row, rollout.reply, len(rollout), True)
    assert (record["completion"], record["reasoning"]) == ("blue", THOUGHT)
    sampling = SamplingSpec(max_tokens=120, temperature=0)
    assert write_replies(network, sampling, 2, [[Message("user", "sky?")]]) == ["blue"]


@pytest.mark.slow
def test_ppo_learns_and_stores_no_value_head(
    family_folder: Callable[[str], Path], rows_file: Path
) -> None:
    notes = Notes()
    fields = {"method": "ppo", "kl_coef": 0.01, "num_mini_batches": 2, "num_ppo_epochs": 2}
    rows_file.write_text(rows_file.read_text() * 4)
    recipe = recipe_of(
        family_folder("gpt2"), rows_file, fields, max_steps=14, learning_rate=2e-3, batch_size=32
    )
    result = train(recipe, reporter=notes)
    steps = [line for line in notes.lines if line["event"] == "train"]
    first, last = (sum(s["reward"] for s in part) / 3 for part in (steps[:3], steps[-3:]))
    assert last > 1.5 * first
    base = load_file(family_folder("gpt2") / "model.safetensors")
    (stored,) = (load_file(path) for path in Path(result.model_dir).glob("*.safetensors"))
    assert not [name for name in stored if "value" in name]
    assert stored.keys() <= base.keys() | {"lm_head.weight"}
    assert luthier.load(result.model_id).generate("Say yes", max_tokens=3) is not None


def test_samples_change_only_with_weights(tiny_model_folder: Path) -> None:
    network, objective = network_of(tiny_model_folder), GRPO(grader=Share())
    examples = prompts(objective, network)

    def replies() -> list[str]:
        return [
            r.reply.text for r in objective.roll_out(network, examples, 2, fixed_generator()).each
        ]

    before = replies()
    assert replies() == before
    with torch.no_grad():
        for weight in network.model.parameters():
            weight += 0.05 * torch.randn_like(weight)
    after = replies()
    assert sum(one != other for one, other in zip(before, after, strict=True)) >= 6


@pytest.mark.slow
def test_training_samples_vary_and_validation_samples_repeat(tiny_model_folder: Path) -> None:
    network, objective = network_of(tiny_model_folder), GRPO(grader=Share())
    examples = prompts(objective, network)
    network.model.train()
    one, other = (objective.sample_step(network, examples) for _ in range(2))
    assert [r.reply for r in one.each] != [r.reply for r in other.each]
    assert network.model.training
    state = torch.get_rng_state()
    one, other = (objective.validation_metrics(network, examples, 100) for _ in range(2))
    assert one == other and torch.equal(torch.get_rng_state(), state)
    score_P = (
        objective.roll_out(network, examples, 1, fixed_generator())
        .score_PG[:, 0]
        .astype(np.float64)
    )
    assert one["reward"] == pytest.approx(score_P.mean())
    assert one["loss"] == -one["reward"]
    assert one["reward_error"] == pytest.approx(score_P.std(ddof=1) / len(score_P) ** 0.5)


def test_log_probabilities_of_both_sides_agree_at_any_temperature(tiny_model_folder: Path) -> None:
    network = network_of(tiny_model_folder)
    objective = GRPO(grader=Share(), temperature=0.6, max_completion_tokens=20)
    with torch.no_grad():
        batches = objective.annotate(network, prompts(objective, network), 100)
        for batch in batches:
            logp_M = logprobs.token_logps(network, batch, 0.6)
            torch.testing.assert_close(logp_M, batch.extra.sampler_M, rtol=1e-4, atol=1e-4)
            objective.loss(network, batch)
    assert 0 < objective.report(network, batches, []).metrics["sampler_difference"] < 1e-5


@pytest.mark.parametrize("method", ["grpo", "ppo"])
def test_failed_grader_is_refused(method: str, tiny_model_folder: Path, rows_file: Path) -> None:
    fields = {"method": method, "grader": "broken"}
    with pytest.raises(GradingFailed) as refused:
        train(recipe_of(tiny_model_folder, rows_file, fields, max_steps=1))
    assert refused.value.rule == "grader.raised"


def test_failed_grader_with_zero_policy_is_counted(
    tiny_model_folder: Path, rows_file: Path
) -> None:
    notes = Notes()
    fields = {"method": "grpo", "grader": "broken", "on_error": "zero"}
    recipe = recipe_of(tiny_model_folder, rows_file, fields, max_steps=2)
    result = train(recipe, reporter=notes)
    counts = [line["ungraded"] for line in notes.lines if line["event"] == "train"]
    assert sorted(counts) == [0, 8]  # all eight completions of the first row, in one of two steps
    assert result.steps == 2


def test_constant_reward_is_refused_before_training(
    tiny_model_folder: Path, rows_file: Path, luthier_home: Path
) -> None:
    never = {"method": "grpo", "grader": {"method": "regex", "pattern": "impossible to write"}}
    with pytest.raises(RecipeError) as refused:
        train(recipe_of(tiny_model_folder, rows_file, never, max_steps=1))
    assert refused.value.rule == "rollouts.no_reward"
    always = {"method": "ppo", "grader": {"method": "regex", "pattern": ""}}
    with pytest.raises(RecipeError) as refused:
        train(recipe_of(tiny_model_folder, rows_file, always, max_steps=1))
    assert refused.value.rule == "rollouts.no_reward"
    assert not list(luthier_home.glob("runs/*/custom"))
    notes = Notes()
    train(
        recipe_of(tiny_model_folder, rows_file, never | {"force": True}, max_steps=1),
        reporter=notes,
    )
    assert any("no signal" in note for note in notes.notes)


def test_rewards_without_bounds_are_never_refused() -> None:
    import numpy as np

    scores = np.array([[-3.0, -2.0], [-1.0, -1.0]], dtype=np.float32)
    assert precheck(scores, is_share=True).refused
    verdict = precheck(scores, is_share=False)
    assert not verdict.refused and "for 1 of the prompts the rewards differ" in verdict.text


def course(rewards: Sequence[float], equal: float = 0.0) -> list[dict[str, Any]]:
    return [{"step": n + 1, "reward": r, "equal_groups": equal} for n, r in enumerate(rewards)]


def test_reward_plateau_gives_advice() -> None:
    wave = [0.02 * (n % 2) for n in range(20)]
    flat, rising = [0.5 + w for w in wave * 2], [0.2 + w for w in wave] + [0.6 + w for w in wave]
    assert "step 40" in advice(course(flat))
    assert advice(course(rising)) == "" == advice(course(flat[:39]))
    assert "95% of the groups" in advice(course(rising, equal=0.95))


@pytest.mark.slow
def test_a_note_about_a_plateau_comes_once(
    tiny_model_folder: Path, rows_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = Notes()
    monkeypatch.setattr(rollout_checks, "advice", lambda lines: "flat" * (len(lines) >= 20))
    fields = {"method": "grpo", "num_generations": 2, "max_completion_tokens": 1, "force": True}
    train(recipe_of(tiny_model_folder, rows_file, fields, max_steps=40), reporter=notes)
    assert notes.notes.count("flat") == 1


def test_row_without_expected_answer_is_refused(tiny_model_folder: Path, rows_file: Path) -> None:
    chat = load_chat_format(tiny_model_folder)
    held = rows_file.with_name("held.jsonl")
    held.write_bytes(rows_file.read_bytes())
    spec = DataSpec(train=rows_file, validation=held, severity={"leakage.many": "note"})
    with pytest.raises(DataError) as caught:
        prepare(spec, GRPO(grader=Number()), chat, 1000, 0)
    assert caught.value.rule == "grader.no_expected"
    assert len(caught.value.problems) == 2 * len(WORDS)


def test_expected_answer_is_never_learned(tiny_model_folder: Path) -> None:
    chat = load_chat_format(tiny_model_folder)
    objective = GRPO(grader=Number())
    turns = (Message("user", "2 + 2?"), Message("assistant", "4"))
    shapes = [
        PromptCompletion("f", 1, prompt="2 + 2?", completion="4"),
        PromptOnly("f", 2, prompt="2 + 2?", expected="4"),
        Conversation("f", 3, messages=turns),
    ]
    encoded = [objective.encode(row, n, chat) for n, row in enumerate(shapes)]
    for example in encoded:
        assert not example.weight_T.any()
        assert example.ids_T.tolist() == chat.encode_prompt(turns[:1]).tolist()


def test_the_answers_need_room_in_the_context(tiny_model_folder: Path, rows_file: Path) -> None:
    chat = load_chat_format(tiny_model_folder)
    spec = DataSpec(train=rows_file, validation_share=0)
    objective = GRPO(grader=Share(), max_completion_tokens=40)
    with pytest.raises(DataError) as refused:
        prepare(spec, objective, chat, 50, 0)
    assert refused.value.rule == "row.too_long"
    data = prepare(spec, objective, chat, 100, 0)
    assert data.longest == 40 + max(len(example) for example in data.train)
    with pytest.raises(DataError) as refused:
        prepare(spec.model_copy(update={"long_rows": "truncate"}), objective, chat, 50, 0)
    assert refused.value.rule == "row.nothing_learned"


def test_prompts_alone_choose_no_objective(tiny_model_folder: Path, rows_file: Path) -> None:
    chat = load_chat_format(tiny_model_folder)
    with pytest.raises(DataError) as refused:
        prepare(DataSpec(train=rows_file), None, chat, 100, 0)
    assert refused.value.rule == "row.objective"


def test_reward_model_with_different_tokenizer_grades(
    family_folder: Callable[[str], Path], tiny_model_folder: Path, tmp_path: Path, rows_file: Path
) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(
        "".join(
            json.dumps({"prompt": f"Say {w}", "chosen": f"{w} yes", "rejected": f"{w} no"}) + "\n"
            for w in WORDS
        )
    )
    judge = luthier.tune(
        data=pairs,
        base=str(family_folder("bert")),
        name="judge",
        objective="reward_model",
        adaptation="full",
        training={"max_steps": 3, "learning_rate": 1e-3},
    )
    notes = Notes()
    fields = {"method": "grpo", "grader": {"method": "reward", "model": judge.model_id}}
    recipe = recipe_of(tiny_model_folder, rows_file, fields, max_steps=2, precision="auto")
    result = train(recipe, reporter=notes)  # rewards in the number type that serving takes
    manifest = json.loads((Path(result.model_dir) / "luthier.json").read_text())
    assert manifest["others"] == {judge.model_id: judge.model_id}
    lines = (Path(result.run_dir) / "samples.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    asked, said = [s["prompt"] for s in samples], [s["completion"] for s in samples]
    expected = luthier.load(judge.model_id).rewards(asked, said)
    assert [s["reward"] for s in samples] == pytest.approx(expected, abs=5e-3)
    assert len({s["reward"] for s in samples}) > 2


def test_grader_without_reward_head_is_refused(tiny_model_folder: Path, rows_file: Path) -> None:
    fields = {"method": "ppo", "grader": {"method": "reward", "model": str(tiny_model_folder)}}
    with pytest.raises(RecipeError) as refused:
        train(recipe_of(tiny_model_folder, rows_file, fields, max_steps=1))
    assert refused.value.rule == "scorer.task"


def test_grpo_and_ppo_measure_reward() -> None:
    assert GRPO().measure == PPO().measure == "reward"


def test_a_folder_without_samples_is_refused(tmp_path: Path) -> None:
    for run, reason in ((str(tmp_path), "has no samples"), ("base:none", "base:none")):
        answer = CliRunner().invoke(app, ["models", "samples", run])
        assert answer.exit_code == 2 and reason in answer.stderr
