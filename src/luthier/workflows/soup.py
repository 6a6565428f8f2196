"""A model between others: a tuned model and its base, or several that were tuned from one base.

    weights = base + alpha * mean of (tuned - base)

Of one tuned model this is WiSE-FT (Wortsman et al. 2022, arXiv:2109.01903): between base and tuned
weights lie models that keep most of what tuning gained and forget less. Of several it is a model soup
(Wortsman et al. 2022, arXiv:2203.05482): ``uniform`` takes the mean of all, ``greedy`` (recipe 1 of the
paper) takes them in by their score on held-out rows, each only where the mean gets no worse by it.
Answering costs what one model costs.

An adapter of LoRA is scaled where it alone is asked for: ``alpha`` times its second matrix, which is
the same model to rounding, as small as before. All else is averaged as whole networks, in float32, as
half of a small change is lost in fewer bits. A head that the base lacks (classes, a rating) is taken
from the tuned models at every ``alpha``. Running statistics of norms are averaged like weights.

Left out: a weight of its own for each model or layer (the learned soup of the paper), ensembles of
answers, alphas above 1.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from luthier.adaptations.lora import LoRA
from luthier.adaptations.qlora import QLoRA
from luthier.engine.machine import available_memory
from luthier.engine.memory import weight_bytes
from luthier.engine.metrics import Reporter
from luthier.engine.runs import Run, automatic_name
from luthier.errors import DoesNotFit, RecipeError
from luthier.evaluation.significance import RowScores, Score, as_gain
from luthier.files import folder_size, hashes_of, need_disk, new_folder
from luthier.models.heads import Head, new_weights
from luthier.models.load import sketch
from luthier.models.manifest import Manifest
from luthier.models.save import ADAPTER, read_adapter, save_format, save_network
from luthier.models.tensors import save_tensors
from luthier.store import models as store
from luthier.store.models import StoredModel
from luthier.workflows.certificate.certificate import certify
from luthier.workflows.new_model import check_read_back, claim_name, new_manifest

COPIES = 4
"""Networks in float32 that are held at once: base, mean, what lies between, and that read back."""
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Points of the curve."""
CPU = torch.device("cpu")
ADAPTER_CONFIG = "adapter_config.json"

Method = Literal["uniform", "greedy"]
Measure = Callable[[StoredModel], tuple[str, Score]]
"""Evaluates a model on held-out rows: the name of what is measured, and the score."""


@dataclass(frozen=True, eq=False)
class AlphaPoint:
    """One model on the way from the base to the tuned ones, measured."""

    alpha: float
    score: Score
    """On the held-out rows."""
    general: Score | None = None
    """On general rows, where they were given."""

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        found: dict[str, Any] = {"alpha": self.alpha, **_plain(self.score)}
        return found if self.general is None else found | {"general": _plain(self.general)}


@dataclass(frozen=True, eq=False)
class Soup:
    """What was averaged, what was measured, and what was stored."""

    base: str
    ingredients: list[str]
    """Ids of the tuned models in it."""
    left_out: list[str]
    """Those without which ``greedy`` measured more."""
    alpha: float
    """Of the stored model; without one, what is suggested."""
    curve: list[AlphaPoint] = field(default_factory=list)
    measure: str = ""
    general_measure: str = ""
    suggested: float | None = None
    """The alpha to take, by the curve; 0 is the base."""
    reason: str = ""
    """Why."""
    model_id: str | None = None
    """``None`` where the base or a tuned model alone is as good, so that nothing was stored."""
    model_dir: str | None = None
    saved: Literal["adapter", "network"] | None = None
    saved_bytes: int = 0
    head_of_tuned: list[str] = field(default_factory=list)
    """Weights that the base lacks, which are the tuned models' at every alpha."""

    def plain(self) -> dict[str, Any]:
        """All of it, for JSON."""
        found = {name: value for name, value in vars(self).items() if name != "curve"}
        return found | {"curve": [point.plain() for point in self.curve]}


def _plain(score: Score) -> dict[str, Any]:
    return {"score": score.value, "error": score.error, "interval": list(score.interval)}


