"""Verification of the files, the record and the certificate of a model.

A hash shows that bytes are unchanged, not the author of the bytes: an attacker who changes a file
can change the hash too. A signature identifies the author.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from luthier.errors import CorruptFile
from luthier.files import names_below, sha256_of
from luthier.library.models import StoredModel, ancestors, changed_files
from luthier.models.manifest import CERTIFICATE, MANIFEST, OWN_FILES, REPORTS, SIGNATURE, Manifest
from luthier.workflows.certificate.certificate import Certificate, parse_certificate
from luthier.workflows.certificate.endpoint import EndpointVerification
from luthier.workflows.certificate.signature import signature_differences


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
    endpoint: EndpointVerification | None = None
    """Comparison with an endpoint, if requested."""

    @property
    def is_intact(self) -> bool:
        """True without changed files."""
        return not self.differences

    @property
    def holds(self) -> bool:
        """True without changed files, and with an endpoint that serves the model, if compared."""
        return self.is_intact and (self.endpoint is None or self.endpoint.is_served)

    @property
    def exit_code(self) -> int:
        """Exit code of the command: 1 if something differs."""
        return 0 if self.holds else 1

    def plain(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "id": self.id, "intact": self.is_intact, "checked": self.checked,
            "differences": self.differences, "remarks": self.remarks,
            **({} if self.endpoint is None else {"endpoint": asdict(self.endpoint)}),
        }  # fmt: skip


def verify_files(model: StoredModel, public_key: Path | None = None) -> Verification:
    """Compare the hashes of ``model`` and its ancestors with the records.

    With ``public_key``, the signature is verified too.
    """
    found = Verification(model.id)
    if public_key is not None:
        found.differences.extend(signature_differences(model, public_key))
        found.checked.append(f"the signature, by {public_key}")
    elif (model.folder / SIGNATURE).is_file():
        found.remarks.append(f"{model.id} is signed; its signature is checked with a public key.")
    for each in (model, *ancestors(model)):
        if isinstance(each, str):
            found.remarks.append(f"{each}, which it was made from, is not here.")
            continue
        if not each.manifest.files:
            found.remarks.append(f"No hashes were recorded of the files of {each.id}.")
            continue
        found.differences.extend(_file_differences(each))
        found.checked.append(f"{len(each.manifest.files):,} files of {each.id}")
    path = model.folder / CERTIFICATE
    if not path.is_file() and (path.exists() or path.is_symlink()):
        found.differences.append(f"{path} is no file.")
        return found
    if not path.is_file():
        found.remarks.append(
            f"{model.id} has no certificate, so nothing says what its record, {MANIFEST}, should hold."
        )
        return found
    content = path.read_bytes()
    try:
        certificate = parse_certificate(content, path)
    except CorruptFile as error:
        found.differences.append(f"{error}.")
        return found
    if (
        certificate.text().encode("utf-8", "replace") != content
        or certificate.sha256 != certificate.digest()
    ):
        found.differences.append(f"{path} is not what was written (SHA-256 differs).")
    found.differences.extend(_certificate_differences(model, certificate))
    found.checked.append(f"the certificate of {certificate.created} and the record {MANIFEST}")
    known = {each.file for each in certificate.reports}
    there = {f"{REPORTS}/{each.name}" for each in (model.folder / REPORTS).glob("*.json")}
    later = sorted(there - known)
    if later:
        found.remarks.append(f"Kept since the certificate was made: {', '.join(later)}.")
    return found


def _file_differences(model: StoredModel) -> Iterator[str]:
    for name in model.manifest.files:
        target = (model.folder / name).resolve()
        if not target.is_relative_to(model.folder.resolve()):
            yield f"{model.folder / name} is a link out of the model's folder, to {target}."
    for path, is_there in changed_files(model):
        how = "is not what was recorded (SHA-256 differs)" if is_there else "is missing"
        yield f"{path} {how}."
    for name in names_below(model.folder):
        own = name.partition("/")[0]
        if name not in model.manifest.files and own not in OWN_FILES and own[:1] != ".":
            yield f"{model.folder / name} was added: the record does not know it."


def _certificate_differences(model: StoredModel, certificate: Certificate) -> Iterator[str]:
    path = model.folder / CERTIFICATE
    if certificate.id != model.id:
        yield f"{path} is of {certificate.id}."
    if sha256_of(model.folder / MANIFEST) != certificate.record_sha256:
        yield f"{model.folder / MANIFEST} is not what was certified (SHA-256 differs)."
    elif Manifest.read(model.folder) != certificate.record:
        yield f"{path} says something else of the model than its record, {MANIFEST}."
    certified = {each.id: each.content_sha256 for each in certificate.lineage}
    for stored in ancestors(model):
        if isinstance(stored, StoredModel) and certified.get(stored.id) not in (
            None,
            stored.content_hash,
        ):
            yield f"{stored.id}, which it was made from, is not the model that was certified."
    for kept in certificate.reports:
        report = model.folder / kept.file
        if not report.is_file():
            yield f"{report} is missing."
        elif sha256_of(report) != kept.sha256:
            yield f"{report} is not what was certified (SHA-256 differs)."
