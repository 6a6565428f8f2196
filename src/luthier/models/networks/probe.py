"""Comparison of luthier's forward pass with transformers' before a network is used.

A few tokens run through the network's own forward pass, luthier's layout, and the decoder with its
cache. All three must agree; otherwise the network is rejected with its family and the first
difference. The comparison uses float32 regardless of the stored data type, because bfloat16
rounding hides soft caps, logit scales and attention sinks. Results do not depend on the weights, so
passed comparisons are cached per configuration.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from luthier import __version__
from luthier.data.tree import TokenTree, build_tree
from luthier.errors import CorruptFile, LuthierError, RecipeError, is_out_of_memory
from luthier.files import luthier_home, read_json, write_json
from luthier.models.networks.attention import Scoring, additive_mask, dense_attention
from luthier.models.networks.fused import fuse
from luthier.models.networks.head_forward import logits_of
from luthier.models.networks.heads import (
    HEADS,
    STEPLESS,
    HeadKind,
    decoder_of,
    decoder_opening,
    head_kind,
)
from luthier.models.networks.layers import first_layer_alone
from luthier.models.networks.layouts import Flat
from luthier.models.networks.modalities import (
    context_length,
    input_shape,
    media_config,
    media_inputs,
    text_config,
)
from luthier.models.networks.network import Network, TreeBatch
from luthier.types import Example

TOLERANCE = 1e-3
"""Maximum relative error in float32; 2e-6 was measured for 90 families."""
ROUNDED_TOLERANCE = 0.1
"""Maximum median relative error in bfloat16. Mixtures of experts choose other experts for some
tokens."""
LENGTHS = (12, 12, 7)
"""Row lengths in tokens. The second row shares the first half of the first row."""
SHARED = 6
PROMPTS = (5, 7)
"""Prompt lengths of the decoder for the first two rows. The remaining tokens are steps."""
STEPS = 2
LONG_COST = 3e11
"""Maximum product of weights and tokens of the long row: 3 seconds for a pass at 200
GFLOP/s."""
UNSUPPORTED: Mapping[str, tuple[str, Sequence[HeadKind]]] = {
    "convbert": ("convolutions that read the padding", ()),
    "deepseek_v32": ("sparse attention, which needs an attention mask", ()),
    "diffllama": ("another result with a cache", ("causal_lm",)),
    "doge": ("a mask that depends on values", ()),
    "glm_moe_dsa": ("sparse attention, which needs an attention mask", ()),
    "mobilebert": ("embeddings of neighbouring tokens", ()),
    "nemotron": ("layers that drop the arguments of attention", ()),
}
"""Families that fail the comparison: the reason and the tasks, all tasks if empty."""
_LIMIT = re.compile(r"window|chunk|block_size|local_radius|local_attention|original_max_position")
"""Names of settings with a number of tokens beyond which layers compute otherwise."""
_SCALED = re.compile(r"soft_?cap|logits?_cap|logits?_scal|lm_head_mult|output_mult")
"""Names of settings that change logits after the output head."""


class _WideOperations(TorchDispatchMode):
    """A dispatch mode that widens each tensor on use, so only one float32 weight is in memory at a
    time."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func`` on tensors in float32."""
        if func is torch.ops.aten.embedding.default:  # select rows before widening, to save memory
            return _widen(func(*args, **(kwargs or {})))
        args, kwargs = tree_map(_widen, (args, kwargs or {}))
        return func(*args, **kwargs)


class _WideConvolutions(TorchFunctionMode):
    """A function mode that widens convolution inputs: convolutions compare data types before
    dispatch."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func``, with float32 tensors for convolutions."""
        kwargs = kwargs or {}
        if func in (torch.conv1d, torch.conv2d):
            args, kwargs = tree_map(_widen, (args, kwargs))
        return func(*args, **kwargs)


@contextmanager
def in_float32() -> Iterator[None]:
    """Compute everything in float32, whatever the type of the weights."""
    with _WideConvolutions(), _WideOperations():  # type: ignore[no-untyped-call]
        yield


def _widen(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16):
        return value.float()
    # Data types are arguments of casts, which would round again.
    return torch.float32 if value in (torch.bfloat16, torch.float16) else value


