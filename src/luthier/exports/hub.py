"""Uploads to the Hugging Face hub, with a model card from the certificate."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from luthier.errors import RecipeError, UploadError
from luthier.exports.export import Export, Format, export_model
from luthier.files import read_json, write_json

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from luthier.library.models import StoredModel

SCHEME = "hub:"
CARD, PEFT_CONFIG = "README.md", "adapter_config.json"
_REPOSITORY = re.compile(rf"{SCHEME}([\w.-]+/[\w.-]+)", re.ASCII)


@dataclass(frozen=True)
class Push:
    """An uploaded model."""

    model: str
    repository: str
    """Repository as ``owner/name``."""
    url: str
    commit: str
    """Commit of the hub with all files."""
    private: bool
    """True if the repository is private."""
    files: list[str]
    """File names, sorted."""
    format: Format

    def plain(self) -> dict[str, Any]:
        """Return the upload as JSON values."""
        return {"id": self.model, **{k: v for k, v in vars(self).items() if k != "model"}}


def push(
    stored: StoredModel,
    to: str,
    format: Format,
    merged: bool | None,
    quantization: str | None,
    public: bool,
    note: Callable[[str], None],
) -> Push:
    """Upload a model to ``hub:owner/name``; :func:`luthier.push` describes the arguments."""
    from huggingface_hub import HfApi, get_token

    from luthier import __version__
    from luthier.workflows.certificate.certificate import check_recorded, make_certificate
    from luthier.workflows.certificate.model_card import hub_name, model_card

    match = _REPOSITORY.fullmatch(to)
    if match is None:
        raise RecipeError(f"{to!r} is not a hub repository. Use {SCHEME}owner/name")
    repository, token = match[1], get_token()
    if token is None:
        raise RecipeError(
            "the upload needs a token with write access. Set HF_TOKEN to a token of "
            "https://huggingface.co/settings/tokens, or run `hf auth login`"
        )
    api = HfApi(token=token)
    check_recorded(stored)
    with _upload_errors(repository, api.endpoint):
        private = _visibility(api, repository)
    if private is False and not public:
        raise RecipeError(
            f"{repository} exists and is public. Use `--public`, or choose another repository"
        )
    if private and public:
        raise RecipeError(
            f"{repository} exists and is private. Omit `--public`, change the visibility on the hub, "
            "or choose another repository"
        )
    with TemporaryDirectory() as scratch:
        note(f"Writing {stored.id} for upload")
        folder = Path(scratch) / "model"
        written = export_model(stored, folder, format, merged, quantization)
        certificate = make_certificate(stored)
        card = model_card(certificate, library_name(written))
        (folder / CARD).write_text(card, encoding="utf-8")
        if PEFT_CONFIG in written.files:
            # The exported configuration has a local path of the base.
            config = read_json(folder / PEFT_CONFIG)
            base = hub_name(certificate.parents[0])
            config["base_model_name_or_path"] = base
            write_json(folder / PEFT_CONFIG, config)
            if _REPOSITORY.fullmatch(SCHEME + base) is None:
                note(
                    f"the adapter's base {base} is not a hub repository. Users of the adapter must set "
                    f"base_model_name_or_path in {PEFT_CONFIG}"
                )
        files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        note(f"Uploading {len(files)} files to {repository}")
        with _upload_errors(repository, api.endpoint):
            if private is None:
                api.create_repo(repository, private=not public, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repository,
                folder_path=folder,
                commit_message=f"Upload {stored.id} by luthier {__version__}",
            )
    url = f"{api.endpoint}/{repository}"
    is_private = not public if private is None else private
    return Push(stored.id, repository, url, str(commit.oid), is_private, files, format)


def library_name(written: Export) -> str:
    """Return the hub's name of the library that loads the export."""
    if written.format != "safetensors":
        return written.format
    if written.of_diffusers:
        return "diffusers"
    return "peft" if PEFT_CONFIG in written.files else "transformers"


def _visibility(api: HfApi, repository: str) -> bool | None:
    """Return whether a repository is private; ``None`` if the token sees no such repository."""
    import httpx2
    from huggingface_hub.errors import RepositoryNotFoundError

    from luthier.models.catalog import ANSWER_SECONDS, CONNECT_SECONDS

    # The only request with a time limit goes first, to detect a dead connection early.
    limit: Any = httpx2.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS)
    try:
        return bool(api.model_info(repository, timeout=limit).private)
    except RepositoryNotFoundError:
        return None


@contextmanager
def _upload_errors(repository: str, endpoint: str) -> Iterator[None]:
    """Raise errors of the hub and the network as :class:`UploadError`."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    again = "The next `luthier models push` skips uploaded files"
    try:
        yield
    except HFValidationError as error:
        raise RecipeError(f"{repository!r} is not a hub repository: {error}") from error
    except OfflineModeIsEnabled as error:
        raise UploadError("HF_HUB_OFFLINE is set. Unset HF_HUB_OFFLINE to upload") from error
    except (HfHubHTTPError, httpx2.HTTPError, OSError, RuntimeError) as error:
        # The hub wraps the error of one file in an error with the name of the file only.
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        file = f"{error} " if cause is not error else ""
        status = getattr(getattr(cause, "response", None), "status_code", None)
        fix = again
        if status in (401, 403):
            fix = "Use a token with write access (https://huggingface.co/settings/tokens)"
        lines = [line.strip().rstrip(".") for line in str(cause).splitlines() if line.strip()]
        reason = f"{file}{[*lines, repr(cause)][0]}"
        raise UploadError(
            f"{repository} could not be uploaded to {endpoint}: {reason}. {fix}"
        ) from error
