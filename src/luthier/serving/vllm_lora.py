"""LoRA adapters of this store for ``vllm serve``, which loads each when a request names it.

vLLM finds :func:`register_resolver` by the entry point ``luthier`` of ``vllm.general_plugins``. A
request for a model that vLLM does not have comes here, with its id; what is an adapter of plain LoRA on
the base that vLLM serves is written once, in PEFT's format, and vLLM puts it beside its base.

    cache/peft/.tmp-vllm~<random>/    of one server, gone when it ends
        <hash of the model>/          as ``luthier models export ID FOLDER`` writes it

It lies in memory where the store is encrypted. vLLM keeps few adapters (``--max-cpu-loras``) and reads
the files of others anew when they are asked for: where these are gone its engine ends, and the server.
So they stay as long as it runs, whatever becomes of the model.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import re
import threading
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.errors import LuthierError, RecipeError
from luthier.files import disk_errors, lock, sha256_of, temporary_folder

if TYPE_CHECKING:
    from luthier.store.models import StoredModel

RESOLVER = "luthier"
"""What it is called in vLLM's registry, and as a plugin."""
_ID = re.compile(r"[\w.-]+:[\w.-]+", re.ASCII)
"""Ids of custom models. What else a request names, such as a path, is never looked up."""

_writing = threading.Lock()
_log = logging.getLogger("vllm.luthier")
"""Below vLLM's own, which has a handler: its server drops warnings of all others."""


def adapter_folder(base_model_name: str, lora_name: str) -> Path:
    """The folder of the adapter ``lora_name`` in PEFT's format, for a server of ``base_model_name``.

    ``base_model_name`` is what ``vllm serve`` was given: a folder, or an id of the hub.

    Raises:
        RecipeError: for a model that is withheld, writes no text, is no adapter of plain LoRA, or was
            tuned on another base.
        UnknownModel: where there is none of this id.
        CorruptFile: where its files are not those that were stored.
    """
    from luthier.serving.export import export, plain_lora
    from luthier.store.model_folders import peft_folder
    from luthier.store.models import check_active, check_writes, content_hash, find

    if _ID.fullmatch(lora_name) is None:
        raise RecipeError(f"{lora_name!r} is no id of a custom model (base:name)")
    stored = check_active(find(lora_name))
    check_writes(stored, "and vLLM answers with text")
    _, base = plain_lora(stored, "vLLM")
    _check_base(stored, base, base_model_name)
    with _writing:  # vLLM asks for several at once, each in a thread
        folder = _own_folder(peft_folder()) / content_hash(stored)
        if not folder.exists():
            # The comparison under PEFT would load the base twice in vLLM's process.
            export(stored, folder, merged=False, compare=False)
    return folder


@lru_cache
def _own_folder(parent: Path) -> Path:
    """A folder in ``parent`` of this process alone, gone when it ends.

    What killed processes left goes before.
    """
    # Else another server may take it for left behind.
    with disk_errors(parent), lock(parent / ".vllm.lock", wait=True):
        until_exit = ExitStack()
        atexit.register(until_exit.close)
        return until_exit.enter_context(temporary_folder(parent / "vllm", private=True))


def _check_base(stored: StoredModel, base: StoredModel, base_model_name: str) -> None:
    """Refuse an adapter on another base than the one that is served: by name, folder or weights."""
    served = Path(base_model_name).expanduser()
    source = (base.manifest.source or "").removeprefix("hf:")
    if base_model_name in (base.id, source) or served.resolve() == base.folder.resolve():
        return
    weights = {
        name: digest
        for name, digest in base.manifest.files.items()
        if name.endswith(".safetensors") and "/" not in name
    }
    if not weights:  # a folder that luthier did not write has no record of its files
        weights = {path.name: sha256_of(path) for path in base.folder.glob("*.safetensors")}
    same = weights and all(
        (served / name).is_file() and sha256_of(served / name) == digest
        for name, digest in weights.items()
    )
    if not same:
        raise RecipeError(
            f"{stored.id} was tuned on {base.id}, and vLLM serves {base_model_name}, which has other "
            f"weights; serve {base.folder}"
        )


def register_resolver() -> None:
    """Let vLLM ask this store for adapters that it does not have; vLLM calls it at its start."""
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

    class LuthierResolver(LoRAResolver):  # type: ignore[misc]
        """Resolves ids of custom models of this store."""

        async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
            """A request for the adapter; ``None``, with the reason in the log, where there is none."""
            if _ID.fullmatch(lora_name) is None:
                return None
            try:
                # It may fetch and write files: answers go on meanwhile.
                folder = await asyncio.to_thread(adapter_folder, base_model_name, lora_name)
            # Beside vLLM not all that luthier requires need be installed.
            except (LuthierError, OSError, ImportError) as error:
                _log.warning("%s is not loaded as a LoRA adapter: %s", lora_name, error)
                return None
            return LoRARequest(
                lora_name=lora_name,
                # Positive and below 2**31; vLLM's server puts a number of its own in its place.
                lora_int_id=int(folder.name[:7], 16) + 1,
                lora_path=str(folder),
            )

    LoRAResolverRegistry.register_resolver(RESOLVER, LuthierResolver())
