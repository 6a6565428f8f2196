"""Folders, archives and arrays as rows, and tables that name files."""

from __future__ import annotations

import base64
import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from luthier.data.files.sources import files_of, hash_of
from luthier.data.inputs import Media
from luthier.data.prompts import input_row
from luthier.data.rows import Columns, load_rows
from luthier.data.shapes.media import BareAudio, BareImage, LabelledAudio, LabelledImage, MediaRow
from luthier.data.shapes.texts import RawText
from luthier.errors import DataError
from luthier.media.decoding import read_pixels


def png(level: int = 0) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), (level,) * 3).save(stream, "PNG")
    return stream.getvalue()


def write(folder: Path, *names: str) -> Path:
    """Write an image of a different gray for each name."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(number))
    return folder


def pack(path: Path, *names: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for number, name in enumerate(names):
            archive.writestr(name, png(number))
    return path


def rows_of(source: Path, columns: Columns | None = None) -> Sequence[Any]:
    return load_rows(source, columns)


def labels_of(source: Path) -> dict[str, str | tuple[str, ...]]:
    """Return labels by file name."""
    found = {}
    for row in rows_of(source):
        assert isinstance(row, LabelledImage)
        found[row.media.name] = row.label
    return found


def rules_of(source: Path) -> set[str]:
    with pytest.raises(DataError) as refused:
        rows_of(source)
    return {problem.rule for problem in refused.value.problems}


@pytest.mark.parametrize("ending", ["parquet", "npz", "zip"])
def test_an_empty_file_is_called_empty(tmp_path: Path, ending: str) -> None:
    (tmp_path / f"a.{ending}").touch()
    assert rules_of(tmp_path / f"a.{ending}") == {"file.empty"}


def test_folder_name_is_the_label(tmp_path: Path) -> None:
    folder = write(tmp_path / "pets", "cat/2.png", "cat/1.PNG", "dog/deep/er.png", "à b/x.png")
    assert labels_of(folder) == {
        "pets/cat/1.PNG": "cat",
        "pets/cat/2.png": "cat",
        "pets/dog/deep/er.png": "dog",
        "pets/à b/x.png": "à b",
    }
    levels = {row.media.name: read_pixels(row.media)[0, 0, 0]
              for row in rows_of(folder) if isinstance(row, MediaRow)}  # fmt: skip
    assert levels["pets/cat/2.png"] == 0 and levels["pets/cat/1.PNG"] == 1
    assert [row.line for row in rows_of(folder)] == [1, 2, 3, 4]


def test_files_without_folders_have_no_labels(tmp_path: Path) -> None:
    rows = rows_of(write(tmp_path, "b.png", "a.png"))
    assert [type(row) for row in rows] == [BareImage, BareImage]
    (tmp_path / "sounds").mkdir()
    for name in ("a.wav", "b.flac"):
        (tmp_path / "sounds" / name).write_bytes(b"x")
    sounds = rows_of(tmp_path / "sounds")
    assert [type(row) for row in sounds] == [BareAudio, BareAudio]


CLUTTER = (
    ".git/x.png", "cat/.thumb.png", "__MACOSX/cat/._1.png", "cat/.ipynb_checkpoints/1-checkpoint.png",
    "cat/.DS_Store", "cat/Thumbs.db", "README.md", "LICENSE-MIT.txt", "dataset_info.json", "_SUCCESS",
)  # fmt: skip
NAMED = ("_other/a.png", "cat/_DSC1001.JPG", "cat/license-plate.png", "dog/__1.png")


def test_only_hidden_files_and_clutter_are_ignored(tmp_path: Path) -> None:
    found = {name: name.split("/")[0] for name in NAMED}
    folder = write(tmp_path / "x", *NAMED, *CLUTTER)
    assert labels_of(folder) == {f"x/{name}": label for name, label in found.items()}
    archive = pack(tmp_path / "x.zip", *NAMED, *CLUTTER)
    assert labels_of(archive) == {f"x.zip/{name}": label for name, label in found.items()}


@pytest.mark.parametrize(
    "name", ["cat/2.heic", "notes.txt", "labels.json", "/cat/2.png", "../2.png"]
)
def test_foreign_files_in_archive_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as refused:
        load_rows(pack(tmp_path / "a.zip", "cat/1.png", name))
    (problem,) = refused.value.problems
    assert problem.rule == "file.directory" and name in problem.message
    if name == "cat/2.heic":
        assert "NEW.jpg" in problem.advice
        assert rules_of(write(tmp_path / "folder", "cat/1.png", name)) == {"file.directory"}


def test_rows_name_members_of_an_archive(tmp_path: Path) -> None:
    archive = pack(tmp_path / "a.zip", "x/cat.png", "x/dog.png")
    rows = "".join(f'{{"image": "{name}.png", "caption": "a {name}"}}\n' for name in ("cat", "dog"))
    for path in (tmp_path / "a.jsonl", tmp_path / "rows.jsonl"):
        path.write_text(rows)
        assert [row.media.member for row in rows_of(path)] == ["x/cat.png", "x/dog.png"]
        path.unlink()
    with zipfile.ZipFile(archive, "a") as stream:
        stream.writestr("x/metadata.jsonl", rows)
    assert [row.target() for row in load_rows(archive)] == ["a cat", "a dog"]
    (tmp_path / "rows.jsonl").write_text('{"image": "cow.png", "caption": "a cow"}\n')
    assert rules_of(tmp_path / "rows.jsonl") == {"media.missing"}


def test_rows_name_images_of_an_npz_file_by_index(tmp_path: Path) -> None:
    pixels = np.arange(2 * 4 * 4, dtype=np.uint8).reshape(2, 4, 4)
    np.savez(tmp_path / "images.npz", images=pixels)
    path = tmp_path / "captions.jsonl"
    path.write_text('{"index": 1, "caption": "b"}\n{"index": 0, "caption": "a"}\n')
    for source in (path, tmp_path):
        rows = rows_of(source, {"image": "index"})
        assert [row.media.array[0, 0] for row in rows] == [16, 0]
    with pytest.raises(DataError) as refused:
        load_rows(path)
    assert "`data.columns.image=index`" in refused.value.problems[0].advice
    path.write_text('{"image": 2, "caption": "b"}\n')
    assert rules_of(path) == {"media.type"}


@pytest.mark.parametrize("name", ["a.heic", "a.M4A"])
def test_files_to_convert_alone_name_the_command(name: str, tmp_path: Path) -> None:
    write(tmp_path / "x", name)
    for source in (tmp_path / "x", tmp_path / "x" / name, pack(tmp_path / "x.zip", name)):
        with pytest.raises(DataError) as refused:
            load_rows(source)
        assert "OLD" + Path(name.lower()).suffix in refused.value.problems[0].advice


@pytest.mark.parametrize(
    ("names", "rule"),
    [
        (("cat/1.png", "2.png"), "media.folder"),
        (("cat/1.png", "cat/2.wav"), "media.mixed"),
        (("train/1.png", "test/2.png"), "file.directory"),
        (("train/cat/1.png", "Validation/cat/2.png"), "file.directory"),
    ],
)
def test_ambiguous_folder_is_refused(names: tuple[str, ...], rule: str, tmp_path: Path) -> None:
    assert rules_of(write(tmp_path, *names)) == {rule}


def test_images_next_to_rows_belong_to_the_rows(tmp_path: Path) -> None:
    write(tmp_path, "pictures/1.png", "pictures/2.png")
    lines = [{"image": f"pictures/{n}.png", "label": str(n)} for n in (2, 1)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert files_of(tmp_path) == [tmp_path / "rows.jsonl"]
    assert labels_of(tmp_path) == {"pictures/2.png": "2", "pictures/1.png": "1"}


def test_folder_hash_covers_names_and_bytes(tmp_path: Path) -> None:
    one = hash_of(write(tmp_path / "one", "cat/1.png", "dog/2.png"))
    assert one == hash_of(write(tmp_path / "two", "cat/1.png", "dog/2.png"))
    assert one != hash_of(write(tmp_path / "three", "cat/1.png", "cow/2.png"))
    (tmp_path / "one/cat/1.png").write_bytes(png(9))
    assert one != hash_of(tmp_path / "one")


def test_an_archive_is_read_as_a_folder_is(tmp_path: Path) -> None:
    names = "cat/1.png", "dog/ü ö.png", "__MACOSX/cat/._1.png", "cat/.DS_Store"
    path = pack(tmp_path / "a.zip", *names)
    assert labels_of(path) == {"a.zip/cat/1.png": "cat", "a.zip/dog/ü ö.png": "dog"}
    row = rows_of(path)[1]
    assert isinstance(row, MediaRow) and read_pixels(row.media)[0, 0, 0] == 1
    flat = rows_of(pack(tmp_path / "flat.zip", "1.png", "2.png"))
    assert [type(row) for row in flat] == [BareImage] * 2


def test_common_parent_folder_of_archive_is_no_label(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.zip", "pets/photos/cat/1.png", "pets/photos/dog/1.png")
    assert sorted(map(str, labels_of(path).values())) == ["cat", "dog"]
    one = pack(tmp_path / "b.zip", "cat/1.png", "cat/2.png")
    assert set(labels_of(one).values()) == {"cat"}


@pytest.mark.parametrize(
    ("names", "rule"),
    [
        (("cat/1.png", "2.png"), "media.folder"),
        (("data/train/cat/1.png", "data/test/cat/2.png"), "media.folder"),
        (("cat/1.png", "dog/1.ogg"), "media.mixed"),
        (("notes.doc",), "file.empty"),
        (("../../1.png", "/2.png"), "file.empty"),
    ],
)
def test_ambiguous_archive_is_refused(names: tuple[str, ...], rule: str, tmp_path: Path) -> None:
    assert rules_of(pack(tmp_path / "a.zip", *names)) == {rule}


def test_empty_archive_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w"):
        pass
    assert rules_of(tmp_path / "a.zip") == {"file.empty"}


def test_a_damaged_archive_is_refused(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.zip", "cat/1.png")
    path.write_bytes(path.read_bytes()[:-30])
    assert rules_of(path) == {"file.damaged"}


def test_arrays_are_pictures(tmp_path: Path) -> None:
    images = np.arange(3 * 5 * 4, dtype=np.uint8).reshape(3, 5, 4)
    path = tmp_path / "digits.npz"
    np.savez(path, images=images, labels=np.array([7, 8, 7]))
    assert labels_of(path) == {"digits.npz[0]": "7", "digits.npz[1]": "8", "digits.npz[2]": "7"}
    row = rows_of(path)[1]
    assert isinstance(row, MediaRow) and (read_pixels(row.media) == images[1][..., None]).all()
    np.savez_compressed(path, images=images.repeat(3).reshape(3, 5, 4, 3), labels=["a", "b", "é"])
    assert list(labels_of(path).values()) == ["a", "b", "é"]
    np.savez(path, images=images)
    assert [type(row) for row in rows_of(path)] == [BareImage] * 3


@pytest.mark.parametrize("type_", ["bool", "uint16", "int64", "float16", "float32", "float64"])
def test_arrays_are_scaled_by_type_or_file_range(type_: str, tmp_path: Path) -> None:
    # The first image is dark: all images of the file share a range.
    images = np.array([[[0, 0, 0.2]], [[0, 0.4, 1]]])
    scaled = {"uint16": 65535, "int64": 255}.get(type_, 1) * images
    np.savez(tmp_path / "a.npz", images=scaled.astype(type_))
    levels = [read_pixels(row.media)[0, :, 0].tolist() for row in rows_of(tmp_path / "a.npz")]
    assert levels == (
        [[0, 0, 255], [0, 255, 255]] if type_ == "bool" else [[0, 0, 51], [0, 102, 255]]
    )


GOOD = np.zeros((2, 4, 4), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "rule"),
    [
        ({"pictures": GOOD}, "media.npz"),
        ({"images": GOOD.astype(np.complex64)}, "media.npz"),
        ({"images": GOOD - np.float32(1)}, "media.npz"),
        ({"images": GOOD + np.int32(70_000)}, "media.npz"),
        ({"images": GOOD[0]}, "media.npz"),
        ({"images": np.zeros((2, 4, 4, 4), np.uint8)}, "media.npz"),
        ({"images": GOOD, "labels": np.arange(3)}, "media.npz"),
        ({"images": GOOD, "labels": np.array([[1], [2]])}, "media.npz"),
        ({"images": GOOD, "labels": np.array([0.5, 1.5])}, "media.npz"),
        ({"images": np.array([None, {}], dtype=object)}, "file.damaged"),
        ({"images": GOOD, "labels": np.array(["a", None], dtype=object)}, "file.damaged"),
    ],
)
def test_invalid_and_pickled_arrays_are_refused(
    arrays: dict[str, Any], rule: str, tmp_path: Path
) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    assert rules_of(tmp_path / "a.npz") == {rule}


def _stored(**members: bytes) -> bytearray:
    """Return an archive in the format of ``numpy.savez``."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return bytearray(stream.getvalue())


