"""Whether a server really serves a model: its greedy replies, scored by what it might be serving.

A greedy reply is made of the tokens that its model found most likely, so the model that wrote it can be
told without writing anything: it is the one that would have chosen each token itself. Where the
endpoint gives log-probabilities, they are compared, too; these differ even where the replies do not.

What is tried are the faults that people make: the model without its adapter, another template, another
adapter of this store.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from luthier.chat_models.base import Failure, ModelSpec, Reply, SamplingSpec
from luthier.chat_models.endpoint import EndpointModel
from luthier.errors import DataError, LuthierError, Problem, RecipeError
from luthier.evaluation.significance import RowScores, differences
from luthier.store.models import StoredModel, chat_format, custom_models, find, writes
from luthier.types import Example, Message, Row

if TYPE_CHECKING:
    from luthier.data.chat import ChatFormat
    from luthier.models.network import Network

Finding = Literal[
    "served", "adapter_without_effect", "wrong_template", "wrong_adapter", "something_else", "undecided"
]  # fmt: skip
MOST_PROMPTS, MOST_TOKENS = 256, 512
MOST_OTHERS = 4
"""Other adapters of the same base that are tried, the newest."""
LEAST_REPLIES = 3
NEARLY = 0.1
"""Nats by which a token may be less likely than the best: servers round in other places."""
MATCH = 0.95
"""Share of tokens that a model would have chosen, from which on it may have written them."""
FAR = 0.5
"""Nats by which log-probabilities differ, on average, from which on they are another model's."""
BUDGET = 1024
"""Tokens computed at once."""
TEMPLATES = {
    "ChatML": "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "[INST]": "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ message['content'] + eos_token }}{% else %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% endif %}{% endfor %}",
    "Alpaca": "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ '### Response:\n' + message['content'] + '\n\n' }}{% else %}"
    "{{ '### Instruction:\n' + message['content'] + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}",
}
"""Templates that servers fall back on, or that people name to them, as they are commonly written."""


class EndpointSpec(ModelSpec):
    """The server that is asked."""

    role: ClassVar[str] = "endpoint"
    named_by: ClassVar[str] = "endpoint_model"
    timeout: float = 60.0
    retries: int = 2


@dataclass(frozen=True)
class Candidate:
    """What a server may be serving."""

    finding: Finding
    name: str
    """In words, behind "the endpoint serves"."""
    chat: ChatFormat
    """How it would read the prompts."""


@dataclass(frozen=True, eq=False)
class CandidateFit:
    """How well a candidate explains the replies."""

    finding: Finding
    name: str
    chosen: RowScores
    """Share of the tokens of each reply that the candidate would have chosen itself."""
    logprob_error: RowScores | None
    """Mean difference of log-probabilities, of the replies that came with them."""

    @property
    def matches(self) -> bool:
        """Whether the candidate may have written the replies."""
        near = self.logprob_error is None or self.logprob_error.value < FAR
        return near and self.chosen.value >= MATCH

    @property
    def rank(self) -> tuple[float, float]:
        """The less the better."""
        error = math.inf if self.logprob_error is None else self.logprob_error.value
        return (-self.chosen.value, error) if error == math.inf else (error, -self.chosen.value)


@dataclass(frozen=True)
class EndpointVerification:
    """What a server serves, as far as its replies tell."""

    finding: Finding
    text: str
    """The finding in words."""
    prompts: int
    """That were answered."""
    failures: list[str] = field(default_factory=list)
    """Why others were not."""
    candidates: list[dict[str, Any]] = field(default_factory=list)
    """What was tried, the best first: share of tokens chosen, difference of log-probabilities."""

    @property
    def is_served(self) -> bool:
        """Whether it is shown that the model is served."""
        return self.finding == "served"


def check_gives_replies(model: StoredModel) -> None:
    """Refuse a model that gives no replies.

    Raises:
        RecipeError: always for such a one.
    """
    if not writes(model) or not chat_format(model).has_tokenizer:
        raise RecipeError(
            f"{model.id} does not write, and only replies in words tell who wrote them; its files are "
            "checked without an endpoint"
        )


