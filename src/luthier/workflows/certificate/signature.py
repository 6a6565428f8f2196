"""Signatures of a model's folder with OpenSSF Model Signing (``model-signing``) and offline keys.

The signature covers all files of the folder: weights, record, certificate and reports. The
certificate contains the hashes of the base below an adapter. The signature is a Sigstore bundle
with an in-toto statement, ``model.sig``, which ``model_signing verify key`` reads without luthier.
Keys are elliptic curve keys (P-256, P-384, P-521) in PEM. No service is queried.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import tempfile
from pathlib import Path
from typing import Any

from luthier.errors import RecipeError
from luthier.files import write_bytes
from luthier.library.models import StoredModel
from luthier.models.manifest import SIGNATURE

_LISTED = {
    "Extra files found in model": "was added after signing",
    "Missing files in model": "was signed, and is missing",
}
"""Beginning of each file list in the package's messages, and our wording."""


class Signer:
    """A private key for signing."""

    def __init__(self, key: Path) -> None:
        """Read the key.

        Raises:
            RecipeError: if the package is not installed, or the key is invalid.
        """
        self._signing, _ = _load()
        if not key.is_file():
            raise RecipeError(f"{key}: the key file does not exist", setting="sign")
        try:
            self._config = self._signing.signing.Config().use_elliptic_key_signer(private_key=key)
        except (ValueError, TypeError, AttributeError) as error:
            raise RecipeError(
                f"{key} is not a private signing key: {_line(error)} Create a key without password: "
                "`openssl ecparam -name prime256v1 -genkey -noout -out key.pem`.",
                setting="sign",
            ) from error

    def sign(self, model: StoredModel) -> Path:
        """Sign the folder of ``model`` with the certificate, and return the signature's path."""
        target = model.folder / SIGNATURE
        hashing = _hashing(self._signing, target)
        with tempfile.TemporaryDirectory(prefix="luthier-sign-") as scratch:
            fresh = Path(scratch) / SIGNATURE
            self._config.set_hashing_config(hashing).sign(model.folder, fresh)
            write_bytes(target, fresh.read_bytes())
        return target


def signature_differences(model: StoredModel, public_key: Path) -> list[str]:
    """Return the differences from the folder that the private half of ``public_key`` signed, as
    sentences.

    Raises:
        RecipeError: if the package is not installed, or the key is invalid.
    """
    signing, errors = _load()
    target = model.folder / SIGNATURE
    if not public_key.is_file():
        raise RecipeError(f"{public_key}: the key file does not exist", setting="public_key")
    if not target.is_file():
        return [f"{model.id} is not signed: {target} is missing."]
    try:
        config = signing.verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    except (ValueError, TypeError, AttributeError) as error:
        text = f"{public_key} is not a public key: {_line(error)}"
        raise RecipeError(text, setting="public_key") from error
    try:
        config.set_hashing_config(_hashing(signing, target)).verify(model.folder, target)
    except errors as error:
        invalid = f"{target} was not signed with the private half of {public_key}, or was changed."
        return _changed_files(str(error), model.folder) or [invalid]
    return []


def _load() -> tuple[Any, Any]:
    """Return the package and the error classes of an invalid signature."""
    if importlib.util.find_spec("model_signing") is None:
        raise RecipeError("signatures need: pip install 'luthier[signing]'")
    import binascii

    import cryptography.exceptions
    import google.protobuf.json_format
    import model_signing

    mismatch = (
        ValueError, KeyError, TypeError, binascii.Error, cryptography.exceptions.InvalidSignature,
        google.protobuf.json_format.ParseError,
    )  # fmt: skip
    return model_signing, mismatch


def _hashing(signing: Any, signature: Path) -> Any:
    """Return the hashing of the package's command, so that both tools verify each other's
    signatures."""
    config = signing.hashing.Config()
    return config.set_ignored_paths(paths=[signature], ignore_git_paths=True)


def _changed_files(text: str, folder: Path) -> list[str]:
    """Return the changed files from a message of the package; empty for an invalid signature."""
    _, named, listed = text.partition("Signature mismatch: ")
    if not named:
        return []
    differences = []
    for line in ast.literal_eval(listed):
        if changed := re.match(r"Hash mismatch for '(.+?)': ", line):
            differences.append(f"{folder / changed[1]} differs from the signed file.")
        for prefix, change in _LISTED.items():
            if line.startswith(prefix):
                names = line.partition("': ")[2].split(", ")
                differences += [f"{folder / name} {change}." for name in names]
    return differences or [f"{folder} differs from the signed folder."]


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
