"""Models on this machine: base models and custom models.

A custom model's id is ``base:name``. Local folders and hub ids are opened directly.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.errors import (
    CorruptFile,
    LuthierError,
    RecipeError,
    UnknownModel,
)
from luthier.files import (
    cached_sha256_of,
    file_version,
    hashes_of,
    lock,
    luthier_home,
    need_disk,
    new_folder,
    sha256_of,
)
from luthier.library.folders import (
    base_folder,
    custom_folder,
    custom_folders,
    id_of,
    is_base_here,
    short_name,
    split_id,
)
from luthier.library.suggestions import suggest_models, suggest_runs
from luthier.models.base_kinds import base_kind
from luthier.models.catalog import CATALOG, CatalogEntry, download_from_hub, pull
from luthier.models.formats.external import ADAPTER_CONFIG, CONFIG, check_lone_weights
from luthier.models.formats.pipelines import is_pipeline
from luthier.models.manifest import MANIFEST, Manifest, TextFormat, created_now
from luthier.models.networks.classic import convert_weights
from luthier.plugins import Component, PluginTable

if TYPE_CHECKING:
    import torch
    from torch import nn

    from luthier.adaptations import Adaptation
    from luthier.data.conversations.chat import ChatFormat
    from luthier.models.folder import ModelFolder
    from luthier.models.networks.heads import Head
    from luthier.objectives import Objective


@dataclass(frozen=True)
class StoredModel:
    """A model on this machine, opened once.

    Configuration, tokenizer, objective and adaptation are parsed at first use. Callers pass the
    object on instead of opening the folder again.
    """

    id: str
    folder: Path
    manifest: Manifest
    """Manifest of the model; only the id for folders of other tools."""
    parent: StoredModel | None = None
    """Parent model of an adapter; ``None`` for a whole network."""
    damaged: str = ""
    """Reason for an unreadable manifest; empty for a valid manifest."""

    @cached_property
    def network(self) -> ModelFolder:
        """Folder of the network's own weights, below all adapters."""
        from luthier.models.folder import ModelFolder

        return self.parent.network if self.parent else ModelFolder(self.folder)

    @property
    def network_folder(self) -> Path:
        """Path of the folder of the network's own weights."""
        return self.parent.network_folder if self.parent else self.folder

    @property
    def tokenizer_from(self) -> str | None:
        """Id of the imported model that provides tokenizer and chat template, or ``None``."""
        return self.manifest.tokenizer_from

    @property
    def kind(self) -> str | None:
        """Kind from the manifest or the network's family; ``None`` if unknown."""
        if self.manifest.kind is not None or self.parent is not None:
            return self.manifest.kind
        is_network = (self.folder / CONFIG).is_file() or is_pipeline(self.folder)
        return self.network.family_kind if is_network else None

    @property
    def root(self) -> str:
        """Id of the base model at the bottom of the lineage."""
        return self.manifest.root or self.id

    @cached_property
    def objective(self) -> Objective:
        """Objective of a custom model, or the default objective of a base model's kind."""
        from luthier.objectives import OBJECTIVES
        from luthier.objectives.base import RunModels

        fields = self.manifest.objective
        if fields is not None:
            return _method(OBJECTIVES, fields, self).model_validate(fields)
        # Folders of other tools have no manifest.
        kind = base_kind(self.kind or self.network.kind)
        objective = OBJECTIVES[kind.objective].model_validate({})
        # A diffusers pipeline stores its sampling settings.
        if is_pipeline(self.folder):
            return objective.bind(RunModels(self.chat, self.network))
        return objective

    @cached_property
    def adaptation(self) -> Adaptation:
        """Adaptation of a custom model."""
        from luthier.adaptations import ADAPTATIONS

        fields = (self.manifest.recipe or {})["adaptation"]
        return _method(ADAPTATIONS, fields, self).model_validate(fields)

    @cached_property
    def chat(self) -> ChatFormat:
        """Tokenizer, chat template and stop tokens for training and inference.

        An unapproved template of an imported model is an error.
        """
        chat = _read_format(self)
        if self.tokenizer_from is None or self.manifest.template_approved:
            return chat
        check = partial(_check_template, self.id, self.folder, chat.template.sha256)
        return replace(chat, template=replace(chat.template, check=check))

    def shared_chat(self, parent: ChatFormat) -> ChatFormat:
        """Return ``parent``, the parent's format, if this model has the same format.

        Loading a tokenizer takes longer than loading an adapter.
        """
        shared = self.tokenizer_from is None and _is_format_of(parent, self)
        return parent if shared else self.chat

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 of all files that determine the model's output, parents included."""
        files = self.manifest.files or hashes_of(self.folder)
        below = self.parent.content_hash if self.parent else ""
        return hashlib.sha256(json.dumps([files, below], sort_keys=True).encode()).hexdigest()

    @property
    def added_tokens(self) -> int:
        """Number of context positions that the adapters of the lineage use in every row."""
        if self.parent is None:
            return 0
        return int(self.adaptation.added_tokens) + self.parent.added_tokens

    @property
    def room(self) -> int:
        """Maximum row length in tokens: the context without :attr:`added_tokens`."""
        return self.network.context - self.added_tokens

    @property
    def writes(self) -> bool:
        """True if the model generates text."""
        if self.kind is None and self.manifest.objective is None:
            return self.network.description.head == "causal_lm"
        return self.objective.task.writes


