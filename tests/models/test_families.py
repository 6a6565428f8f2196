"""Every supported family of base models compared with transformers and PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from luthier.data.rows import load_rows
from luthier.engine.train import train
from luthier.errors import LuthierError
from luthier.exports.writer import export
from luthier.inference.generation import Generator
from luthier.inference.prediction import Predictor
from luthier.library.models import StoredModel, find, load
from luthier.models.decoding.sampling import Sampling
from luthier.models.load import as_network
from luthier.recipe import Recipe
from luthier.workflows.capabilities import capabilities
from model_families import DECODERS, ENCODER_DECODERS, ENCODERS, Family

CPU = torch.device("cpu")
TEMPLATE = (
    "{%- for m in messages -%}<|im_start|>{{ m.role }}\n"
    "{%- if m.role == 'assistant' -%}{{ '\n' }}<think>\n{{ (m.reasoning_content or '') | trim }}\n"
    "</think>\n\n{{ m.content }}{%- else -%}{{ '\n' + m.content }}{%- endif -%}<|im_end|>\n"
    "{%- endfor -%}{%- if add_generation_prompt -%}<|im_start|>assistant\n<think>\n\n</think>\n\n"
    "{%- endif -%}"
)
"""ChatML with an empty reasoning block before each reply, as in Qwen 3 and SmolLM 3."""
LONG = "When will my new card be delivered to me? The quick brown fox jumps over the dog."
"""More tokens than the attention windows of the tiny families."""
REPLIES = [
    {"prompt": "say fox", "completion": "FOX"},
    {"prompt": "say dog", "completion": "DOG"},
    {"prompt": f"say {LONG}", "completion": "The capital of France is Paris."},
]
"""Rows of different lengths with a shared beginning, one longer than the attention windows."""
PROMPTS = ["say fox", f"say {LONG}"]
LABELLED = [
    {"text": text, "label": label}
    for text, label in (("the lazy dog", "animal"), (LONG, "card"), ("brown fox", "animal"))
] * 2


def marked(families: Sequence[Family]) -> list[Any]:
    """Return parameters of a test: most families run with the slow tests only."""
    return [
        pytest.param(each, id=each.id, marks=() if each.every_run else (pytest.mark.slow,))
        for each in families
        if not each.refused
    ]


def write_base(family: Family, kind: Any, tokenizer: Any, folder: Path) -> Any:
    """Write a network whose weights are all random, and return the network."""
    torch.manual_seed(0)
    network: Any = kind.from_config(family.config(), dtype=torch.float32)
    with torch.no_grad():
        for weight in network.parameters():
            # Otherwise biases are 0 and norms 1, and an ignored weight would not be noticed.
            weight.add_(torch.randn_like(weight) * 0.05)
    if network.can_generate():
        network.generation_config.eos_token_id = tokenizer.eos_token_id
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return network


def write_rows(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tuned(
    base: Path,
    data: Path,
    objective: str,
    adaptation: str = "lora",
    rate: float = 0.02,
    name: str = "tuned",
) -> StoredModel:
    """Return a model after 12 steps on ``data``."""
    options: dict[str, Any] = {"rank": 4, "alpha": 9.5} if adaptation == "lora" else {}
    training = {
        "max_steps": 12,
        "batch_size": 6,
        "learning_rate": rate,
        "precision": "float32",
        "threads": 1,
    }
    result = train(
        Recipe.parse(
            {
                "base": str(base), "name": f"{name}-{adaptation}", "objective": objective,
                "adaptation": {"method": adaptation, **options}, "training": training,
                "data": {"train": str(data), "validation_share": 0},
            }
        )
    )  # fmt: skip
    return find(result.model_id)


def loss_here(
    model: StoredModel, objective: Any, data: Path, dtype: torch.dtype = torch.float32
) -> tuple[float, list[Any]]:
    """Return luthier's loss on ``data`` in one batch, and the encoded rows."""
    rows = [objective.encode(row, at, model.chat) for at, row in enumerate(load_rows(data))]
    network = as_network(load(model, dtype, CPU, objective.head()), CPU, dtype)
    return objective.parity_loss(network, rows, 1024), rows


@torch.no_grad()
def loss_there(model: Any, rows: Sequence[Any]) -> float:
    """Return transformers' mean loss of the learned tokens, one row at a time."""
    total, count = 0.0, 0
    for row in rows:
        learned_T = row.weight_T != 0
        labels = torch.from_numpy(np.where(learned_T, row.ids_T, -100))[None]
        if row.source_T is None:
            inputs = {"input_ids": torch.from_numpy(row.ids_T)[None], "labels": labels}
        else:
            # The row starts with the decoder's start token, which transformers adds to the labels.
            inputs = {"input_ids": torch.from_numpy(row.source_T)[None], "labels": labels[:, 1:]}
        loss = float(model(**inputs).loss)
        total, count = total + loss * int(learned_T.sum()), count + int(learned_T.sum())
    return total / count


