"""Heads of transformers' model families.

The *kind* of a head names its outputs. transformers has one class per kind and family. luthier uses
these classes unchanged, so saved models load in transformers. The flat layout has no ``[B, T, H]``
tensor: heads run on the hidden states of selected nodes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from luthier.errors import RecipeError
from luthier.files import read_json
from luthier.models.networks.modalities import (
    input_shape,
    is_ctc_recognizer,
    is_dual_encoder,
    media_config,
    reads_images_in_text,
    reads_sound,
    text_config,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

HeadKind = Literal[
    "causal_lm",
    "masked_lm",
    "bidirectional_lm",
    "sequence_classification",
    "token_classification",
    "question_answering",
    "embedding",
    "autoencoding",
    "adversarial",
    "denoising",
    "image_to_text",
]


@dataclass(frozen=True)
class HeadClasses:
    """Classes of transformers and PEFT for a kind of head, and properties of the head."""

    words: str
    """Description of a network with this head, for error messages."""
    text: str = ""
    """Automatic class of transformers for text networks; empty if none exists."""
    media: tuple[str, ...] = ()
    """Automatic classes for networks with images or spectrograms as input."""
    peft: str = "FEATURE_EXTRACTION"
    """PEFT's name."""
    hub: str | None = None
    """Task name of Hugging Face."""
    output: Literal["row_scores", "token_scores", "logits", "states"] = "logits"
    classes: int | None = 0
    """Number of classes; 0 if the network decides, ``None`` for the number of labels."""
    pretrained: bool = False
    """True if all weights of the head are pretrained, so that none trains with every adaptation."""


_TO_IMAGE = ("AutoModelForImageToImage",)
HEADS: dict[HeadKind, HeadClasses] = {
    "causal_lm": HeadClasses(
        "a causal language model", "AutoModelForCausalLM", peft="CAUSAL_LM", hub="text-generation",
        pretrained=True,
    ),
    "masked_lm": HeadClasses("a masked language model", "AutoModelForMaskedLM", hub="fill-mask"),
    "bidirectional_lm": HeadClasses(
        "a bidirectional language model", "AutoModelForPreTraining", classes=None
    ),
    "sequence_classification": HeadClasses(
        "a classifier", "AutoModelForSequenceClassification",
        ("AutoModelForImageClassification", "AutoModelForAudioClassification"), "SEQ_CLS",
        output="row_scores", classes=None,
    ),
    "token_classification": HeadClasses(
        "a classifier of tokens", "AutoModelForTokenClassification", peft="TOKEN_CLS",
        hub="token-classification", output="token_scores", classes=None,
    ),
    "question_answering": HeadClasses(
        "a reader that answers questions", "AutoModelForQuestionAnswering", peft="QUESTION_ANS",
        hub="question-answering", output="token_scores", classes=2,
    ),
    "embedding": HeadClasses(
        "an encoder", "AutoModel", ("AutoModel",), hub="sentence-similarity", output="states",
        pretrained=True,
    ),
    "autoencoding": HeadClasses("an autoencoder of images", media=_TO_IMAGE, pretrained=True),
    "adversarial": HeadClasses(
        "a generator of images with its discriminator", media=("AutoModelForPreTraining",),
        classes=None,
    ),
    "denoising": HeadClasses("a denoiser of images", media=_TO_IMAGE, classes=None),
    "image_to_text": HeadClasses(
        "a writer of the text of images", "",
        ("AutoModelForImageTextToText", "AutoModelForTextRecognition"), "SEQ_2_SEQ_LM",
        pretrained=True,
    ),
}  # fmt: skip
_PERMUTED = frozenset({"xlnet"})
"""Families trained to predict tokens in random order, a different objective than next-token
prediction."""
_FROM_BOTH_SIDES = frozenset({"elmo"})
"""Pre-trained by predicting words from either side; other families are by something else."""
_SEQ2SEQ = "AutoModelForSeq2SeqLM"