def catalogue_model(entry: CatalogEntry) -> StoredModel:
    """Return a catalogue model from its description, without download."""
    return StoredModel(entry.id, base_folder(entry.id), entry.manifest())


def describe(model_id: str) -> StoredModel:
    """Open a model by id; a catalogue model that is missing is described without a download."""
    is_missing = model_id in CATALOG and not is_base_here(model_id)
    return catalogue_model(CATALOG[model_id]) if is_missing else find(model_id)


def find(
    model_id: str,
    say: Callable[[str], None] = lambda text: None,
    is_able: Callable[[Objective], bool] | None = None,
) -> StoredModel:
    """Open a model by id; downloads a missing base model.

    Search order: custom model (``base:name``), catalogue, pretrained base model, local folder, hub
    id.

    Args:
        is_able: Filter for the suggestions in the error for an unknown id.
    """
    if ":" in model_id and not Path(model_id).exists():
        return _find_custom(model_id, is_able)
    if model_id in CATALOG:
        folder = base_folder(model_id)
        if not is_base_here(model_id):
            pull(CATALOG[model_id], folder, say)
        return StoredModel(model_id, folder, Manifest.read(folder))
    if re.fullmatch(r"[\w.-]+", model_id) and is_base_here(model_id):
        return StoredModel(model_id, base_folder(model_id), Manifest.read(base_folder(model_id)))
    path = Path(model_id).expanduser()
    if path.suffix == ".safetensors" and path.is_file():
        return _from_file(path.absolute())
    if model_id and path.is_dir():
        whole = path.absolute()
        return StoredModel(str(whole), whole, Manifest(id=str(whole)))
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model_id) and not model_id.startswith("."):
        if (custom_folder(*model_id.split("/")) / MANIFEST).is_file():
            meant = model_id.replace("/", ":")
            raise UnknownModel(f"Unknown model {model_id!r}. Did you mean {meant}?")
        say(f"Looking up {model_id} on the hub")
        return StoredModel(model_id, download_from_hub(model_id)[0], Manifest(id=model_id))
    raise UnknownModel(
        f"Unknown model {model_id!r}. "
        f"{suggest_runs(model_id)}{suggest_models(model_id, _ids_of_able(is_able))} A local "
        "Hugging Face folder or a hub id (organisation/name) is also accepted."
    )


