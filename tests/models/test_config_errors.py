"""Errors of libraries for invalid configurations."""

from __future__ import annotations

import errno
from collections.abc import Callable
from types import FunctionType

import pytest
import torch
from transformers.modeling_outputs import ImageClassifierOutput

from luthier.errors import OutOfMemory, UnknownModel, memory_errors
from luthier.models.config_errors import reject_configuration
from luthier.types import Message

NETWORK = "luthier.models.networks.layouts"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_shortage_of_memory_is_no_fault_of_a_configuration(error: Exception) -> None:
    caught = pytest.raises(UnknownModel)
    with caught as refused, reject_configuration(UnknownModel, "no network"):
        raise RuntimeError("no such size")
    assert refused.value.rule == "config.rejected"
    with pytest.raises(type(error)), reject_configuration(UnknownModel, "no network"):
        raise error
    with pytest.raises(OutOfMemory), memory_errors():
        raise error


@pytest.mark.parametrize(
    "place", ["transformers.models.odd", "luthier.models.networks.classic.odd"]
)
def test_configuration_error_in_network_code_is_refused(place: str) -> None:
    with pytest.raises(UnknownModel), reject_configuration(UnknownModel, "no network"):
        _function_of(place)()


def test_internal_error_is_not_a_configuration_error() -> None:
    with pytest.raises(TypeError), reject_configuration(UnknownModel, "no network"):
        _function_of("luthier.models.load")()


def test_missing_attribute_is_refused_only_for_network_outputs() -> None:
    with pytest.raises(UnknownModel), reject_configuration(UnknownModel, "no network"):
        _function_of(NETWORK, lambda: ImageClassifierOutput().last_hidden_state)()  # type: ignore[attr-defined]
    with pytest.raises(AttributeError), reject_configuration(UnknownModel, "no network"):
        _function_of(NETWORK, lambda: Message("user", "a").states)()  # type: ignore[attr-defined]


def _function_of(module: str, code: Callable[[], object] = lambda: len(5)) -> Callable[[], object]:  # type: ignore[arg-type]
    """Return ``code`` as a function of ``module``; raises a TypeError by default."""
    return FunctionType(code.__code__, {**globals(), "__name__": module})
