"""Loading tokenizer, chat template and stop tokens from a Hugging Face directory, without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from luthier.data.chat import ChatFormat, Template
from luthier.data.processors import Processor, read_processor
from luthier.errors import RecipeError, UnknownModel
from luthier.files import read_json
from luthier.models import nets
from luthier.models.description import import_transformers
from luthier.models.fast_tokenizer import FastTokenizer
from luthier.models.modalities import text_fields
from luthier.models.pipelines import (
    is_pipeline,
    pipeline_processor,
    read_pipeline,
    tokenizer_folder,
)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder, without transformers where it is certain to do the same."""
    folder = tokenizer_folder(folder)
    if (fast := FastTokenizer.open(folder)) is not None:
        return fast
    import_transformers(networks=False)
    from transformers import AutoTokenizer

    if (folder / "config.json").is_file():  # transformers looks up the network's type there
        nets.register(read_json(folder / "config.json").get("model_type", ""))
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UnknownModel(f"the tokenizer in {folder} cannot be loaded: {error}") from error
    # Rows that are too long are refused with line and fix; its own warning would only come before.
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer


def check_vocabulary(chat: ChatFormat, config: dict[str, Any], model_id: str) -> None:
    """Refuse a tokenizer that gives ids the network has no embedding for.

    Tokens added to a tokenizer and used by no row are let be; many published models have some.
    """
    size = text_fields(config).get("vocab_size")
    known = max([chat.tokenizer.vocab_size, *(stop + 1 for stop in chat.stop_ids)])
    if isinstance(size, int) and known > size:
        raise RecipeError(
            f"the tokenizer of {model_id} does not belong to its network: it gives ids up to "
            f"{known - 1:,}, and the network has embeddings for {size:,}. Put the tokenizer files of "
            "the network's own model into the folder."
        )


def tokenizer_difference(one: ChatFormat, other: ChatFormat) -> str | None:
    """How the tokens of two models differ; ``None`` where what one writes the other reads.

    Tokens that only the larger vocabulary has are let be: models add some that no row uses.
    """
    first, second = one.tokenizer.get_vocab(), other.tokenizer.get_vocab()
    shared = first.keys() & second.keys()
    moved = [token for token in sorted(shared) if first[token] != second[token]]
    lacking = min(len(first), len(second)) - len(shared)
    if not moved and not lacking:
        return None
    example = f" ({moved[0]!r} is {first[moved[0]]} and {second[moved[0]]})" if moved else ""
    return (
        f"{len(first):,} and {len(second):,} tokens, {lacking:,} of the fewer without a counterpart, "
        f"{len(moved):,} with another id{example}"
    )


def load_chat_format(folder: Path, template: Template = "auto") -> ChatFormat:
    """Tokenizer, template and stop tokens of a model folder.

    Stop tokens are those of ``generation_config.json`` and the tokenizer's own end-of-text token.
    """
    processor = load_processor(folder)
    if processor is not None and not reads_texts(folder, processor):
        return ChatFormat.reading(processor)
    tokenizer = load_tokenizer(folder)
    if is_pipeline(folder):  # files of older pipelines do not say how long a text may be
        tokenizer.model_max_length = read_pipeline(folder)["max_position_embeddings"]
    path = folder / "generation_config.json"
    stops = read_json(path).get("eos_token_id") if path.is_file() else None
    listed = stops if isinstance(stops, list) else [] if stops is None else [stops]
    return ChatFormat.of(tokenizer, template, listed, _start_id(folder), processor)


def load_processor(folder: Path) -> Processor | None:
    """How the model in ``folder`` reads images or sounds; ``None`` where it reads texts alone.

    A pipeline need not say it: its networks do.
    """
    processor = read_processor(folder)
    if processor is None and is_pipeline(folder):
        return pipeline_processor(read_pipeline(folder))
    return processor


def reads_texts(folder: Path, processor: Processor | None) -> bool:
    """Whether the model in ``folder`` has texts, beside what its ``processor`` reads or alone."""
    if processor is None:
        return True
    if processor.kind == "audio":
        return False  # beside networks of sounds lies the tokenizer of what they once transcribed
    place = tokenizer_folder(folder)
    return any((place / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))


def _start_id(folder: Path) -> int | None:
    """First token of the decoder of an encoder-decoder; ``None`` for other networks."""
    path = folder / "config.json"
    config = read_json(path) if path.is_file() else {}
    if not config.get("is_encoder_decoder"):
        return None
    for fields in (config, text_fields(config)):
        for name in ("decoder_start_token_id", "pad_token_id"):
            if isinstance(start := fields.get(name), int):
                return start
    return None
