"""The decoder: replies are independent of concurrent requests, and cancelled requests leave
nothing."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decoding import MEMORY, answer, asked, settled, submit

from luthier.errors import RecipeError
from luthier.inference import decoder as module
from luthier.inference.decoder import Decoder
from luthier.inference.generation import Generator
from luthier.inference.inference import (
    GenerationRequest,
    InferenceFailed,
    InferenceRefused,
    TokenChunk,
    TooLong,
)
from luthier.inference.memory import CacheBudget
from luthier.inference.scheduler import WaitingRequests, working_for
from luthier.library.models import find, load
from luthier.limits import ModelLimits
from luthier.models.decoding.sampler import TokenSampler, sample
from luthier.models.decoding.sampling import Sampling
from luthier.models.load import as_network
from luthier.types import Message
from tokenizers_of_families import MISTRAL, sentencepiece

CPU = torch.device("cpu")
QUESTIONS = [
    "Hi",
    "What is the capital of France?",
    "ü日本👋",
    "fox " * 60,
    "My card has not arrived",
]


def generator_of(stored: Any) -> Generator:
    network = as_network(load(stored, torch.float32, CPU), CPU, torch.float32)
    return Generator(network, stored.chat)


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_likeliest_answer_is_the_generator_s(
    opened: Decoder, question: str, tiny_model_folder: Path
) -> None:
    stored = find(str(tiny_model_folder))
    generator = Generator(
        as_network(load(stored, torch.float32, CPU), CPU, torch.float32), stored.chat
    )
    expected = generator.answers([question], Sampling(max_tokens=24))[0]
    found = answer(opened, asked(question))
    assert found.text == expected.text.rstrip("\ufffd")
    assert found.tokens == expected.tokens
    assert found.reason == ("stop" if expected.finished else "length")


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.3, "top_p": 0.8}, {"stop": (" ", "a")}])
def test_seed_gives_same_text_in_server_stream_and_batch(
    opened: Decoder, tiny_model_folder: Path, settings: dict[str, Any]
) -> None:
    """The server, streamed replies, batches, and completions of a network in training."""
    stored = find(str(tiny_model_folder))
    generator = generator_of(stored)
    sampling = Sampling(max_tokens=24, seed=5, **settings)
    fields = {"seed": 5, **settings}
    served = [answer(opened, asked(question, **fields)).text for question in QUESTIONS]
    assert generator.replies(QUESTIONS, sampling, batch_size=3) == served
    assert ["".join(generator.stream(question, sampling)) for question in QUESTIONS] == served
    if "stop" in settings:
        return
    prompts = [generator.chat.encode_prompt([Message("user", q)]) for q in QUESTIONS]
    drawn = sample(generator.network, prompts, 2, sampling, stop_ids=generator.chat.stop_ids)
    several = [opened.submit(asked(q, n=2, **fields)).results() for q in QUESTIONS]
    for pair, two in zip(drawn, several, strict=True):
        for completion, each in zip(pair, two, strict=True):
            ids = completion.ids_T[: len(completion.ids_T) - completion.stopped].tolist()
            assert generator.chat.replies.decode(ids).rstrip("\ufffd") == each.text


def test_seeds(opened: Decoder) -> None:
    def text(**fields: Any) -> str:
        return answer(opened, asked("Hi", temperature=1, **fields)).text

    assert text(seed=1) == text(seed=1) != text(seed=2)
    assert len({text() for _ in range(8)}) > 4  # two may both end at once, as empty texts
    several = opened.submit(asked("Hi", temperature=1, seed=1, n=5)).results()
    assert several[0].text == text(seed=1)
    assert len({each.text for each in several}) == 5


def first_tokens(opened: Decoder, count: int, **fields: Any) -> set[bytes]:
    """Return the first tokens of ``count`` samples."""
    found = opened.submit(asked("Hi", max_tokens=1, n=count, top_logprobs=0, seed=3, **fields))
    return {score.text for each in found.results() for score in each.scores}


def test_draws_respect_top_k_top_p_and_min_p(opened: Decoder) -> None:
    (result,) = opened.submit(asked("Hi", max_tokens=1, top_logprobs=20)).results()
    top = result.scores[0].top
    ranked = [text for text, _ in top]
    assert first_tokens(opened, 100, temperature=1, top_k=3) == set(ranked[:3])
    share = sum(torch.exp(torch.tensor([logprob for _, logprob in top[:4]]))) - 1e-4
    assert first_tokens(opened, 128, temperature=1, top_p=float(share)) <= set(ranked[:4])
    least = float(torch.exp(torch.tensor(top[2][1] - top[0][1]))) - 1e-4
    assert first_tokens(opened, 128, temperature=1, min_p=least) <= set(ranked[:3])
    assert len(first_tokens(opened, 128, temperature=2)) > 20


def test_logprobs_are_the_network_s_own(opened: Decoder, tiny_model_folder: Path) -> None:
    """Log-probabilities precede penalties and temperature, also for tokens that were not chosen."""
    model: Any = load(find(str(tiny_model_folder)), torch.float32, CPU).eval()
    request = asked("Hi", temperature=1.5, seed=5, top_logprobs=3, repetition_penalty=1.3)
    found = answer(opened, request)
    prompt = opened.encode(request.prompt).tolist()
    chosen = opened.chat.tokenizer
    by_bytes = {opened.constraints.token_bytes(i): i for i in range(len(chosen))}
    ids = [by_bytes[score.text] for score in found.scores]
    with torch.no_grad():
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    logp = torch.log_softmax(logits, -1)
    assert len(found.scores) == found.tokens > 3
    for row, token, score in zip(logp, ids, found.scores, strict=True):
        assert score.logprob == pytest.approx(float(row[token]), abs=1e-4)
        expected = row.topk(3)
        assert [by_bytes[text] for text, _ in score.top] == expected.indices.tolist()
        assert [value for _, value in score.top] == pytest.approx(
            expected.values.tolist(), abs=1e-4
        )


def test_penalties_and_bias(opened: Decoder, tiny_model_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    request = asked("Hi", repetition_penalty=1.7, top_logprobs=0)
    ids = torch.from_numpy(opened.encode(request.prompt))[None]
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False,
        repetition_penalty=1.7,
    )[0, ids.shape[1] :]  # fmt: skip
    expected = [opened.constraints.token_bytes(i) for i in out.tolist()]
    assert [score.text for score in answer(opened, request).scores] == expected[:24]
    plain = answer(opened, asked("Hi", top_logprobs=0))
    first = next(i for i in range(320) if opened.constraints.token_bytes(i) == plain.scores[0].text)
    banned = answer(opened, asked("Hi", top_logprobs=0, logit_bias={first: -100.0}))
    assert plain.scores[0].text not in [score.text for score in banned.scores]
    forced = answer(opened, asked("Hi", top_logprobs=0, logit_bias={first: 100.0}))
    assert {score.text for score in forced.scores} == {plain.scores[0].text}
    mixed = asked("Hi", top_logprobs=0, frequency_penalty=2, presence_penalty=2)
    repeats = [score.text for score in answer(opened, mixed).scores]
    usual = [score.text for score in plain.scores]
    assert len(set(repeats)) >= len(set(usual))
    assert repeats != usual


def test_stop_sequences_over_borders_of_tokens(opened: Decoder) -> None:
    whole = answer(opened, asked("Hi", max_tokens=40)).text
    for start in range(0, len(whole) - 3, 3):
        stop = whole[start : start + 3]
        events = list(opened.submit(asked("Hi", max_tokens=40, stop=("never there", stop))))
        pieces = [event.text for event in events if isinstance(event, TokenChunk)]
        assert "".join(pieces) == whole[: whole.index(stop)]
        assert (events[-1].reason, events[-1].stop) == ("stop_sequence", stop)  # type: ignore[union-attr]
    assert settled(opened)


@pytest.mark.slow
def test_more_answers_than_step_together_take_turns(
    opened: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one sequence per step, a short request does not wait for the eight replies of a long
    request."""
    many = asked("Hi", n=8, temperature=1, seed=3, max_tokens=60)
    alone = [whole.text for whole in opened.submit(many).results()]
    short = answer(opened, asked("My card has not arrived", max_tokens=12)).text
    steps: list[tuple[int, bool]] = []
    step = opened._backend.step

    def counted(states: Any, tokens: Any) -> Any:
        steps.append((len(states), any(a.state in states for a in briefly())))
        return step(states, tokens)

    def briefly() -> list[Any]:
        return [a for job in opened._writing if job.client == "short" for a in job.answers]

    monkeypatch.setattr(opened, "_rows", 1)
    monkeypatch.setattr(opened._backend, "step", counted)
    busy = submit(opened, "many", many)
    deadline = time.monotonic() + 60
    while len(steps) < 80:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert submit(opened, "short", asked(QUESTIONS[4], max_tokens=12)).results()[0].text == short
    assert [whole.text for whole in busy.results()] == alone
    assert {count for count, _ in steps} == {1}
    own = [place for place, (_, mine) in enumerate(steps) if mine]
    # The later request gets nearly every step after its first.
    assert len(own) == 11 and own[-1] - own[0] < 30