def model_before(model: StoredModel, base: str | None) -> StoredModel:
    """Return the model ``base``, by default the parent of ``model``.

    Raises:
        RecipeError: without both.
        UnknownModel: for an unknown id.
    """
    before = base or model.manifest.parent
    if before is None:
        raise RecipeError(
            f"{model.id} has no recorded parent model. Name a tuned model, or set `base`"
        )
    return find(before)


def check_active(model: StoredModel) -> StoredModel:
    """Return ``model`` if it may be used.

    Raises:
        RecipeError: for a model withheld because of exceeded limits.
    """
    if model.manifest.withheld:
        raise RecipeError(
            f"{model.id} is withheld: {model.manifest.withheld}. `luthier models accept "
            f"{model.id}` activates the model. `luthier evaluate` and `luthier forgetting` "
            "also measure withheld models."
        )
    return model


def _ids_of_able(
    is_able: Callable[[Objective], bool] | None, custom_only: bool = False
) -> list[str]:
    """Return the ids of all models that ``is_able`` accepts."""
    known = custom_models()
    if not custom_only:
        known = [*map(catalogue_model, CATALOG.values()), *pretrained_models(), *known]
    return [each.id for each in known if is_able is None or _is_model_able(each, is_able)]


def _is_model_able(model: StoredModel, is_able: Callable[[Objective], bool]) -> bool:
    try:
        return is_able(model.objective)
    except (LuthierError, ValueError):  # damaged, or of a missing plugin
        return False


def _from_file(path: Path) -> StoredModel:
    """Return the base model of a file with known weights. The first call converts the file."""
    check_lone_weights(path)
    digest = sha256_of(path)
    name = f"{short_name(path.stem)}-{digest[:8]}"
    folder = base_folder(name)
    if not (folder / MANIFEST).is_file():
        need_disk(folder, path.stat().st_size, f"copying {path}")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with lock(folder.parent / f".{name}.lock", wait=True):
            if not (folder / MANIFEST).is_file():
                with new_folder(folder) as fresh:
                    convert_weights(path, fresh)
                    Manifest(
                        id=name,
                        kind="image_encoder",
                        source=f"file:{path}",
                        source_sha256=digest,
                        created=created_now(),
                        files=hashes_of(fresh, skip=(MANIFEST,)),
                    ).write(fresh)
    return StoredModel(name, folder, Manifest.read(folder))


def pretrained_models() -> list[StoredModel]:
    """Return the base models pretrained on this machine, oldest first; see :func:`custom_models`."""
    found = (path.parent for path in base_folder("*").parent.glob(f"*/{MANIFEST}"))
    return _read_models({each.name: each for each in found if each.name not in CATALOG})


def pretrained_versions() -> tuple[tuple[str | int, ...], ...]:
    """Return names and manifest versions of the pretrained base models, as a cheap cache key.

    Equal values mean equal results of :func:`pretrained_models`.
    """
    found: list[tuple[str | int, ...]] = []
    with suppress(FileNotFoundError), os.scandir(base_folder("")) as folders:
        for folder in folders:
            if folder.name.startswith(".") or folder.name in CATALOG:
                continue
            with suppress(FileNotFoundError, NotADirectoryError):
                found.append((folder.name, *file_version(os.stat(f"{folder.path}/{MANIFEST}"))))
    return tuple(sorted(found))


def custom_models() -> list[StoredModel]:
    """Return all custom models, oldest first.

    An unreadable manifest is empty, with the reason in ``damaged``.
    """
    return _read_models({id_of(each): each for each in custom_folders(MANIFEST)})


def _read_models(folders: Mapping[str, Path]) -> list[StoredModel]:
    """Return the complete models of ``folders``, oldest first."""
    found = []
    for model_id, folder in folders.items():
        if folder.name.startswith("."):
            continue
        try:
            found.append(StoredModel(model_id, folder, _read_record(folder, model_id)))
        except CorruptFile as error:
            empty = Manifest(id=model_id)
            found.append(StoredModel(model_id, folder, empty, damaged=str(error)))
    return sorted(found, key=lambda model: (model.manifest.created, model.id))


