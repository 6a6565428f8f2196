"""Pre-training from raw text: tokenizer, network, token file, training, storing.

The network has random weights, or is an existing base with its tokenizer: continued pre-training
(Gururangan et al. 2020, arXiv:2004.10964) of all weights or an adapter, on text of any size.

All parts before the training are created once, in the run's folder, atomically and from the request
alone. A killed run resumes with the same bits. The tuning engine trains all weights of the network.

    pretraining/<name>/survey.json   statistics of the files
    pretraining/<name>/start/        tokenizer, configuration and random weights
    pretraining/<name>/tokens/       the text as token ids

An adapter is a custom model of its base, with the run in ``runs/<base>/<name>``.

Several processes share the rows of each step as in :mod:`luthier.engine.train`. The order of
sequences follows from seed and step alone. The first process creates the parts.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from luthier import __version__
from luthier.data.conversations.chat import ChatFormat
from luthier.data.files.corpus import CorpusPiece, HeldOut, Survey, pieces, sample, survey
from luthier.data.files.read import find_container
from luthier.data.files.sources import files_of
from luthier.data.tokens import EncoderTokenFile, PieceFile, TokenFile, TokenWriter, id_type
from luthier.engine.dataset import Dataset
from luthier.engine.job import TrainingJob, resolve_job
from luthier.engine.machine import (
    TRAINING_KERNELS,
    Machine,
    choose_machine,
    keep_freed_memory,
    limit_kernels,
)
from luthier.engine.metrics import Reporter
from luthier.engine.processes import (
    ORPHAN_SECONDS,
    has_agent,
    launch_id,
    main,
    run_in_processes,
    started_again,
)
from luthier.engine.runs import START, TOKENS, BaseRun, Result, Run
from luthier.engine.timings import Clock
from luthier.engine.train import train_first_process, train_other_process
from luthier.errors import DataError, Problem, RecipeError, RefusedInput
from luthier.files import (
    need_disk,
    new_folder,
    read_json,
    sha256_of,
    write_json,
)
from luthier.library import models as store
from luthier.models import bpe
from luthier.models.build import build, read_configuration
from luthier.models.manifest import Manifest
from luthier.models.network_shapes import SHAPES, configuration
from luthier.models.networks.heads import Head
from luthier.models.process_group import ProcessGroup
from luthier.objectives.base import Objective, RunModels
from luthier.objectives.causal_lm import CausalLM
from luthier.objectives.masked_lm import MaskedLM
from luthier.objectives.span_corruption import SpanCorruption
from luthier.recipe import DataSpec, Recipe, Training
from luthier.workflows.certificate.certificate import certify
from luthier.workflows.pretrain_defaults import NetworkFacts, choose, plan, shortage
from luthier.workflows.pretrain_recipe import PretrainRecipe

SURVEY, SETTLED = "survey.json", "settled.json"
MAX_VALIDATION = 400
"""Maximum validation sequences; sequences of a longer text are sampled evenly."""
BATCH = 16
"""Pieces of text that are encoded together, about a megabyte."""


def pretrain(
    recipe: PretrainRecipe,
    resume: bool = False,
    reporter: Reporter | None = None,
    processes: int = 1,
) -> Result:
    """Carry out ``recipe``, and store and verify the base model.

    ``processes`` of this machine share the work; under a launcher such as torchrun, all started
    processes.

    Raises:
        RefusedInput: before any training, for text, recipe, memory, disk or name.
        Interrupted: on Ctrl-C or SIGTERM, after a checkpoint.
    """
    reporter = reporter or Reporter()
    if processes == 1:
        result = _train(recipe, resume, reporter)
    else:
        run = _run_of(recipe, reporter)
        with run.lock():
            if _begin(recipe, run, resume) is None:
                # Before the start of the processes, which would wait longer than their time limit.
                with _dropped_if_refused(run):
                    _make_parts(recipe, run, reporter)
        request = {"recipe": recipe.plain(), "resume": True}
        result = run_in_processes("luthier.workflows.pretrain", request, processes, reporter)
    if ProcessGroup.of_environment().rank == 0:
        certify(result.model_id)
    return result


def _train(recipe: PretrainRecipe, resume: bool, reporter: Reporter) -> Result:
    """Run :func:`pretrain` in this process, possibly as one of several launched processes."""
    group = ProcessGroup.of_environment()
    keep_freed_memory()
    limit_kernels(TRAINING_KERNELS)
    machine = choose_machine(recipe.training.precision, recipe.training.threads)
    run = _run_of(recipe, reporter)
    with group.shared_errors():
        if group.rank:
            silent = Reporter()
            return train_other_process(lambda _: _job(recipe, run, machine, silent, group), group)
        with run.lock(ORPHAN_SECONDS if has_agent() else 0.0):
            done = _begin(recipe, run, resume)
            with _dropped_if_refused(run):
                job = None if done else _job(recipe, run, machine, reporter, group)
            return train_first_process(job, run, done, run.has_metrics(), reporter, Clock(), group)


def _run_of(recipe: PretrainRecipe, reporter: Reporter) -> Run:
    if recipe.makes_adapter:
        return Run(store.find(str(recipe.network.base), reporter.stage).root, recipe.name)
    return BaseRun(recipe.name)


def _begin(recipe: PretrainRecipe, run: Run, resume: bool) -> Result | None:
    launch = launch_id()
    # A node that joins or leaves restarts all processes.
    resume = resume or started_again() or bool(launch and run.read_launch() == launch)
    try:
        return run.begin(_request(recipe), resume, launch)
    except BaseException:
        run.drop_if_empty()
        raise


@contextmanager
def _dropped_if_refused(run: Run) -> Iterator[None]:
    try:
        yield
    except RefusedInput:
        run.drop_if_untrained()
        raise


def _request(recipe: PretrainRecipe) -> dict[str, Any]:
    sources = [*recipe.data.train, *recipe.data.validation]
    files = [file for source in sources for file in files_of(source)]
    problems: list[Problem] = []
    for path in files:
        find_container(path, problems)
    if problems:
        raise DataError(problems)
    hashes = {str(path): sha256_of(path) for path in files}
    return {"recipe": recipe.plain(), "data": hashes, "luthier": __version__}


@dataclass(frozen=True)
class _Parts:
    recipe: PretrainRecipe
    """Recipe with the sizes of network and tokenizer."""
    choices: list[tuple[str, Any, str]]
    """Chosen settings: name, value, reason."""
    start: store.StoredModel
    chat: ChatFormat
    context: int
    """Tokens of a sequence."""
    data: Dataset


def _make_parts(recipe: PretrainRecipe, run: Run, reporter: Reporter) -> _Parts:
    statistics = _survey(recipe, run, reporter)
    # The sizes follow from the amount of text, which is counted first.
    recipe, choices = plan(recipe, statistics)
    start = _start(recipe, run, statistics, reporter)
    chat = replace(start.chat, template=start.chat.template.with_date())
    context = room = start.room - recipe.adaptation.added_tokens
    if recipe.network.base is not None:
        CausalLM().bind(RunModels(chat))
        if (recipe.network.context or 0) > room:
            raise RecipeError(
                f"`network.context` is {recipe.network.context:,}, and {start.id} allows at most "
                f"{room:,} tokens. Remove the setting, or reduce the value.",
                setting="network.context",
            )
        context = min(room, recipe.network.context or CausalLM().sequence_length)
    elif recipe.method == "span_corruption":  # relative positions have no limit of their own
        assert recipe.network.size is not None
        shape = SHAPES[recipe.network.family][recipe.network.size]
        context = recipe.network.context or shape.context
    data = _dataset(recipe, run, statistics, chat, context, reporter)
    return _Parts(recipe, choices, start, chat, context, data)


def _job(
    recipe: PretrainRecipe, run: Run, machine: Machine, reporter: Reporter, group: ProcessGroup
) -> TrainingJob:
    """Read or create the parts and choose open settings."""
    parts = _make_parts(recipe, run, reporter)
    recipe, choices, start, data = parts.recipe, parts.choices, parts.start, parts.data
    weights, embedding = _count(start, data.objective.head())
    training: Training = recipe.training
    if recipe.network.base is None:  # continued pre-training uses the defaults of tuning
        family = start.network.fields["model_type"]
        facts = NetworkFacts(weights, embedding, parts.context, data.counts["tokens"], family)
        training, more = choose(training, facts)
        if note := shortage(facts, training):
            reporter.note(note)
        learned = ("weights", f"{weights:,}", f"and {parts.context} tokens of context")
        choices = [*choices, learned, *more]
    whole = Recipe(
        base=start.id,
        data=DataSpec(train=str(run.folder / TOKENS / "train.bin")),
        objective=data.objective,
        adaptation=recipe.adaptation,
        training=training,
    )
    stored_settings = read_json(run.folder / SETTLED) if (run.folder / SETTLED).is_file() else {}
    job = resolve_job(
        whole,
        start,
        parts.chat,
        replace(data, choices=choices),
        machine,
        reporter,
        stored_settings,
        group.size,
        run.checkpoint_bytes(),
    )
    if group.rank == 0:
        # A resumed run keeps the micro-batches, because their size changes the last bits.
        budget = job.recipe.training.micro_batch_tokens
        write_json(run.folder / SETTLED, {"micro_batch_tokens": budget})
    resolved = job.recipe.plain()
    names = ("training", "objective", "adaptation")
    filled = {name: resolved[name] for name in names}
    origin: dict[str, Any] = {"recipe": recipe.plain() | filled}
    if recipe.network.base is not None:
        origin |= {"parent": start.id, **store.tokenizer_origin(start)}
    if recipe.makes_adapter:
        origin |= {"root": start.root}
    else:
        licence = start.manifest.licence if recipe.network.base is not None else None
        context = start.room
        origin |= {"parameters": weights, "context": context, "licence": licence}
    return replace(job, origin=origin)


def _dataset(
    recipe: PretrainRecipe,
    run: Run,
    statistics: Survey,
    chat: ChatFormat,
    context: int,
    reporter: Reporter,
) -> Dataset:
    folder, facts = run.folder / TOKENS, _tokens(recipe, run, statistics, chat, reporter)
    objective = recipe.objective(chat, context)
    train, validation = (
        _open_tokens(folder / f"{name}.bin", facts[name], objective, chat, context)
        for name in ("train", "validation")
    )
    learned = train.tokens - len(train)
    if isinstance(objective, MaskedLM):
        learned = round(objective.mask_share * train.tokens)
    elif isinstance(objective, SpanCorruption) and train:
        learned = len(train) * round(train[0].weight)
    if not train:
        raise RecipeError(
            f"The training text has only {train.tokens} tokens. Give more text, or reduce "
            "`data.validation_share`."
        )
    return Dataset(
        objective=objective,
        train=train,
        # Every n-th sequence, because the first sequences may be of one document.
        validation=validation[:: max(1, -(-len(validation) // MAX_VALIDATION))],
        longest=train.longest,
        hashes=run.request_value("data"),
        choices=[],
        counts={
            "rows": statistics.documents,
            "validation_rows": len(validation),
            "tokens": train.tokens,
            "learned_tokens": learned,
            "examples": len(train),
        },
    )


def _open_tokens(
    path: Path, facts: dict[str, Any], objective: Objective, chat: ChatFormat, context: int
) -> TokenFile:
    """Open a file of tokens as sequences for ``objective``."""
    # The inputs of encoders have special tokens, too.
    size = context - 2
    if isinstance(objective, MaskedLM):
        ends = chat.tokenizer.cls_token_id, chat.text_tokenizer.end_id
        return EncoderTokenFile.open(path, facts, size, *ends)
    if isinstance(objective, SpanCorruption):
        objective.check_sentinels(size)
        return PieceFile.open(path, facts, size, objective.piece)
    return TokenFile.open(path, facts, context)


def _survey(recipe: PretrainRecipe, run: Run, reporter: Reporter) -> Survey:
    # Stored, because counting the text takes minutes and a resumed run needs the same numbers.
    path = run.folder / SURVEY
    if not path.is_file():
        reporter.stage("Checking the text")
        if recipe.data.validation:
            survey(recipe.data.validation)
        write_json(path, asdict(survey(recipe.data.train)))
    return Survey(**read_json(path))


def _start(
    recipe: PretrainRecipe, run: Run, statistics: Survey, reporter: Reporter
) -> store.StoredModel:
    """Return tokenizer and network before the first step."""
    if recipe.network.base is not None:
        return store.find(recipe.network.base, reporter.stage)
    folder = run.folder / START
    is_encoder = recipe.method == "masked_lm"
    kind: Literal["causal_lm", "masked_lm"] = "masked_lm" if is_encoder else "causal_lm"
    if not folder.is_dir():
        fields, vocabulary = _network(recipe)
        reporter.stage(f"Training a tokenizer of {vocabulary:,} tokens")
        size = recipe.tokenizer.sample
        texts = sample(recipe.data.train, size, statistics.characters)
        if statistics.characters > size:
            reporter.note(
                f"the tokenizer learns from {size:,} of {statistics.characters:,} characters"
            )
        tokenizer = bpe.train_bpe(texts, vocabulary, recipe.special_tokens)
        if len(tokenizer) < vocabulary:
            reporter.note(
                f"the text has only {len(tokenizer):,} different tokens, the size of the vocabulary"
            )
        end = tokenizer.eos_token_id
        start = tokenizer.bos_token_id
        fields |= {"vocab_size": len(tokenizer), "bos_token_id": start, "eos_token_id": end}
        fields.pop("pad_token_id", None)
        if recipe.method != "causal_lm":
            fields["pad_token_id"] = tokenizer.pad_token_id
        if recipe.method == "span_corruption":
            fields["decoder_start_token_id"] = tokenizer.pad_token_id
        with new_folder(folder) as fresh:
            build(fields, recipe.training.seed, fresh, kind)
            tokenizer.save_pretrained(fresh)
    name = "a new network"
    return store.StoredModel(name, folder, Manifest(id=name, kind=kind))


def _network(recipe: PretrainRecipe) -> tuple[dict[str, Any], int]:
    """Return the network's configuration and the vocabulary size of the tokenizer."""
    network, vocabulary = recipe.network, recipe.tokenizer.vocabulary
    if network.config is None:
        assert network.size is not None and vocabulary is not None
        shape = SHAPES[network.family][network.size]
        shape = replace(shape, context=network.context or shape.context, vocabulary=vocabulary)
        return configuration(network.family, shape, 0), vocabulary
    fields = read_configuration(network.config)
    vocabulary = vocabulary or fields.get("vocab_size")
    if vocabulary is None:
        raise RecipeError(
            f"{network.config} has no `vocab_size`. Add `vocab_size`, or set `--vocabulary`.",
            setting="tokenizer.vocabulary",
        )
    smallest = recipe.special_tokens.smallest
    if not isinstance(vocabulary, int) or vocabulary < smallest:
        raise RecipeError(
            f"The vocabulary of {vocabulary} is below the minimum of {smallest}: 256 bytes and the "
            f"end-of-text token. Change `vocab_size` in {network.config}, or set `--vocabulary`.",
            setting="tokenizer.vocabulary",
        )
    if network.context is not None:
        fields.pop("n_positions", None)
        fields["max_position_embeddings"] = network.context
    return fields, vocabulary


