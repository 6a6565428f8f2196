"""Hyperparameters of customization jobs: Bedrock's names and the settings of the recipe.

Bedrock sends hyperparameters as strings, and the recipe parses and checks the strings. A job returns
the strings as sent, because Terraform replaces a model whose values differ from the configuration. A
job without hyperparameters returns the values that the job chose.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luthier.server.http.messages import Fault, parse_digits
from luthier.server.tables.jobs import Job

HYPERPARAMETERS: Mapping[str, str] = {
    "epochCount": "training.epochs",
    "batchSize": "training.batch_size",
    "learningRate": "training.learning_rate",
    "learningRateWarmupSteps": "training.warmup_steps",
    "learningRateMultiplier": "training.learning_rate_multiplier",
    "earlyStoppingThreshold": "training.min_delta",
    "earlyStoppingPatience": "training.patience",
    "luthier.adaptation": "adaptation.method",
    "luthier.loraRank": "adaptation.rank",
    "luthier.loraAlpha": "adaptation.alpha",
    "luthier.loraDropout": "adaptation.dropout",
    "luthier.schedule": "training.schedule",
    "luthier.weightDecay": "training.weight_decay",
    "luthier.maxSteps": "training.max_steps",
    "luthier.evaluateEvery": "training.evaluate_every",
    "luthier.seed": "training.seed",
    "luthier.longRows": "data.long_rows",
    "luthier.validationShare": "data.validation_share",
    "luthier.shuffle": "training.shuffle",
}
"""Settings by hyperparameter; names with a dot are luthier's own."""
_SHOWN_WHEN_OMITTED = ("epochCount", "batchSize", "learningRate")
"""Hyperparameters returned with the chosen values if the request sets none."""

RFT_FIELDS: Mapping[str, tuple[str, str]] = {
    "epochCount": ("training", "epochs"),
    "batchSize": ("training", "batch_size"),
    "learningRate": ("training", "learning_rate"),
    "trainingSamplePerPrompt": ("objective", "num_generations"),
    "inferenceMaxTokens": ("objective", "max_completion_tokens"),
    "evalInterval": ("training", "evaluate_every"),
}
"""Settings, by group and field, of the typed hyperparameters of reinforcement fine-tuning."""


_NAMES = {
    **{f"{group}.{field}": name for name, (group, field) in RFT_FIELDS.items()},
    **{setting: name for name, setting in HYPERPARAMETERS.items()},
    "base": "baseModelIdentifier",
    "sampling.max_tokens": "maxResponseLengthForInference",
}


def setting_name(setting: str) -> str:
    """Return Bedrock's name for a setting of a recipe, such as ``training.epochs=3``."""
    name, equals, value = setting.partition("=")
    return _NAMES.get(name, name) + equals + value


def parse(sent: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return settings by group and field; the recipe checks the values later.

    Raises:
        Fault: Validation, for an unknown name, or a part of an epoch.
    """
    fields: dict[str, dict[str, Any]] = {}
    for name, text in sent.items():
        if name not in HYPERPARAMETERS:
            known = ", ".join(HYPERPARAMETERS)
            message = f"Unknown hyperparameter {name[:100]!r}. Choose from {known}."
            raise Fault("Validation", message, parameter="hyperParameters")
        if name == "epochCount" and not parse_digits(text):
            # Recipes accept parts of an epoch; Bedrock does not.
            message = f"epochCount must be an integer of at least 1, not {text[:100]!r}."
            raise Fault("Validation", message, parameter="hyperParameters")
        group, field = HYPERPARAMETERS[name].split(".")
        fields.setdefault(group, {})[field] = text
    training = fields.get("training", {})
    if "learning_rate" in training and "learning_rate_multiplier" in training:
        # The recipe applies its multiplier only to a learning rate that the recipe chooses.
        try:
            training["learning_rate"] = float(training["learning_rate"]) * float(
                training.pop("learning_rate_multiplier")
            )
        except ValueError:
            message = "learningRate and learningRateMultiplier must be numbers."
            raise Fault("Validation", message, parameter="hyperParameters") from None
    return fields


def describe(job: Job) -> Mapping[str, str] | None:
    """Return the hyperparameters of the request, or the chosen values; ``None`` before the choice."""
    if job.request.get("hyperParameters"):
        sent: Mapping[str, str] = job.request["hyperParameters"]
        return sent
    if "chosen" not in job.details:
        return None
    values = {name: job.setting(HYPERPARAMETERS[name]) for name in _SHOWN_WHEN_OMITTED}
    return {name: f"{value:.10g}" for name, value in values.items() if value is not None}


def parse_rft(sent: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return settings by group from ``rftConfig.hyperParameters``, whose shapes were checked.

    Raises:
        Fault: Validation, for ``maxPromptLength``, which is not supported, and for a wrong length.
    """
    fields: dict[str, dict[str, Any]] = {}
    for name, value in sent.items():
        if name == "maxPromptLength":
            text = (
                "maxPromptLength is not supported: the context length of the model is the limit. "
                "Leave out maxPromptLength; luthier.longRows sets the handling of longer rows."
            )
            raise Fault("Validation", text, parameter="customizationConfig")
        if name == "inferenceMaxTokens" and value < 1:
            text = f"{name} must be an integer of at least 1, not {value}."
            raise Fault("Validation", text, parameter="customizationConfig")
        if name in RFT_FIELDS:
            group, field = RFT_FIELDS[name]
            fields.setdefault(group, {})[field] = value
    return fields


def ignored_warnings(sent: Mapping[str, Any]) -> list[str]:
    """Return warnings for hyperparameters without effect, which AWS's own examples set."""
    if "reasoningEffort" not in sent:
        return []
    effort = sent["reasoningEffort"]
    return [f"reasoningEffort is {effort} and has no effect: no model has levels of reasoning."]


def merge_fields(*layers: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the union of settings by group; a later layer replaces values."""
    merged: dict[str, dict[str, Any]] = {}
    for layer in layers:
        for group, fields in layer.items():
            merged.setdefault(group, {}).update(fields)
    return merged
