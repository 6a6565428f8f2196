"""Distillation by responses: the student is tuned on the teacher's answers.

Kim and Rush 2016, Sequence-Level Knowledge Distillation (arXiv:1606.07947), section 3.2: the mode
of the teacher's distribution over sequences replaces the data. This module uses greedy search, the
paper beam search. Left out: interpolation with the data's own replies (section 3.3).

The folder ``distillations/STUDENT/NAME`` has the files that a distillation needs to resume:

    request.json     the request
    insights.jsonl   every prompt: accepted, or rejected by a rule
    train.jsonl      the student's training rows

The teacher's answers are in a log that all runs share (:mod:`luthier.inference.reply_log`). The
training is an ordinary run of `tune` with checkpoints.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

from luthier import __version__
from luthier.chat_models.base import ChatModel, Done, Failure, Reply, SamplingSpec
from luthier.data.files.sources import hash_of
from luthier.data.prompts import load_prompts
from luthier.data.shapes.conversations import Conversation, PromptCompletion, PromptOnly
from luthier.engine.metrics import Reporter
from luthier.engine.runs import Result, Run, automatic_name, is_resumed, lock_folder
from luthier.errors import Interrupted, RecipeError, RefusedInput, RunConflict
from luthier.files import json_lines, luthier_home, sha256_of, write_bytes, write_json
from luthier.graders import Grader
from luthier.inference.reply_log import (
    ReplyLog,
    in_service,
    reply_key,
    reply_log_path,
)
from luthier.library.folders import short_name
from luthier.library.models import StoredModel, check_writes, find
from luthier.objectives import OBJECTIVES
from luthier.objectives.base import RunModels
from luthier.pages import PAGE, Displayed
from luthier.types import Message, Row
from luthier.workflows.distil.insights import (
    Insight,
    InsightSummary,
    check_grader,
    grade_insights,
    judge_answer,
    reject_prompts,
    repetition_warning,
    summary,
)
from luthier.workflows.distil.questions import cited_answers
from luthier.workflows.distil.recipe import DistilRecipe, TeacherSpec

INSIGHTS, ANSWERS, _REQUEST = "insights.jsonl", "train.jsonl", "request.json"
FIRST = 10
"""Number of prompts after which a distillation of twice as many prompts stops if one rule rejects
all replies."""


def by_responses(
    recipe: DistilRecipe, resume: bool, reporter: Reporter, processes: int = 1
) -> Distilled:
    """Query the teacher, filter the answers, and train the student with ``processes``."""
    student = find(recipe.base, reporter.stage)
    parent = luthier_home() / "distillations" / short_name(student.root)
    name = recipe.name or automatic_name(student.root, recipe.data.train, resume, parent)
    recipe = recipe.model_copy(update={"name": name})
    work = _Responses(recipe, student, parent / name, reporter, processes)
    with lock_folder(work.folder, f"the distillation {name}"):
        return work.run(resume)


class _Responses:
    def __init__(
        self,
        recipe: DistilRecipe,
        student: StoredModel,
        folder: Path,
        reporter: Reporter,
        processes: int,
    ) -> None:
        self.recipe, self.student, self.folder = recipe, student, folder
        self.reporter, self.processes = reporter, processes
        self.graders: Mapping[str, Grader] = {}
        self.training = Run(student.root, str(recipe.name))

    def run(self, resume: bool) -> Distilled:
        """Run all stages; checks come first."""
        try:
            rows, teacher = self._check(resume)
        except BaseException:
            # A new folder of a refused request; a folder with a request belongs to an earlier
            # distillation.
            if not (self.folder / _REQUEST).exists():
                shutil.rmtree(self.folder, ignore_errors=True)
            raise
        try:
            return self._ask_and_train(rows, teacher, resume)
        except RefusedInput:
            # The name becomes free for a new request; the log keeps the answers.
            if self.training.request_value("recipe") is None:
                (self.folder / _REQUEST).unlink()
            raise

    def _check(self, resume: bool) -> tuple[list[Row], ChatModel]:
        self.reporter.stage("Checking the prompts")
        rows = self._prompts()
        # Before the first query: replies of an endpoint cost money.
        weights = _check_student(self.recipe, self.student)
        teacher = teacher_of(self.recipe.teacher, self.reporter.stage)
        self.graders = self._graders(len(rows) - len(reject_prompts(rows, self.recipe.insights)))
        self._claim_name(teacher, resume)
        if teacher.weights is not None and weights > teacher.weights:
            self.reporter.note(
                f"warning: the student ({weights:,} weights) is larger than the teacher "
                f"({teacher.weights:,} weights)"
            )
        return rows, teacher

    def _ask_and_train(self, rows: Sequence[Row], teacher: ChatModel, resume: bool) -> Distilled:
        insights = self._judge(rows, self._answers(rows, teacher))
        counts = summary(insights)
        self._write(INSIGHTS, [insight.plain() for insight in insights])
        for line in counts.lines:
            self.reporter.note(line)
        if warning := repetition_warning(insights):
            self.reporter.note(f"warning: {warning}")
        self._check_enough(counts)
        accepted = [each for each in insights if each.rule is None]
        if self.recipe.insights.questions:
            cited, about = cited_answers(accepted)
            self.reporter.note(about)
            if len(cited) < self.recipe.insights.minimum:
                raise RefusedInput(f"Too few questions: {about}. Use a larger teacher.")
            pairs = [row.record() for row in cited]
        else:
            pairs = [_with_reply(each.row, each.answer or "").record() for each in accepted]
        self._write(ANSWERS, pairs)
        lineage = self._lineage(teacher, counts)
        return Distilled(self._train(resume, lineage), lineage)

    def _prompts(self) -> list[Row]:
        spec, path = self.recipe.insights, self.recipe.data.train
        rows = load_prompts(path, self.recipe.data.columns)
        if row := next((row for row in rows if row.tools), None):
            raise RecipeError(
                f"{row.location} has tools, which teachers do not support. Remove rows with "
                "tools, or tune on rows with tool calls."
            )
        if self.recipe.teacher.url and (row := next((row for row in rows if row.images), None)):
            raise RecipeError(
                f"{row.location} has images, which teachers at endpoints do not receive. Remove rows "
                "with images, or use a local teacher."
            )
        check_grader(rows, spec)
        if len(rows) < spec.minimum:
            raise RecipeError(
                f"{path} has {len(rows)} prompts, and the minimum is {spec.minimum} answers. Give more "
                f"prompts, or set `insights.minimum={max(2, len(rows))}`.",
                setting="insights.minimum",
            )
        return rows

    def _claim_name(self, teacher: ChatModel, resume: bool) -> None:
        plain = self.recipe.plain()
        # Key, time limits and retries may change in a resumed distillation.
        plain["teacher"] = {key: plain["teacher"].get(key) for key in ("model", "url")}
        request = {
            "recipe": plain,
            "teacher": dict(teacher.identity),
            "prompts": hash_of(self.recipe.data.train),
            "luthier": __version__,
        }
        path, name = self.folder / _REQUEST, str(self.recipe.name)
        if is_resumed(path, request, f"distillation {name}", resume):
            return
        if self.training.folder.exists() or self.training.model_folder.exists():
            raise RunConflict(
                f"The run {self.training.model_id} exists. Choose a different `--name`."
            )
        write_json(path, request)

    def _answers(self, rows: Sequence[Row], teacher: ChatModel) -> dict[int, Reply | Failure]:
        """Return the outcome of each row by index; query only prompts without a logged reply."""
        sampling, reporter = self.recipe.sampling, self.reporter
        skip = reject_prompts(rows, self.recipe.insights)
        questions = {index: row.turns() for index, row in enumerate(rows) if index not in skip}
        settings = sampling.model_dump(mode="json")
        keys = [reply_key(teacher.identity, each, settings) for each in questions.values()]

        def ask(positions: list[int], done: Done) -> None:
            logged = len(keys) - len(positions)
            if logged:
                reporter.note(f"{logged:,} of {len(keys):,} answers are logged already")
            if not positions:
                return
            reporter.stage(f"Querying {teacher.name}")
            if teacher.terms:
                reporter.note(teacher.terms)
            numbers = count(logged + 1)
            conversations = [*questions.values()]

            def query(chosen: Sequence[int], done: Done) -> None:
                def on_answer(number: int, outcome: Reply | Failure) -> None:
                    done(chosen[number], outcome)

                teacher.ask(
                    [conversations[each] for each in chosen], sampling, on_answer, reporter.note
                )

            def record(position: int, outcome: Reply | Failure) -> None:
                done(position, outcome)
                reporter.progress(next(numbers), len(keys), "answers")

            if len(keys) >= 2 * FIRST:
                failures: dict[int, Failure] = {}

                def record_reply(position: int, outcome: Reply | Failure) -> None:
                    # Failed prompts are sent again with the rest: the failure may be an outage.
                    if isinstance(outcome, Failure):
                        failures[position] = outcome
                    else:
                        record(position, outcome)

                first = range(FIRST)
                if missing := [position for position in positions if position in first]:
                    query(missing, record_reply)
                outcomes = [failures.get(each) or log.replies[keys[each]] for each in first]
                self._check_first([rows[index] for index in [*questions][:FIRST]], outcomes)
            query([each for each in positions if keys[each] not in log.replies], record)

        with ReplyLog.open(reply_log_path(teacher.identity, teacher.name)) as log:
            try:
                outcomes = log.complete(keys, ask)
            except KeyboardInterrupt:
                finished = sum(key in log.replies for key in keys)
                raise Interrupted(
                    f"Stopped with {finished:,} of {len(keys):,} answers stored. Run the same command "
                    "with `--resume` to continue."
                ) from None
        return dict(zip(questions, outcomes, strict=True))

    def _check_first(self, rows: Sequence[Row], outcomes: Sequence[Reply | Failure]) -> None:
        """Stop if one rule rejects all first replies. Scores of graders do not stop the work."""
        overflow = self._overflow()
        insights = [
            judge_answer(row, outcome, self.recipe.insights, overflow)
            for row, outcome in zip(rows, outcomes, strict=True)
        ]
        counts = summary(insights)
        if not counts.accepted and len(counts.rules) == 1:
            self._write(INSIGHTS, [insight.plain() for insight in insights])
            raise self._too_few(counts, f"The first {len(rows)} replies are all rejected")

    def _judge(self, rows: Sequence[Row], outcomes: dict[int, Reply | Failure]) -> list[Insight]:
        """Return the insight of each row, in the order of the file."""
        spec, overflow = self.recipe.insights, self._overflow()
        skip = reject_prompts(rows, spec)
        insights = [
            skip[index] if index in skip else judge_answer(row, outcomes[index], spec, overflow)
            for index, row in enumerate(rows)
        ]
        for grader in self.graders.values():
            self.reporter.stage(f"Grading {sum(each.rule is None for each in insights):,} answers")
            insights = grade_insights(insights, grader, spec.threshold)
        self.graders = {}  # frees a judge of this machine before the student trains
        return insights

    def _graders(self, answers: int) -> Mapping[str, Grader]:
        """Return the grader of the insights, if any, with loaded and tested models."""
        from luthier.workflows.evaluate import open_graders

        grader = self.recipe.insights.grader
        graders = {} if grader is None else {grader.method: grader}
        return open_graders(graders, answers, self.reporter.note)

    def _overflow(self) -> Callable[[Row, str], str]:
        """Return a function that describes a prompt with answer beyond the student's context."""
        if self.recipe.data.long_rows in ("drop", "truncate"):
            return lambda row, answer: ""  # training truncates or drops long rows
        chat = self.student.chat
        context = self.student.room - self.recipe.adaptation.added_tokens
        objective = self.recipe.objective or OBJECTIVES["sft"].model_validate({})

        def overflow(row: Row, answer: str) -> str:
            size = objective.encode(_with_reply(row, answer), 0, objective.format(chat)).longest
            return f"{size:,} tokens of {context:,}" if size > context else ""

        return overflow

    def _check_enough(self, counts: InsightSummary) -> None:
        minimum = self.recipe.insights.minimum
        if counts.accepted < minimum:
            found = f"Only {counts.accepted} of {counts.prompts} prompts are accepted"
            raise self._too_few(counts, f"{found}, and the minimum is {minimum}")

    def _too_few(self, counts: InsightSummary, found: str) -> RefusedInput:
        """Return the error. Clients of a service get no path, and only settings of every API."""
        fixes = {"answer.cut": "a larger `sampling.max_tokens`"}
        if not in_service():
            fixes |= {
                "answer.refusal": "`insights.refusals=false` for false positives",
                "answer.too_short": "a lower `insights.shortest_answer`",
                "answer.too_long": "a higher `insights.longest_answer`",
                "grader.score": "a lower `insights.threshold`",
            }
        advice = ["other or more prompts", *(fixes[rule] for rule in counts.rules if rule in fixes)]
        where = "" if in_service() else f" See {self.folder / INSIGHTS}."
        if not in_service() and counts.accepted >= 2:
            advice.append("a lower `insights.minimum`")
        rejections = ", ".join(f"{count} {rule}" for rule, count in counts.rules.items())
        return RefusedInput(
            f"{found}: {rejections}. All replies are stored.{where} Use {', or '.join(advice)}.",
            rule="distil.too_few",
        )

    def _lineage(self, teacher: ChatModel, counts: InsightSummary) -> dict[str, Any]:
        return {
            "method": self.recipe.method,
            "teacher": dict(teacher.identity),
            "sampling": self.recipe.sampling.model_dump(mode="json"),
            "prompts": {
                "file": str(self.recipe.data.train),
                "sha256": hash_of(self.recipe.data.train),
            },
            "insights": {**asdict(counts), "file": str(self.folder / INSIGHTS)},
            "answers_sha256": sha256_of(self.folder / ANSWERS),
        }

    def _train(self, resume: bool, lineage: dict[str, Any]) -> Result:
        from luthier.engine.processes import train_in_processes

        data = self.recipe.data.model_copy(update={"train": str(self.folder / ANSWERS)})
        recipe = self.recipe.tuning_recipe(data=data)
        origin = {"distillation": lineage}
        return train_in_processes(recipe, self.processes, resume, self.reporter, origin)

    def _write(self, name: str, lines: Sequence[dict[str, Any]]) -> None:
        write_bytes(self.folder / name, json_lines(lines).encode())