def _tokens(
    recipe: PretrainRecipe, run: Run, statistics: Survey, chat: ChatFormat, reporter: Reporter
) -> dict[str, Any]:
    """Write the text as tokens, once, and return the content of ``tokens.json``."""
    folder = run.folder / TOKENS
    if not folder.is_dir():
        kind = id_type(len(chat.tokenizer))
        # A byte-level tokenizer needs more than one token for many characters outside of ASCII.
        bytes_at_most = 2 * statistics.characters * int(kind[-1])
        need_disk(run.folder, bytes_at_most, "the text as tokens")
        split = HeldOut(recipe.data.validation_share or 0.0, recipe.training.seed, statistics)
        with (
            new_folder(folder) as fresh,
            TokenWriter(fresh / "train.bin", kind) as train,
            TokenWriter(fresh / "validation.bin", kind) as validation,
        ):
            text = _report_progress(pieces(recipe.data.train), statistics.characters, reporter)
            _encode(split.parts(text), chat, train, validation)
            _encode(
                ((piece, True) for piece in pieces(recipe.data.validation)), chat, train, validation
            )
            facts = {"train": train.close(), "validation": validation.close()}
            write_json(fresh / "tokens.json", facts)
    facts = read_json(folder / "tokens.json")
    return dict(facts)


