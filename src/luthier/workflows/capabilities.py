"""Capabilities of a model: allowed objectives and adaptations with memory, without a download.

The checks are the checks of a run: the objective checks the tokenizer, and head and adaptation are
attached to a network without weights. This module has no rules of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

from luthier.adaptations import ADAPTATIONS, Adaptation
from luthier.data.conversations.chat import ChatFormat
from luthier.data.conversations.chat_template import ChatTemplate
from luthier.data.conversations.replies import DecoderFrame
from luthier.data.inputs import PROCESSORS
from luthier.engine.defaults import SMALLEST_BUDGET
from luthier.engine.machine import available_memory, choose_machine
from luthier.engine.memory import PROCESS, sketch_training
from luthier.errors import RefusedInput
from luthier.library.folders import is_base_here
from luthier.library.models import find
from luthier.models.catalog import CATALOG
from luthier.models.characters import character_tokenizer
from luthier.models.load import catalogue_config
from luthier.models.networks import classic as nets
from luthier.models.networks.heads import Head
from luthier.models.networks.layouts import MOST_IMAGES
from luthier.models.networks.modalities import input_shape, media_config, reads_sound, text_config
from luthier.objectives import OBJECTIVES, Objective
from luthier.objectives.base import check_base

Config = Callable[[Head], Any]
"""Gives transformers' configuration of a network for a head."""


@dataclass(frozen=True)
class Capability:
    """An objective with an adaptation on a network."""

    objective: str
    adaptation: str
    reason: str = ""
    """Reason of a rejection; empty if allowed."""
    memory: int = 0
    """Estimated peak in bytes with micro-batches of ``SMALLEST_BUDGET`` tokens, without a
    teacher."""
    fits: bool = False
    """True if the memory is free on this machine."""


@dataclass(frozen=True)
class Capabilities:
    """All objectives with all adaptations on a model."""

    model: str
    here: bool
    """True if the files are on this machine; False means that the catalogue is the source."""
    available: int
    """Free memory in bytes."""
    verdicts: list[Capability]


def capabilities(model_id: str) -> Capabilities:
    """Return the capabilities of a catalogue model, downloaded or not, or of any known model.

    Raises:
        UnknownModel: for an unknown model.
    """
    size = choose_machine().dtype.itemsize
    available = available_memory()
    entry = CATALOG.get(model_id)
    is_local = entry is None or is_base_here(model_id)
    config: Config
    if entry is not None and not is_local:
        config = partial(catalogue_config, entry)
        chat = format_of(config(Head("causal_lm")))
    else:
        stored = find(model_id)
        chat, config = stored.chat, stored.network.config
    verdicts = table(config, chat, size)
    judged = [
        replace(each, fits=not each.reason and each.memory - PROCESS <= available)
        for each in verdicts
    ]
    return Capabilities(model_id, is_local, available, judged)


def table(config: Config, chat: ChatFormat, size: int) -> list[Capability]:
    """Each objective with each adaptation on a network; ``size`` is the bytes of a number.

    Networks differ by the task of their head alone, so each is drawn once for all objectives of a
    task.
    """
    sketched: dict[tuple[Any, ...], Capability] = {}
    verdicts = []
    for kind in OBJECTIVES.values():
        objective = default_objective(kind)
        refused = _refusal(objective, chat)
        for name, adaptation in ADAPTATIONS.items():
            key = (objective.task.head, objective.uses_reference, name)
            if not refused and key not in sketched:
                defaults = adaptation.model_validate({})
                sketched[key] = _capability(config, objective, defaults, size)
            verdicts.append(
                replace(sketched[key], objective=objective.method)
                if not refused
                else Capability(objective.method, name, refused)
            )
    return verdicts


def default_objective(kind: type[Objective]) -> Objective:
    """Return an objective with defaults and a placeholder for a teacher."""
    return kind.model_validate({"teacher": "ID"} if "teacher" in kind.model_fields else {})


def _refusal(objective: Objective, chat: ChatFormat) -> str:
    try:
        check_base(objective, chat)
    except RefusedInput as error:
        # Objectives with the same message are listed together; the advice names the objective.
        return error.problem.message
    return ""


def _capability(
    config: Config, objective: Objective, adaptation: Adaptation, size: int
) -> Capability:
    head = Head(objective.task.head, ("a", "b"))  # heads without classes ignore the labels
    try:
        network = config(head)
        memory = sketch_training(network, objective, adaptation, size, head).memory
        tokens = MOST_IMAGES if media_config(network) is not None else SMALLEST_BUDGET
    except RefusedInput as error:
        return Capability(objective.method, adaptation.method, str(error))
    return Capability(objective.method, adaptation.method, "", memory.peak(tokens))


def family_table(family: str) -> list[Capability]:
    """Return the capabilities of a network family of default size, from transformers or luthier."""
    from transformers import AutoConfig

    nets.register(family)

    def config(head: Head) -> Any:
        return AutoConfig.for_model(family)

    return table(config, format_of(config(Head("causal_lm"))), 2)


def format_of(config: Any) -> ChatFormat:
    """Return the format of a network, with a minimal tokenizer for the checks of objectives."""
    is_encoder_decoder = config.is_encoder_decoder
    decoder = DecoderFrame(0) if is_encoder_decoder else None
    if media_config(config) is not None:
        shape = input_shape(config)
        if text_config(config) is not None:
            tokenizer = SimpleNamespace(mask_token_id=None, get_vocab=dict)
            processor = PROCESSORS["image"].for_shape(shape)
            return ChatFormat(ChatTemplate(tokenizer, "plain", (1,)), decoder, processor)
        audio = shape[1] > 1 or reads_sound(config)
        kind = "image" if shape[0] == 3 else "audio" if audio else "window"
        return ChatFormat.reading(PROCESSORS[kind].for_shape(shape))
    vocabulary = {"<extra_id_0>": 0, "<extra_id_1>": 1} if is_encoder_decoder else {}
    if config.model_type == "elmo":
        vocabulary = character_tokenizer().get_vocab()
    tokenizer = SimpleNamespace(mask_token_id=0, get_vocab=lambda: vocabulary)
    return ChatFormat(ChatTemplate(tokenizer, "plain", (1,)), decoder)