def _check_student(recipe: DistilRecipe, student: StoredModel) -> int:
    """Reject an untrainable student before the teacher is queried; return the student's weights."""
    import torch

    objective = recipe.objective or OBJECTIVES["sft"].model_validate({})
    if "prompt" not in objective.shapes | objective.further_shapes:
        raise RecipeError(
            f"Method responses needs rows of prompt and reply, which objective {objective.method} does "
            "not support. Use `sft`.",
            setting="objective",
        )
    objective.bind(RunModels(student.chat))
    network = student.network.sketch(objective.head())
    weights = sum(weight.numel() for weight in network.parameters())
    with torch.device("meta"):
        recipe.adaptation.attach(network)
    return weights


def _with_reply(row: Row, reply: str) -> PromptCompletion | Conversation:
    if isinstance(row, PromptOnly):
        return PromptCompletion(row.file, row.line, row.prompt, reply)
    return Conversation(row.file, row.line, (*row.turns(), Message("assistant", reply)))


@dataclass(frozen=True, repr=False)
class Distilled(Displayed):
    """Result of a distillation."""

    result: Result
    """Run that trained the student."""
    details: dict[str, Any]
    """JSON values of the manifest's field ``distillation``."""

    def summary(self) -> list[str]:
        """Return the summary of the student's run."""
        return self.result.summary()

    def html(self, layout: str = PAGE) -> str:
        """Return the student's run as a page or fragment."""
        return self.result.html(layout)

    def plain(self) -> dict[str, Any]:
        """Return the run's result and the details as JSON values."""
        return {**asdict(self.result), "distillation": self.details}


