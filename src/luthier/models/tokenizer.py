"""Loading of tokenizer, chat template and stop tokens without torch."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from luthier.data.conversations.chat import ChatFormat
from luthier.data.conversations.replies import DecoderFrame
from luthier.data.conversations.tokenization import tokenizer_errors
from luthier.data.inputs import Processor, read_processor
from luthier.data.sentence import read_sentence_pipeline
from luthier.errors import LuthierError, RecipeError, UnknownModel
from luthier.files import cached_sha256_of, luthier_home, read_json, write_bytes
from luthier.models.folder import ModelFolder, import_transformers
from luthier.models.formats.pipelines import tokenizer_folder
from luthier.models.manifest import OWN_FILES
from luthier.models.networks import classic as nets
from luthier.models.networks.modalities import text_fields
from luthier.models.stored_tokenizer import StoredTokenizer

TOKENIZER, SPECIAL_TOKENS = "tokenizer.json", "special_tokens.json"
"""Files of a stored tokenizer."""
_READ = frozenset((".json", ".txt", ".model", ".jinja", ".spm", ".bpe", ".tiktoken", ".codes"))
"""Suffixes of the files that transformers' tokenizers read."""
_TOKENIZER_FILES = ("*token*", "*vocab*", "*.model", "*.spm", "merges.txt", "*.codes")
"""Patterns of tokenizer files."""
_TRIALS = (
    "",
    " Hello , world . It 's 3 % of\n\n the\tfour  parts ?",
    "Łódź, naïve, 東京, 🙂 and a zero\u200bwidth",
    "x y " * 300,
)
"""Texts for the comparison of a cached tokenizer with transformers."""


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a model folder from the cache, or with transformers.

    A tokenizer is cached if the library ``tokenizers`` alone produces the same tokens. Not cached
    are tokenizers in Python, tokenizers with several chat templates, and translation tokenizers,
    whose special tokens depend on the languages.
    """
    folder = tokenizer_folder(folder)
    stored = _stored_folder(folder)
    with suppress(OSError, ValueError):  # not cached, just removed, or damaged
        content, fields = (stored / TOKENIZER).read_bytes(), (stored / SPECIAL_TOKENS).read_bytes()
        return StoredTokenizer(content, json.loads(fields), folder)
    own = load_with_transformers(folder)
    if (plain := _as_stored(own, folder)) is None:
        return own
    # After a crash between both writes the second file is missing, and the read above fails.
    with suppress(OSError, LuthierError):  # a full or read-only disk
        write_bytes(stored / TOKENIZER, own.backend_tokenizer.to_str().encode())
        write_bytes(stored / SPECIAL_TOKENS, json.dumps(_fields(own)).encode())
    return plain


def remove_stored_tokenizer(folder: Path) -> None:
    """Delete the cached tokenizer of ``folder``. The next use creates a new copy."""
    shutil.rmtree(_stored_folder(tokenizer_folder(folder)), ignore_errors=True)


def _stored_folder(folder: Path) -> Path:
    """Return the cache folder, named by the content of the files in ``folder``."""
    found = folder.iterdir() if folder.is_dir() else ()
    files = (path for path in found if path.suffix in _READ and path.name not in OWN_FILES)
    hashes = {path.name: cached_sha256_of(path) for path in files if path.is_file()}
    # 1 is the version of the cache format. Other library versions can return other tokens.
    known = json.dumps([1, version("transformers"), version("tokenizers"), sorted(hashes.items())])
    name = hashlib.sha256(known.encode()).hexdigest()
    return luthier_home() / "cache" / "tokenizers" / name


def _as_stored(own: Any, folder: Path) -> StoredTokenizer | None:
    """Return a cached tokenizer for transformers' ``own``, or ``None`` if tokens would differ."""
    if (
        not own.is_fast
        or not isinstance(own.chat_template, str | None)
        or hasattr(own, "_switch_to_target_mode")
        or hasattr(own, "tgt_lang")
        or own.clean_up_tokenization_spaces
    ):
        return None
    made = StoredTokenizer(own.backend_tokenizer.to_str().encode(), _fields(own), folder)
    with suppress(RecipeError), tokenizer_errors():
        if _reads_alike(made, own):
            return made
    return None


def _fields(own: Any) -> dict[str, Any]:
    """Return the attributes of a stored tokenizer for ``own`` of transformers."""
    special = own.special_tokens_map
    fields: dict[str, Any] = {
        "chat_template": own.chat_template,
        "model_max_length": own.model_max_length,
        "model_input_names": own.model_input_names,
        "special_tokens_map": special,
        "all_special_tokens": [str(token) for token in own.all_special_tokens],
        "all_special_ids": own.all_special_ids,
    }
    for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"):
        token = special.get(f"{name}_token")
        fields[f"{name}_token"] = token
        fields[f"{name}_token_id"] = token and getattr(own, f"{name}_token_id")
    return fields


