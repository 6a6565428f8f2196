"""What drawing somebody else's network may take."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import FunctionType

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput

from luthier.errors import ModelRefused, UnknownModel
from luthier.models import bounds
from luthier.models.bounds import drawing_bounds, refuse_configuration
from luthier.types import Message


def test_modules_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MOST_MODULES", 100)
    with drawing_bounds():
        nn.ModuleList(nn.Identity() for _ in range(100))
    with pytest.raises(ModelRefused, match="more than 100 modules"), drawing_bounds():
        nn.ModuleList(nn.Identity() for _ in range(101))
    nn.ModuleList(nn.Identity() for _ in range(101))


def test_modules_of_another_thread_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MOST_MODULES", 10)
    with drawing_bounds(memory=False), ThreadPoolExecutor(1) as other:
        other.submit(lambda: nn.ModuleList(nn.Identity() for _ in range(100))).result()


LARGE = """
import resource
from luthier.errors import ModelRefused
from luthier.models.bounds import drawing_bounds

before = resource.getrlimit(resource.RLIMIT_DATA)
try:
    with drawing_bounds():
        bytearray(300 << 20)
except ModelRefused as refused:
    assert "256 MiB of memory" in str(refused), refused
else:
    raise AssertionError("not refused")
assert resource.getrlimit(resource.RLIMIT_DATA) == before
with drawing_bounds():
    bytearray(100 << 20)
bytearray(300 << 20)
"""


@pytest.mark.slow
def test_memory_is_bounded_in_the_block_alone() -> None:
    """In a process of its own: what this one has been given and does not use would be enough."""
    done = subprocess.run(
        [sys.executable, "-c", LARGE], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_time_is_bounded_even_where_errors_are_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MOST_SECONDS", 0.2)
    before = signal.getsignal(signal.SIGPROF)
    with pytest.raises(ModelRefused, match=r"0\.2 seconds"), drawing_bounds():
        _swallow()
    assert signal.getsignal(signal.SIGPROF) == before
    assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)


def _swallow() -> None:
    with suppress(ModelRefused):
        _compute(5)
    _compute(5)


def _compute(seconds: float) -> None:
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass


def test_a_full_gpu_is_no_fault_of_a_configuration() -> None:
    refused = pytest.raises(UnknownModel, match="no network: no such size")
    with refused, refuse_configuration(UnknownModel, "no network"):
        raise RuntimeError("no such size")
    with pytest.raises(torch.OutOfMemoryError), refuse_configuration(UnknownModel, "no network"):
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("place", ["transformers.models.odd", "luthier.models.nets.odd"])
def test_what_interprets_a_configuration_is_refused_for_its_errors(place: str) -> None:
    with pytest.raises(UnknownModel), refuse_configuration(UnknownModel, "no network"):
        _function_of(place)()


def test_an_error_of_our_own_is_no_fault_of_a_configuration() -> None:
    with pytest.raises(TypeError), refuse_configuration(UnknownModel, "no network"):
        _function_of("luthier.models.load")()


def test_what_an_object_lacks_is_the_fault_of_who_made_it() -> None:
    with pytest.raises(UnknownModel), refuse_configuration(UnknownModel, "no network"):
        _function_of("luthier.models.layouts", lambda: ImageClassifierOutput().last_hidden_state)()  # type: ignore[attr-defined]
    with pytest.raises(AttributeError), refuse_configuration(UnknownModel, "no network"):
        _function_of("luthier.models.layouts", lambda: Message("user", "a").states)()  # type: ignore[attr-defined]


def _function_of(module: str, code: Callable[[], object] = lambda: len(5)) -> Callable[[], object]:  # type: ignore[arg-type]
    """The function as one of that module; it raises a TypeError where none is given."""
    return FunctionType(code.__code__, {**globals(), "__name__": module})
