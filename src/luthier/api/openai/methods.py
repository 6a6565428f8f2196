"""What a fine-tuning job is asked with, and what that is as fields of a recipe."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from luthier.api.openai.errors import invalid
from luthier.api.openai.requests import Body, Metadata

Auto = Literal["auto"]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Rate = Annotated[float, Field(gt=0, le=100)]
MOST_EPOCHS = 100
ARMS = ("supervised", "dpo", "reinforcement")


class Hyperparameters(Body):
    """Those that every method has."""

    n_epochs: Auto | Annotated[int, Field(ge=1, le=MOST_EPOCHS)] = "auto"
    """Passes over the training rows."""
    batch_size: Auto | Annotated[int, Field(ge=1, le=512)] = "auto"
    """Rows in one step."""
    learning_rate_multiplier: Auto | Rate = "auto"
    """Factor of the learning rate that fits the data and the model."""


class DpoHyperparameters(Hyperparameters):
    """Those of preferences."""

    beta: Auto | Annotated[float, Field(gt=0, le=2)] = "auto"
    """How far the model may go from where it starts; higher is less."""


class ReinforcementHyperparameters(Hyperparameters):
    """Those of rewards."""

    compute_multiplier: Auto | Annotated[float, Field(gt=0, le=16)] = "auto"
    """Factor of the completions that are drawn for each prompt."""
    eval_interval: Auto | Count = "auto"
    """Steps between measurements."""
    eval_samples: Auto | Count = "auto"
    """Shown again, without effect: measurements draw one completion of each held-out prompt."""
    reasoning_effort: Literal["default", "low", "medium", "high"] = "default"
    """Shown again, without effect: no model here reasons by levels."""


class Supervised(Body):
    """Answers that are to be learned."""

    hyperparameters: Hyperparameters = Hyperparameters()


class Dpo(Body):
    """Answers that are preferred to others."""

    hyperparameters: DpoHyperparameters = DpoHyperparameters()


class ReinforcementMethod(Body):
    """Answers of the model's own, with rewards."""

    grader: dict[str, Any]
    hyperparameters: ReinforcementHyperparameters = ReinforcementHyperparameters()


class Method(Body):
    """What is learned from the rows."""

    type: Literal["supervised", "dpo", "reinforcement"]
    supervised: Supervised | None = None
    dpo: Dpo | None = None
    reinforcement: ReinforcementMethod | None = None


class CreateJob(Body):
    """The body of a new job."""

    model: Annotated[str, Field(min_length=1)]
    training_file: Annotated[str, Field(min_length=1)]
    validation_file: str | None = None
    suffix: Annotated[str, Field(max_length=64)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    metadata: Metadata = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None
    """Where supervised jobs had them before there were methods."""

    @property
    def kind(self) -> str:
        """The method's type."""
        return self.method.type if self.method else "supervised"

    @property
    def chosen(self) -> Hyperparameters:
        """The hyperparameters of the method."""
        arm = getattr(self.method, self.kind) if self.method else None
        if arm is not None:
            found: Hyperparameters = arm.hyperparameters
            return found
        return self.hyperparameters or Hyperparameters()

    def check(self) -> None:
        """Refuse a method whose parts do not belong together."""
        if self.method is None:
            return
        for arm in ARMS:
            if arm != self.kind and getattr(self.method, arm) is not None:
                text = f"A job of type '{self.kind}' takes no settings of '{arm}'."
                raise invalid(text, f"method.{arm}")
        if self.kind == "reinforcement" and self.method.reinforcement is None:
            text = "Reinforcement fine-tuning needs a grader."
            raise invalid(text, "method.reinforcement.grader", "missing_required_parameter")


_NAMES = {
    "base": "model",
    "training.epochs": "n_epochs",
    "training.batch_size": "batch_size",
    "training.rate_factor": "learning_rate_multiplier",
    "training.evaluate_every": "eval_interval",
    "training.seed": "seed",
    "objective.beta": "beta",
    "objective.num_generations": "compute_multiplier",
    "objective.grader": "method.reinforcement.grader",
    "data.train": "training_file",
    "data.validation": "validation_file",
}
_TYPES = {"sft": "supervised", "dpo": "dpo", "grpo": "reinforcement"}
"""Types of ``method`` by the objective that they come to."""


def setting_name(field: str, value: str | None) -> str | None:
    """What OpenAI calls a field of the recipe (:mod:`luthier.setting_names`)."""
    if field == "training.learning_rate" and value is not None:
        return "another learning_rate_multiplier"  # a rate itself cannot be asked for
    if field == "objective.method" and value is not None:
        return f"method.type={_TYPES[value]}" if value in _TYPES else None
    if field not in _NAMES:
        return None
    return _NAMES[field] + ("" if value is None else f"={value}")


def without_effect(asked: CreateJob) -> list[str]:
    """What was asked and changes nothing, for the events of the job."""
    chosen, found = asked.chosen, []
    if isinstance(chosen, ReinforcementHyperparameters):
        if chosen.reasoning_effort != "default":
            effort = chosen.reasoning_effort
            found.append(
                f"reasoning_effort is {effort} and has no effect: no model here reasons by levels."
            )
        if chosen.eval_samples != "auto":
            found.append(
                f"eval_samples is {chosen.eval_samples} and has no effect: measurements draw one "
                "completion of each held-out prompt."
            )
    return found


def settings_of(asked: CreateJob, seed: int, writes: bool) -> dict[str, Any]:
    """Fields of the recipe by group; what is ``auto`` is left for the recipe to choose.

    ``writes`` says whether the model writes text; for an encoder its rows say what is learned.
    """
    chosen = asked.chosen
    training: dict[str, Any] = {"seed": seed}
    objective: dict[str, Any] = {}
    if chosen.n_epochs != "auto":
        training["epochs"] = chosen.n_epochs
    if chosen.batch_size != "auto":
        training["batch_size"] = chosen.batch_size
    if chosen.learning_rate_multiplier != "auto":
        training["rate_factor"] = chosen.learning_rate_multiplier
    if asked.kind == "dpo":
        objective["method"] = "dpo"
    elif asked.kind == "supervised" and writes:
        objective["method"] = "sft"
    if isinstance(chosen, DpoHyperparameters) and chosen.beta != "auto":
        objective["beta"] = chosen.beta
    if isinstance(chosen, ReinforcementHyperparameters):
        if chosen.eval_interval != "auto":
            training["evaluate_every"] = chosen.eval_interval
        if chosen.compute_multiplier != "auto":
            objective["num_generations"] = max(2, round(8 * chosen.compute_multiplier))
    return {"training": training} | ({"objective": objective} if objective else {})
