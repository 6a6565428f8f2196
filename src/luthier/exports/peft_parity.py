"""Comparison of an exported LoRA adapter under PEFT with the model that luthier serves.

PEFT reads ``target_modules`` by rules of each family: PEFT rejects layers of Mamba, and matches the
names of experts to wrong layers. An adapter that PEFT loads in part is a worse model without any
error.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.adaptations.lora import LoRA
from luthier.errors import RecipeError
from luthier.library.models import load
from luthier.models.formats.save import read_adapter, whole_model
from luthier.models.networks.probe import first_output

if TYPE_CHECKING:
    from torch import Tensor

    from luthier.library.models import StoredModel

LARGEST_ERROR = 1e-3
"""Largest allowed relative difference of the outputs in float32."""
SMALLEST_EFFECT = 0.05
"""Largest allowed difference as a share of the adapter's effect on the outputs."""
NAMED = 3
"""Number of modules that an error message names."""


def check_peft(stored: StoredModel, folder: Path) -> None:
    """Load the adapter in ``folder`` with PEFT and compare the outputs with the outputs of ``stored``.

    Raises:
        RecipeError: naming the modules that PEFT does not load, or the difference.
    """
    import torch
    from peft import PeftModel

    assert stored.parent is not None
    cpu = torch.device("cpu")
    fix = "Export the model merged, or tune with other `adaptation.targets`"
    head = stored.objective.head()
    base: Any = load(stored.parent, torch.float32, cpu, head)
    plain = first_output(base)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # missing weights are named below
            adapted: Any = PeftModel.from_pretrained(whole_model(base), str(folder))
    except Exception as error:  # rules of a family raise any exception
        raise RecipeError(
            f"PEFT cannot load the adapter of {stored.id}: {str(error).splitlines()[0]} {fix}"
        ) from error
    lost = _lost_modules(adapted, read_adapter(folder))
    if lost:
        more = f" and {len(lost) - NAMED} more" if len(lost) > NAMED else ""
        raise RecipeError(
            f"PEFT does not load these modules of {stored.id}: {', '.join(lost[:NAMED])}{more}. "
            f"{fix}",
            rule="export.modules",
        )
    if not isinstance(stored.adaptation, LoRA):
        return  # QLoRA was trained on a quantized base, which PEFT does not know
    outputs = first_output(adapted)
    del adapted, base
    expected = first_output(load(stored, torch.float32, cpu, head))
    change = float((outputs - expected).norm())
    size, effect = float(expected.norm()), float((expected - plain).norm())
    if change > LARGEST_ERROR * size or change > max(SMALLEST_EFFECT * effect, 1e-5 * size):
        raise RecipeError(
            f"outputs of {stored.id} under PEFT differ by {change / size:.2g} (relative). {fix}",
            rule="export.differs",
        )


def _lost_modules(adapted: Any, saved: dict[str, Tensor]) -> list[str]:
    """Return the modules whose saved weights are missing in the network under PEFT."""
    import torch

    loaded = {  # a new head stands beside the original one
        name.replace(".modules_to_save.default.", ".").replace(".default.", "."): weight
        for name, weight in adapted.state_dict().items()
    }
    lost = dict[str, None]()
    for name, weight in saved.items():
        own = loaded.get(name)
        if own is None or own.shape != weight.shape or not torch.equal(own.float(), weight.float()):
            lost[name.partition(".lora_")[0].removeprefix("base_model.model.")] = None
    return sorted(lost)