def _read_record(folder: Path, model_id: str) -> Manifest:
    """Return a model's manifest; raises :class:`CorruptFile` for the manifest of another model."""
    manifest = Manifest.read(folder)
    if manifest.id != model_id:
        raise CorruptFile(
            f"{folder} contains the manifest of {manifest.id}. A copied or renamed folder is "
            "not a model. Restore the name or remove the folder."
        )
    return manifest


def is_recorded(model: StoredModel) -> bool:
    """Return True if luthier trained or imported the model and stores its manifest."""
    return model.folder.is_relative_to(luthier_home()) and bool(model.manifest.created)


@contextmanager
def lock_record(model: StoredModel) -> Iterator[None]:
    """Lock the manifest and certificate of ``model``.

    Raises:
        CorruptFile: for a missing manifest.
    """
    record = model.folder / MANIFEST
    with ExitStack() as held:
        try:
            held.enter_context(lock(record, wait=True, create=False))
        except FileNotFoundError as error:
            raise CorruptFile(f"{record} is missing; {_RESTORE}") from error
        yield


def update_record(model: StoredModel, change: Callable[[Manifest], Manifest]) -> StoredModel:
    """Apply ``change`` to the current manifest, and return the updated model.

    A lock serializes concurrent changes.

    Raises:
        CorruptFile: for a missing or unreadable manifest.
    """
    with lock_record(model):
        manifest = change(_read_record(model.folder, model.id))
        manifest.write(model.folder)
    return replace(model, manifest=manifest)


def load(
    model: StoredModel,
    dtype: torch.dtype,
    device: torch.device,
    head: Head | None = None,
    on_merged: Callable[[StoredModel], None] = lambda model: None,
) -> nn.Module:
    """Load the network of ``model`` with all adapters of the lineage merged.

    Args:
        head: Head to load. Default: the network's own task.
        on_merged: Called with each model of the lineage, base model first, after merging.

    Raises:
        CorruptFile: for a file with another hash than in the manifest.
    """
    from luthier.data.sentence import read_sentence_pipeline
    from luthier.models.load import load_model
    from luthier.models.networks.heads import decoder_of, set_decoder_opening
    from luthier.models.networks.modalities import media_config
    from luthier.models.networks.sentence_head import attach_sentence_head

    check_whole(model)
    head = head or model.objective.head()
    if model.parent is None:
        network = load_model(model.folder, dtype, device, head, model.network)
    else:
        network = load(model.parent, dtype, device, head, on_merged)
        attach_adapter(network, model)
        model.adaptation.merge(network)
    if head.kind == "causal_lm" and decoder_of(network) is not None:
        form = model.manifest.format or text_format(model.chat)
        if form.start_id is not None:
            set_decoder_opening(network, (form.start_id, *form.opening_ids))
    if head.kind == "embedding":
        stored, folder = model.manifest.format, model.network_folder
        pipeline = None if stored is None else stored.sentence
        if stored is None and media_config(network.config) is None:
            pipeline = read_sentence_pipeline(folder)
        attach_sentence_head(network, pipeline, folder)
    on_merged(model)
    return network


_PICTURES = frozenset({".png", ".svg"})


def check_whole(model: StoredModel) -> None:
    """Reject a model with changed files. Hashes are cached per file.

    Raises:
        CorruptFile: with the file.
    """
    for path, is_there in changed_files(model, cached_sha256_of):
        if path.suffix in _PICTURES:  # images do not affect the model
            continue
        if not is_there:
            raise CorruptFile(f"{path} is missing; {_RESTORE}", rule="file.missing")
        raise CorruptFile(f"{path} has changed (SHA-256 differs); {_RESTORE}", rule="file.changed")


