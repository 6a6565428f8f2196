"""Verification of the files, the record and the certificate of a model.

A hash shows that bytes are unchanged, not the author of the bytes: an attacker who changes a file
can change the hash too. A signature identifies the author.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from luthier.errors import CorruptFile
from luthier.files import names_below, sha256_of
from luthier.library.models import StoredModel, ancestors, changed_files
from luthier.models.manifest import CERTIFICATE, MANIFEST, OWN_FILES, REPORTS, SIGNATURE, Manifest
from luthier.workflows.certificate.certificate import Certificate, parse_certificate


@dataclass(frozen=True)
class Verification:
    """The result of verifying a model."""

    id: str
    checked: list[str] = field(default_factory=list)
    """Verified parts, in sentences."""
    differences: list[str] = field(default_factory=list)
    """Changed files, in sentences."""
    remarks: list[str] = field(default_factory=list)
    """Parts that cannot be verified, in sentences."""

    @property
    def is_intact(self) -> bool:
        """True without changed files."""
        return not self.differences

    @property
    def exit_code(self) -> int:
        """Exit code of the command: 1 if something differs."""
        return 0 if self.is_intact else 1

    def plain(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "id": self.id, "intact": self.is_intact, "checked": self.checked,
            "differences": self.differences, "remarks": self.remarks,
        }  # fmt: skip


def verify_files(model: StoredModel) -> Verification:
    """Compare the hashes of ``model`` and its ancestors with the records."""
    result = Verification(model.id)
    if (model.folder / SIGNATURE).is_file():
        result.remarks.append(f"{model.id} is signed. Verify {SIGNATURE} with model_signing.")
    for each in (model, *ancestors(model)):
        if isinstance(each, str):
            result.remarks.append(f"The ancestor {each} is not on this machine.")
            continue
        if not each.manifest.files:
            result.remarks.append(f"The record of {each.id} has no hashes of files.")
            continue
        result.differences.extend(_file_differences(each))
        result.checked.append(f"{len(each.manifest.files):,} files of {each.id}")
    path = model.folder / CERTIFICATE
    if not path.is_file():
        if path.exists() or path.is_symlink():
            result.differences.append(f"{path} is not a file.")
        else:
            result.remarks.append(
                f"{model.id} has no certificate, so the record {MANIFEST} cannot be verified."
            )
        return result
    content = path.read_bytes()
    try:
        certificate = parse_certificate(content, path)
    except CorruptFile as error:
        result.differences.append(f"{error}.")
        return result
    if (
        certificate.text().encode("utf-8", "replace") != content
        or certificate.sha256 != certificate.digest()
    ):
        result.differences.append(f"{path} was changed: the SHA-256 differs.")
    result.differences.extend(_certificate_differences(model, certificate))
    result.checked.append(f"the certificate of {certificate.created} and the record {MANIFEST}")
    certified = {each.file for each in certificate.reports}
    stored = {f"{REPORTS}/{each.name}" for each in (model.folder / REPORTS).glob("*.json")}
    if later := sorted(stored - certified):
        result.remarks.append(f"Reports later than the certificate: {', '.join(later)}.")
    return result


def _file_differences(model: StoredModel) -> Iterator[str]:
    for name in model.manifest.files:
        target = (model.folder / name).resolve()
        if not target.is_relative_to(model.folder.resolve()):
            yield f"{model.folder / name} is a link to {target}, outside the model's folder."
    for path, exists in changed_files(model):
        yield f"{path} {'differs from the record (SHA-256)' if exists else 'is missing'}."
    for name in names_below(model.folder):
        first = name.partition("/")[0]
        if name not in model.manifest.files and first not in OWN_FILES and first[:1] != ".":
            yield f"{model.folder / name} was added and is not in the record."


def _certificate_differences(model: StoredModel, certificate: Certificate) -> Iterator[str]:
    path = model.folder / CERTIFICATE
    if certificate.id != model.id:
        yield f"{path} is the certificate of {certificate.id}."
    if sha256_of(model.folder / MANIFEST) != certificate.record_sha256:
        yield f"{model.folder / MANIFEST} differs from the certificate (SHA-256)."
    elif Manifest.read(model.folder) != certificate.record:
        yield f"{path} contradicts the record {MANIFEST}."
    certified = {each.id: each.content_sha256 for each in certificate.lineage}
    for stored in ancestors(model):
        if isinstance(stored, StoredModel) and certified.get(stored.id) not in (
            None,
            stored.content_hash,
        ):
            yield f"The ancestor {stored.id} differs from the certificate."
    for each in certificate.reports:
        report = model.folder / each.file
        if not report.is_file():
            yield f"{report} is missing."
        elif sha256_of(report) != each.sha256:
            yield f"{report} differs from the certificate (SHA-256)."
