"""Scores and verdicts of models that are loaded next to the trained network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from luthier.chat_models.base import (
    CachedWriter,
    Failure,
    ModelSpec,
    SamplingSpec,
    Writer,
    writer_of,
)
from luthier.data.shapes.conversations import Conversation
from luthier.data.shapes.texts import RawText
from luthier.data.tree import READING_BUDGET
from luthier.errors import RecipeError
from luthier.graders import Answer, Scorer
from luthier.graders.base import Embedder, LabelReader
from luthier.models.networks.heads import decoder_of, head_kind
from luthier.objectives.base import Objective, chat_of
from luthier.objectives.classification import Classification
from luthier.objectives.contrastive import Contrastive, read_embeddings
from luthier.objectives.preferences.reward_model import RewardModel
from luthier.tasks import RATING, RERANKING
from luthier.types import Message

if TYPE_CHECKING:
    from luthier.data.conversations.chat import ChatFormat
    from luthier.models.networks.heads import HeadKind
    from luthier.models.networks.network import Network
    from luthier.types import IntArray

Remember = Callable[[Writer, ModelSpec, SamplingSpec], Writer]


def silent(text: str) -> None:
    """Print nothing."""


@dataclass(frozen=True)
class LocalModels:
    """The models of graders: networks in memory, and endpoints."""

    networks: Mapping[str, Network]
    """Frozen networks by id."""
    note: Callable[[str], None] = field(default=silent)
    """Function to print a note about an endpoint."""
    remember: Remember = field(default=lambda write, judge, sampling: CachedWriter(write))
    """Function that wraps a writer with a cache; default: in memory."""

    def scorer(self, model: str) -> Scorer:
        """Return the reward model with the id ``model``."""
        check_reward_model(model, self.networks[model])
        return partial(rewards, self.networks[model])

    def embedder(self, model: str) -> Embedder:
        """Return the encoder with the id ``model``."""
        return partial(embeddings, self.networks[model])

    def classifier(self, model: str) -> LabelReader:
        """Return the classifier with the id ``model``."""
        check_classifier(model, self.networks[model])
        return partial(probabilities, self.networks[model])

    def writer(
        self, judge: ModelSpec, sampling: SamplingSpec, schema: Mapping[str, Any] | None = None
    ) -> Writer:
        """Return the judge with a cache of replies. ``schema`` is ignored."""
        if judge.url is None:
            network = self.networks[judge.model]
            write: Writer = partial(write_replies, network, sampling, judge.batch_size)
            return self.remember(write, judge, sampling)
        from luthier.chat_models.endpoint import EndpointModel

        endpoint = EndpointModel(judge)
        self.note(endpoint.terms)
        write = writer_of(endpoint, judge.role, sampling, self.note)
        return self.remember(write, judge, sampling)


def write_replies(
    network: Network,
    sampling: SamplingSpec,
    batch_size: int,
    conversations: Sequence[Sequence[Message]],
) -> list[str | Failure]:
    """Return a network's reply to each conversation; a failure for conversations beyond the
    context.

    The reply depends only on the conversation and the seed, not on the other conversations.
    """
    from luthier.models.decoding.backends import completion_limit
    from luthier.models.decoding.sampler import sample
    from luthier.models.decoding.sampling import Sampling

    chat = chat_of(network)
    prompts = [_prompt(chat, turns) for turns in conversations]
    before, beside = network.tokens_before, decoder_of(network.model) is not None
    # A conversation beyond the context fails alone; `sample` would reject the whole batch.
    able = [
        place
        for place, prompt_T in enumerate(prompts)
        if sampling.max_tokens <= completion_limit(before + len(prompt_T), network.context, beside)
    ]
    replies: list[str | Failure] = [
        Failure(
            "judge.refused",
            f"a prompt of {len(prompt_T):,} tokens and a reply of {sampling.max_tokens:,} exceed "
            f"the judge's context of {network.context:,} tokens",
        )
        for prompt_T in prompts
    ]
    completions = sample(
        network,
        [prompts[place] for place in able],
        1,
        Sampling(**sampling.model_dump()),
        stop_ids=chat.stop_ids,
        batch_size=batch_size,
    )
    for place, (completion,) in zip(able, completions, strict=True):
        replies[place] = chat.replies.decode_reply(prompts[place], completion.text_ids).text
    return replies


def _prompt(chat: ChatFormat, turns: Sequence[Message]) -> IntArray:
    """Encode a conversation. Models without a chat template get all turns as one text."""
    if chat.template.kind == "plain" or chat.decoder is not None:
        turns = [Message("user", "\n\n".join(turn.content for turn in turns))]
    return chat.encode_prompt(turns)


def check_grader_model(name: str, head: HeadKind, learned: Objective) -> None:
    """Reject a model whose head does not fit the grader."""
    if head == "embedding" and not learned.task.embeds:
        raise RecipeError(
            f"{name} was trained for {learned.method} and has no embeddings. Use an encoder, "
            "such as all-minilm-l6-v2"
        )
    # `embeddings` opens each encoder with the default pooling.
    if (pooling := getattr(learned, "pooling", "auto")) != "auto" and head == "embedding":
        raise RecipeError(f"{name} uses pooling {pooling!r}, and graders require pooling 'auto'")
    if head == "causal_lm" and not learned.task.writes:
        raise RecipeError(
            f"{name} was trained for {learned.method} and cannot generate text. Use grader "
            "`reward` for reward models"
        )
    if head == "sequence_classification" and learned.task in (RATING, RERANKING):
        raise RecipeError(
            f"{name} was trained for {learned.method}, and has neither labels nor rewards. Name a "
            "model of `objective.method=classification` or `objective.method=reward_model`",
            rule="scorer.task",
        )


def check_classifier(name: str, network: Network) -> None:
    """Reject a model that returns a number instead of labels."""
    if network.model.config.problem_type == "regression":
        raise RecipeError(
            f"{name} returns a number, not labels. Use grader `reward` for reward models, or train a "
            "classifier with `objective.method=classification`",
            rule="scorer.task",
        )


def check_reward_model(name: str, network: Network) -> None:
    """Reject a model that is not a reward model."""
    if (
        head_kind(network.model) != "sequence_classification"
        or network.model.config.num_labels != 1
    ):
        raise RecipeError(
            f"{name} is not a reward model. Train a reward model with "
            "`objective.method=reward_model`",
            rule="scorer.task",
        )


def embeddings(network: Network, texts: Sequence[str]) -> NDArray[np.float32]:
    """Return embeddings ``[N, H]`` of length 1; long text is truncated."""
    import torch

    encoder, chat = Contrastive(), chat_of(network)
    rows = [RawText("text", number, text) for number, text in enumerate(texts)]
    examples = [
        encoder.truncate(encoder.encode(row, place, chat), network.context)
        for place, row in enumerate(rows)
    ]
    network.model.eval()
    with torch.no_grad():
        found_NH = read_embeddings(network, encoder, examples, READING_BUDGET)
    return np.asarray(found_NH.cpu().numpy(), dtype=np.float32)


def probabilities(network: Network, texts: Sequence[str]) -> list[dict[str, float]]:
    """Return the probability of each label for each text; long text is truncated."""
    import torch

    config, chat = network.model.config, chat_of(network)
    labels = tuple(str(config.id2label[number]) for number in range(config.num_labels))
    multi_label = config.problem_type == "multi_label_classification"
    objective = Classification(labels=labels, multi_label=multi_label)
    examples = [
        objective.truncate(
            objective.encode(RawText("text", number, text), number, chat), network.context
        )
        for number, text in enumerate(texts)
    ]
    network.model.eval()
    with torch.no_grad():
        found = network.read_rows(examples, READING_BUDGET, partial(objective.predict, network))
    return [each["scores"] for each in found]


def rewards(network: Network, answers: Sequence[Answer]) -> list[float]:
    """Return a reward for each answer, in the reward model's own format and tokenizer.

    Answers beyond the context are truncated.
    """
    import torch

    objective, chat = RewardModel(), chat_of(network)
    context = network.context
    examples = []
    for place, answer in enumerate(answers):
        turns = (*answer.prompt, Message("assistant", answer.reply))
        row = Conversation(answer.row.file, answer.row.line, turns)
        examples.append(objective.truncate(objective.encode(row, place, chat), context))
    network.model.eval()
    with torch.no_grad():
        return network.read_rows(
            examples,
            READING_BUDGET,
            lambda batch: network.row_scores(batch).float()[:, 0].tolist(),
        )