def changed_files(
    model: StoredModel, hash_of: Callable[[Path], str] = sha256_of
) -> Iterator[tuple[Path, bool]]:
    """Yield files that differ from the manifest, and if the file exists."""
    for name, digest in model.manifest.files.items():
        path = model.folder / name
        is_there = path.is_file()
        if not is_there or hash_of(path) != digest:
            yield path, is_there


_RESTORE = "restore the file from a backup, or remove the model and create it again"


def attach_adapter(network: nn.Module, model: StoredModel) -> None:
    """Attach the adapter ``model`` to the parent's network.

    Raises:
        CorruptFile: for a missing or changed file, or an adapter for another network.
    """
    from luthier.models.formats.save import load_adapter

    check_whole(model)
    load_adapter(network, model.adaptation, model.folder)


def shares_base(model: StoredModel) -> bool:
    """Return True if ``model`` runs as an unmerged adapter on the parent's network.

    Server, CLI and SDK use the same rule: merging rounds, and equal seeds should give equal text.
    """
    from luthier.models.decoding.backends import chosen_backend, merges_adapters

    return not merges_adapters() and chosen_backend().batches_adapters and can_share_base(model)


def can_share_base(model: StoredModel) -> bool:
    """Return True if ``model`` is an adapter that can share the parent's network."""
    parent = below = model.parent
    while below is not None and below.parent is not None:
        if not below.adaptation.mergeable:  # its layers would be below the adapter's layers
            return False
        below = below.parent
    if (
        parent is None
        or not model.adaptation.shares_base
        or not (model.writes and parent.writes)
        or parent.manifest.withheld
        or can_share_base(parent)  # the parent has no own network to share
    ):
        return False
    network = parent.network.description
    return network.flat and not _changes(model, network.heads)


def _changes(model: StoredModel, parts: Sequence[str]) -> bool:
    """Return True if the adapter has weights in one of the modules ``parts``."""
    from luthier.models.formats.save import ADAPTER
    from luthier.models.formats.tensors import tensor_headers
    from luthier.models.networks.heads import is_inside

    stored_parts = [*map(model.adaptation.stored_name, parts)]
    with suppress(LuthierError):  # loading the file reports the error
        return any(is_inside(name, stored_parts) for name in tensor_headers(model.folder / ADAPTER))
    return False


def ancestors(model: StoredModel) -> list[StoredModel | str]:
    """Return the lineage of ``model``, nearest parent first; ids for absent models.

    Catalogue models are not downloaded.
    """
    found: list[StoredModel | str] = []
    while parent := model.manifest.parent:
        try:
            if parent in CATALOG and not is_base_here(parent):
                return [*found, parent]
            model = model.parent or find(parent)
        except LuthierError:
            return [*found, parent]
        found.append(model)
    return found


def tokenizer_origin(model: StoredModel) -> dict[str, Any]:
    """Return the fields of a record about the origin of the tokenizer of ``model``."""
    if model.tokenizer_from is None:
        return {}
    approved = model.manifest.template_approved
    return {"tokenizer_from": model.tokenizer_from, "template_approved": approved}


def check_mergeable(model: StoredModel, need: str) -> None:
    """Reject a model whose lineage contains an adapter that cannot be merged.

    ``need`` names the purpose in the error.

    Raises:
        RecipeError: with the adapter and alternatives.
    """
    while model.parent is not None:
        adaptation = model.adaptation
        if not adaptation.mergeable:
            raise RecipeError(
                f"{model.id} was trained with {adaptation.method}, which cannot be merged "
                f"into the network, and {need}. Use {model.parent.id}, or a model trained "
                "with lora or full.",
                rule="export.unmergeable",
            )
        model = model.parent


def ignores_classes(model: StoredModel) -> bool:
    """Return True for another tool's image or audio classifier, used here for embeddings."""
    if model.manifest.kind is not None or model.manifest.objective is not None:
        return False
    stored_head = model.network.description.head
    return model.objective.task.embeds and stored_head == "sequence_classification"


