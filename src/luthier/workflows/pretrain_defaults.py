"""Default settings of pre-training from text and network, with published reasons."""

from __future__ import annotations

import math
from dataclasses import dataclass

from luthier.data.files.corpus import Survey
from luthier.engine.defaults import Choice
from luthier.models.network_shapes import SHAPES, Size
from luthier.recipe import Training
from luthier.workflows.pretrain_recipe import PretrainRecipe

CHARACTERS_PER_TOKEN = 4
"""Average characters per token of text with spaces, for choices before a tokenizer exists."""
TOKENS_PER_WEIGHT = 20
"""Hoffmann et al. 2022, arXiv:2203.15556: for a given amount of computing, the best network."""
MAX_PASSES = 4
"""Muennighoff et al. 2023, arXiv:2305.16264: up to four passes teach nearly as much as new text."""
LARGEST_BATCH = 1 << 15
SMALLEST_BATCH = 1 << 11
VALIDATION_SEQUENCES = 200
RECURRENT_RATE = 0.01
"""Of 0.001 to 0.02, measured with LSTMs of 1 and 9 million weights (docs/log/models.md)."""


@dataclass(frozen=True)
class NetworkFacts:
    """Facts for the choice of training settings."""

    weights: int
    embedding: int
    """Weights of the embedding tables, included in ``weights``."""
    context: int
    tokens: int
    """Tokens of the training text."""
    family: str = "llama"


def plan(recipe: PretrainRecipe, statistics: Survey) -> tuple[PretrainRecipe, list[Choice]]:
    """Fill the settings needed before building: size, vocabulary, validation share."""
    choices: list[Choice] = []
    network, tokenizer, data = recipe.network, recipe.tokenizer, recipe.data
    tokens = statistics.characters // CHARACTERS_PER_TOKEN
    if network.size is None and network.config is None and network.base is None:
        size, reason = _size(tokens)
        network = network.model_copy(update={"size": size})
        choices.append(("network.size", size, reason))
    if tokenizer.vocabulary is None and network.size is not None:
        default = SHAPES[network.family][network.size].vocabulary
        vocabulary, reason = _vocabulary(default, tokens)
        tokenizer = tokenizer.model_copy(update={"vocabulary": vocabulary})
        choices.append(("tokenizer.vocabulary", vocabulary, reason))
    if data.validation_share is None and not data.validation:
        share, reason = _validation_share(recipe, tokens)
        data = data.model_copy(update={"validation_share": share})
        choices.append(("data.validation_share", share, reason))
    update = {"network": network, "tokenizer": tokenizer, "data": data}
    return recipe.model_copy(update=update), choices


def choose(training: Training, facts: NetworkFacts) -> tuple[Training, list[Choice]]:
    """Fill passes, batch and rate."""
    choices: list[Choice] = []
    if training.epochs is None and training.max_steps is None:
        passes, reason = _passes(facts)
        training = training.model_copy(update={"epochs": passes})
        choices.append(("training.epochs", passes, reason))
    if training.batch_size is None:
        batch, reason = _batch(facts, training.epochs or 1)
        training = training.model_copy(update={"batch_size": batch})
        choices.append(("training.batch_size", batch, reason))
    if training.learning_rate is None:
        rate, reason = learning_rate(facts.weights - facts.embedding)
        if facts.family == "lstm":
            rate, reason = RECURRENT_RATE, "measured for LSTMs"
        rate *= training.learning_rate_multiplier
        training = training.model_copy(update={"learning_rate": rate})
        choices.append(("training.learning_rate", rate, reason))
    return training, choices


def shortage(facts: NetworkFacts, training: Training) -> str:
    """Return a warning if the text is far too short for the network, else an empty string."""
    seen = facts.tokens * (training.epochs or 1)
    if training.max_steps is not None or seen >= facts.weights * TOKENS_PER_WEIGHT / 4:
        return ""
    return (
        f"{facts.tokens:,} tokens are {facts.tokens / facts.weights:.2g} per weight; about "
        f"{TOKENS_PER_WEIGHT} are optimal (Hoffmann et al. 2022). The model will learn spelling, words "
        "and style, not facts. Use more text or a smaller size"
    )


def learning_rate(weights: int) -> tuple[float, str]:
    """Return the rate of Kaplan et al. 2020, arXiv:2001.08361, equation D.1, for non-embedding
    ``weights``.

    The rate is 6.9e-4 for 85 million weights; Brown et al. 2020, table 2.1, used 6e-4.
    """
    rate = 0.003239 - 0.0001395 * math.log(max(weights, 1))
    rate = float(f"{max(rate, 1e-4):.2g}")
    return rate, f"{weights / 1e6:.3g} M weights without embeddings (Kaplan et al. 2020, eq. D.1)"


def _size(tokens: int) -> tuple[Size, str]:
    sizes: dict[Size, float] = {"tiny": 1e6, "3m": 3e6, "10m": 10e6, "30m": 30e6}
    chosen: Size = "tiny"
    for size, weights in sizes.items():
        if tokens * MAX_PASSES >= TOKENS_PER_WEIGHT * weights:
            chosen = size
    return chosen, f"about {tokens:,} tokens; about {TOKENS_PER_WEIGHT} per weight are optimal"


def _vocabulary(default: int, tokens: int) -> tuple[int, str]:
    # A token that is hardly seen is hardly learned: a hundred times each, on average.
    room = 1 << max(9, int(math.log2(max(tokens, 1) / 100)) if tokens > 100 else 0)
    if room < default:
        return room, "each token occurs 100 times on average in the text"
    return default, "usual for this size"


def _validation_share(recipe: PretrainRecipe, tokens: int) -> tuple[float, str]:
    size = recipe.network.size
    context = recipe.network.context or (
        SHAPES[recipe.network.family][size].context if size else 512
    )
    if tokens < 20 * context:
        return 0.0, "too little text for held-out sequences; set `data.validation`"
    share = float(f"{min(0.1, VALIDATION_SEQUENCES * context / tokens):.2g}")
    return share, f"a tenth, at most about {VALIDATION_SEQUENCES} sequences"


def _passes(facts: NetworkFacts) -> tuple[float, str]:
    needed = TOKENS_PER_WEIGHT * facts.weights / facts.tokens
    if needed <= 1:
        return 1.0, f"{1 / needed * TOKENS_PER_WEIGHT:.0f} tokens per weight in one pass"
    passes = float(min(MAX_PASSES, math.ceil(needed)))
    return passes, "repeated text helps for up to four passes (Muennighoff et al. 2023)"


def _batch(facts: NetworkFacts, passes: float) -> tuple[int, str]:
    """Return a batch size for a thousand steps or more, within the efficient size of the first
    steps.

    The efficient batch at a loss has ``2e8 / loss^(1 / 0.21)`` tokens (Kaplan et al. 2020, section
    5.1): 39,000 at 6 nats.
    """
    tokens = 1 << int(math.log2(max(1.0, facts.tokens * passes / 1000)))
    tokens = min(max(tokens, SMALLEST_BATCH), LARGEST_BATCH)
    batch = max(1, tokens // facts.context)
    return (
        batch,
        f"{batch * facts.context:,} tokens; larger batches help only later (Kaplan et al. 2020, 5.1)",
    )