def test_closed_streams_free_all_state(opened: Decoder) -> None:
    streams = [opened.submit(asked(f"Hi {i}", max_tokens=900, temperature=1)) for i in range(64)]
    for number, stream in enumerate(streams):
        if number % 2:
            next(stream)
        stream.close()
    assert settled(opened)
    waiting = opened.submit(asked("Hi", max_tokens=900, temperature=1, logit_bias={1: -100.0}))
    ended = threading.Thread(target=lambda: list(waiting))
    ended.start()
    waiting.close()
    ended.join(1)
    assert not ended.is_alive()
    assert settled(opened)


def test_the_context_ends_an_answer(opened: Decoder) -> None:
    prompt = [5, 6, 7] * 330
    found = answer(opened, GenerationRequest(prompt, temperature=1, logit_bias={1: -100.0}))
    assert (found.reason, found.tokens) == ("context", 1024 - 990)
    with pytest.raises(TooLong):
        opened.submit(GenerationRequest([5] * 1024))
    for wrong in ([], [320], "", [-1]):
        with pytest.raises(InferenceRefused):
            opened.submit(GenerationRequest(wrong))


def test_too_many_are_turned_away(opened: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opened, "limits", ModelLimits(answers=1))
    monkeypatch.setattr(opened, "_waiting", WaitingRequests(3))
    streams: list[Any] = []
    request = asked("Hi", max_tokens=500, logit_bias={1: -100.0})
    with pytest.raises(InferenceFailed) as refused:
        streams.extend(opened.submit(request) for _ in range(9))
    assert refused.value.code == "Throttling"
    assert 3 <= len(streams) <= 5
    for stream in streams:
        stream.close()
    assert settled(opened)