def greedy(folder: Path, kind: Any, prompt: str, tokens: int) -> str:
    """Return transformers' greedy text."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = kind.from_pretrained(folder).eval()
    if model.config.is_encoder_decoder:
        encoded, start = tokenizer(prompt, return_tensors="pt"), 1
    else:
        encoded = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True,
            return_tensors="pt", return_dict=True,
        )  # fmt: skip
        start = encoded["input_ids"].shape[1]
    out = model.generate(
        encoded["input_ids"], attention_mask=encoded["attention_mask"], max_new_tokens=tokens,
        do_sample=False, num_beams=1,
    )  # fmt: skip
    # luthier returns only whole characters; the last bytes can be incomplete.
    return str(tokenizer.decode(out[0, start:], skip_special_tokens=True)).rstrip("\ufffd")


def check_text_model(family: Family, kind: Any, tokenizer: Any, folder: Path) -> None:
    """Tune, export and query a family, and compare every step with transformers and PEFT."""
    base, data = folder / "base", write_rows(REPLIES, folder / "rows.jsonl")
    plain = write_base(family, kind, tokenizer, base)
    able = {
        (each.objective, each.adaptation)
        for each in capabilities(str(base)).verdicts
        if not each.reason
    }
    assert {("sft", "lora"), ("sft", "full")} <= able

    stored = tuned(base, data, "sft")
    merged = export(stored, folder / "merged", merged=True)
    losses = []
    for model, path in ((find(str(base)), base), (stored, merged)):
        ours, rows = loss_here(model, stored.objective, data)
        theirs = kind.from_pretrained(path).eval()
        assert ours == pytest.approx(loss_there(theirs, rows), rel=1e-4)
        losses.append(ours)
    assert losses[1] < losses[0] - 0.3

    adapter = export(stored, folder / "adapter", merged=False)
    ids = torch.arange(5, 25)[None]
    further = {"decoder_input_ids": ids} if family in ENCODER_DECODERS else {}
    with torch.no_grad():
        by_peft = PeftModel.from_pretrained(kind.from_pretrained(base), adapter).eval()
        torch.testing.assert_close(
            kind.from_pretrained(merged).eval()(input_ids=ids, **further).logits,
            by_peft(input_ids=ids, **further).logits,
            rtol=1e-4,
            atol=1e-4,
        )

    served = Generator.open(stored).replies(PROMPTS, Sampling(max_tokens=12))
    # transformers decodes the first bytes of an unfinished character as replacement characters.
    texts = [greedy(merged, kind, prompt, 12).rstrip("\ufffd") for prompt in PROMPTS]
    assert [text.rstrip("\ufffd") for text in served] == texts

    whole = tuned(base, data, "sft", "full", 0.003)
    assert loss_here(whole, whole.objective, data)[0] < losses[0] - 0.1

    rounded = folder / "rounded"
    plain.to(torch.bfloat16).save_pretrained(rounded)
    tokenizer.save_pretrained(rounded)
    ours, rows = loss_here(find(str(rounded)), stored.objective, data, torch.bfloat16)
    theirs = kind.from_pretrained(rounded, dtype=torch.bfloat16).eval()
    assert ours == pytest.approx(loss_there(theirs, rows), rel=0.03)


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("family", marked(DECODERS))
def test_a_decoder_equals_transformers(
    family: Family, new_tokenizer: Callable[..., Any], tmp_path: Path
) -> None:
    check_text_model(family, AutoModelForCausalLM, new_tokenizer(TEMPLATE), tmp_path)


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("family", marked(ENCODER_DECODERS))
def test_an_encoder_decoder_equals_transformers(
    family: Family, new_tokenizer: Callable[..., Any], tmp_path: Path
) -> None:
    tokenizer = new_tokenizer(None, ("<pad>", "</s>"), "</s>")
    check_text_model(family, AutoModelForSeq2SeqLM, ended(tokenizer, "</s>"), tmp_path)


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("family", marked(ENCODERS))
def test_an_encoder_classifies_like_transformers(
    family: Family, new_tokenizer: Callable[..., Any], tmp_path: Path
) -> None:
    base, data = tmp_path / "base", write_rows(LABELLED, tmp_path / "rows.jsonl")
    tokenizer = encoder_tokenizer(new_tokenizer)
    write_base(family, AutoModelForSequenceClassification, tokenizer, base)
    stored = tuned(base, data, "classification")
    merged = export(stored, tmp_path / "merged", merged=True)
    ours, rows = loss_here(stored, stored.objective, data)
    theirs: Any = AutoModelForSequenceClassification.from_pretrained(merged).eval()
    with torch.no_grad():
        logits = torch.cat(
            [theirs(input_ids=torch.from_numpy(row.ids_T)[None]).logits for row in rows]
        )
    targets = torch.tensor([int(np.asarray(row.target).item()) for row in rows])
    assert ours == pytest.approx(
        float(torch.nn.functional.cross_entropy(logits, targets)), rel=1e-4
    )
    assert ours < 0.5
    found = [each["label"] for each in Predictor.open(stored).answers([*load_rows(data)])]
    assert found == [theirs.config.id2label[int(best)] for best in logits.argmax(-1)]


TAGGED = [{"tokens": ["the", word, "dog"], "tags": ["O", "B-x", "O"]} for word in ("lazy", "old")]
RELATED = [{"anchor": text, "positive": LONG[: 4 * n]} for n, text in enumerate(PROMPTS, 5)]
TASKS: dict[str, tuple[Any, list[dict[str, Any]]]] = {
    "token_classification": (AutoModelForTokenClassification, TAGGED * 3),
    "contrastive": (AutoModel, RELATED),
    "masked_lm": (AutoModelForMaskedLM, [{"text": LONG[:n]} for n in (20, 40, 60)]),
}
"""Further tasks of encoders, with transformers' class and rows."""