@dataclass(frozen=True)
class Head:
    """Kind and classes of a head."""

    kind: HeadKind
    labels: tuple[str, ...] = ()
    problem: Literal["single_label_classification", "multi_label_classification", "regression"] = (
        "single_label_classification"
    )
    bias: tuple[float, ...] = ()
    """Initial bias of a new head, one number per class. Default: zeros."""
    pooling: Literal["mean"] | None = None
    """Pooling of a BERT classifier. Default: the family's pooling."""
    letters: str = ""
    """Letters of a CTC text recognizer in addition to the stored letters."""

    def settings(self) -> dict[str, Any]:
        """Return the corresponding fields of transformers' configuration."""
        classes = HEADS[self.kind].classes
        if classes is not None:
            return {"num_labels": classes} if classes else {}
        names = dict(enumerate(self.labels))
        return {
            "num_labels": len(self.labels),
            "id2label": names,
            "label2id": {name: index for index, name in names.items()},
            "problem_type": self.problem if self.kind == "sequence_classification" else None,
        }


CAUSAL_LM, EMBEDDING_HEAD = Head("causal_lm"), Head("embedding")
MEAN_POOLED = frozenset({"bert", "mean_pooling_bert"})
"""Families whose classifier can pool with a mean (``networks/classic/mean_pooling_bert.py``)."""
STEPLESS = frozenset({"tfidf", "input_statistics", "z_score", "item_counts"})
"""Families whose weights are fitted before the first step, and that take no steps.

Networks with a method ``fit_rows`` fit themselves. The objective fits the head of other networks.
"""
POOLING_CONFIG = Path("1_Pooling") / "config.json"
"""Pooling configuration in folders of sentence-transformers."""


def declared_pooling(folder: Path) -> Literal["mean"] | None:
    """Return the pooling that the folder declares, if luthier supports mean pooling for the
    network."""
    kind = read_json(folder / "config.json").get("model_type")
    if kind == "mean_pooling_bert":
        return "mean"
    if kind not in MEAN_POOLED or not (folder / POOLING_CONFIG).is_file():
        return None
    modes = {name for name, on in read_json(folder / POOLING_CONFIG).items() if on is True}
    alone = {name for name in modes if name.startswith("pooling_mode_")}
    # sentence-transformers concatenates several pooling modes, which luthier does not support.
    return "mean" if alone == {"pooling_mode_mean_tokens"} else None


def auto_class(config: Any, kind: HeadKind) -> Any:
    """Return transformers' automatic class for ``kind``; raises for families without such a head."""
    import transformers

    name = _class_name(config, kind)
    if not name:
        able = [each.words for other, each in HEADS.items() if _class_name(config, other)]
        raise RecipeError(
            f"A network of type {config.model_type} cannot be {HEADS[kind].words}. "
            f"Supported: {', '.join(able) or 'no head'}.",
            rule="network.head",
        )
    return getattr(transformers, name)


def head_in(config: Any) -> Head:
    """Return the head of a stored network; :func:`head_kind_in` determines the kind."""
    kind = head_kind_in(config)
    if HEADS[kind].classes is not None or HEADS[kind].output == "logits":
        return Head(kind)
    labels = tuple(str(config.id2label[index]) for index in range(config.num_labels))
    return Head(kind, labels, config.problem_type or Head(kind).problem)


def head_kind_in(config: Any) -> HeadKind:
    """Return the kind of the class that a stored network's configuration names.

    If the class belongs to no kind (``GPT2Model``, ``BertForPreTraining``), the result is the
    family's first kind in the order: causal language model, masked language model, no head, any
    other.
    """
    import transformers

    named = next(iter(getattr(config, "architectures", None) or ()), "")
    able: dict[HeadKind, str] = {
        kind: name for kind in HEADS if (name := _class_name(config, kind))
    }
    classes: dict[HeadKind, Any] = {
        kind: getattr(transformers, name)._model_mapping[type(config)]
        for kind, name in able.items()
    }
    named_so = [kind for kind, own in classes.items() if getattr(own, "__name__", "") == named]
    plain: tuple[HeadKind, ...] = ("causal_lm", "masked_lm", "embedding")
    return [*named_so, *(kind for kind in plain if kind in able), *able, plain[-1]][0]


def is_decoder(config: Any) -> bool:
    """Return True for families of causal language models without an encoder."""
    return _class_name(config, "causal_lm") == HEADS["causal_lm"].text