class SimulatedClock:
    """Simulated time of a network; a chunk of a prompt costs ten steps."""

    def __init__(self, opened: Decoder, patch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        backend = opened._backend
        read, step = backend.prefill, backend.step
        patch.setattr(backend, "prefill", lambda state: (self.add(0.1), read(state))[1])
        patch.setattr(
            backend,
            "step",
            lambda states, tokens: (self.add(0.01 + 0.002 * len(states)), step(states, tokens))[1],
        )
        patch.setattr(module, "time", self)

    def add(self, seconds: float) -> None:
        self.now += seconds

    def perf_counter(self) -> float:
        return self.now


def test_long_prompts_slow_a_short_request_by_at_most_half(
    opened: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimulatedClock(opened, monkeypatch)
    short = asked("Hi", max_tokens=60, logit_bias={1: -100.0})
    quiet = submit(opened, "neighbour", short).results()
    quiet_seconds, clock.now = clock.now, 0.0
    long = GenerationRequest([5, 6, 7] * 300, max_tokens=100, temperature=1, logit_bias={1: -100.0})
    streams = [submit(opened, "attacker", long) for _ in range(60)]
    next(streams[0])
    for _ in range(5):
        began = clock.now
        assert submit(opened, "neighbour", short).results() == quiet
        # and a chunk and a step that were already running
        assert clock.now - began <= 2 * quiet_seconds + 0.35
    assert any(not job.cancelled for job in (*opened._reading, *opened._writing))
    for stream in streams:
        stream.close()
    assert settled(opened)


def test_paused_clients_leave_answers_unchanged(
    opened: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paused sequences lie between running sequences in the same bank."""
    requests = [asked(f"Hi {i}", max_tokens=40, logit_bias={1: -100.0}) for i in range(9)]
    alone = [answer(opened, request) for request in requests]
    draws = random.Random(0)

    def some(clients: Collection[str]) -> set[str]:
        return {each for each in sorted(clients) if draws.random() < 0.5} or set(clients)

    monkeypatch.setattr(opened._scheduler, "runnable", some)
    streams = [submit(opened, f"client {i % 3}", each) for i, each in enumerate(requests)]
    assert [stream.results()[0] for stream in streams] == alone
    assert settled(opened)


def test_request_over_answer_limit_is_refused(
    opened: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opened, "limits", ModelLimits(answers=4))
    with pytest.raises(InferenceRefused):
        opened.submit(asked("Hi", n=5))
    assert len(opened.submit(asked("Hi", n=4)).results()) == 4


def test_failure_in_an_answer_reaches_a_single_client(
    opened: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = answer(opened, asked("Hi"))
    other = submit(opened, "other", asked("Hi"))
    honest = TokenSampler.choose

    def choose(chooser: TokenSampler, logits_V: torch.Tensor) -> int:
        if chooser.sampling.seed == 13:
            raise IndexError
        return honest(chooser, logits_V)

    monkeypatch.setattr(TokenSampler, "choose", choose)
    with pytest.raises(InferenceFailed) as refused:
        submit(opened, "one", asked("Hi", temperature=1, seed=13)).results()
    assert refused.value.code == "ModelError"
    assert other.results() == [usual]
    no_numbers = torch.full((320,), torch.nan)
    with pytest.raises(RecipeError):
        TokenSampler(asked("Hi", temperature=1), 0, 0, np.array([1]), None).choose(no_numbers)


def test_log_probabilities_have_a_limit(opened: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opened, "limits", ModelLimits(logprobs=2 * 24 * 4))
    assert len(opened.submit(asked("Hi", n=2, top_logprobs=3)).results()) == 2
    with pytest.raises(InferenceRefused) as refused:
        opened.submit(asked("Hi", n=2, top_logprobs=10, max_tokens=12))
    assert refused.value.parameter == "top_logprobs"


@pytest.mark.slow
def test_unread_stream_pauses_generation(opened: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    long = asked("Hi", max_tokens=200, logit_bias={1: -100.0})
    whole = answer(opened, long)
    monkeypatch.setattr(module, "UNREAD", 5)
    stream = submit(opened, "slow", long)
    for _ in range(20):
        assert submit(opened, "other", asked("Hi", max_tokens=9)).results()
    assert stream.written() < 20
    deadline = time.monotonic() + 10
    while opened._scheduler._at_work:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert stream.results() == [whole]
    assert settled(opened)


@pytest.mark.parametrize("ids", [[-1], [2**63], [10**30], [320]])
def test_invalid_token_ids_are_refused(opened: Decoder, ids: list[int]) -> None:
    with pytest.raises(InferenceRefused):
        opened.submit(GenerationRequest(ids))


def test_failed_free_leaves_remaining_requests_running(
    opened: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    drop = opened._backend.free

    def fail(state: Any) -> None:
        drop(state)
        raise MemoryError

    monkeypatch.setattr(opened._backend, "free", fail)
    with suppress(InferenceFailed):
        submit(opened, "one", asked("Hi")).results()
    monkeypatch.setattr(opened._backend, "free", drop)
    assert submit(opened, "two", asked("Hi")).results()
    assert settled(opened)
    assert not opened._scheduler._at_work


def test_memory_and_answers_are_shared_between_clients(
    opened: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    endless = asked("Hi", max_tokens=900, n=8, temperature=1, logit_bias={1: -100.0})
    streams = [submit(opened, "one", endless) for _ in range(20)]
    next(streams[0])
    assert submit(opened, "two", asked("Hi", n=32)).results()
    assert opened._answers["one"] == opened.limits.share_of(opened.limits.answers)
    assert len([*opened._waiting]) == 8
    for stream in streams:
        stream.close()
    assert settled(opened)
    one = opened._backend.bytes_of(len(opened.encode(endless.prompt)) + 900)
    monkeypatch.setattr(opened, "memory", CacheBudget(4 * one, 3 * one))
    single = asked("Hi", max_tokens=900, temperature=1, logit_bias={1: -100.0})
    streams = [submit(opened, "one", single) for _ in range(5)]
    next(streams[0])
    assert submit(opened, "two", asked("Hi")).results()
    assert opened._answers["one"] == 3
    for stream in streams:
        stream.close()
    assert settled(opened)


def test_memory_is_bounded(opened: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    one = opened._backend.bytes_of(len(opened.encode(asked("Hi").prompt)) + 24)
    monkeypatch.setattr(opened, "memory", CacheBudget(2 * one, one))
    seen: list[Counter[str]] = []
    write = opened._write
    monkeypatch.setattr(opened, "_write", lambda: (seen.append(opened._answers.copy()), write())[1])
    streams = [submit(opened, f"client {i % 2}", asked("Hi")) for i in range(6)]
    assert len({stream.results()[0].text for stream in streams}) == 1
    assert max(each.total() for each in seen) == 2
    assert max(max(each.values()) for each in seen) == 1
    with pytest.raises(InferenceRefused):
        opened.submit(asked("Hi", n=3))
    assert settled(opened)


def test_decoder_answers_after_failed_step(
    opened: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = opened._backend.step

    def fail(*arguments: Any) -> Any:
        monkeypatch.setattr(opened._backend, "step", step)
        raise RuntimeError("a secret of ours")

    monkeypatch.setattr(opened._backend, "step", fail)
    with pytest.raises(InferenceFailed) as failed:
        answer(opened, asked("Hi"))
    assert failed.value.code == "ModelError"
    assert settled(opened)
    assert answer(opened, asked("Hi")).tokens == 24


def test_failed_prompt_open_leaves_running_answer_unchanged(
    opened: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter that was removed fails its request only."""
    other = opened.submit(asked("Hi", max_tokens=200, logit_bias={1: -100.0}))
    next(other)
    begin = opened._backend.open

    def fail(*arguments: Any) -> Any:
        monkeypatch.setattr(opened._backend, "open", begin)
        raise KeyError("a secret of ours")

    monkeypatch.setattr(opened._backend, "open", fail)
    with pytest.raises(InferenceFailed):
        answer(opened, asked("Hi"))
    assert other.results()[0].tokens == 200
    assert settled(opened)


def test_no_numbers_are_no_answer(opened: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """At temperature 0, too."""
    step = opened._backend.step
    monkeypatch.setattr(
        opened._backend, "step", lambda *given: torch.full_like(step(*given), torch.nan)
    )
    with pytest.raises(InferenceFailed) as failed:
        answer(opened, asked("Hi", max_tokens=8, temperature=0))
    assert failed.value.code == "ModelError"


def test_closed_decoder_fails_with_service_unavailable(
    tiny_model_folder: Path, in_float32: None
) -> None:
    made = Decoder.open(find(str(tiny_model_folder)), CacheBudget(MEMORY))
    stream = made.submit(asked("Hi", max_tokens=900, logit_bias={1: -100.0}))
    next(stream)
    made.close()
    with pytest.raises(InferenceFailed):
        list(stream)
    with pytest.raises(InferenceFailed) as refused:
        made.submit(asked("Hi"))
    assert refused.value.code == "ServiceUnavailable"


def test_queue_timeout_is_throttled_except_background_work(
    opened: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = ModelLimits(answers=1, queue_seconds=0.2)
    monkeypatch.setattr(opened, "limits", limits)
    endless = asked("Hi", max_tokens=900, logit_bias={1: -100.0})
    busy = opened.submit(endless)
    next(busy)
    late = opened.submit(asked("Hi"))
    with working_for("", background=True):
        patient = opened.submit(asked("Hi"))
    with pytest.raises(InferenceFailed) as refused:
        late.results()
    assert refused.value.code == "Throttling"
    assert next(busy)
    busy.close()
    assert patient.results()[0].tokens > 0
    assert settled(opened)


def test_answer_over_time_limit_ends_with_timeout(
    opened: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = answer(opened, asked("fox"))
    endless = asked("Hi", max_tokens=900, logit_bias={1: -100.0}, n=2)
    late = opened.submit(endless)
    next(late)
    (job,) = opened._at_work()
    other = opened.submit(asked("fox"))
    job.began -= opened.limits.answer_seconds
    pieces: list[Any] = []
    with pytest.raises(InferenceFailed) as ended:
        pieces.extend(late)
    assert ended.value.code == "ModelTimeout"
    assert other.results()[0] == expected
    assert settled(opened)


def test_completion_keeps_first_space(
    tiny_llama: Callable[..., Any], tmp_path: Path, in_float32: None
) -> None:
    tokenizer = sentencepiece("normalizer", MISTRAL)
    tiny_llama(vocab_size=len(tokenizer), eos_token_id=2).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    made = Decoder.open(find(str(tmp_path)), CacheBudget(MEMORY))
    (token,) = tokenizer.encode("is", add_special_tokens=False)
    fields = {"max_tokens": 2, "logit_bias": {token: 100.0}}
    ids = tuple(made.encode("What"))
    for prompt in ("What", ids):
        request = GenerationRequest(prompt=prompt, **fields)
        assert answer(made, request).text == " is is"
        pieces = [e.text for e in made.submit(request) if isinstance(e, TokenChunk)]
        assert pieces == [" is", " is"]
    assert answer(made, asked("What", **fields)).text == "is is"  # the template writes the space
    made.close()


@pytest.mark.slow
def test_deterministic_decoder_runs_single_sequences(
    tiny_model_folder: Path, in_float32: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Decoder.open(find(str(tiny_model_folder)), CacheBudget(MEMORY), deterministic=True)
    requests = [
        asked(QUESTIONS[i % 5], temperature=0.8, seed=i, n=1 + i % 2, top_logprobs=1)
        for i in range(8)
    ]
    alone = [made.submit(request).results() for request in requests]
    sizes: list[int] = []
    backend: Any = made._backend
    for name in ("prefill", "step"):
        honest = getattr(backend, name)
        monkeypatch.setattr(
            backend,
            name,
            lambda states, *rest, run=honest: (sizes.append(len(states)), run(states, *rest))[1],
        )
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda request: made.submit(request).results(), requests))
    made.close()
    assert together == alone, "also each log-probability, to the last bit"
    assert {*sizes} == {1} and len(sizes) > 50
