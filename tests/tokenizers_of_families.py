"""Tiny tokenizers and chat templates in the style of published models."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

from luthier.data.conversations.chat import ChatFormat
from luthier.types import TemplateKwargs

_SPECIAL = ("<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
_CORPUS = (
    "the capital of France is a key that a dog finds. What is it? It is open.",
    "USER: ASSISTANT: [INST] yes or no? [/INST] <<SYS>> be brief <</SYS>> the door is open",
)
PREPENDS = ("normalizer", "always", "first", "never", "legacy", "not legacy")
"""Ways to prepend a space in SentencePiece tokenizers."""

_TURNS = "{% for m in messages %}{% if m['role'] == 'user' %}"
MISTRAL = (
    "{{ bos_token }}"
    + _TURNS
    + "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token }}"
    "{% endif %}{% endfor %}"
)
LLAMA_2 = (
    _TURNS + "{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
VICUNA = (
    "{{ bos_token + 'A chat. ' }}"
    + _TURNS
    + "{{ 'USER: ' + m['content'] + ' ' }}{% else %}{{ 'ASSISTANT: ' + m['content'] + eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
PHI_3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<|user|>' + m['role'] + '\n' + m['content'] | trim"
    " + '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|user|>assistant\n' }}{% endif %}"
)
GLM = (
    "[gMASK]<sop>{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|user|>\n' + m['content'] }}"
    "{% else %}{{ '<|assistant|>\n<think></think>\n' + m['content'].strip() }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TEMPLATES = {
    "mistral": MISTRAL,
    "llama 2": LLAMA_2,
    "zephyr": ZEPHYR,
    "vicuna": VICUNA,
    "phi 3": PHI_3,
    "gemma": GEMMA,
}


def sentencepiece(prepend: str, template: str | None, first: bool = True) -> Any:
    """Return a tokenizer with ``▁`` pieces, and bytes for unknown characters.

    ``prepend`` is one of :data:`PREPENDS`; ``first`` adds ``<s>`` at the start of texts.
    """
    from transformers import LlamaTokenizer, PreTrainedTokenizerFast

    octets = [f"<0x{number:02X}>" for number in range(256)]
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=[*_SPECIAL, *octets],
        initial_alphabet=[*"▁|<>\n "],
        show_progress=False,
    )
    core.train_from_iterator(_CORPUS * 3, trainer)
    spec = json.loads(core.to_str())
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    if prepend.endswith("legacy"):
        merges = [tuple(each) for each in spec["model"]["merges"]]
        vocab, legacy = spec["model"]["vocab"], prepend == "legacy"
        made = LlamaTokenizer(
            vocab=vocab, merges=merges, legacy=legacy, add_bos_token=first, **names
        )
        made.add_special_tokens({"additional_special_tokens": [*_SPECIAL[3:]]})
        made.chat_template = template
        return made
    spec["added_tokens"] = spec["added_tokens"][: len(_SPECIAL)]
    for token in spec["added_tokens"]:  # Phi-3 has this of most of its tokens
        token["rstrip"] = template == PHI_3 and token["content"].startswith("<|")
    core = Tokenizer.from_str(json.dumps(spec))
    core.pre_tokenizer = None
    if prepend == "normalizer":
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        core.normalizer = normalizers.Sequence(steps)
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    replace, strip = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
    core.decoder = decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse(), strip])
    if first:
        core.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, additional_special_tokens=[*_SPECIAL[3:]], **names
    )
    made.chat_template = template
    return made


def with_kwargs(chat: ChatFormat, kwargs: TemplateKwargs) -> ChatFormat:
    """Return a format with other defaults for variables of the chat template."""
    return replace(chat, template=chat.template.with_kwargs(kwargs))
