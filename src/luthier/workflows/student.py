"""Students: smaller networks cut from a teacher's weights, stored and verified."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from luthier import __version__
from luthier.engine.metrics import Reporter
from luthier.engine.runs import Run
from luthier.errors import LuthierError, RecipeError
from luthier.files import folder_size, hashes_of, need_disk, new_folder, sha256_of
from luthier.library import models as store
from luthier.models.folder import ModelFolder
from luthier.models.formats.save import save_network
from luthier.models.load import sketch, stored_dtype
from luthier.models.manifest import Manifest, created_now
from luthier.models.networks.heads import Head, head_in
from luthier.models.shrinking.student import StudentPlan, StudentShape, plan, shrink
from luthier.models.tokenizer import check_vocabulary
from luthier.recipe import check_name
from luthier.workflows.certificate.certificate import certify

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Student:
    """A stored student."""

    model_id: str
    model_dir: str
    parent: str
    layers: int
    """Layers in each stack of the student."""
    kept: tuple[int, ...] | None
    """Kept layers of the teacher, counted from 0; None for a network with one repeated layer."""
    weights: int
    teacher_weights: int
    saved_bytes: int
    """Size of the student's weights on disk."""


@dataclass(frozen=True)
class _Draft:
    teacher: store.StoredModel
    head: Head
    planned: StudentPlan
    dtype: torch.dtype
    weights: int
    teacher_weights: int


def make_student(
    teacher_id: str, name: str, shape: StudentShape, reporter: Reporter | None = None
) -> Student:
    """Cut a smaller network from a teacher's weights and store the custom model ``name``.

    The student has the teacher's precision. Adapters of the teacher's lineage are merged first, in
    float32. A head (classes, tags, a rating) and the tokenizer with template and stop tokens stay.

    Raises:
        RefusedInput: before any weight is read, for shape, family, name or disk.
    """
    reporter = reporter or Reporter()
    shape.check()
    teacher = store.find(teacher_id, reporter.stage)
    try:
        run = Run(teacher.root, check_name(name))
    except ValueError as error:
        raise RecipeError(f"`name` {name!r}: {error}", setting="name") from error
    with run.lock():
        try:
            run.check_free()
            draft = _draft(teacher, shape)
            for line in describe_draft(draft):
                reporter.note(line)
            made = _store(draft, run, reporter.stage)
            certify(made.model_id)
            return made
        finally:
            run.drop_if_empty()


def describe_draft(draft: _Draft) -> list[str]:
    """Return a description of a draft in lines."""
    planned, share = draft.planned, draft.weights / draft.teacher_weights
    before, after = planned.depth
    lines = []
    if after != before or planned.shape.keep is not None:
        kept_layers = next(iter(planned.stacks.values()), None)
        which = "one layer, repeated" if kept_layers is None else ", ".join(map(str, kept_layers))
        stacks = f" in each of {len(planned.stacks)} stacks" if len(planned.stacks) > 1 else ""
        lines.append(f"layers: {after} of {before}{stacks} ({which})")
    widths = ("heads", "intermediate", "hidden")
    lines += [
        f"{field}: {size} in each layer" if field != "hidden" else f"{field}: {size} channels"
        for field in widths
        if (size := getattr(planned.shape, field)) is not None
    ]
    size = draft.weights * draft.dtype.itemsize / 1e6
    kind = str(draft.dtype).removeprefix("torch.")
    lines.append(
        f"weights: {draft.teacher_weights:,} -> {draft.weights:,} ({share:.1%}), "
        f"{size:,.1f} MB in {kind}"
    )
    if share == 1:
        lines.append("the student has the size of the teacher")
    return lines


def _draft(teacher: store.StoredModel, shape: StudentShape) -> _Draft:
    store.check_mergeable(teacher, "a student is made of these")
    network = teacher.network
    check_vocabulary(teacher.chat, network.fields, teacher.id)
    learned = teacher.manifest.objective
    bare = Head("causal_lm")  # adds nothing to the configuration
    head = teacher.objective.head() if learned else head_in(network.config(bare))
    whole: Any = network.sketch(head)
    planned = plan(whole, shape)
    smaller = sketch(planned.config, head)
    counts = [sum(weight.numel() for weight in model.parameters()) for model in (smaller, whole)]
    return _Draft(teacher, head, planned, stored_dtype(network.path), *counts)


def _store(draft: _Draft, run: Run, stage: Callable[[str], None]) -> Student:
    """Cut, save and verify the student, and store the model."""
    teacher, head = draft.teacher, draft.head
    need_disk(
        run.model_folder, draft.weights * draft.dtype.itemsize + (16 << 20), "storing the student"
    )
    stage(f"Loading {teacher.id}")
    torch.manual_seed(0)  # weights that are missing in the files are random
    # Merged in float32, because a sum in fewer bits loses most of a small change.
    precision = draft.dtype if teacher.parent is None else torch.float32
    student = shrink(store.load(teacher, precision, CPU, head).to(draft.dtype), draft.planned)
    stage("Storing and verifying the student")
    with new_folder(run.model_folder) as fresh:
        save_network(student, teacher.chat, fresh)
        manifest = _manifest(draft, run, fresh)
        stored = store.StoredModel(run.model_id, fresh, manifest)
        loaded = store.load(stored, draft.dtype, CPU, head).state_dict()
        different = [
            name
            for name, weight in student.state_dict().items()
            if name not in loaded or not weight.equal(loaded[name])
        ]
        if different:
            raise LuthierError(
                f"The saved weights differ from the student ({', '.join(different[:3])}). The student "
                "is not stored."
            )
        manifest.model_copy(update={"files": hashes_of(fresh)}).write(fresh)
    return Student(
        model_id=run.model_id,
        model_dir=str(run.model_folder),
        parent=teacher.id,
        layers=draft.planned.depth[1],
        kept=next(iter(draft.planned.stacks.values()), None),
        weights=draft.weights,
        teacher_weights=draft.teacher_weights,
        saved_bytes=folder_size(run.model_folder, ".safetensors"),
    )


def _manifest(draft: _Draft, run: Run, folder: Path) -> Manifest:
    teacher, planned = draft.teacher, draft.planned
    learned = teacher.manifest.objective
    return Manifest(
        id=run.model_id,
        root=teacher.root,
        **store.tokenizer_origin(teacher),
        licence=teacher.manifest.licence,
        created=created_now(),
        luthier=__version__,
        torch=torch.__version__,
        format=store.text_format(teacher.chat),
        kind=teacher.kind or ("causal_lm" if draft.head.kind == "causal_lm" else "encoder"),
        saved="network",
        parent=teacher.id,
        recipe={"objective": learned} if learned else None,
        student={
            "asked": {
                key: value for key, value in asdict(planned.shape).items() if value is not None
            },
            "kept": {stack: list(layers) for stack, layers in planned.stacks.items()},
            "layers": planned.depth[1],
            "teacher_layers": planned.depth[0],
            "teacher_parameters": draft.teacher_weights,
            "teacher_sha256": {
                path.name: sha256_of(path) for path in sorted(teacher.folder.glob("*.safetensors"))
            },
        },
        parameters=draft.weights,
        context=ModelFolder(folder).context,
        precision=str(draft.dtype).removeprefix("torch."),
    )
