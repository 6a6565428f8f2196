"""Bounds on what drawing a network may take that somebody else's configuration describes.

A ``config.json`` of a few bytes can ask for a million experts, labels or positions, each of which costs
time and memory before a single weight is looked at, and every family has other names for them. So the
numbers of layers, which all families have, are looked at by name (``luthier.models.outside``), and what
is built is bounded whatever it is called.
"""

from __future__ import annotations

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from luthier.errors import ModelRefused, RefusedInput
from luthier.models.outside import CONFIG

MOST_MODULES = 50_000
"""Modules of a network; one with 1,000 layers of 13 has 13,000."""
MOST_SECONDS = 20
"""Of the process's own computing; large networks take 2."""
MOST_MEMORY = 256 << 20
"""Bytes beside what the process has; networks of 13,000 modules take 40 MB."""

DOES_NOT_RUN = "the network of type {} does not run as its config.json describes it"


@contextmanager
def drawing_bounds(memory: bool = True) -> Iterator[None]:
    """Bounds on modules, time and memory for a block that draws a network without its numbers.

    What the block imports counts, too: import the libraries before. Modules are those of this thread;
    time is bounded in the main thread alone, which hears signals. The bound on ``memory`` is one of the
    whole process, whatever its threads do.

    Raises:
        ModelRefused: where the block goes beyond one of them.
    """
    with ExitStack() as bounds:
        bounds.enter_context(_modules())
        if memory:
            bounds.enter_context(_memory())
        if threading.current_thread() is threading.main_thread():
            bounds.enter_context(_seconds())
        try:
            yield
        except MemoryError as error:
            raise _too_much(f"more than {MOST_MEMORY >> 20:,} MiB of memory") from error


@contextmanager
def refuse_configuration(refusal: type[RefusedInput], message: str) -> Iterator[None]:
    """Turn what libraries raise on configurations that describe no network into ``refusal``.

    They check little of a configuration and end where they first compute with what is wrong, so the
    errors are of every kind. An error of programming that starts in code of luthier which does not
    interpret configurations is no fault of one, and stays as it is.
    """
    import torch
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except torch.OutOfMemoryError:
        raise  # of a GPU, whatever the configuration says
    except (
        ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError,
        RuntimeError, StrictDataclassError, TypeError, ValueError,
    ) as error:  # fmt: skip
        if isinstance(error, _PROGRAMMING) and _starts_in_own_code(error):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise refusal(f"{message}: {reason[:400]}") from error


_PROGRAMMING = (AssertionError, AttributeError, LookupError, TypeError)
_INTERPRET = ("luthier.models.nets", "luthier.models.modalities", "luthier.models.heads")
"""Modules of luthier in which a wrong value of a configuration can show first."""


def _starts_in_own_code(error: BaseException) -> bool:
    """Whether code of luthier raised ``error`` that does not interpret configurations.

    What an object lacks is the fault of who made it: outputs of some families have no states to read.
    """
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    module = str(frame.tb_frame.f_globals.get("__name__")) if frame is not None else ""
    if isinstance(error, AttributeError):
        module = type(error.obj).__module__
    return module.startswith("luthier.") and not module.startswith(_INTERPRET)


@contextmanager
def _modules() -> Iterator[None]:
    from torch.nn.modules.module import register_module_module_registration_hook

    count, own = 0, threading.get_ident()

    def count_module(*_: Any) -> None:
        nonlocal count
        # torch has one list of hooks for all threads.
        count += threading.get_ident() == own
        if count > MOST_MODULES:
            raise _too_much(f"more than {MOST_MODULES:,} modules")

    hook = register_module_module_registration_hook(count_module)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _memory() -> Iterator[None]:
    import psutil

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = psutil.Process().memory_info().data + MOST_MEMORY
    known = [each for each in (soft, hard) if each != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min([limit, *known]), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


@contextmanager
def _seconds() -> Iterator[None]:
    def over(number: int, frame: Any) -> None:
        raise _too_much(f"more than {MOST_SECONDS} seconds")

    before = signal.signal(signal.SIGPROF, over)
    # Again and again: a library may swallow the first one.
    signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _too_much(what: str) -> ModelRefused:
    return ModelRefused(
        CONFIG, "model.network", f"Drawing the network that it describes takes {what}.",
        "Take the config.json that belongs to the weights.",
    )  # fmt: skip