def make_soup(
    model_ids: Sequence[str],
    name: str | None = None,
    alpha: float | None = None,
    method: Method = "uniform",
    measure: Measure | None = None,
    measure_general: Measure | None = None,
    reporter: Reporter | None = None,
) -> Soup:
    """Average models that were tuned from one base, and store the custom model ``name``.

    Args:
        model_ids: custom models of one base, with the same head.
        name: of the new model; the first one's with ``-soup`` and a number when not given.
        alpha: share of what was tuned, up to 1. Not given, it is the suggestion of the curve where
            there is one, else 0.5 for one model and 1 for several.
        method: which of several models are averaged; ``greedy`` needs ``measure``.
        measure: evaluates a model on held-out rows; with it the curve over :data:`ALPHAS` is measured.
        measure_general: the same on rows of another kind, which tell what is forgotten.
        reporter: receives what is done.

    Raises:
        RefusedInput: for models that do not go together, a name, an alpha, a memory or a disk.
    """
    reporter = reporter or Reporter()
    if twice := next((each for each in model_ids if [*model_ids].count(each) > 1), None):
        raise RecipeError(f"{twice} would be averaged with itself; name each model once")
    tuned = [store.find(model_id, reporter.stage) for model_id in model_ids]
    _check(tuned, alpha, method, measure)
    first = tuned[0]
    if name is None:
        name = automatic_name(first.root, f"{first.id.rpartition(':')[2][:44]}-soup", False)
    with claim_name(first.root, name) as run:
        made = _Averaging(tuned, run, measure, measure_general, reporter).make(alpha, method)
        if made.model_id is not None:
            certify(made.model_id)
        return made


def _check(
    tuned: Sequence[StoredModel], alpha: float | None, method: Method, measure: Measure | None
) -> None:
    """Refuse models that cannot be averaged, before a weight is read."""
    if not tuned:
        raise RecipeError("name a tuned model")
    if alpha is not None and not 0 < alpha <= 1:
        raise RecipeError(
            f"alpha={alpha:g} is no share: 0 is the base and 1 the mean of the tuned models; give "
            "what lies between"
        )
    if len(tuned) == 1 and alpha == 1:
        raise RecipeError(f"alpha=1 of one model is {tuned[0].id} itself; give less")
    if method == "greedy" and (measure is None or len(tuned) == 1):
        raise RecipeError(
            "method=greedy takes in one of several models after the other by its score: name "
            "several models, and held-out rows"
        )
    first = tuned[0]
    for each in tuned:
        if each.manifest.parent is None or each.manifest.objective is None:
            raise RecipeError(
                f"{each.id} was not tuned here, so the weights that it started from are not known"
            )
        if each.manifest.parent != first.manifest.parent:
            raise RecipeError(
                f"{first.id} was tuned from {first.manifest.parent} and {each.id} from "
                f"{each.manifest.parent}: only models of one base lie close enough to be averaged"
            )
        if store.objective_of(each).head() != store.objective_of(first).head():
            raise RecipeError(
                f"{first.id} and {each.id} have other heads (another task, or other labels), which "
                "have no mean"
            )
        store.check_mergeable(each, "a mean is one of these")


