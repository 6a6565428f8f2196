"""Errors of invalid configurations, and a memory limit for the networks they describe."""

from __future__ import annotations

import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from luthier.errors import ModelRefused, RefusedInput, is_out_of_memory
from luthier.models.formats.external import CONFIG

MOST_MEMORY = 256 << 20
"""Memory limit for creating a network on the meta device, in bytes. Networks with 13,000 modules
need 40 MB."""

MOST_MODULES = 20_000
"""Limit of modules in a network. Mixtures of experts store all experts of a layer in one module."""

DOES_NOT_RUN = "The network of type {} does not run with this config.json"


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Limit the memory of this process while creating the network of an imported model.

    The limit applies to the whole process. Import libraries before the block.

    Raises:
        ModelRefused: if the block allocates more than :data:`MOST_MEMORY`.
    """
    import psutil

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    # The kernel's limit is absolute, so it includes the memory that the process already uses.
    limit = psutil.Process().memory_info().data + MOST_MEMORY
    # A lower limit that is already set stays in force.
    known = [each for each in (soft, hard) if each != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min([limit, *known]), hard))
    try:
        yield
    except MemoryError as error:
        raise ModelRefused(
            CONFIG, "model.network",
            f"Creating the network needs more than {MOST_MEMORY >> 20:,} MiB of memory.",
            "Use the config.json that belongs to the weights.",
        ) from error  # fmt: skip
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


@contextmanager
def bounded_modules() -> Iterator[None]:
    """Limit the number of modules that this thread creates.

    Python 3.13 needs minutes to reach the memory limit.

    Raises:
        ModelRefused: for more than :data:`MOST_MODULES` modules.
    """
    from torch.nn.modules.module import register_module_module_registration_hook

    count, own = 0, threading.get_ident()

    def count_module(*_: object) -> None:
        nonlocal count
        count += threading.get_ident() == own
        if count > MOST_MODULES:
            raise ModelRefused(
                CONFIG, "model.modules",
                f"The configured network has more than {MOST_MODULES:,} modules.",
                "Use the config.json that belongs to the weights.",
            )  # fmt: skip

    hook = register_module_module_registration_hook(count_module)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def reject_configuration(refusal: type[RefusedInput], message: str) -> Iterator[None]:
    """Convert errors that libraries raise for an invalid configuration into ``refusal``.

    Libraries rarely validate a configuration: an invalid value fails at its first use, with any
    error type. Errors that start in luthier's own code stay unchanged, except in the modules of
    ``_INTERPRET``.
    """
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except (
        ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError,
        RuntimeError, StrictDataclassError, TypeError, ValueError,
    ) as error:  # fmt: skip
        if is_out_of_memory(error):
            raise  # free memory does not depend on the configuration
        # Bugs of luthier must not be reported as faults of the user's configuration.
        if isinstance(error, _PROGRAMMING) and _starts_in_own_code(error):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise refusal(f"{message}: {reason[:400]}", rule="config.rejected") from error


_PROGRAMMING = (AssertionError, AttributeError, LookupError, TypeError)
_INTERPRET = (
    "luthier.models.networks.classic",
    "luthier.media.networks",
    "luthier.models.networks.modalities",
    "luthier.models.networks.heads",
)
"""Modules of luthier that interpret configurations."""


def _starts_in_own_code(error: BaseException) -> bool:
    """Return True if luthier code that does not interpret configurations raised ``error``.

    An AttributeError belongs to the code that created the object: outputs of some families have no
    hidden states.
    """
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    module = str(frame.tb_frame.f_globals.get("__name__")) if frame is not None else ""
    if isinstance(error, AttributeError):
        module = type(error.obj).__module__
    return module.startswith("luthier.") and not module.startswith(_INTERPRET)
