"""Packed models: a file with a model and all parents, for machines without network.

The file is a zip archive without compression, because weights do not get smaller. The folders are
the folders of the store, ``base/ID`` and ``custom/BASE/NAME``, each with the model's manifest, which
has the hash of each file. Only manifests of base models have a licence. Parents come first.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import BadZipFile, ZipFile

from luthier.errors import CorruptFile, RecipeError
from luthier.files import (
    json_text,
    luthier_home,
    names_below,
    need_disk,
    new_file,
    new_folder,
    sha256_of,
    verify,
)
from luthier.library.folders import base_folder, folder_of, short_name
from luthier.library.models import StoredModel, ancestors, check_whole
from luthier.models.catalog import CATALOG, SUFFIXES, fetching_lock
from luthier.models.manifest import MANIFEST, Manifest, created_now

PACKED = ".luthier"
"""Suffix of packed models."""
_FOLDER = re.compile(rf"((?:base|custom/\w[\w.-]*)/\w[\w.-]*)/{re.escape(MANIFEST)}")
"""Path of a manifest in the archive."""


@dataclass(frozen=True)
class PackedModel:
    """Manifest and files of a model in the file."""

    manifest: Manifest
    source: Path
    """Folder of the files."""

    @property
    def folder(self) -> str:
        """Folder in the archive and in the store."""
        return _store_folder(self.manifest.id).relative_to(_models()).as_posix()

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum((self.source / name).stat().st_size for name in self.manifest.files)


def pack(model: StoredModel, target: Path, say: Callable[[str], None]) -> list[PackedModel]:
    """Write ``model`` and all parents into the file ``target``.

    A model of the hub or of a folder gets its short name as id.

    Raises:
        CorruptFile: for a file with another hash.
        RecipeError: for a parent outside the store.
    """
    packed = [_prepare(model)]
    for parent in ancestors(model):
        if isinstance(parent, str) or not parent.manifest.files:
            name = parent if isinstance(parent, str) else parent.id
            raise RecipeError(
                f"{model.id} builds on {name}, which is not in the store. Pack the folder of "
                f"`luthier models export {model.id} FOLDER --merged` instead"
            )
        packed.insert(0, _prepare(parent))
    need_disk(target, sum(each.size for each in packed), f"packing {model.id}")
    with new_file(target) as file, ZipFile(file, "w") as archive:
        for each in packed:
            say(f"Packing {each.manifest.id} ({each.size / 1e6:,.0f} MB)")
            archive.writestr(f"{each.folder}/{MANIFEST}", json_text(each.manifest.plain()))
            for name in each.manifest.files:
                archive.write(each.source / name, f"{each.folder}/{name}")
    return packed


def unpack(source: Path, say: Callable[[str], None]) -> list[StoredModel]:
    """Store the models of a packed file, parents first. Existing models stay.

    Raises:
        CorruptFile: for a damaged file, or a file of other software.
        RecipeError: for a missing file, or a different model with the same id.
    """
    try:
        with ZipFile(source) as archive:
            size = sum(each.file_size for each in archive.infolist())
            need_disk(luthier_home(), size, f"unpacking {source}")
            found = [match[1] for name in archive.namelist() if (match := _FOLDER.fullmatch(name))]
            if not found:
                raise CorruptFile(f"{source} has no model of `luthier models pack`")
            return [_unpack(archive, folder, say) for folder in found]
    except FileNotFoundError:
        raise RecipeError(f"The file {source} does not exist") from None
    except BadZipFile as error:
        raise CorruptFile(f"{source} is damaged, or not a packed model: {error}") from error


def _prepare(model: StoredModel) -> PackedModel:
    """Return a model of the store unchanged, and other models with a new manifest."""
    check_whole(model)
    if model.manifest.files:
        return PackedModel(model.manifest, model.folder)
    names = [name for name in names_below(model.folder) if name.endswith(SUFFIXES)]
    manifest = Manifest(
        id=short_name(model.id),
        source=f"folder:{model.folder.name}"
        if model.folder == Path(model.id)
        else f"hub:{model.id}",
        created=created_now(),
        files={name: sha256_of(model.folder / name) for name in names},
    )
    return PackedModel(manifest, model.folder)


def _unpack(archive: ZipFile, folder: str, say: Callable[[str], None]) -> StoredModel:
    target = _models() / folder
    with TemporaryDirectory() as scratch:
        _extract(archive, f"{folder}/{MANIFEST}", Path(scratch) / MANIFEST)
        manifest = Manifest.read(Path(scratch))
    if _store_folder(manifest.id) != target:
        raise CorruptFile(f"{archive.filename}: the folder {folder} has the model {manifest.id}")
    known = CATALOG.get(manifest.id)
    if known and manifest.source != known.source.provenance["source"]:
        raise RecipeError(
            f"{manifest.id} is a model of the catalogue, and the file has another one, from "
            f"{manifest.source}"
        )
    with fetching_lock(target):
        if (target / MANIFEST).is_file():
            if Manifest.read(target).files == manifest.files:
                verify(target, manifest.files)
                say(f"{manifest.id} is here")
                return StoredModel(manifest.id, target, manifest)
            raise RecipeError(
                f"Another model {manifest.id} is here. Remove it with `luthier models remove "
                f"{manifest.id}`"
            )
        say(f"Storing {manifest.id}")
        with new_folder(target) as fresh:
            for name in (MANIFEST, *manifest.files):
                if ".." in Path(name).parts or Path(name).is_absolute():
                    raise CorruptFile(f"{archive.filename}: {name} leaves the model's folder")
                _extract(archive, f"{folder}/{name}", fresh / name)
            verify(fresh, manifest.files)
    return StoredModel(manifest.id, target, manifest)


def _extract(archive: ZipFile, name: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with archive.open(name) as packed, target.open("wb") as out:
            shutil.copyfileobj(packed, out, 1 << 20)
    except KeyError:
        raise CorruptFile(f"{archive.filename}: {name} is missing") from None


def _models() -> Path:
    return luthier_home() / "models"


def _store_folder(model_id: str) -> Path:
    return folder_of(model_id) or base_folder(model_id)
