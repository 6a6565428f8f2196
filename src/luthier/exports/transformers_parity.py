"""Comparison of an exported network, as transformers loads it, with the network that luthier runs.

transformers draws random weights for names that a folder lacks, and reports no error. The
comparison loads the export as a user does, and runs one forward pass.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.errors import RecipeError
from luthier.models.config_errors import reject_configuration
from luthier.models.networks.heads import HeadKind, auto_class, head_kind
from luthier.models.networks.probe import compute_in_float32, first_output, relative_error

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LARGEST_ERROR = 1e-3
"""Largest allowed relative difference of the outputs, computed in float32. The weights are equal
bit for bit."""
_GENERATORS: tuple[HeadKind, ...] = ("autoencoding", "adversarial", "denoising")
"""Heads of luthier's own networks and of diffusers pipelines, whose outputs are random."""


def expected_output(model: Any) -> Tensor | None:
    """Return the first output of ``model`` for fixed inputs, in float32, on the CPU.

    Returns ``None`` for networks that transformers does not load.
    """
    if head_kind(model) in _GENERATORS:
        return None
    with compute_in_float32(model):
        return first_output(model).cpu()


def check_loads(
    folder: Path,
    model: str,
    kind: HeadKind,
    expected: Tensor,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Load the network in ``folder`` with transformers and compare the output with ``expected``.

    Args:
        model: Id of the model, for the error.

    Raises:
        RecipeError: if transformers cannot load the network or computes another output.
    """
    from transformers import AutoConfig

    advice = "The export was removed. Export the adapter without `--merged`, or report this model."
    message = f"transformers cannot load the export of {model}. {advice}"
    with reject_configuration(RecipeError, message):
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        found, loaded = auto_class(config, kind).from_pretrained(
            str(folder), dtype=dtype, trust_remote_code=False, output_loading_info=True
        )
    network = found.to(device)
    with compute_in_float32(network):
        error = relative_error(first_output(network).cpu(), expected)
    if error < LARGEST_ERROR:  # false for nan
        return
    lost = ", ".join(sorted(loaded["missing_keys"])[:3])
    missing = f" Weights that transformers does not find: {lost}." if lost else ""
    raise RecipeError(
        f"outputs of {model} in transformers differ by {error:.2g} (relative).{missing} {advice}",
        rule="export.differs",
    )
