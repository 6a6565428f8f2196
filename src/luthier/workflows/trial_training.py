"""A training on a temporary copy, for estimates and advice."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from luthier.engine.job import TrainingJob, prepare_job, with_base
from luthier.engine.loop import Loop
from luthier.engine.machine import choose_machine
from luthier.engine.metrics import Reporter
from luthier.engine.runs import Run
from luthier.engine.steps import select_steps
from luthier.engine.train import Trainer
from luthier.files import TEMPORARY, luthier_home
from luthier.library.models import find
from luthier.models.network import Network
from luthier.recipe import Recipe


@contextmanager
def temporary_run(root: str, kind: str) -> Iterator[Run]:
    """Yield a run of a base model below ``kind`` in the home folder, removed at the end."""
    home = luthier_home() / kind
    home.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=home))
    try:
        yield Run(root, kind, rehearsal=folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def trial_training(
    recipe: Recipe, kind: str, reporter: Reporter
) -> Iterator[tuple[TrainingJob, Network, Loop]]:
    """Yield the job of ``recipe``, the network and the loop before the first step.

    Raises:
        RefusedInput: as :func:`luthier.engine.train.train`.
    """
    machine = choose_machine(recipe.training.precision, recipe.training.threads)
    recipe = with_base(recipe, reporter)
    job = prepare_job(recipe, find(recipe.base, reporter.stage), machine, reporter)
    with temporary_run(job.base.root, kind) as run:
        trainer = Trainer(job, run, reporter, select_steps(job, trial=True))
        loop = trainer.start(resume=False)
        yield job, trainer.network, loop