class LocalTeacher(ChatModel):
    """A base or custom model of this machine, a batch at a time."""

    def __init__(self, spec: TeacherSpec, stored: StoredModel) -> None:

        check_writes(stored)
        self.name, self.spec, self.stored = stored.id, spec, stored
        network = stored.network.sketch(stored.objective.head())
        self.weights = sum(weight.numel() for weight in network.parameters())
        self._digest = stored.content_hash

    @property
    def identity(self) -> Mapping[str, Any]:
        """Id of the teacher and the hash of its files, because the same id may be trained again."""
        return {"model": self.stored.id, "sha256": self._digest}

    def ask(
        self,
        questions: Sequence[Sequence[Message]],
        sampling: SamplingSpec,
        done: Done,
        note: Callable[[str], None],
    ) -> None:
        """Generate answers in batches of similar length, the longest prompts first."""
        from luthier.inference.generation import Generator
        from luthier.models.decoding.sampling import Sampling

        generator = Generator.open(self.stored)
        settings = Sampling(**sampling.model_dump())
        accepted = []
        for index, messages in enumerate(questions):
            refusal = generator.refusal(messages, settings)
            if refusal is None:
                accepted.append(index)
            else:
                done(index, Failure("teacher.refused", refusal))
        # Similar lengths need little padding, and the longest batch first fails at once if memory
        # is short.
        accepted.sort(key=lambda index: -sum(len(turn.content) for turn in questions[index]))
        size = self.spec.batch_size
        for start in range(0, len(accepted), size):
            batch = accepted[start : start + size]
            answers = generator.answers([questions[index] for index in batch], settings, size)
            for index, answer in zip(batch, answers, strict=True):
                finish = "stop" if answer.finished else "length"
                done(index, Reply(answer.text, finish, answer.tokens))


def teacher_of(spec: TeacherSpec, say: Callable[[str], None]) -> ChatModel:
    """Return the teacher of ``spec``, or raise :class:`RecipeError`."""
    if spec.url is not None:
        from luthier.chat_models.endpoint import EndpointModel

        return EndpointModel(spec)

    return LocalTeacher(spec, find(spec.model, say))
