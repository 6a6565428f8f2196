"""Teachers of every family and their own outputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from remembered_probes import FOLDER

from luthier.models.folder import ModelFolder
from luthier.models.load import load_model
from luthier.models.networks.heads import Head, decoder_of, head_in, head_kind


@pytest.fixture(autouse=True)
def own_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probe the networks of each test."""
    monkeypatch.delenv(FOLDER)


@pytest.fixture(scope="session")
def teacher_of(family_folder: Callable[[str], Path]) -> Callable[..., Any]:
    """``teacher_of(family, head)``: a network with all weights away from where some start (0, 1)."""

    def teacher(family: str, head: Head | None = None) -> Any:
        folder = family_folder(family)
        torch.manual_seed(3)
        head = head or head_in(ModelFolder(folder).config(Head("causal_lm")))
        model: Any = load_model(folder, torch.float32, torch.device("cpu"), head).eval()
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight) * 0.05)
        return model

    return teacher


@pytest.fixture(scope="session")
def answers() -> Callable[[Any], torch.Tensor]:
    """Return ``answers(model)``: logits, scores or states for two rows of tokens."""

    @torch.no_grad()
    def told(model: Any) -> torch.Tensor:
        ids = torch.randint(150, (2, 9), generator=torch.Generator().manual_seed(1)) + 5
        ids[:, -1] = model.config.eos_token_id or 1
        writes = decoder_of(model) and head_kind(model) == "causal_lm"
        more: dict[str, Any] = {"decoder_input_ids": ids} if writes else {}
        known = not hasattr(model.config, "segment_length")
        if known and getattr(model.config, "use_cache", False):
            more["use_cache"] = False  # the cache counts layers by old numbers
        found = model.eval()(input_ids=ids, **more)
        states = head_kind(model) == "embedding"
        out: torch.Tensor = found.last_hidden_state if states else found.logits
        return out

    return told
