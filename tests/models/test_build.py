"""Errors for invalid configurations, including checks of other libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from luthier.errors import RecipeError
from luthier.models.build import build, build_speller
from luthier.models.tokenizer import load_tokenizer


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "llama", "hidden_size": 33},
        {"model_type": "llama", "hidden_size": "wide"},
        {"model_type": "transfo_xl", "segment_length": 0},
    ],
)
def test_invalid_sizes_are_refused(fields: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as refused:
        build(fields, 0, tmp_path / "new")
    assert refused.value.rule == "config.rejected"
    assert not (tmp_path / "new").exists()


def test_elmo_tokenizer_loads_without_type_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.utils import logging

    sizes = {"filters": [[1, 4]], "projection_size": 8, "cell_size": 16}
    build_speller({"model_type": "elmo", **sizes}, 0, tmp_path)
    # As in a process without a loaded ELMo.
    CONFIG_MAPPING._extra_content.pop("elmo")
    logging.enable_propagation()
    try:
        assert load_tokenizer(tmp_path).encode("a")[1:-1] == [224, 68]
    finally:
        logging.disable_propagation()
    assert not caplog.records
    with pytest.raises(RecipeError) as refused:
        build_speller({"model_type": "elmo", "filters": []}, 0, tmp_path)
    assert refused.value.rule == "config.rejected"