def _class_name(config: Any, kind: HeadKind) -> str:
    """Return the name of transformers' automatic class for the kind and family; empty if none
    exists."""
    if media_config(config) is not None:
        named = () if is_dual_encoder(config) and kind != "embedding" else HEADS[kind].media
        return next((name for name in named if _has(config, name, kind)), "")
    if reads_images_in_text(config):
        return HEADS["image_to_text"].media[0] if kind == "causal_lm" else ""
    name = HEADS[kind].text
    if not name or (kind == "bidirectional_lm" and config.model_type not in _FROM_BOTH_SIDES):
        return ""
    # transformers also has such classes for decoders, which see no word after the answer.
    if kind == "question_answering" and (_has(config, _SEQ2SEQ) or not has_masks(config)):
        return ""
    if _has(config, _SEQ2SEQ):
        # Text encoding needs the encoder only; the decoder generates.
        name = {"causal_lm": _SEQ2SEQ, "embedding": "AutoModelForTextEncoding"}.get(kind, name)
        return name if _has(config, name) else ""
    # transformers maps these families to causal language models, but their attention is bidirectional.
    ahead = config.model_type in _PERMUTED or has_masks(config)
    if kind == "causal_lm" and ahead and not getattr(config, "is_decoder", False):
        return ""
    return name if _has(config, name) else ""


def has_masks(config: Any) -> bool:
    """Return True for families of masked language models."""
    return _has(config, HEADS["masked_lm"].text)


def _has(config: Any, name: str, kind: HeadKind | None = None) -> bool:
    """Return True if the automatic class knows the family; with ``kind``, by a class for no other
    kind of head."""
    import transformers

    known = getattr(transformers, name)._model_mapping
    if type(config) not in known:
        return False
    return kind in (None, "embedding", getattr(known[type(config)], "luthier_head_kind", kind))


def set_head_kind(model: nn.Module, kind: HeadKind) -> None:
    """Store the kind of the head on ``model``, and correct the name of the backbone."""
    model.luthier_head_kind = kind  # type: ignore[assignment]
    # Llama 4 keeps the name that its backbone has in the multimodal network.
    if getattr(model, "base_model", None) is model and hasattr(
        getattr(model, "model", None), "base_model"
    ):
        model.base_model_prefix = "model"


def set_new_weights(model: nn.Module, names: Collection[str]) -> None:
    """Store on ``model`` the names of randomly initialized head weights."""
    model.luthier_new_weights = frozenset(names)  # type: ignore[assignment]


def new_weights(model: nn.Module) -> frozenset[str]:
    """Return the names of head weights that were initialized and not loaded."""
    names: frozenset[str] = getattr(model, "luthier_new_weights", frozenset())
    return names


def head_kind(model: nn.Module) -> HeadKind:
    """Return the kind of the head of ``model``."""
    kind: HeadKind = getattr(model, "luthier_head_kind", "causal_lm")
    return kind


def peft_task(model: nn.Module) -> str:
    """PEFT's name of the task of ``model``."""
    kind = head_kind(model)
    return "SEQ_2_SEQ_LM" if kind == "causal_lm" and decoder_of(model) else HEADS[kind].peft


def scores_letters(model: Any) -> bool:
    """Return True for CTC text recognizers; their backbone alone is an image encoder."""
    return head_kind(model) == "image_to_text" and is_ctc_recognizer(model.config)


def frozen_parts(model: nn.Module) -> tuple[str, ...]:
    """Return the input modules that stay frozen with every adaptation."""
    names: tuple[str, ...] = getattr(model, "frozen_parts", ())
    return names


def usual_targets(model: nn.Module) -> tuple[str, ...]:
    """Return name suffixes of the family's usual LoRA targets; empty for all linear layers."""
    names: tuple[str, ...] = getattr(model, "usual_targets", ())
    return names


def scratch_rate(model: nn.Module) -> float | None:
    """Return the learning rate for training from random weights, if the family needs a special
    rate."""
    rate: float | None = getattr(model, "scratch_rate", None)  # fastText
    return rate