def _reads_alike(stored: StoredTokenizer, own: Any) -> bool:
    """Return True if a cached tokenizer encodes and decodes like transformers'."""
    if stored.get_vocab() != own.get_vocab() or stored.vocab_size != own.vocab_size:
        return False
    for text in (*_TRIALS, " a ".join(own.all_special_tokens)):
        for special in (True, False):
            one, other = (
                each(text, add_special_tokens=special, return_offsets_mapping=True)
                for each in (stored, own)
            )
            ids = other["input_ids"]
            if (
                one["input_ids"] != ids
                or one["offset_mapping"] != other["offset_mapping"]
                or one.word_ids() != other.word_ids()
                or stored.decode(ids, special) != own.decode(ids, skip_special_tokens=special)
            ):
                return False
    pairs = [each("a word", "two words") for each in (stored, own)]
    return bool(pairs[0]["input_ids"] == pairs[1]["input_ids"])


def load_with_transformers(folder: Path) -> Any:
    """Load the tokenizer in ``folder`` with transformers.

    Raises:
        UnknownModel: for files that transformers cannot load.
    """
    import_transformers(networks=False)
    from transformers import AutoTokenizer

    if (folder / "config.json").is_file():  # transformers reads the model type there
        nets.register(read_json(folder / "config.json").get("model_type", ""))
    try:
        # Imported folders can contain Python code, which must not run.
        tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        if not any(match for pattern in _TOKENIZER_FILES for match in folder.glob(pattern)):
            raise UnknownModel(
                f"{folder} has no tokenizer. Copy the tokenizer files of the model, such as "
                "tokenizer.json and tokenizer_config.json, into the folder"
            ) from error
        raise UnknownModel(f"Cannot load the tokenizer in {folder}: {error}") from error
    template = folder / "chat_template.json"
    if tokenizer.chat_template is None and template.is_file():
        # Vision-language models stored the template next to their processor before transformers 5.
        tokenizer.chat_template = read_json(template).get("chat_template")
    # luthier reports long rows with line and fix; this warning would repeat the report.
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer


def check_vocabulary(chat: ChatFormat, config: dict[str, Any], model_id: str) -> None:
    """Reject a tokenizer with ids beyond the network's embedding.

    Unused added tokens are ignored, because many published models have some.
    """
    size = text_fields(config).get("vocab_size")
    known = max([chat.tokenizer.vocab_size, *(stop + 1 for stop in chat.stop_ids)])
    if isinstance(size, int) and known > size:
        raise RecipeError(
            f"The tokenizer of {model_id} has ids up to {known - 1:,}, but the network has "
            f"{size:,} embeddings. Copy the tokenizer files of the network's own model into "
            "the folder."
        )


def tokenizer_difference(one: ChatFormat, other: ChatFormat) -> str | None:
    """Return a description of the difference between two tokenizers, or ``None`` if compatible.

    Tokens that exist only in the larger vocabulary are ignored: models add tokens that no row uses.
    """
    first, second = one.tokenizer.get_vocab(), other.tokenizer.get_vocab()
    shared = first.keys() & second.keys()
    moved = [token for token in sorted(shared) if first[token] != second[token]]
    lacking = min(len(first), len(second)) - len(shared)
    if not moved and not lacking:
        return None
    example = f" ({moved[0]!r} is {first[moved[0]]} and {second[moved[0]]})" if moved else ""
    return (
        f"{len(first):,} and {len(second):,} tokens, {lacking:,} of the smaller vocabulary missing in "
        f"the larger, {len(moved):,} with different ids{example}"
    )


def load_chat_format(folder: Path, network: ModelFolder | None = None) -> ChatFormat:
    """Return tokenizer, template and stop tokens of a model folder.

    ``network`` is the opened folder of the network, ``folder`` itself if ``None``. Stop tokens are
    those of ``generation_config.json`` and the tokenizer's own end-of-text token.
    """
    network = network or ModelFolder(folder)
    config = network.fields
    own = network.path == folder
    processor = (network.images or network.processor) if own else read_processor(folder)
    if processor is not None and not reads_texts(folder, processor):
        return ChatFormat.reading(processor)
    tokenizer = load_tokenizer(folder)
    if network.is_pipeline:  # older pipelines do not define a maximum length
        tokenizer.model_max_length = config["max_position_embeddings"]
    generation = _generation_config(folder)
    stops = generation.get("eos_token_id")
    listed = stops if isinstance(stops, list) else [] if stops is None else [stops]
    chat = ChatFormat.of(
        tokenizer, "auto", listed, _decoder_frame(config), processor, is_causal(config)
    )
    if processor is not None:  # TrOCR's pretraining uses no special tokens of the tokenizer
        return chat
    try:
        chat = replace(chat, sentence=read_sentence_pipeline(folder))
    except RecipeError as error:  # only embeddings need the pipeline
        chat = replace(chat, sentence_problem=str(error))
    if chat.decoder is None:
        return chat
    return replace(chat, decoder=_full_frame(chat, chat.decoder, folder, config, generation))