def prompts_of(model: StoredModel, data: str | Path | None, count: int) -> list[Sequence[Message]]:
    """``count`` prompts, evenly spread: of ``data``, or of the rows that ``model`` was measured on.

    Raises:
        RecipeError: where there are none, or ``count`` is out of bounds.
    """
    from luthier.data.rows import load_rows

    if not LEAST_REPLIES <= count <= MOST_PROMPTS:
        raise RecipeError(f"ask {LEAST_REPLIES} to {MOST_PROMPTS} prompts, not {count}")
    recipe = (model.manifest.recipe or {}).get("data", {})
    held: dict[str, list[int]] = model.manifest.data.held_out if model.manifest.data else {}
    source = data or recipe.get("validation") or recipe.get("train")
    if data is None and (not isinstance(source, str) or not Path(source).exists()):
        raise RecipeError(
            f"the rows that {model.id} was measured on are not here; name others with prompts as data"
        )
    rows: Sequence[Row] = load_rows(str(source), recipe.get("columns") if data is None else None)
    if data is None and held:
        kept = [row for row in rows if row.line in held.get(row.file, ())]
        rows = kept or rows
    prompts: list[Sequence[Message]] = [
        turns for row in rows if not row.tools and (turns := row.prompt_turns())
    ]
    if len(prompts) < LEAST_REPLIES:
        raise DataError(
            [Problem(str(source), 1, "row.no_reply", "fewer than three rows ask something.",
                     "Give rows of prompt and completion, or messages, without tools.")],
            "nothing was asked",
        )  # fmt: skip
    count = min(count, len(prompts))
    return [prompts[place * len(prompts) // count] for place in range(count)]


def verify_endpoint(
    model: StoredModel,
    spec: EndpointSpec,
    prompts: Sequence[Sequence[Message]],
    max_tokens: int = 32,
    note: Callable[[str], None] = lambda text: None,
) -> EndpointVerification:
    """Ask the endpoint all ``prompts`` at temperature 0, and say what wrote the replies.

    Raises:
        RecipeError: for a key that is refused, a model that is not there.
        LuthierError: for an endpoint that does not answer.
    """
    if not 1 <= max_tokens <= MOST_TOKENS:
        raise RecipeError(f"ask for 1 to {MOST_TOKENS} tokens of a reply, not {max_tokens}")
    replies, failures = _ask(spec, prompts, max_tokens, note)
    if len(replies) < LEAST_REPLIES:
        raise LuthierError(
            f"{spec.url} answered {len(replies)} of {len(prompts)} prompts: {'; '.join(failures[:3])}"
        )
    fits = sorted(_fits(model, prompts, replies, note), key=lambda each: each.rank)
    if not any(each.finding == "served" for each in fits):
        raise LuthierError(
            f"{model.id} could not read the replies of {spec.url}, so nothing says who wrote them: "
            f"they may be longer than its context, though {max_tokens} tokens were asked for"
        )
    finding, text = _judge(fits, len(replies))
    if finding == "something_else" and (counts := _other_prompt(model, prompts, replies)):
        finding = "wrong_template"
        text = (
            f"The template is another one: the endpoint read {counts[0]} tokens of a prompt that "
            f"{model.id} reads as {counts[1]}, and its replies are not those of {model.id}."
        )
    candidates = [
        {
            "finding": each.finding,
            "name": each.name,
            "tokens_chosen": each.chosen.value,
            "logprob_difference": each.logprob_error.value if each.logprob_error else None,
        }
        for each in fits
    ]
    return EndpointVerification(finding, text, len(replies), failures, candidates)


def _ask(
    spec: EndpointSpec,
    prompts: Sequence[Sequence[Message]],
    max_tokens: int,
    note: Callable[[str], None],
) -> tuple[dict[int, Reply], list[str]]:
    """Replies by the numbers of their prompts, and why others have none."""
    outcomes: dict[int, Reply | Failure] = {}
    sampling = SamplingSpec(max_tokens=max_tokens)
    EndpointModel(spec, logprobs=True).ask(prompts, sampling, outcomes.__setitem__, note)
    refused = [
        n for n, each in sorted(outcomes.items())
        if isinstance(each, Failure) and each.rule.endswith(".refused")
    ]  # fmt: skip
    if refused:  # perhaps only for the log-probabilities
        EndpointModel(spec).ask(
            [prompts[n] for n in refused],
            sampling,
            lambda place, outcome: outcomes.__setitem__(refused[place], outcome),
            note,
        )
    replies = {n: each for n, each in sorted(outcomes.items()) if isinstance(each, Reply)}
    reasons = [each.reason for each in outcomes.values() if isinstance(each, Failure)]
    return replies, list(dict.fromkeys(reasons))


def _fits(
    model: StoredModel,
    prompts: Sequence[Sequence[Message]],
    replies: dict[int, Reply],
    note: Callable[[str], None],
) -> Iterator[CandidateFit]:
    from luthier.engine.machine import open_network

    for stored, candidates in _candidates(model, [prompts[n] for n in replies]):
        note(f"Scoring the replies by {stored.id}")
        network = open_network(stored)
        for each in candidates:
            try:
                yield _fit(network, each, prompts, replies)
            except LuthierError as error:  # a template that refuses such prompts did not write them
                note(f"{each.name} was not tried: {error}")
        network.close()


def _candidates(
    model: StoredModel, prompts: Sequence[Sequence[Message]]
) -> Iterator[tuple[StoredModel, list[Candidate]]]:
    """What may be served, by the network it would be."""
    own = chat_format(model)
    parent = find(str(model.manifest.parent)) if model.manifest.parent else None
    templates = [(f"{model.id} without its chat template", own.with_template("plain"))]
    for name, template in TEMPLATES.items():
        templates.append((f"{model.id} with the template {name}", _with_template(own, template)))
    if parent is not None:
        theirs = chat_format(parent)
        templates.append((f"{model.id} with the template of {parent.id}", theirs))
    seen = [_prompt_ids(own, prompts)]
    wrong = []
    for name, chat in templates:
        if (ids := _prompt_ids(chat, prompts)) not in seen and ids is not None:
            seen.append(ids)
            wrong.append(Candidate("wrong_template", name, chat))
    yield model, [Candidate("served", model.id, own), *wrong]
    if parent is None:
        return
    idle = [
        Candidate("adapter_without_effect", f"{parent.id}, as if nothing had been tuned", chat)
        for chat in ([own] if _prompt_ids(theirs, prompts) == seen[0] else [own, theirs])
    ]
    yield parent, idle
    others = [
        each
        for each in reversed(custom_models())
        if each.id != model.id and each.root == model.root and not each.damaged
        and each.manifest.kind == "causal_lm"
    ]  # fmt: skip
    for other in others[:MOST_OTHERS]:
        stored = find(other.id)
        yield stored, [Candidate("wrong_adapter", stored.id, chat_format(stored))]


def _with_template(chat: ChatFormat, template: str) -> ChatFormat:
    import copy

    tokenizer = copy.copy(chat.tokenizer)
    tokenizer.chat_template = template
    return replace(chat, tokenizer=tokenizer, template="chat")


def _prompt_ids(chat: ChatFormat, prompts: Sequence[Sequence[Message]]) -> list[list[int]] | None:
    """Tokens of the prompts; ``None`` where the template refuses them."""
    try:
        return [chat.encode_prompt(each).tolist() for each in prompts]
    except RecipeError:
        return None


def _fit(
    network: Network,
    candidate: Candidate,
    prompts: Sequence[Sequence[Message]],
    replies: dict[int, Reply],
) -> CandidateFit:
    numbers = [*replies]
    examples = [
        _example(candidate.chat, prompts[n], replies[n], place) for place, n in enumerate(numbers)
    ]
    if any(len(each) > network.context for each in examples):
        raise RecipeError("a prompt with its reply is longer than its context")
    scores = [*_token_scores(network, examples).values()]
    error_R, known_R = np.zeros(len(scores)), np.zeros(len(scores))
    for place, (logp_M, _) in enumerate(scores):
        given = replies[numbers[place]].logprobs
        # The endpoint counts the token that ends a reply, or it does not.
        if given and len(given) in (len(logp_M), len(logp_M) - 1):
            error_R[place] = np.abs(np.array(given) - logp_M[: len(given)]).mean()
            known_R[place] = 1
    return CandidateFit(
        candidate.finding,
        candidate.name,
        RowScores.of([(gap_M <= NEARLY).sum() for _, gap_M in scores], [len(g) for _, g in scores]),
        RowScores.of(error_R, known_R, is_share=False)
        if 2 * known_R.sum() >= len(scores)
        else None,
    )


def _example(chat: ChatFormat, prompt: Sequence[Message], reply: Reply, place: int) -> Example:
    """The prompt and the reply as the candidate reads them; the end is learned where there was one."""
    prompt_T = chat.encode_prompt(prompt)
    # Half a character at the end of a reply that was cut off is no token that was written.
    text, cut, _ = reply.text.partition("\N{REPLACEMENT CHARACTER}")
    reply_T = chat.tokens(text, first=False)
    if (reply.finish == "stop" and not cut) or not len(reply_T):
        reply_T = np.append(reply_T, chat.end_id)
    if chat.start_id is not None:
        ids_T = chat.decoder_ids(reply_T)
        weight_T = (np.arange(len(ids_T)) > 0).astype(np.float32)
        return Example(ids_T, weight_T, place, source_T=prompt_T)
    ids_T = np.concatenate([prompt_T, reply_T])
    weight_T = (np.arange(len(ids_T)) >= len(prompt_T)).astype(np.float32)
    return Example(ids_T, weight_T, place)


def _token_scores(
    network: Network, examples: Sequence[Example]
) -> dict[int, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """Of each example's reply tokens: the log-probability, and what the best token had more."""
    import torch

    found = {}
    with torch.no_grad():
        for batch in network.batches(examples, BUDGET):
            # Of all nodes, as a server reads them: of few alone sums are in another order.
            logits_SV = network.logits(network.hidden(batch)[batch.source_S]).float()
            logp_SV = logits_SV.log_softmax(-1)
            logp_E = logp_SV[batch.edge_source_E, batch.target_E]
            gap_E = logp_SV.amax(-1)[batch.edge_source_E] - logp_E
            row_M, edge_M = batch.learned_edges
            for row, example in enumerate(batch.tree.examples):
                own = edge_M[row_M == row]
                found[example.row] = (logp_E[own].cpu().numpy(), gap_E[own].cpu().numpy())
    return dict(sorted(found.items()))


def _other_prompt(
    model: StoredModel, prompts: Sequence[Sequence[Message]], replies: dict[int, Reply]
) -> tuple[int, int] | None:
    """Tokens that the endpoint and the model count of the first prompt, where none is counted alike."""
    chat = chat_format(model)
    counts = [
        (each.prompt_tokens, len(chat.encode_prompt(prompts[n])))
        for n, each in replies.items()
        if each.prompt_tokens is not None
    ]
    return counts[0] if counts and all(theirs != own for theirs, own in counts) else None


def _judge(fits: Sequence[CandidateFit], replies: int) -> tuple[Finding, str]:
    """What the best of ``fits`` says, and whether the others can be told from it."""
    best = fits[0]
    own = next(each for each in fits if each.finding == "served")
    share = f"{best.chosen.value:.0%} of the tokens of {replies} replies"
    if not best.matches:
        return "something_else", (
            f"The endpoint serves neither {own.name} nor anything else that was tried: the nearest is "
            f"{best.name}, which would have chosen {share} itself."
        )
    as_good = [
        each for each in fits
        if each is not best and each.matches and not _differ(best, each)
    ]  # fmt: skip
    if best is not own and own not in as_good:
        what = {
            "adapter_without_effect": "The adapter has no effect: the endpoint serves",
            "wrong_template": "The template is another one: the endpoint serves",
            "wrong_adapter": "The adapter is another one: the endpoint serves",
        }[best.finding]
        return best.finding, f"{what} {best.name}, which would have chosen {share} itself."
    if rivals := [each for each in (best, *as_good) if each is not own]:
        return "undecided", (
            f"{own.name} may have written the replies, but so may {rivals[0].name}: both would have "
            f"chosen nearly the same. Ask prompts that the two answer differently."
        )
    return "served", f"The endpoint serves {own.name}: it would have chosen {share} itself."


def _differ(one: CandidateFit, other: CandidateFit) -> bool:
    """Whether two candidates explain the replies differently, by more than chance."""
    if one.logprob_error is not None and other.logprob_error is not None:
        return differences(one.logprob_error, {"": other.logprob_error})[""].significant
    return differences(one.chosen, {"": other.chosen})[""].significant