def _npy(array: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


@pytest.mark.parametrize("name", ["a.npz", "upload"])
@pytest.mark.parametrize("array", ["images", "labels"])
def test_members_without_arrays_are_refused(array: str, name: str, tmp_path: Path) -> None:
    members = {"images": _npy(GOOD), "labels": _npy(np.arange(2))} | {array: b"no array"}
    (tmp_path / name).write_bytes(_stored(**members))
    assert rules_of(tmp_path / name) == {"media.npz"}


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_rows_name_files_below_their_folder(ending: str, tmp_path: Path) -> None:
    write(tmp_path, "p/1.png", "p/2.png")
    path = tmp_path / f"rows.{ending}"
    if ending == "csv":
        path.write_text("image,label\np/1.png,a\np/../p/2.png,b\n")
    else:
        rows = [{"image": "p/1.png", "label": "a"}, {"image": {"path": "p/2.png"}, "label": "b"}]
        path.write_text("\n".join(map(json.dumps, rows)))
    assert sorted(map(str, labels_of(path).values())) == ["a", "b"]


def test_rows_hold_pictures_in_base64(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    address = "data:image/png;base64," + base64.b64encode(png(7)).decode()
    path.write_text(json.dumps({"image": address, "label": "a"}) + "\n")
    (row,) = rows_of(path)
    assert isinstance(row, LabelledImage) and read_pixels(row.media)[0, 0, 0] == 7
    for bad in ("data:image/png,plain", "data:image/png;base64,***", "data:"):
        path.write_text(json.dumps({"image": bad, "label": "a"}) + "\n")
        assert rules_of(path) == {"media.type"}


def test_parquet_with_hugging_face_image_bytes(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    write(tmp_path, "3.png", "4.png")
    images = [
        {"bytes": png(1), "path": "one.png"},
        {"bytes": png(2), "path": None},
        {"bytes": None, "path": "4.png"},
    ]
    pq.write_table(pa.table({"image": images, "label": ["a", "b", "c"]}), tmp_path / "rows.parquet")
    rows = rows_of(tmp_path / "rows.parquet")
    found = [row.media for row in rows if isinstance(row, LabelledImage)]
    assert [int(read_pixels(each)[0, 0, 0]) for each in found] == [1, 2, 1]
    assert found[0].name == "one.png" and found[2].path == str(tmp_path / "4.png")
    pq.write_table(pa.table({"audio": [b"RIFF"], "label": ["a"]}), tmp_path / "sounds.parquet")
    assert [type(row) for row in rows_of(tmp_path / "sounds.parquet")] == [LabelledAudio]


@pytest.mark.parametrize(
    ("value", "rule"),
    [
        ("../secret.png", "media.outside"),
        ("p/../../secret.png", "media.outside"),
        ("/etc/hostname", "media.outside"),
        ("link.png", "media.outside"),
        ("linked/secret.png", "media.outside"),
        ({"path": "../secret.png"}, "media.outside"),
        ("circle.png", "media.missing"),
        ("p", "media.missing"),
        ("missing.png", "media.missing"),
        ("x" * 5000 + ".png", "media.missing"),
        ("a\0b.png", "media.type"),
        ("", "media.type"),
        (7, "media.type"),
        (None, "media.type"),
        ({}, "media.type"),
        (["p/1.png"], "media.type"),
    ],
)
def test_rows_with_files_outside_the_folder_are_refused(
    value: Any, rule: str, tmp_path: Path
) -> None:
    folder = tmp_path / "own"
    write(folder, "p/1.png")
    write(tmp_path, "secret.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "linked").symlink_to(tmp_path)
    (folder / "circle.png").symlink_to(folder / "circle.png")
    path = folder / "rows.jsonl"
    path.write_text(json.dumps({"image": value, "label": "a"}) + "\n")
    assert rules_of(path) == {rule}


def test_input_path_is_an_image_audio_or_text(tmp_path: Path) -> None:
    write(tmp_path, "a.png", "b.wav")
    image, sound = (input_row(str(tmp_path / name), "asked") for name in ("a.png", "b.wav"))
    assert isinstance(image, BareImage) and isinstance(sound, BareAudio)
    for text in (str(tmp_path / "missing.png"), "words", "a\0.png", "x" * 300 + ".png", ""):
        assert isinstance(input_row(text, "asked"), RawText)


def test_row_record_has_image_path(tmp_path: Path) -> None:
    row = LabelledImage("rows.jsonl", 3, Media("image", "p/1.png", data=png()), ("a", "b"))
    assert row.record() == {"image": "p/1.png", "label": ["a", "b"]}
    assert row.targets() == ("a", "b") and row.excerpt() == "p/1.png"
    same = LabelledImage("other.jsonl", 9, Media("image", "else.png", data=png()), "c")
    assert row.inputs() == same.inputs()
    assert row.bare().record() == {"image": "p/1.png"}