def _encode(
    text: Iterator[tuple[CorpusPiece, bool]],
    chat: ChatFormat,
    train: TokenWriter,
    validation: TokenWriter,
) -> None:
    """Append each piece to a token file, with an end-of-text token after each document."""
    while batch := list(islice(text, BATCH)):
        encoded = bpe.encode(chat.tokenizer, [piece.text for piece, _ in batch])
        for (piece, is_validation), ids in zip(batch, encoded, strict=True):
            (validation if is_validation else train).append(
                [*ids, chat.text_tokenizer.end_id] if piece.ends else ids
            )


def _report_progress(
    text: Iterator[CorpusPiece], characters: int, reporter: Reporter
) -> Iterator[CorpusPiece]:
    """Yield the same pieces and report the progress every 15 seconds."""
    started, reported = time.monotonic(), 0.0
    reporter.stage(f"Writing {characters / 1e6:,.1f} million characters as tokens")
    for piece in text:
        yield piece
        now, share = time.monotonic() - started, piece.start / max(1, characters)
        if now - reported > 15 and share > 0:
            reported = now
            reporter.stage(f"Writing tokens: {share:.0%}, {now / share - now:,.0f} s left")


def _count(start: store.StoredModel, head: Head) -> tuple[int, int]:
    """Return the weights of the network and of the embedding tables."""
    model: Any = start.network.sketch(head)
    # By identity: many networks use one matrix as input and output embedding.
    tables = {
        id(m.weight): m.weight
        for m in (model.get_input_embeddings(), model.get_output_embeddings())
    }
    embedding = sum(weight.numel() for weight in tables.values())
    return sum(weight.numel() for weight in model.parameters()), embedding


def _train_request(request: Mapping[str, Any], reporter: Reporter) -> Result:
    # Not `parse`: a parsed recipe contains defaults that exclude each other.
    recipe = PretrainRecipe.model_validate(request["recipe"])
    return _train(recipe, request["resume"], reporter)


if __name__ == "__main__":
    main(_train_request)
