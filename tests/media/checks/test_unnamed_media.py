"""Folders with images that are missing in the table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from luthier.data.convert import convert
from luthier.data.rows import RowReader, load_rows
from luthier.errors import DataError


def images(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        pixels = np.full((8, 8, 3), number * 20, np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")


def test_unnamed_images_are_counted(tmp_path: Path) -> None:
    images(tmp_path / "img", 5)
    lines = ["file_name,label", *(f"img/{n}.png,{'ab'[n % 2]}" for n in range(3))]
    (tmp_path / "metadata.csv").write_text("\n".join(lines))
    reader = RowReader(tmp_path)
    assert len(reader.read_all()) == 3
    (found,) = reader.warnings
    assert (found.rule, found.file) == ("media.unnamed", str(tmp_path))
    assert "img/3.png, img/4.png" in found.message
    lines += ["img/3.png,a", "img/4.png,b"]
    (tmp_path / "metadata.csv").write_text("\n".join(lines))
    reader = RowReader(tmp_path)
    assert len(reader.read_all()) == 5 and not reader.warnings


def test_converted_paths_are_relative_to_new_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        images(tmp_path / "photos" / name, 2)
    target = tmp_path / "rows.jsonl"
    convert(tmp_path / "photos", target)
    rows = load_rows(target)
    assert {each.labels[0] for each in rows} == {"a", "b"}
    assert all(each.media.read() for each in rows)
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError) as caught:
        convert(tmp_path / "photos", tmp_path / "out" / "rows.jsonl")
    assert {each.rule for each in caught.value.problems} == {"convert.media"}