def reads_texts(folder: Path, processor: Processor | None) -> bool:
    """Return True if the model in ``folder`` has text inputs in addition to the inputs of
    ``processor``."""
    if processor is None:
        return True
    if processor.kind == "audio":
        return False  # audio networks use the tokenizer for transcriptions
    place = tokenizer_folder(folder)
    return any((place / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))


_STARTS_FROM_BOS = frozenset({"t5gemma", "t5gemma2"})
"""Families whose decoder starts with ``bos_token_id`` and that have no ``decoder_start_token_id``."""
_STARTS_FROM_LAST = frozenset({"mbart", "plbart"})
"""Families whose ``shift_tokens_right`` starts the decoder with the last token of the labels."""


def _generation_config(folder: Path) -> dict[str, Any]:
    """Return the fields of ``generation_config.json``; none if the file is missing."""
    path = folder / "generation_config.json"
    fields: dict[str, Any] = read_json(path) if path.is_file() else {}
    return fields


def is_causal(config: Mapping[str, Any]) -> bool:
    """Return whether the fields of a ``config.json`` name the class of a causal language model."""
    named = config.get("architectures") or ()
    return any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in named)


def _decoder_frame(config: Mapping[str, Any]) -> DecoderFrame | None:
    """Return the decoder's first token in an encoder-decoder; ``None`` for other networks."""
    if not config.get("is_encoder_decoder"):
        return None
    if config.get("model_type") in _STARTS_FROM_BOS:
        return DecoderFrame(int(text_fields(config).get("bos_token_id", 2)))
    for fields in (config, text_fields(config)):
        for name in ("decoder_start_token_id", "pad_token_id"):
            if isinstance(start := fields.get(name), int):
                return DecoderFrame(start)
    return None


def _full_frame(
    chat: ChatFormat,
    frame: DecoderFrame,
    folder: Path,
    config: Mapping[str, Any],
    generation: Mapping[str, Any],
) -> DecoderFrame:
    """Return ``frame`` with the tokenizer's special tokens around target texts."""
    forced_id = generation.get("forced_bos_token_id", config.get("forced_bos_token_id"))
    if problem := _language_problem(chat.tokenizer, folder, forced_id):
        return replace(frame, problem=problem)
    # Special tokens around this trial text also surround every other target text.
    text = "a"
    switches = hasattr(chat.tokenizer, "_switch_to_target_mode")
    encoded = chat.tokenizer(text_target=text) if switches else chat.tokenizer(text)
    whole, inner = [*encoded["input_ids"]], chat.text_tokenizer.target_tokens(text).tolist()
    starts = [at for at in range(len(whole)) if whole[at : at + len(inner)] == inner]
    if not inner or not starts:
        problem = f"{folder}: the tokenizer adds unknown special tokens to target texts."
        return replace(frame, problem=f"{problem} Use a T5, BART or M2M-100.")
    opening, closing = whole[: starts[0]], whole[starts[0] + len(inner) :]
    start_id, kind = frame.start_id, config.get("model_type")
    if kind in _STARTS_FROM_LAST:
        start_id = whole[-1]
    elif kind in _STARTS_FROM_BOS and opening[:1] == [start_id]:
        opening = opening[1:]  # the tokenizer's <bos> is the decoder's start token
    # A network learns to stop only from targets that end with a stop token.
    if not {*closing} & {*chat.stop_ids}:
        closing = [*closing, *chat.stop_ids[:1]]
    return DecoderFrame(start_id, tuple(opening), tuple(closing))


def _language_problem(tokenizer: Any, folder: Path, forced_id: int | None) -> str:
    """Set the target language of a multilingual tokenizer; return the fault if none is named.

    The language is ``tgt_lang`` of the tokenizer, or else the network's ``forced_bos_token_id``.
    """
    if isinstance(tokenizer, StoredTokenizer) or not hasattr(tokenizer, "tgt_lang"):
        return ""
    named = tokenizer.init_kwargs
    if not named.get("tgt_lang") and forced_id is not None:
        # M2M-100 has the token `__fr__` for the language `fr`.
        tokenizer.tgt_lang = tokenizer.convert_ids_to_tokens(forced_id).strip("_")
    elif not named.get("tgt_lang"):
        return _NO_LANGUAGE.format(folder / "tokenizer_config.json", "target", "tgt_lang")
    if not named.get("src_lang"):  # transformers would assume English
        return _NO_LANGUAGE.format(folder / "tokenizer_config.json", "source", "src_lang")
    return ""


_NO_LANGUAGE = (
    "{}: the {} language of the translation model is missing. Set `{}` with "
    'AutoTokenizer.from_pretrained(FOLDER, src_lang="...", tgt_lang="...").save_pretrained(FOLDER).'
)
