"""GGUF files in llama.cpp, and whether they answer there as the model does here.

llama.cpp runs in this process, by the package ``xllamacpp``; it is asked over its own server, which
listens on loopback behind a key while it is open.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import numpy as np
import torch

from luthier.errors import LuthierError, RecipeError
from luthier.evaluation.parity import REFERENCE_PROMPTS, TokenComparison
from luthier.models.gguf import Quantization, round_weights, shown_bytes
from luthier.models.manifest import GgufParity
from luthier.types import IntArray, Message, TemplateKwargs

if TYPE_CHECKING:
    from luthier.data.chat import ChatFormat

TOKENS = 24
"""Tokens that are written behind each prompt."""
CONTEXT = 512
"""Tokens of prompt and reply that are tried at most."""
LIKELIEST = 64
"""Tokens of which llama.cpp tells the probability, in each place."""
LIMIT, QUANTIZED_LIMIT = 0.005, 0.08
"""Of :func:`largest_divergence`: seven times what was measured or more (docs/log/service.md).
Weights of less than 16 bits are multiplied by numbers that llama.cpp rounds to 8."""


def largest_divergence(quantization: Quantization) -> float:
    """Nats a token on average, with the weights that a file has, beyond which it is refused."""
    return LIMIT if quantization in ("f32", "f16", "bf16") else QUANTIZED_LIMIT


@dataclass(frozen=True)
class TokenLogps:
    """What llama.cpp tells of a token that it chose."""

    id: int
    size: int
    """Bytes of its text, with those of the tokens before it that nothing is told of."""
    logps: dict[int, float]
    """Of the likeliest tokens in its place."""


@dataclass(frozen=True)
class Continuation:
    """What llama.cpp wrote behind a prompt."""

    tokens: list[int]
    token_logps: list[TokenLogps]
    """What is known of some of them, in their order: llama.cpp tells nothing of tokens that end
    within a character."""
    tokens_per_second: float


class LlamaCpp:
    """One GGUF file in llama.cpp."""

    def __init__(self, file: Path, adapter: Path | None = None) -> None:
        """``adapter`` is the file of a LoRA adapter that is put on the network in ``file``.

        Raises:
            LuthierError: where llama.cpp does not load them.
        """
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        if adapter is not None:
            info = xllamacpp.CommonAdapterLoraInfo()
            info.path, info.scale = str(adapter), 1.0
            params.lora_adapters = [info]
        params.n_ctx, params.n_parallel, params.n_gpu_layers = CONTEXT, 1, 0
        params.cpuparams.n_threads = torch.get_num_threads()
        params.warmup, params.verbosity = False, -1
        self._key = secrets.token_hex()
        params.api_keys = [self._key]
        try:
            self._server: Any = xllamacpp.Server(params)
        except Exception as error:  # its own classes, by what went wrong
            raise LuthierError(f"llama.cpp does not load {file.name}: {error}") from error
        # A server that is closed before its loop of tasks has begun waits for that loop forever. What
        # is asked here is answered by the loop, so that it runs when this returns.
        self._request("/lora-adapters")

    def close(self) -> None:
        """Let go of the network."""
        self._server = None

    def tokens(self, text: str, *, first: bool) -> list[int]:
        """Token ids of ``text``; ``first`` puts before it what the file's texts begin with."""
        body = {"content": text, "add_special": first, "parse_special": True}
        return list(self._request("/tokenize", body)["tokens"])

    def prompt_text(self, messages: Sequence[Message], kwargs: TemplateKwargs) -> str:
        """Render ``messages`` with the file's chat template and return the text."""
        turns = [{"role": each.role, "content": each.content} for each in messages]
        body = {"messages": turns, "chat_template_kwargs": kwargs}
        return str(self._request("/apply-template", body)["prompt"])

    def write(self, ids_T: IntArray, count: int) -> Continuation:
        """Go on greedily from a prompt, until ``count`` tokens or one that ends replies."""
        answer = self._request(
            "/completion",
            {
                "prompt": ids_T.tolist(), "n_predict": count, "temperature": 0.0,
                "n_probs": LIKELIEST, "return_tokens": True, "cache_prompt": False,
            },
        )  # fmt: skip
        token_logps = [
            TokenLogps(
                int(each["id"]),
                len(each["bytes"]),
                {int(top["id"]): float(top["logprob"]) for top in each["top_logprobs"]},
            )
            for each in answer.get("completion_probabilities", ())
        ]
        speed = float(answer["timings"]["predicted_per_second"])
        return Continuation([int(token) for token in answer["tokens"]], token_logps, speed)

    def _request(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        request = Request(  # noqa: S310 - loopback
            self._server.listening_address + path,
            None if body is None else json.dumps(body).encode(),
            {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"},
        )
        try:
            with urlopen(request, timeout=600) as response:  # noqa: S310
                return json.load(response)
        except HTTPError as error:
            raise LuthierError(
                f"llama.cpp: {error.read().decode(errors='replace')[:500]}"
            ) from error
        except (URLError, OSError) as error:
            raise LuthierError(f"llama.cpp does not answer: {error}") from error


@torch.no_grad()
def compare_gguf(
    file: Path,
    network: Any,
    chat: ChatFormat,
    quantization: Quantization,
    adapter: Path | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> GgufParity:
    """Whether llama.cpp answers from ``file`` as ``network`` does, a model of transformers in
    float32.

    Prompts are the same texts and the same tokens in both; behind each, llama.cpp writes greedily,
    and in each place the probabilities are compared that both give the next token. What the type of
    the weights loses is told, and is no fault. So the network is then rounded as the file is, and
    what is left between the two has to be small: it stays rounded. ``on_progress`` hears how many
    readings of prompts are done, of how many: each is written once and read twice.

    Raises:
        RecipeError: with the first text or token that differs, or where llama.cpp computes
        otherwise.
    """
    network.eval()
    total = 3 * len(REFERENCE_PROMPTS)
    on_progress(0, total)
    with closing(LlamaCpp(file, adapter)) as opened:
        texts = []
        for number, prompt in enumerate(REFERENCE_PROMPTS, 1):
            ids_T = _same_prompt(opened, chat, (Message("user", prompt),))
            room = min(CONTEXT, network.config.max_position_embeddings) - len(ids_T)
            if room > 0:
                texts.append((ids_T, opened.write(ids_T, min(TOKENS, room))))
            on_progress(number, total)
    found = _compare(network, chat, texts)
    on_progress(2 * len(REFERENCE_PROMPTS), total)
    if found.is_empty:
        raise RecipeError("llama.cpp wrote nothing behind any prompt")
    as_it_is = found.parity()
    round_weights(network, quantization)
    rounded = _compare(network, chat, texts).parity()
    on_progress(total, total)
    limit = largest_divergence(quantization)
    if not rounded.mean_kl <= limit:
        raise RecipeError(
            f"llama.cpp answers otherwise: with the same weights, {rounded.describe()}, and more than "
            f"{limit:g} is no rounding{rounded.difference_text(lambda token: chat.decode([token]))}",
            rule="export.differs",
        )
    return GgufParity(**as_it_is.model_dump(), rounded_kl=rounded.mean_kl)


def _compare(
    network: Any, chat: ChatFormat, texts: Sequence[tuple[IntArray, Continuation]]
) -> TokenComparison:
    """What both find likeliest in each place, and divergences where they are known."""
    comparison = TokenComparison()
    for row, (ids_T, written) in enumerate(texts):
        whole_T = torch.tensor([*ids_T.tolist(), *written.tokens])
        logits_TV = network(input_ids=whole_T[None]).logits[0, len(ids_T) - 1 : -1].float()
        logp_TV = torch.log_softmax(logits_TV, -1)
        known = dict(zip(_places(written, chat), written.token_logps, strict=True))
        for place, theirs in enumerate(written.tokens):
            logp_V, logps = logp_TV[place], known[place].logps if place in known else {}
            ours = int(logp_V.argmax())
            both_known = ours in logps and theirs in logps
            comparison.add(
                row,
                len(ids_T) + place,
                (ours, theirs),
                (
                    float(logp_V[ours] - logp_V[theirs]),
                    logps[theirs] - logps[ours] if both_known else None,
                ),
                _divergence(logp_V, logps) if logps else None,
            )
    return comparison


def _same_prompt(opened: LlamaCpp, chat: ChatFormat, messages: Sequence[Message]) -> IntArray:
    """Token ids of a prompt, which are the same in llama.cpp."""
    # llama.cpp gives templates of Llama 3 today's date, where transformers prints the template's own.
    kwargs = chat.read_kwargs({"date_string": "26 Jul 2024"})
    text, plain = chat.prompt_text(messages, kwargs=kwargs), chat.template == "plain"
    if not plain and (other := opened.prompt_text(messages, kwargs)) != text:
        bare = text.removeprefix(str(chat.tokenizer.bos_token))  # it is put before tokens instead
        if other != bare:
            raise RecipeError(
                f"llama.cpp's reading of the chat template gives {other[:200]!r}, and not "
                f"{text[:200]!r}"
            )
    ids_T = chat.prompt_tokens(text)
    read = opened.tokens(text, first=plain)
    if read != ids_T.tolist():
        pairs = zip(ids_T.tolist(), read, strict=False)
        place = next((at for at, (one, other) in enumerate(pairs) if one != other), len(read))
        raise RecipeError(
            f"llama.cpp makes other tokens of {text[:80]!r}: token {place + 1} is "
            f"{read[place : place + 1]}, and not {ids_T[place : place + 1].tolist()}"
        )
    return ids_T


def _places(written: Continuation, chat: ChatFormat) -> list[int]:
    """Numbers of the tokens that llama.cpp told something of."""
    texts = chat.tokenizer.convert_ids_to_tokens(written.tokens)
    added = chat.tokenizer.added_tokens_decoder
    sizes = [  # special tokens are not shown, nor those that no text becomes
        0 if text is None or (token in added and added[token].special) else shown_bytes(chat, text)
        for token, text in zip(written.tokens, texts, strict=True)
    ]
    found = [-1]
    for number, each in enumerate(written.token_logps):
        wanted = sum(other.size for other in written.token_logps[: number + 1])
        found.append(
            next(
                place
                for place in range(found[-1] + 1, len(sizes))
                if written.tokens[place] == each.id and sum(sizes[: place + 1]) >= wanted
            )
        )
    return found[1:]


def _divergence(logp_V: torch.Tensor, other: Mapping[int, float]) -> float:
    """Kullback-Leibler divergence in nats between our probabilities and those that llama.cpp told;
    all other tokens count as one."""
    ours = logp_V[list(other)].double().exp().numpy()
    theirs = np.exp(np.array([*other.values()], dtype=np.float64))
    ours, theirs = (np.append(each, max(1.0 - each.sum(), 1e-9)) for each in (ours, theirs))
    return max(0.0, float((ours * (np.log(ours + 1e-30) - np.log(theirs + 1e-30))).sum()))
