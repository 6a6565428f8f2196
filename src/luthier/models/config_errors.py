"""Configurations that describe no network, or one that takes too much memory to draw."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager

from luthier.errors import ModelRefused, RefusedInput
from luthier.models.external import CONFIG

MOST_MEMORY = 256 << 20
"""Bytes that drawing a network without its numbers may take; networks of 13,000 modules take 40 MB."""

DOES_NOT_RUN = "the network of type {} does not run as its config.json describes it"


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Bound the memory of this process while a block draws the network of an imported model.

    Import the libraries before the block. The bound is one of the whole process.

    Raises:
        ModelRefused: if the block takes more than :data:`MOST_MEMORY`.
    """
    import psutil

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = psutil.Process().memory_info().data + MOST_MEMORY
    known = [each for each in (soft, hard) if each != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min([limit, *known]), hard))
    try:
        yield
    except MemoryError as error:
        raise ModelRefused(
            CONFIG, "model.network",
            f"Drawing the network that it describes takes more than {MOST_MEMORY >> 20:,} MiB of "
            "memory.",
            "Take the config.json that belongs to the weights.",
        ) from error  # fmt: skip
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


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
        raise refusal(f"{message}: {reason[:400]}", rule="config.rejected") from error


_PROGRAMMING = (AssertionError, AttributeError, LookupError, TypeError)
_INTERPRET = (
    "luthier.models.nets",
    "luthier.media.networks",
    "luthier.models.modalities",
    "luthier.models.heads",
)
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
