"""Names of layers in a multimodal language model and in the text part that luthier loads."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.files import read_json, write_bytes
from luthier.models.formats.external import ADAPTER_CONFIG
from luthier.models.formats.save import ADAPTER, read_adapter
from luthier.models.formats.tensors import save_tensors

if TYPE_CHECKING:
    from luthier.models.folder import ModelFolder

NAMES = {
    r"^language_model\.(lm_head|model)\.": r"\1.",
    r"^model\.(?:language_model|text_model)\.": "model.",
}
"""Patterns that rename layers of a multimodal model, as transformers 4 and transformers 5 save the
model, to the names of the text part."""
_PEFT = "base_model.model."


def name_in_text_part(name: str) -> str:
    """Return the name of a layer of the multimodal model in the text part."""
    for pattern, replacement in NAMES.items():
        name = re.sub(pattern, replacement, name)
    return name


def fit_to_text_part(adapter: Path) -> None:
    """Rename the layers of a PEFT adapter on a multimodal model to the names of the text part."""
    _rename(adapter, name_in_text_part)


def fit_to_whole(adapter: Path, network: ModelFolder) -> None:
    """Rename the layers of a PEFT adapter on the text part to the names in the multimodal model of
    ``network``."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(str(network.path), trust_remote_code=False)
    with torch.device("meta"):
        whole = getattr(transformers, config.architectures[0])(config)
    names = ((name_in_text_part(name), name) for name, _ in whole.named_modules())
    text, other = next((own, name) for own, name in names if own != name)
    same = text.rpartition(".")[2]
    before, after = text.removesuffix(same), other.removesuffix(same)
    _rename(adapter, lambda name: re.sub(rf"^{re.escape(before)}", after, name))


def _rename(adapter: Path, rename: Callable[[str], str]) -> None:
    weights = {
        _PEFT + rename(name.removeprefix(_PEFT)): weight
        for name, weight in read_adapter(adapter).items()
    }
    # The tensors may be views of the file, so the new file must not overwrite the old bytes.
    (adapter / ADAPTER).unlink()
    save_tensors(weights, adapter / ADAPTER, metadata={"format": "pt"})
    fields = read_json(adapter / ADAPTER_CONFIG)
    for key in ("target_modules", "target_parameters"):
        if isinstance(fields.get(key), list):
            fields[key] = [rename(name) for name in fields[key]]
    text = json.dumps(fields, indent=2, sort_keys=True)
    write_bytes(adapter / ADAPTER_CONFIG, text.encode())