class _Averaging:
    """Models between the base and the tuned ones: written, measured, one of them stored."""

    def __init__(
        self,
        tuned: Sequence[StoredModel],
        run: Run,
        measure: Measure | None,
        measure_general: Measure | None,
        reporter: Reporter,
    ) -> None:
        self.tuned, self.run, self.reporter = list(tuned), run, reporter
        self.measure, self.measure_general = measure, measure_general
        self.base = store.find(str(tuned[0].manifest.parent), reporter.stage)
        self.chat = store.chat_format(tuned[0])
        self._mean: tuple[list[StoredModel], dict[str, Tensor]] | None = None
        self._check_memory()

    def _check_memory(self) -> None:
        """Refuse whole networks that would not fit, before one of them is read."""
        if len(self.tuned) == 1 and _lora_tensors(self.tuned[0]) is not None:
            return
        network = sketch(self.base.network_folder, self._head)
        need = COPIES * weight_bytes(network, torch.float32.itemsize)
        if need > (free := available_memory()):
            raise DoesNotFit(
                f"averaging holds {COPIES} networks in float32 at once: of {self.base.id} these are "
                f"{need / 1e9:.2f} GB, and {free / 1e9:.2f} GB of memory are free. Free some memory, "
                "or take one model that was tuned with lora: its adapter alone is scaled"
            )

    def make(self, alpha: float | None, method: Method) -> Soup:
        """Choose, measure and store."""
        chosen = self._choose_greedily() if method == "greedy" else self.tuned
        found = Soup(
            base=self.base.id,
            ingredients=[each.id for each in chosen],
            left_out=[each.id for each in self.tuned if each not in chosen],
            alpha=alpha or (0.5 if len(chosen) == 1 else 1.0),
        )
        if self.measure is not None:
            found = self._with_curve(found, chosen, self.measure, alpha)
        if found.alpha == 0 or (found.alpha == 1 and len(chosen) == 1):
            return found
        self.reporter.stage("Storing and verifying the model")
        record = {"method": method, "ingredients": {e.id: store.content_hash(e) for e in chosen}}
        facts = found.plain()
        record |= {name: facts[name] for name in ("alpha", "left_out", "curve", "measure")}
        with new_folder(self.run.model_folder) as fresh:
            manifest = self._write(chosen, found.alpha, fresh)
            manifest = manifest.model_copy(update={"soup": record, "files": hashes_of(fresh)})
            manifest.write(fresh)
        return replace(
            found,
            model_id=self.run.model_id,
            model_dir=str(self.run.model_folder),
            saved=manifest.saved,
            saved_bytes=folder_size(self.run.model_folder, ".safetensors"),
            head_of_tuned=sorted(self._new) if "_network" in self.__dict__ else [],
        )

    def _choose_greedily(self) -> list[StoredModel]:
        """The models without which the held-out rows are answered worse, the best first."""
        found = {}
        for place, each in enumerate(self.tuned):
            self.reporter.progress(place, len(self.tuned), "models")
            found[each.id] = self._gain([each])
        order = sorted(self.tuned, key=lambda each: -found[each.id])
        chosen, best = order[:1], found[order[0].id]
        for each in order[1:]:
            gain = self._gain([*chosen, each])
            if gain >= best:
                chosen, best = [*chosen, each], gain
        return chosen

    def _gain(self, chosen: Sequence[StoredModel]) -> float:
        """The score of a mean on the held-out rows, of which more is better."""
        assert self.measure is not None
        with self._model(chosen, 1.0) as stored:
            return _gain(*self.measure(stored))

    def _with_curve(
        self, soup: Soup, chosen: Sequence[StoredModel], measure: Measure, alpha: float | None
    ) -> Soup:
        """The points of the curve measured, and one of them suggested."""
        points: list[AlphaPoint] = []
        alphas = sorted({*ALPHAS, *([] if alpha is None else [alpha])})
        name = general_name = ""
        for place, each in enumerate(alphas):
            self.reporter.progress(place, len(alphas), "points of the curve")
            general = None
            with self._model(chosen, each) as stored:
                name, score = measure(stored)
                if self.measure_general is not None:
                    general_name, general = self.measure_general(stored)
            points.append(AlphaPoint(each, score, general))
        suggested, reason = suggest(points, name, general_name)
        return replace(
            soup,
            alpha=suggested if alpha is None else alpha,
            curve=points,
            measure=name,
            general_measure=general_name,
            suggested=suggested,
            reason=reason,
        )

    @contextmanager
    def _model(self, chosen: Sequence[StoredModel], alpha: float) -> Iterator[StoredModel]:
        """A model that is there as long as it is measured."""
        if alpha == 1 and len(chosen) == 1:
            yield chosen[0]
            return
        folder = self.run.folder / "point"
        folder.mkdir(parents=True)
        try:
            manifest = self._write(chosen, alpha, folder)
            parent = self.base if manifest.saved == "adapter" else None
            yield StoredModel(manifest.id, folder, manifest, parent)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _write(self, chosen: Sequence[StoredModel], alpha: float, folder: Path) -> Manifest:
        """Write weights and tokenizer and read them back; the record, of what they are."""
        first = chosen[0]
        adapter = _lora_tensors(first) if len(chosen) == 1 else None
        recipe = {"objective": first.manifest.objective}
        if adapter is not None:
            recipe["adaptation"] = (first.manifest.recipe or {})["adaptation"]
            tensors = {name: self._scale(name, each, alpha) for name, each in adapter.items()}
            save_tensors(tensors, folder / ADAPTER, metadata={"format": "pt"})
            shutil.copyfile(first.folder / ADAPTER_CONFIG, folder / ADAPTER_CONFIG)
            save_format(self.chat, folder)
            kept, again = tensors, read_adapter(folder)
        else:
            network = self._network
            network.load_state_dict(self._between(chosen, alpha))
            kept = network.state_dict()
            need_disk(folder, sum(w.nbytes for w in network.parameters()), "storing the model")
            save_network(network, self.chat, folder)
        manifest = new_manifest(
            self.run,
            first,
            self.chat,
            kind=first.kind,
            saved="network" if adapter is None else "adapter",
            parent=self.base.id,
            recipe=recipe,
            plugins=first.manifest.plugins,
            precision="float32",
        )
        if adapter is None:
            stored = StoredModel(manifest.id, folder, manifest)
            again = store.load(stored, torch.float32, CPU, self._head).state_dict()
        check_read_back(kept, again, "model")
        return manifest

    def _scale(self, name: str, tensor: Tensor, alpha: float) -> Tensor:
        """A tensor of an adapter that changes ``alpha`` times as much."""
        if ".lora_A." in name:
            return tensor
        if ".lora_B." in name:
            return tensor * alpha
        plain = name.removeprefix(LoRA().stored_name(""))
        if plain in self._new or plain not in self._start:
            return tensor
        return torch.lerp(self._start[plain], tensor.float(), alpha)

    def _between(self, chosen: Sequence[StoredModel], alpha: float) -> dict[str, Tensor]:
        """Weights between the base and the mean of ``chosen``; whole numbers are those of the mean."""
        mean = self._mean_of(chosen)
        return {
            name: torch.lerp(start, mean[name], alpha)
            if start.is_floating_point() and name not in self._new
            else mean[name]
            for name, start in self._start.items()
        }

    def _mean_of(self, chosen: Sequence[StoredModel]) -> dict[str, Tensor]:
        """The mean of whole networks."""
        if self._mean is not None and self._mean[0] == list(chosen):
            return self._mean[1]
        mean: dict[str, Tensor] = {}
        for each in chosen:
            self.reporter.stage(f"Loading {each.id}")
            state = store.load(each, torch.float32, CPU, self._head).state_dict()
            shapes = {name: weight.shape for name, weight in state.items()}
            if shapes != {name: weight.shape for name, weight in self._start.items()}:
                raise RecipeError(
                    f"{each.id} has other weights than its base {self.base.id}, so they have no mean"
                )
            for name, weight in state.items():
                if not weight.is_floating_point():
                    mean.setdefault(name, weight)
                elif name in mean:
                    mean[name] += weight / len(chosen)
                else:
                    mean[name] = weight / len(chosen)
        self._mean = list(chosen), mean
        return mean

    @property
    def _head(self) -> Head:
        return store.objective_of(self.tuned[0]).head()

    @cached_property
    def _network(self) -> Any:
        """The base, with the head of the tuned models, into which weights are loaded."""
        self.reporter.stage(f"Loading {self.base.id}")
        torch.manual_seed(0)  # a head that the base lacks is drawn, and taken from the tuned models
        return store.load(self.base, torch.float32, CPU, self._head)

    @cached_property
    def _start(self) -> dict[str, Tensor]:
        """Weights of the base."""
        state: dict[str, Tensor] = self._network.state_dict()
        return {name: weight.clone() for name, weight in state.items()}

    @cached_property
    def _new(self) -> frozenset[str]:
        """Weights that the base lacks."""
        return new_weights(self._network)


