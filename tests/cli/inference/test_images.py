"""``luthier sample``: output paths are checked before sampling."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from command_line import Answer
from PIL import Image

from luthier.cli.terminal.console import check_output
from luthier.errors import RecipeError


@pytest.mark.parametrize(
    ("output", "kind"),
    [
        ("full", "RecipeError"),
        ("full/1.png", "UnknownModel"),
        ("full/notes.txt", "RecipeError"),
        ("samples.JPG", "RecipeError"),
        ("samples.gif", "RecipeError"),
        ("samples.mp4", "RecipeError"),
        ("run-1.2", "UnknownModel"),
        ("empty", "UnknownModel"),
        ("new/folder", "UnknownModel"),
    ],
)
def test_sample_output_must_be_image_or_new_folder(
    luthier_home: Path, tmp_path: Path, output: str, kind: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    answer = Answer("sample", "small-vae:none", "--output", str(tmp_path / output), "--json")
    assert answer.code == 2 and answer.json()["error"]["type"] == kind


def test_invalid_image_file_is_reported(luthier_home: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "b.png").write_bytes(b"just words")
    answer = Answer("sample", "small-vae", "--reconstruct", str(tmp_path / "photos"),
                    "--output", str(tmp_path / "copy.png"))  # fmt: skip
    assert answer.code == 2 and "photos/b.png" in answer.err and "Traceback" not in answer.err


def test_reconstruct_output_must_be_supported_image(luthier_home: Path, tmp_path: Path) -> None:
    copies = str(tmp_path / "copies.gif")
    answer = Answer("sample", "small-vae:none", "--reconstruct", "x", "--output", copies)
    assert answer.code == 2 and "copies.png" in answer.err


def test_output_in_unwritable_folder_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, right: Path(path) != tmp_path)
    with pytest.raises(RecipeError) as refused:
        check_output(tmp_path / "samples.png")
    assert refused.value.rule == "file.unwritable"


@pytest.mark.parametrize("ending", ["bmp", "webp"])
def test_reconstruct_accepts_image_formats(luthier_home: Path, tmp_path: Path, ending: str) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / f"one.{ending}")
    image, copies = str(tmp_path / f"one.{ending}"), str(tmp_path / "copies.png")
    answer = Answer("sample", "small-vae:none", "--reconstruct", image, "--output", copies)
    assert answer.code == 2 and "small-vae:none" in answer.err