@pytest.mark.slow
@pytest.mark.usefixtures("in_float32")
# The masked language model of ESM has a bias outside of the output layer.
@pytest.mark.parametrize("family", marked([e for e in ENCODERS if e.model_type != "esm"]))
def test_encoder_task_adapters_match_merged_weights(
    family: Family, new_tokenizer: Callable[..., Any], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    write_base(family, AutoModelForMaskedLM, encoder_tokenizer(new_tokenizer), base)
    ids = torch.tensor([[0, *range(5, 20), 1]])
    for objective, (kind, rows) in TASKS.items():
        data = write_rows(rows, tmp_path / f"{objective}.jsonl")
        stored = tuned(base, data, objective, name=objective)
        merged = kind.from_pretrained(export(stored, tmp_path / objective, merged=True)).eval()
        plain = kind.from_pretrained(base, num_labels=merged.config.num_labels)
        adapter = export(stored, tmp_path / f"{objective}-adapter", merged=False)
        by_peft = PeftModel.from_pretrained(plain, adapter).eval()
        with torch.no_grad():
            ours, theirs = merged(input_ids=ids)[0], by_peft(input_ids=ids)[0]
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def encoder_tokenizer(new_tokenizer: Callable[..., Any]) -> Any:
    """Return a tokenizer with the special tokens of an encoder."""
    tokenizer = new_tokenizer(None, ("<s>", "</s>", "<pad>", "<mask>"), "</s>")
    tokenizer.pad_token, tokenizer.mask_token, tokenizer.cls_token = "<pad>", "<mask>", "<s>"
    return ended(tokenizer, "</s>", "<s>")


def ended(tokenizer: Any, end: str, start: str = "") -> Any:
    """Return ``tokenizer`` with tokens around each text."""
    from tokenizers.processors import TemplateProcessing

    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single=f"{start} $A {end}".strip(),
        special_tokens=[(t, tokenizer.convert_tokens_to_ids(t)) for t in (start, end) if t],
    )
    return tokenizer


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize(
    "family",
    [pytest.param(e, id=e.id) for e in (*DECODERS, *ENCODER_DECODERS, *ENCODERS) if e.refused],
)
def test_an_unsupported_family_is_refused(
    family: Family, new_tokenizer: Callable[..., Any], tmp_path: Path
) -> None:
    kind, objective, rows = AutoModelForCausalLM, "sft", REPLIES
    if family in ENCODERS:
        kind, objective, rows = AutoModelForSequenceClassification, "classification", LABELLED
    tokenizer = new_tokenizer(None if family in ENCODERS else TEMPLATE)
    if family in ENCODER_DECODERS:
        kind, tokenizer = AutoModelForSeq2SeqLM, ended(new_tokenizer(None), "<|im_end|>")
    data = write_rows(rows, tmp_path / "rows.jsonl")
    write_base(family, kind, tokenizer, tmp_path / "base")
    with pytest.raises(LuthierError) as refused:
        tuned(tmp_path / "base", data, objective)
    assert family.model_type in str(refused.value)