def _lora_tensors(stored: StoredModel) -> dict[str, Tensor] | None:
    """What an adapter consists of that can be scaled: LoRA's update is linear in its second matrix.

    ``None`` of all other models; DoRA's lengths are not linear in anything.
    """
    if stored.manifest.saved != "adapter":
        return None
    adaptation = store.adaptation_of(stored)
    lora = adaptation.lora if isinstance(adaptation, QLoRA) else adaptation
    return read_adapter(stored.folder) if isinstance(lora, LoRA) and not lora.dora else None


def suggest(
    curve: Sequence[AlphaPoint], measure: str, general_measure: str = ""
) -> tuple[float, str]:
    """The alpha to take, and why.

    Without general rows the best score. With them, of all points that are no more than one standard
    error below it (the rule of Breiman et al. 1984 for pruned trees), the best on the general rows. Of
    equals the nearest to the base.
    """
    best = max(curve, key=lambda point: (_gain(measure, point.score), -point.alpha))
    if best.general is None:
        return best.alpha, f"the best {measure.replace('_', ' ')} of the curve"
    near = [
        each
        for each in curve
        if _gain(measure, each.score) >= _gain(measure, best.score) - _error(best.score, each.score)
    ]
    chosen = max(near, key=lambda point: (_gain(general_measure, point.general), -point.alpha))
    return chosen.alpha, (
        f"the best {general_measure.replace('_', ' ')} on general rows among points whose "
        f"{measure.replace('_', ' ')} is within one standard error of the best"
    )


def _gain(name: str, score: Score | None) -> float:
    assert score is not None
    return as_gain(name, score.value)


def _error(best: Score, other: Score) -> float:
    """Standard error of a difference: known row by row, or that of the best."""
    if isinstance(best, RowScores) and isinstance(other, RowScores) and len(best) == len(other):
        return best.difference_error(other)
    return best.error
