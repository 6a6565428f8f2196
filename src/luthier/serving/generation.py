"""Answering with a model: the same weights, template and stop tokens it was trained with.

A custom model is loaded with its adapters merged, exactly as ``models export --merged`` writes it,
so serving and the exported directory give the same tokens. Decoding is transformers' own
``generate``; prompts of a batch are sorted by length, so that little is spent on padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from luthier.errors import RecipeError
from luthier.models.heads import prompt_ids
from luthier.models.prefix import prefix_cache, prefix_tokens
from luthier.types import Message

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from luthier.data.chat import ChatFormat
    from luthier.store.models import StoredModel
    from luthier.types import IntArray

Prompt = str | Sequence[Message]
MAX_TOKENS = 256
"""Of a reply, where nothing else is said."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    max_tokens: int | None = None
    """Tokens of the reply at most; 256, or half of a smaller context, when not given."""
    temperature: float = 0.0
    """0 takes the most likely token; higher draws more freely."""
    top_p: float = 1.0
    """Draw only from the most likely tokens that together have this probability."""
    seed: int = 0
    """Seed of the draws."""

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        if self.max_tokens is not None and self.max_tokens < 1:
            raise RecipeError("max-tokens must be at least 1")
        if not 0 <= self.temperature < math.inf:
            raise RecipeError("temperature must be 0 or more")
        if not 0 < self.top_p <= 1:
            raise RecipeError("top-p must be above 0 and at most 1")
        if not 0 <= self.seed < 2**63:
            raise RecipeError("seed must be 0 or more, and below 2**63")


@dataclass(frozen=True)
class Answer:
    """A reply, and how it ended."""

    text: str
    finished: bool
    """Whether the model ended it; else the limit of tokens cut it off."""
    tokens: int
    """Tokens of the text."""