def is_inside(name: str, modules: Sequence[str]) -> bool:
    """Return True if the module or weight ``name`` is one of ``modules`` or inside one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


INNER_HEADS = ("pooler", "mix")
"""Modules inside a network that belong to some heads and are missing in other networks."""


def head_modules(model: nn.Module) -> list[str]:
    """Return the full names of modules that belong to the head instead of the pretrained network.

    These modules train and are saved with every adaptation. A causal language model has none: its
    head is pretrained. A classifier on the first token includes the pooler.
    """
    from torch import nn

    if HEADS[head_kind(model)].pretrained and not scores_letters(model):
        return []
    prefix = getattr(model, "base_model_prefix", "")
    shared = {id(weight) for weight in model.base_model.parameters()}  # type: ignore[union-attr]
    heads = [
        own
        for name, child in model.named_children()
        if name not in (prefix, *frozen_parts(model))
        for own in _own_modules(name, child, shared)
    ]
    pooler = getattr(model.base_model, "pooler", None)
    if head_kind(model) == "sequence_classification" and isinstance(pooler, nn.Module):
        heads.append(f"{prefix}.pooler")
    mix = getattr(model.base_model, "mix", None)  # ELMo's sum of layers
    if head_kind(model) != "bidirectional_lm" and isinstance(mix, nn.Module):
        heads.append(f"{prefix}.mix")
    return heads


def _own_modules(name: str, module: nn.Module, shared: Collection[int]) -> list[str]:
    """Return the largest modules in ``module`` without weights of the pretrained network.

    An output layer with tied weights stays frozen, bias included: PEFT stores whole modules, and
    the tied weight is the embedding of every token.
    """
    own = [id(weight) not in shared for weight in module.parameters()]
    if all(own):
        return [name] if own else []
    return [
        inner
        for child, part in module.named_children()
        for inner in _own_modules(f"{name}.{child}", part, shared)
    ]


def head_weights(model: nn.Module) -> set[str]:
    """Return the names of the weights of :func:`head_modules`, without weights shared with the
    network."""
    modules = tuple(f"{name}." for name in head_modules(model))
    return {n for n, _ in model.named_parameters() if n.startswith(modules)} if modules else set()


def score_layer(model: Any) -> nn.Linear | None:
    """Return the linear output layer of a new head, or ``None``."""
    from torch import nn

    classes = int(model.config.num_labels)
    inside = tuple(f"{name}." for name in head_modules(model))
    found = [
        module
        for name, module in model.named_modules()
        if f"{name}.".startswith(inside or ("?",)) and isinstance(module, nn.Linear)
    ]
    return found[-1] if found and found[-1].out_features == classes else None


def start_bias(model: nn.Module, bias: Sequence[float], new: Collection[str]) -> None:
    """Set the bias of the class scores if the bias is one of the ``new`` weights.

    Row classifiers on decoders have no bias.
    """
    import torch

    # If one class is frequent, the first gradients are alike for all rows. Without an initial bias,
    # the network would make all states alike before the bias moves.
    own = head_weights(model) & set(new)
    last = [w for n, w in model.named_parameters() if n in own and n.endswith("bias")][-1:]
    for weight in last:
        if weight.shape == (len(bias),):
            with torch.no_grad():
                weight.copy_(torch.tensor(bias))


def first_position(model: Any) -> int:
    """Return the position of the first token: 0, or padding index + 1 in RoBERTa's family."""
    embeddings: Any = getattr(model.base_model, "embeddings", None)
    if hasattr(embeddings, "create_position_ids_from_input_ids"):
        return int(embeddings.padding_idx) + 1
    return 0


def hidden_size_of(model: Any) -> int:
    """Return the size ``H`` of a hidden state; for images, of the input of the classifier or
    decoder."""
    from torch import nn

    if is_dual_encoder(model.config):
        return int(model.config.projection_dim)
    text = text_config(model.config)
    if text is not None or reads_sound(model.config):
        return int((text or model.config).hidden_size)
    if hasattr(model.config, "latent_size"):
        return int(model.config.latent_size)
    if head_kind(model) == "denoising" and hasattr(model.config, "embedding_size"):
        return int(model.config.embedding_size)  # ResNet's name for the width of its first layer
    if not hasattr(model, "classifier"):  # an embedding network
        return _embedding_width(model)
    linear = [each for each in model.classifier.modules() if isinstance(each, nn.Linear)]
    return linear[0].in_features


def _embedding_width(model: Any) -> int:
    """Return the size of an image embedding, computed because families use different names."""
    import torch

    from luthier.models.networks.layouts import pooled_states

    weight = next(model.parameters())
    pixels = torch.zeros(1, *input_shape(model.config), device=weight.device, dtype=weight.dtype)
    # In training mode, batch normalization refuses a single image and changes its statistics.
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    with torch.no_grad():
        width = int(pooled_states(model, pixels).shape[-1])
    for module, is_training in modes:
        module.training = is_training
    return width