class DenseAttention:
    """Token tree attention with a dense mask, for devices whose kernel requires low precision."""

    def __init__(self, tree: TokenTree, is_bidirectional: bool, device: torch.device) -> None:
        self.before = 0
        place_N = np.arange(len(tree))
        first_N = place_N - tree.depth_N
        if is_bidirectional:
            # A bidirectional tree is a forest of chains: an equal first node means the same row.
            sees_NN = first_N[:, None] == first_N
        else:
            # In depth-first order node i descends from node j if j <= i < end[j].
            sees_NN = (place_N <= place_N[:, None]) & (place_N[:, None] < tree.subtree_end_N)
        self._sees_NN, self._depth_N, self._device = sees_NN, tree.depth_N, device

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring
    ) -> Tensor:
        """Return ``[1, N, Hq, D]`` for query ``[1, Hq, N, D]``, key and value ``[1, Hk, N, D]``."""
        sees_NN = self._sees_NN
        if scoring.window is not None:
            sees_NN = sees_NN & scoring.window.sees(self._depth_N[:, None], self._depth_N)
        sees = torch.from_numpy(sees_NN).to(self._device)
        mask_NN = additive_mask(sees, torch.float32)
        return dense_attention(query[0], key[0], value[0], mask_NN, scoring)[None]