class Generator:
    """One model in memory, ready to answer."""

    def __init__(self, model: Any, chat: ChatFormat, device: torch.device) -> None:
        from transformers import GenerationConfig

        self.model, self.chat, self.device = model.eval(), chat, device
        # Penalties and the like of the base model's own file would apply to batches only.
        self.model.generation_config = GenerationConfig()
        self.prompt_ids = np.array(prompt_ids(model), dtype=np.int64)
        """A soft prompt that stands before every prompt."""
        self.prefix = prefix_tokens(model)
        """Keys and values that stand before both; 0 without a prefix."""
        self.context = int(getattr(model.config, "max_position_embeddings", 0) or 1 << 30)

    @staticmethod
    def open(stored: StoredModel) -> Generator:
        """Load ``stored`` on the best device of this machine."""
        from luthier.engine.devices import choose_machine
        from luthier.store.models import chat_format, load, objective_of

        if objective_of(stored).task != "causal_lm":
            raise RecipeError(
                f"{stored.id} does not write text: it was trained for "
                f"{objective_of(stored).method}. Use luthier predict."
            )
        machine = choose_machine()
        model = load(stored, machine.dtype, machine.device)
        return Generator(model, chat_format(stored), machine.device)

    def max_tokens(self, sampling: Sampling) -> int:
        """Tokens of a reply at most; where that is not said, half of the context is the prompt's."""
        return sampling.max_tokens or max(1, min(MAX_TOKENS, self.context // 2))

    def replies(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        batch_size: int = 32,
        done: Callable[[int], None] = lambda count: None,
    ) -> list[str]:
        """One reply to each prompt, in the order given. ``done`` hears how many are finished."""
        return [answer.text for answer in self.answers(prompts, sampling, batch_size, done)]

    def answers(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        batch_size: int = 32,
        done: Callable[[int], None] = lambda count: None,
    ) -> list[Answer]:
        """As :meth:`replies`, with how each of them ended."""
        encoded = [self._encode(prompt, sampling, index) for index, prompt in enumerate(prompts)]
        order = sorted(range(len(encoded)), key=lambda index: -len(encoded[index]))
        answers: dict[int, Answer] = {}
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = self._batch([encoded[index] for index in chosen], sampling)
            answers.update(zip(chosen, batch, strict=True))
            done(start + len(chosen))
        return [answers[index] for index in range(len(encoded))]

    def refusal(self, prompt: Prompt, sampling: Sampling) -> str | None:
        """Why the model cannot answer ``prompt`` at all; ``None`` where it can."""
        refusal = self._refusal(self._prompt_ids(prompt), sampling)
        return refusal and f"the prompt {refusal}"

    def stream(self, prompt: Prompt, sampling: Sampling) -> Iterator[str]:
        """The reply to one prompt, in pieces as they are decoded.

        A piece is given out once the text before it can no longer change, so characters of more
        than one token arrive whole.
        """
        ids: list[int] = []
        shown = text = ""
        for token in self._tokens(self._encode(prompt, sampling, 0), sampling):
            ids.append(token)
            text = self.chat.decode(ids)
            if not text.endswith("\ufffd"):
                if text[len(shown) :]:
                    yield text[len(shown) :]
                shown = text
        if text[len(shown) :]:
            yield text[len(shown) :]

    def _encode(self, prompt: Prompt, sampling: Sampling, index: int) -> IntArray:
        ids_T = self._prompt_ids(prompt)
        if refusal := self._refusal(ids_T, sampling):
            raise RecipeError(f"prompt {index + 1} {refusal} Shorten it, or lower max_tokens.")
        return ids_T

    def _prompt_ids(self, prompt: Prompt) -> IntArray:
        messages = [Message("user", prompt)] if isinstance(prompt, str) else prompt
        return np.concatenate([self.prompt_ids, self.chat.encode_prompt(messages)])

    def _refusal(self, ids_T: IntArray, sampling: Sampling) -> str | None:
        beside = self.chat.start_id is not None  # the encoder's prompt takes no room of the reply
        reply = self.max_tokens(sampling)
        sizes = [self.prefix + len(ids_T), reply]
        if (max(sizes) if beside else sum(sizes)) <= self.context:
            return None
        return (
            f"has {len(ids_T)} tokens; with {reply} for the reply that is more than the "
            f"model's context of {self.context}."
        )

    def _batch(self, prompts: Sequence[IntArray], sampling: Sampling) -> list[Answer]:
        import torch

        # Ids of what the cache holds are never looked at: any will do.
        width = self.prefix + max(map(len, prompts))
        pad = self.chat.stop_ids[0]
        ids_BT = torch.full((len(prompts), width), pad)
        mask_BT = torch.zeros((len(prompts), width), dtype=torch.long)
        mask_BT[:, : self.prefix] = 1
        for row, prompt in enumerate(prompts):
            ids_BT[row, width - len(prompt) :] = torch.from_numpy(prompt)
            mask_BT[row, width - len(prompt) :] = 1
        with torch.inference_mode():
            torch.manual_seed(sampling.seed)
            out_BT = self.model.generate(
                ids_BT.to(self.device),
                attention_mask=mask_BT.to(self.device),
                past_key_values=prefix_cache(self.model, len(prompts)),
                **self._settings(sampling),
            )
        # An encoder-decoder gives its reply alone, behind the token it starts from.
        first = width if self.chat.start_id is None else 1
        return [self._answer(row[first:]) for row in out_BT]

    def _answer(self, ids_T: Tensor) -> Answer:
        """The text before the first stop token."""
        ids: list[int] = ids_T.tolist()
        stops = [index for index, token in enumerate(ids) if token in self.chat.stop_ids]
        reply = ids[: stops[0]] if stops else ids
        return Answer(self.chat.decode(reply), bool(stops), len(reply))

    def _settings(self, sampling: Sampling) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "decoder_start_token_id": self.chat.start_id,
            "max_new_tokens": self.max_tokens(sampling),
            "do_sample": sampling.temperature > 0,
            "eos_token_id": list(self.chat.stop_ids),
            "pad_token_id": self.chat.stop_ids[0],
        }
        if sampling.temperature > 0:
            settings |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        return settings

    def _tokens(self, prompt_T: IntArray, sampling: Sampling) -> Iterator[int]:
        """Decode one token at a time with a key-value cache."""
        import torch

        generator = torch.Generator().manual_seed(sampling.seed)
        ids = torch.from_numpy(prompt_T)[None].to(self.device)
        cache, further = prefix_cache(self.model, rows=1), dict[str, Any]()
        if beside := self.chat.start_id is not None:
            with torch.inference_mode():
                further["encoder_outputs"] = self.model.get_encoder()(input_ids=ids)
            ids = torch.tensor([[self.chat.start_id]], device=self.device)
        else:
            further["logits_to_keep"] = 1
        for _ in range(self.max_tokens(sampling)):
            if beside:
                further["decoder_input_ids"] = ids
            with torch.inference_mode():
                out = self.model(
                    None if beside else ids, past_key_values=cache, use_cache=True, **further
                )
            cache = out.past_key_values
            token = _choose(out.logits[0, -1].float().cpu(), sampling, generator)
            if token in self.chat.stop_ids:
                return
            yield token
            ids = torch.tensor([[token]], device=self.device)


def _choose(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    import torch

    from luthier.models.sampler import nucleus

    if sampling.temperature == 0:
        return int(logits_V.argmax())
    probability_V = torch.softmax(logits_V / sampling.temperature, -1)
    kept_V = nucleus(probability_V[None], sampling.top_p)[0]
    return int(torch.multinomial(kept_V, 1, generator=generator))
