"""A decoder of the tiny model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from decoding import MEMORY

from luthier.engine import machine as machines
from luthier.engine.machine import Machine
from luthier.inference.decoder import Decoder
from luthier.inference.memory import CacheBudget
from luthier.inference.prefix_cache import PrefixCache
from luthier.library.models import find

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def opened(tiny_model_folder: Path) -> Iterator[Decoder]:
    """Yield a float32 decoder for the tests of a module."""
    with pytest.MonkeyPatch.context() as patch:
        machine = Machine(CPU, torch.float32, 1, "a test")
        patch.setattr(machines, "choose_machine", lambda *arguments: machine)
        memory = CacheBudget(MEMORY)
        stored = find(str(tiny_model_folder))
        made = Decoder.open(stored, memory, prefixes=PrefixCache(memory))
    yield made
    made.close()