def check_writes(model: StoredModel) -> None:
    """Reject a model that cannot generate text.

    Raises:
        RecipeError: for encoders.
    """
    if not model.writes:
        raise RecipeError(f"{model.id} is an encoder and cannot generate text.", rule="export.task")


def _method(
    table: PluginTable[Component], fields: Mapping[str, Any], model: StoredModel
) -> Component:
    """Return the class of a model's objective or adaptation; raises if the plugin is missing."""
    method = fields["method"]
    if method not in table:
        raise RecipeError(
            f"{model.id} requires {method} of a package that is not installed "
            f"({table.group}). Install the package to use the model."
        )
    return table[method]


def _check_template(model_id: str, folder: Path, sha256: str) -> None:
    """Reject an unapproved chat template.

    Raises:
        RecipeError: with the command to approve the template.
    """
    with suppress(CorruptFile):
        if Manifest.read(folder).template_approved:
            return
    raise RecipeError(
        f"The chat template of {model_id} is not approved (SHA-256 {sha256}). An "
        f"administrator can approve the template with `luthier admin models trust {model_id}`."
    )


def trust_template(model: StoredModel) -> StoredModel:
    """Approve the chat template of an imported model, or of a model trained from one."""
    return update_record(
        model, lambda manifest: manifest.model_copy(update={"template_approved": True})
    )


def _is_format_of(chat: ChatFormat, model: StoredModel) -> bool:
    """Return whether ``chat``, of the parent, is the format of ``model``, by hashes of all files."""
    from luthier.models.formats.save import ADAPTER

    assert model.parent is not None
    others = model.parent.manifest.files
    files = {
        name: digest
        for name, digest in model.manifest.files.items()
        if name not in (ADAPTER, ADAPTER_CONFIG) and not name.endswith((".png", ".svg"))
    }
    return (
        model.manifest.format == text_format(chat)
        and "tokenizer.json" in files
        and all(others.get(name) == digest for name, digest in files.items())
    )


def _read_format(model: StoredModel) -> ChatFormat:
    from luthier.data.conversations.chat import ChatFormat
    from luthier.data.conversations.replies import DecoderFrame
    from luthier.data.inputs import read_processor
    from luthier.models.tokenizer import is_causal, load_chat_format, load_tokenizer

    stored = model.manifest.format
    if stored is None or stored.template == "none":
        return load_chat_format(model.folder, model.network)
    decoder = None
    if stored.start_id is not None:
        decoder = DecoderFrame(stored.start_id, stored.opening_ids, stored.closing_ids)
    return ChatFormat.of(
        load_tokenizer(model.folder),
        stored.template,
        stored.stop_ids,
        decoder,
        read_processor(model.folder),
        is_causal(model.network.fields),
        stored.sentence,
    )


def text_format(chat: ChatFormat) -> TextFormat:
    """Return the manifest's description of a chat format."""
    if not chat.has_tokenizer:
        return TextFormat(template="none", stop_ids=())
    frame = chat.decoder
    return TextFormat(
        template=chat.template.kind,
        stop_ids=chat.stop_ids,
        start_id=frame.start_id if frame else None,
        opening_ids=frame.opening_ids if frame else (),
        closing_ids=frame.closing_ids if frame else (),
        sentence=chat.sentence,
    )


def _find_custom(model_id: str, is_able: Callable[[Objective], bool] | None = None) -> StoredModel:
    base, name = split_id(model_id)
    folder = custom_folder(base, name)
    known = re.fullmatch(r"[\w.-]+", name) is not None
    if not known or not (folder / MANIFEST).is_file():
        others = _ids_of_able(is_able, custom_only=True)
        raise UnknownModel(
            f"Unknown custom model {model_id!r}. {suggest_runs(model_id)}"
            f"{suggest_models(model_id, others)}"
        )
    manifest = _read_record(folder, model_id)
    parent = find(str(manifest.parent)) if manifest.saved == "adapter" else None
    return StoredModel(manifest.id, folder, manifest, parent)