def decoder_of(model: Any) -> nn.Module | None:
    """Return the decoder of an encoder-decoder, without output head; ``None`` for other networks."""
    backbone = model.base_model
    if text_config(model.config) is None or getattr(backbone, "encoder", None) is None:
        return None
    # The decoder of Funnel Transformer has no base model: it continues the encoder.
    decoder: nn.Module | None = getattr(getattr(backbone, "decoder", None), "base_model", None)
    return decoder


def decoder_start(model: Any) -> int:
    """Return the first decoder token of an encoder-decoder."""
    start = getattr(model.config, "decoder_start_token_id", None)
    if start is None:  # T5Gemma
        start = getattr(getattr(model.config, "decoder", None), "bos_token_id", None)
    return padding_id(model) if start is None else int(start)


def set_decoder_opening(model: nn.Module, ids: Sequence[int]) -> None:
    """Store on ``model`` the decoder tokens before every reply."""
    model.luthier_decoder_opening = tuple(ids)  # type: ignore[assignment]


def decoder_opening(model: Any) -> tuple[int, ...]:
    """Return the decoder tokens before every reply of an encoder-decoder."""
    ids: tuple[int, ...] = getattr(model, "luthier_decoder_opening", ())
    return ids or (decoder_start(model),)


def padding_id(model: Any) -> int:
    """Return a padding token. Padding is masked, so any valid id works."""
    return int(getattr(model.config, "pad_token_id", None) or 0)


def logit_scale(model: Any) -> nn.Parameter | None:
    """Return the log temperature of a dual encoder, or ``None`` for other networks."""
    return model.logit_scale if is_dual_encoder(model.config) else None


def truncation_length(model: Any) -> int | None:
    """Return the truncation length of backpropagation in tokens; ``None`` for no truncation."""
    reach: int | None = getattr(model.config, "segment_length", None)  # Transformer-XL
    return reach


def prompt_ids(model: Any) -> tuple[int, ...]:
    """Return the ids of the soft prompt before every row; empty without a soft prompt."""
    if media_config(model.config) is not None:
        return ()
    ids: tuple[int, ...] = getattr(model.get_input_embeddings(), "prompt_ids", ())
    return ids


def logit_factor(model: Any) -> float:
    """Return the constant factor of the logits."""
    config = model.config.get_text_config(decoder=True)
    for name in ("logit_scale", "lm_head_multiplier"):  # Cohere, Falcon-H1
        if isinstance(factor := getattr(config, name, None), int | float):
            return float(factor)
    return 1.0 / float(getattr(config, "logits_scaling", None) or 1.0)  # Granite, MiniCPM


def logit_cap(model: Any) -> float | None:
    """Return the limit ``c`` of logits ``c tanh(x / c)``, or ``None``."""
    config = model.config.get_text_config(decoder=True)
    for name in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"):
        if cap := getattr(config, name, None):
            return float(cap)
    return None


def _has_scaled_outputs(config: Any) -> bool:
    """Return whether a T5 network scales the states before its tied output layer."""
    is_tied = config.model_type == "umt5" and config.tie_word_embeddings
    return bool(getattr(config, "scale_decoder_outputs", is_tied))


def before_vocabulary(model: Any, hidden_SH: Tensor) -> Tensor:
    """Return hidden states ``[S, H]`` as input of the output embedding.

    A bidirectional language model predicts from each half, ``[S, 2, H / 2]``.
    """
    from luthier.models.networks.head_forward import before_output_layer

    kind, is_media = head_kind(model), media_config(model.config) is not None
    # The heads of ModernBERT's decoder and of BERT as a decoder have layers below the output layer.
    output = model.get_output_embeddings()
    is_nested = not any(child is output for child in model.children())
    has_layers = is_nested or getattr(model, "lm_head", None) not in (None, output)
    transforms = kind == "masked_lm" or (kind == "causal_lm" and has_layers)
    if transforms and not is_media and decoder_of(model) is None:
        return before_output_layer(model, hidden_SH)
    if is_media:  # the text decoder of an image encoder
        model = model.decoder
    if kind == "bidirectional_lm":
        hidden_SH = hidden_SH.unflatten(-1, (2, -1))
    elif _has_scaled_outputs(model.config):
        hidden_SH = hidden_SH * model.model_dim**-0.5
    return hidden_SH