class Probe:
    """Random token rows and reference outputs."""

    def __init__(self, model: Any, device: torch.device, has_long_row: bool = False) -> None:
        """Draw the rows.

        Args:
            has_long_row: Add a row beyond the windows and chunks of the network.
        """
        self.model, self.device = model, device
        vocabulary = int(model.config.vocab_size)
        generator = torch.Generator().manual_seed(0)
        self.beside = decoder_of(model) is not None
        self.kind = head_kind(model)
        self.writes = self.beside and self.kind == "causal_lm"
        # Low ids may be padding tokens.
        rows = torch.randint(vocabulary // 2, vocabulary, (3, LENGTHS[0]), generator=generator)
        rows[1, :SHARED] = rows[0, :SHARED]
        lengths = LENGTHS[:2] if self.beside else LENGTHS
        if self.beside:
            rows[:, -1] = model.config.eos_token_id  # T5's classifier uses the end token
        self.rows = [rows[row, :length] for row, length in enumerate(lengths)]
        if has_long_row and (longest := _long_row(model)):
            row = torch.randint(vocabulary // 2, vocabulary, (longest,), generator=generator)
            row[-1] = rows[0, -1]
            self.rows.append(row)

    @torch.no_grad()
    def plain(self, some: Sequence[Tensor] = ()) -> list[Tensor]:
        """Return the output of the network's own forward for each row: ``[T, V]``, or ``[1, C]``.

        Args:
            some: Rows to run one by one instead of all rows.
        """
        self.model.eval()
        parts: Sequence[Sequence[Tensor]] = [self.rows[:2], *([row] for row in self.rows[2:])]
        # Batches require a padding token, so the rows of classifiers run alone.
        if some or HEADS[self.kind].output == "row_scores":
            parts = [[row] for row in some or self.rows]
        outputs: list[Tensor] = []
        for rows in parts:
            ids_RT = torch.stack([*rows]).to(self.device)
            further = {"decoder_input_ids": ids_RT} if self.writes else {}
            found = self.model(input_ids=ids_RT, **further)
            out = (
                found.last_hidden_state if HEADS[self.kind].output == "states" else logits_of(found)
            )
            check_finite(out)
            outputs += [each.float().view(-1, out.shape[-1]) for each in out]
        return outputs

    def is_random(self, expected: Sequence[Tensor]) -> bool:
        """Return whether a second forward pass differs from ``expected`` for the longest row."""
        again = self.plain([self.rows[-1]])[0]
        return not relative_error(again, expected[-1]) < TOLERANCE

    @torch.no_grad()
    def is_bidirectional(self) -> bool:
        """Return whether the state of the first token depends on later tokens."""
        if self.beside:
            return False
        ids_2T = torch.stack([self.rows[0], self.rows[0].flip(0)])
        ids_2T[1, 0] = ids_2T[0, 0]
        found = self.model.base_model(input_ids=ids_2T.to(self.device))
        one_H, other_H = found.last_hidden_state[:, 0].float()
        # Mixtures of experts sum in another order next to other tokens, so bits may differ.
        return relative_error(one_H, other_H) > TOLERANCE

    def ours(self, network: Network, dense: bool = False) -> tuple[Tensor, list[int]]:
        """Return the outputs of luthier's layout and the row index of each output.

        Args:
            dense: Run the flat layout with :class:`DenseAttention`.
        """
        rows = [
            Example(
                ids_T.numpy(),
                np.zeros(len(ids_T), dtype=np.float32),
                index,
                source_T=ids_T.numpy() if self.writes else None,
            )
            for index, ids_T in enumerate(self.rows)
        ]
        outputs: list[Tensor] = []
        order: list[int] = []
        for part in network.split_by_factors(rows):
            if not part:
                continue
            tree = build_tree(part, share=network.shares)
            # The reference forward pass does not include a key-value prefix.
            batch = network.batch(tree, prefix=False)
            if dense and isinstance(network.layout, Flat):
                batch = replace(
                    batch, plan=DenseAttention(batch.tree, network.is_bidirectional, self.device)
                )
            outputs.append(self._head(network, batch))
            order += tree.row_R.tolist()
        return torch.cat(outputs), order

    def _head(self, network: Network, batch: TreeBatch) -> Tensor:
        nodes = torch.from_numpy(batch.tree.node_M).to(self.device)
        match HEADS[self.kind].output:
            case "row_scores":
                return network.row_scores(batch)
            case "token_scores":
                return network.token_scores(batch, nodes)
        hidden_MH = network.hidden(batch, nodes)
        return hidden_MH if HEADS[self.kind].output == "states" else network.logits(hidden_MH)

    @torch.no_grad()
    def cached_logits(self, network: Network) -> list[tuple[int, Tensor]]:
        """Return token counts and the decoder's next-token logits for the first rows.

        The decoder prefills prompts and runs :data:`STEPS` cached steps.
        """
        from luthier.models.decoding.backends import read_prompts
        from luthier.models.decoding.torch_backend import torch_backend

        rows = self.rows[: len(PROMPTS)]
        prompts = [ids_T.numpy() for ids_T in rows]
        first = [0] * len(rows)
        if not self.beside:
            first = [*PROMPTS]
            prompts = [ids_T[:count] for ids_T, count in zip(prompts, first, strict=True)]
        found: list[tuple[int, Tensor]] = []
        with closing(torch_backend(network, network.context, packs=False)) as backend:
            states, logits_RV = read_prompts(backend, prompts, 1)
            for step in range(STEPS + 1):
                found += [
                    (at + step, row_V.float()) for at, row_V in zip(first, logits_RV, strict=True)
                ]
                if step < STEPS:
                    tokens = [int(ids[at + step]) for ids, at in zip(rows, first, strict=True)]
                    logits_RV = backend.step(states, tokens)
            for state in states:
                backend.free(state)
        return found

    @torch.no_grad()
    def uncached_logits(self, expected: Sequence[Tensor]) -> list[Tensor]:
        """Return the logits that :meth:`cached_logits` should return, by the network's own forward."""
        if not self.beside:
            return [
                expected[row][at + step - 1]
                for step in range(STEPS + 1)
                for row, at in enumerate(PROMPTS)
            ]
        start = torch.tensor(decoder_opening(self.model))
        outputs = []
        for ids_T in self.rows[: len(PROMPTS)]:
            decoder_ids = torch.cat([start, ids_T[:STEPS]])[None].to(self.device)
            found = self.model(input_ids=ids_T[None].to(self.device), decoder_input_ids=decoder_ids)
            outputs.append(found.logits[0, len(start) - 1 :].float())
        return [out_TV[step] for step in range(STEPS + 1) for out_TV in outputs]


def _long_row(model: Any) -> int:
    """Return the number of tokens of a row beyond the limits in the configuration; 0 without a
    limit, or if the row would cost more than :data:`LONG_COST`."""
    fields = model.config.to_dict()
    limits = [
        each
        for name, value in _settings(fields)
        if _LIMIT.search(name) and not name.endswith("layers")
        for each in (value if isinstance(value, list) else [value])
        if isinstance(each, int) and each > 1
    ]
    try:
        context = context_length(fields)
    except RecipeError:
        context = 1 << 30
    weights = sum(weight.numel() for weight in model.parameters())
    most = min(context, LONG_COST / max(1, weights))
    # Three times a limit, because layers with chunks also see the neighbouring chunks.
    lengths = (times * each + SHARED for each in limits for times in (1, 3))
    return max((each for each in lengths if each <= most), default=0)


def probed_network(model: Any, device: torch.device, dtype: torch.dtype) -> Network:
    """Attach the layout to a text network, after a comparison for new configurations.

    Raises:
        RecipeError: if results differ from transformers.
        CorruptFile: for outputs that are not finite.
    """
    probe, record = Probe(model, device, has_long_row=True), _record(model, device)
    # A network without steps has zeros for unknown words, and the probe's words are unknown.
    is_stepless = model.config.model_type in STEPLESS
    if (known := _read_record(record)) is not None:
        network = Network(model, device, dtype, is_stepless or known["is_bidirectional"])
        fuse(model)
        model.eval()
        with torch.no_grad():
            # A passed comparison covers the configuration, but these weights can still be damaged.
            check_finite(Probe(model, device).ours(network)[0])
        return network
    decodes = probe.kind == "causal_lm"
    # References come first: Network() and fuse() replace parts of the model.
    with compute_in_float32(model):
        expected = probe.plain()
        if probe.is_random(expected):
            raise refusal(model, "outputs for equal rows are random")
        is_bidirectional = is_stepless or probe.is_bidirectional()
        wanted = probe.uncached_logits(expected) if decodes else []
    if decodes and is_bidirectional:
        raise refusal(model, "tokens attend to later tokens")
    network = Network(model, device, dtype, is_bidirectional)
    fuse(model)
    with torch.no_grad(), reject_crash(model, "run in luthier's layout"):
        check_finite(probe.ours(network)[0])
        with compute_in_float32(model):
            ours, rows = probe.ours(network, dense=device.type != "cpu")
    want = torch.cat([expected[row] for row in rows])
    places = [f"row {row}, token {at}" for row in rows for at in range(len(expected[row]))]
    _compare(model, "luthier's forward pass", places, ours.float().view_as(want), want)
    if network.tokens_before:  # transformers' forward pass would not include the prefix
        return network
    if decodes:
        with reject_crash(model, "generate text"), compute_in_float32(model):
            found = probe.cached_logits(network)
        _compare_steps(model, "generation with a cache", found, wanted)
        if (
            dtype != torch.float32
        ):  # the decoder can use another code path in bfloat16, such as LlamaForward
            with reject_crash(model, "generate text"):
                found = probe.cached_logits(network)
            _compare_median(model, "generation with a cache", found, wanted)
    _remember(record, model, is_bidirectional=is_bidirectional)
    return network


@contextmanager
def compute_in_float32(model: Any) -> Iterator[None]:
    """Compute everything in float32, on any device.

    Experts run one at a time on accelerators, whose grouped kernel requires bfloat16.
    """
    before = getattr(model.config, "_experts_implementation", None)
    grouped = model.device.type != "cpu" and before == "grouped_mm"
    if grouped:
        model.set_experts_implementation("eager")
    try:
        with nullcontext() if model.dtype == torch.float32 else in_float32():
            yield
    finally:
        if grouped:
            model.set_experts_implementation(before)


def try_shared(network: Network, method: str, attach: Callable[[Any], None]) -> None:
    """Compare an adapter on a shared base network with the whole network, before training.

    Args:
        attach: Adds the layers of the adaptation ``method``, with random weights, to a network that
            shares the base's weights.

    Raises:
        RecipeError: for families whose adapters cannot share a base network or generate other text.
    """
    model = network.model
    if not isinstance(network.layout, Flat) or head_kind(model) != "causal_lm":
        return
    own, device = {id(weight) for weight in model.parameters()}, network.device
    with (
        reject_crash(model, f"generate text with {method}"),
        _same_random(device),
        torch.no_grad(),
    ):
        shared = network.with_adapter(attach)
        for weight in shared.model.parameters():
            if id(weight) not in own:
                # LoRA's B starts at 0, so a missing update would not be noticed.
                weight.normal_(std=0.1)
        probe = Probe(shared.model, device)
        names = [n for n, each in shared.model.named_parameters() if id(each) not in own]
        if not all(name.startswith(f"{model.base_model_prefix}.") for name in names):
            return  # an adapter above the backbone cannot share its base network
        record = _record(shared.model, device, method, str(network.dtype), *names)
        if record.is_file():
            return
        ours, rows = probe.ours(shared)
        wanted = probe.uncached_logits(_by_row(probe, ours.float(), rows))
        found = probe.cached_logits(shared)
    # In the network's own precision: adapter stacks are inference tensors, which a dispatch mode cannot
    # view. The adapter weights are large, so a missing adapter exceeds the rounding error.
    _compare_median(model, f"generation with {method} next to its base", found, wanted)
    _remember(record, model)


def try_training(network: Network, method: str) -> None:
    """Run a forward and a backward pass of a network with the adaptation ``method``.

    Raises:
        RecipeError: for families whose modules are incompatible with the adaptation.
    """
    model = network.model
    if media_config(model.config) is not None:
        return
    with reject_crash(model, f"train with {method}"), _same_random(network.device):
        model.train()
        try:
            with first_layer_alone(model):  # one layer is enough if all layers are alike
                out, _ = Probe(model, network.device).ours(network)
                if out.requires_grad:  # no gradient with a soft prompt, which the probe's rows lack
                    out.float().square().mean().backward()
        finally:
            model.zero_grad(set_to_none=True)
            model.eval()


@contextmanager
def _same_random(device: torch.device) -> Iterator[None]:
    """Leave torch's random numbers as they are: runs are the same with and without a trial."""
    # By default, fork_rng saves the state of every GPU.
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def _by_row(probe: Probe, out_MV: Tensor, rows: Sequence[int]) -> list[Tensor]:
    """Return the parts of ``out_MV``, ``[T, V]`` each, in the order of the rows of the probe."""
    parts = out_MV.split([len(probe.rows[row]) for row in rows])
    return [part for _, part in sorted(zip(rows, parts, strict=True), key=lambda each: each[0])]


def check_finite(output: Tensor) -> None:
    """Reject a network whose own forward pass returns nan or inf.

    Raises:
        CorruptFile: for such an output.
    """
    if not output.isfinite().all():
        raise CorruptFile(
            "The network returns nan or inf: the weights are damaged.",
            rule="weights.not_finite",
        )


def refusal(model: Any, reason: str) -> RecipeError:
    """Return the error for a family whose results differ from transformers."""
    return RecipeError(
        f"Networks of type {model.config.model_type} are not supported yet: {reason}. Choose a base "
        "model of another family (`luthier models list`).",
        rule="network.unsupported",
    )


@contextmanager
def reject_crash(model: Any, doing: str) -> Iterator[None]:
    """Convert any exception of the comparison into an error that names the family.

    Raises:
        RecipeError: with the family and the original error.
    """
    try:
        yield
    except LuthierError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise  # says nothing about the family
        reason = " ".join(str(error).split())[:300]
        raise refusal(model, f"cannot {doing} ({type(error).__name__}: {reason})") from error


def _settings(fields: Any) -> Iterator[tuple[str, Any]]:
    """Yield names and scalar values of a configuration, nested configurations included."""
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from _settings(value)
        else:
            yield str(name), value


def first_output(model: Any) -> Tensor:
    """Return the first output of ``model`` for fixed random inputs, in float32."""
    network = getattr(model, "get_base_model", lambda: model)()
    config, generator = network.config, torch.Generator().manual_seed(0)
    inputs: dict[str, Tensor] = {}
    if media_config(config) is not None:
        pixels = torch.randn(2, *input_shape(config), generator=generator)
        inputs = media_inputs(network, pixels)
    if (texts := text_config(config)) is not None:
        size = int(texts.vocab_size)
        ids_2T = torch.randint(size // 2, size, (2, 16), generator=generator)
        if getattr(texts, "eos_token_id", None) is not None:
            ids_2T[:, -1] = texts.eos_token_id  # T5's classifier needs an end token
        if decoder_of(network) is not None:
            inputs["decoder_input_ids"] = ids_2T
        if "pixel_values" not in inputs or decoder_of(network) is None:
            inputs["input_ids"] = ids_2T
        is_classifier = type(network).__name__.endswith("ForSequenceClassification")
        if is_classifier and getattr(texts, "pad_token_id", None) is None:
            # transformers finds the ends of several rows by their padding token.
            inputs = {name: each[:1] for name, each in inputs.items()}
    device = next(network.parameters()).device
    inputs = {name: each.to(device) for name, each in inputs.items()}
    with torch.no_grad():
        output: Tensor = model.eval()(**inputs)[0]
    return output.float()


def relative_error(one: Tensor, other: Tensor) -> float:
    """Return the norm of the difference of two tensors as a share of the norm of ``other``."""
    return float((one - other).norm() / other.norm().clamp_min(1e-6))


def _compare(model: Any, what: str, places: Sequence[str], got: Tensor, want: Tensor) -> None:
    """Reject a network if ``got`` and ``want`` ``[M, V]`` differ by more than rounding."""
    error = relative_error(got, want)
    # A comparison with NaN is false, so NaN is rejected.
    if error < TOLERANCE:
        return
    far_M = (got - want).norm(dim=-1) >= TOLERANCE * want.norm(dim=-1)
    at = int(far_M.nonzero()[0]) if far_M.any() else 0
    column = int((got[at] - want[at]).abs().argmax())
    scaled = [
        f"{name}={value}"
        for name, value in _settings(model.config.to_dict())
        if _SCALED.search(name) and value not in (None, 1, 1.0)
    ]
    hint = f"; config.json has {', '.join(scaled)}" if scaled else ""
    raise refusal(
        model,
        f"{what} differs from transformers (relative error {error:.2g}; {places[at]}: "
        f"{float(got[at, column]):.4f} instead of {float(want[at, column]):.4f}{hint})",
    )


def _compare_steps(
    model: Any, what: str, found: Sequence[tuple[int, Tensor]], wanted: Sequence[Tensor]
) -> None:
    """Compare results of :meth:`Probe.cached_logits` and :meth:`Probe.uncached_logits`."""
    places = [f"row {n % len(PROMPTS)}, token {at}" for n, (at, _) in enumerate(found)]
    _compare(
        model, what, places, torch.stack([row_V for _, row_V in found]), torch.stack([*wanted])
    )


def _compare_median(
    model: Any, what: str, found: Sequence[tuple[int, Tensor]], wanted: Sequence[Tensor]
) -> None:
    """Compare the median token in the network's own precision."""
    # In bfloat16 a single token can differ completely, without any error (docs/log/engine.md).
    error_M = [
        relative_error(row_V, want_V) for (_, row_V), want_V in zip(found, wanted, strict=True)
    ]
    # Negated, so that NaN is rejected.
    if not float(np.median(error_M)) < ROUNDED_TOLERANCE:
        _compare_steps(model, what, found, wanted)


def _record(model: Any, device: torch.device, *further: str) -> Path:
    """Return the marker file of a configuration that passed with these library versions."""
    import transformers

    # The comparison runs in float32, and its result does not depend on the folder.
    fields = {**model.config.to_dict(), "dtype": None, "_name_or_path": None}
    versions = (__version__, torch.__version__, transformers.__version__)
    known = json.dumps(
        [fields, head_kind(model), type(model).__name__, device.type, versions, *further],
        default=str,
    )
    return luthier_home() / "probes" / f"{hashlib.sha256(known.encode()).hexdigest()}.json"


def _remember(record: Path, model: Any, **found: bool) -> None:
    """Write the file of a passed trial."""
    record.parent.mkdir(parents=True, exist_ok=True)
    write_json(record, {"type": model.config.model_type, **found})


def _read_record(record: Path) -> dict[str, Any] | None:
    if not record.is_file():
        return None
    found = read_json(record)
    return found if isinstance(found, dict) and "is_bidirectional" in found else None
