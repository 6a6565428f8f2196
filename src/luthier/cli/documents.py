"""``luthier index`` and ``luthier ask``: search in documents, and answers from documents."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.cli.terminal.bridge import Command, CommandGroup
from luthier.cli.terminal.console import (
    heavy_imports,
    new_table,
    note,
    print_table,
    print_text,
)
from luthier.cli.terminal.options import AtLeastOne, OptionalAtLeastOne
from luthier.errors import RecipeError, RefusedInput
from luthier.files import luthier_home
from luthier.formatting import list_some
from luthier.pages import Displayed

if TYPE_CHECKING:
    from luthier.documents.answers import DocumentAnswer
    from luthier.documents.index import (
        FoundPassage,
        IndexedDocument,
        IndexUpdate,
    )
    from luthier.documents.retriever import Retriever
    from luthier.engine.metrics import Reporter
    from luthier.inference.generation import Generator
    from luthier.library.models import StoredModel
    from luthier.models.decoding.sampling import Sampling
    from luthier.types import Message
    from luthier.workflows.prompting import PassageSearch


WATCH_SECONDS = 2.0
"""Time between two looks at a watched folder."""
SMALL_BASE = 400_000_000
"""Number of weights below which an untuned model gets a warning: of 100 questions,
``smollm2-135m-instruct`` answered 19 from the right passages."""


@dataclass(frozen=True, repr=False)
class IndexSummary(Displayed):
    """An index with documents."""

    name: str
    model: str
    """Embedding model."""
    documents: list[IndexedDocument]
    threshold: float | None
    update: IndexUpdate | None = None
    """Changes by ``index add``."""
    unfinished: list[tuple[str, int]] = field(default_factory=list)
    """Embedding model and number of documents of running and killed updates."""
    updated: str = ""
    """Time of the last complete update, in UTC."""

    @property
    def passages(self) -> int:
        """Number of passages."""
        return sum(each.passages for each in self.documents)

    @property
    def read(self) -> int:
        """Number of documents with passages."""
        return sum(not each.refused for each in self.documents)

    def summary(self) -> list[str]:
        """Return the name and the size."""
        updated = f", updated {self.updated}" if self.updated else ""
        return [
            f"index {self.name}: {self.passages:,} passages of {self.read:,} documents "
            f"({self.model}{updated})"
        ]


@dataclass(frozen=True, repr=False)
class FoundPassages(Displayed):
    """Passages of a search."""

    passages: list[FoundPassage] = field(default_factory=list)
    declined: bool = False
    """True if the passages do not answer the question."""

    def summary(self) -> list[str]:
        """Return the best passages."""
        return [f"{each.place}: {each.excerpt(100)}" for each in self.passages[:5]]

    def plain(self) -> dict[str, Any]:
        """Return JSON values."""
        found = [each.plain() for each in self.passages]
        return {"passages": found, "declined": self.declined}


def index_documents(
    sources: Sequence[str | Path],
    *,
    name: str,
    model: str | None = None,
    watch: bool = False,
    reporter: Reporter | None = None,
) -> IndexSummary:
    """Index documents, or update the index after changes.

    Unchanged documents are not read again, and documents that are gone from a folder are removed.
    Another embedding model builds a new index, which replaces the old index at the end.

    Args:
        sources: Documents (PDF, office files, HTML, EPUB, text) or folders.
        name: Name of the index.
        model: Embedding model; by default that of the index or language.
        watch: Update the index after each change, until Ctrl-C.
        reporter: Receives progress; silent if not given.

    Returns:
        The index with its documents, and what changed.

    Raises:
        RefusedInput: for missing files, missing libraries, or a model without embeddings.
    """
    from luthier.documents.readers import other_formats
    from luthier.engine.metrics import Reporter

    reporter = reporter or Reporter()
    given = [sources] if isinstance(sources, str | Path) else sources
    paths = [Path(source) for source in given]
    if others := other_formats(paths):
        counts = ", ".join(f"{count:,} {name}" for name, count in others.most_common())
        reporter.note(f"files of other formats are left out: {counts}")
    # Before the first update, so that a change during the update is seen by the next check.
    before = _files_state(paths)
    summary = _update_index(paths, name, model, reporter)
    known = set[str]()
    if watch:
        _note_changes(summary, known, reporter)
        reporter.note("watching for changes; Ctrl-C ends")
    with suppress(KeyboardInterrupt):
        # Polling: change notices of the system do not cover network folders and mounted volumes.
        while watch:
            time.sleep(WATCH_SECONDS)
            now = _files_state(paths)
            if now == before:
                continue
            try:
                summary = _update_index(paths, name, model, reporter)
            except RefusedInput as error:  # an empty folder, or another process writes: tried again
                if str(error) not in known:
                    known.add(str(error))
                    reporter.note(f"not updated: {error}")
            else:
                before = now
                _note_changes(summary, known, reporter)
    return summary


def _note_changes(summary: IndexSummary, known: set[str], reporter: Reporter) -> None:
    """Print what changed, and refused documents that are not ``known``."""
    assert summary.update is not None
    reporter.note(summary.update.text)
    for each in summary.update.problems:
        if each.refused and each.path not in known:
            known.add(each.path)
            reporter.note(f"{each.path}: left out: {each.refused}")


def _files_state(sources: Sequence[Path]) -> dict[Path, tuple[int, int]]:
    """Return size and modification time of the files in ``sources``."""
    from luthier.documents.readers import visible_files

    found = {}
    for source in sources:
        for path in visible_files(source) if source.is_dir() else [source]:
            with suppress(OSError):  # removed since the list was made
                status = path.stat()
                found[path] = status.st_size, status.st_mtime_ns
    return found


def _update_index(
    paths: Sequence[Path], name: str, model: str | None, reporter: Reporter
) -> IndexSummary:
    """Read the new and changed documents of ``paths``."""
    with heavy_imports():
        from luthier.documents.index import DocumentIndex, IndexedDocument
        from luthier.documents.readers import document_files, frequent_languages, outward_links
        from luthier.documents.retriever import calibrate
        from luthier.gate.checks.language import UNSPACED
        from luthier.gate.inspect import encoder_of_languages
        from luthier.inference.embeddings import check_embeds
        from luthier.library.models import find

    files = document_files(paths)
    with DocumentIndex.open(name) if name in DocumentIndex.names() else nullcontext() as before:
        languages = frequent_languages(files) if before is None else [before.language]
        # The search for words of a language without spaces also finds words between spaces.
        unspaced = (code for code in languages if code in UNSPACED)
        language = next(unspaced, languages[0] if languages else "")
        if model is None and before is not None:
            model = before.model
        if model is None:
            model, reason = encoder_of_languages(languages, "an encoder of sentences")
            reporter.note(f"embedding model {model}: {reason}")
        stored = find(model)
        check_embeds(stored, stored.objective)
        if before is not None and before.fingerprint != stored.content_hash:
            # Documents of other folders stay.
            listed = [Path(each.path) for each in before.documents()]
            files = sorted({*files, *(path for path in listed if path.is_file())})
    embed = load_once(stored).embed
    with DocumentIndex.update(name, stored, language) as index:
        update = index.synchronize(
            files, paths, embed, lambda done, total: reporter.progress(done, total, "index")
        )
        links = [
            IndexedDocument(str(each), 0, "", f"a link out of the folder, to {each.resolve()}")
            for each in outward_links(paths)
        ]
        update = replace(update, problems=[*update.problems, *links])
        summary = IndexSummary(name, stored.id, index.documents(), None, update)
        if not summary.passages:
            reasons = [f"{each.path}: {each.refused}" for each in update.problems]
            raise RecipeError(f"no document could be read. {list_some(reasons, 10)}")
        limit = calibrate(index, lambda questions: index.best_cosines(embed(questions)))
        return IndexSummary(name, stored.id, index.documents(), limit, update)


def show_index(name: str | None = None) -> IndexSummary | list[IndexSummary]:
    """Show the documents of an index, or all indexes.

    Args:
        name: Name of the index; all indexes by default.

    Returns:
        The index with its documents.

    Raises:
        RefusedInput: for an unknown index.
    """
    from luthier.documents.index import DocumentIndex

    found = []
    complete = DocumentIndex.names()
    files = luthier_home().glob("indexes/*/*.sqlite")
    names = sorted({*complete, *(file.parent.name for file in files)}) if name is None else [name]
    for each in names:
        unfinished = DocumentIndex.unfinished(each)
        if each in complete or not unfinished:
            with DocumentIndex.open(each) as index:
                about = each, index.model, index.documents(), index.threshold()
                found.append(IndexSummary(*about, unfinished=unfinished, updated=index.updated))
        else:
            found.append(IndexSummary(each, unfinished[0][0], [], None, unfinished=unfinished))
    return found if name is None else found[0]


def search_documents(
    name: str, question: str, *, top: AtLeastOne = 5, reranker: str | None = None
) -> FoundPassages:
    """Find the passages nearest to a question.

    Args:
        name: Name of the index.
        question: Question or words.
        top: Number of passages.
        reranker: Model of objective reranker that orders the passages.

    Returns:
        The passages, the best first.

    Raises:
        RefusedInput: for an unknown index, or without its embedding model.
    """
    if top < 1:
        raise RecipeError(f"`top` is {top}, and must be at least 1", setting="top")
    with open_retriever(name, reranker) as retriever:
        found, may_answer = retriever.search(_check_question(question), top)
        return FoundPassages(found, not may_answer)


def remove_index(name: str, source: Path | None = None) -> None:
    """Remove an index, or its documents of a file or folder. The files stay.

    Args:
        name: Name of the index.
        source: File or folder, which may be deleted already.

    Raises:
        RefusedInput: for an unknown index or source, or while another process writes.
    """
    from luthier.documents.index import DocumentIndex

    DocumentIndex.remove(name, source)


def ask(
    model: str,
    question: str,
    *,
    index: str,
    top: OptionalAtLeastOne = None,
    max_tokens: AtLeastOne = 256,
    reranker: str | None = None,
) -> DocumentAnswer:
    """Answer a question from the documents of an index, with citations.

    In Python, the models of the last questions stay in memory.

    Args:
        model: Id of a model that generates text or reads passages.
        question: The question.
        index: Name of the index (luthier index add).
        top: Number of passages for the model.
        max_tokens: Maximum tokens of the answer.
        reranker: Model of objective reranker that orders the passages.

    Returns:
        The answer, the passages of the prompt, and the cited passages.

    Raises:
        RefusedInput: for an unknown index or model.
    """
    with heavy_imports():
        from luthier.data.conversations.citations import DECLINED
        from luthier.documents.answers import PASSAGES, DocumentAnswer
        from luthier.inference.generation import Generator
        from luthier.library.models import check_active, find

    def is_able(objective: Any) -> bool:
        return Generator.is_able(objective) or objective.task.head == "question_answering"

    question = _check_question(question)
    stored = check_active(find(model, is_able=is_able))
    if not is_able(stored.objective):
        raise RecipeError(
            f"{stored.id} neither generates text nor answers questions. Use a chat model or a model of "
            "objective question_answering."
        )
    with open_retriever(index, reranker) as retriever:
        found, may_answer = retriever.search(question, top or PASSAGES)
    passages = tuple(found)
    if not may_answer:
        return DocumentAnswer(question, DECLINED, passages, declined=True)
    model_in_memory = load_once(stored)
    if isinstance(model_in_memory, Generator):
        return _generate(stored, model_in_memory, question, passages, max_tokens)
    return _read_answer(model_in_memory, question, passages)


def _generate(
    stored: StoredModel,
    generator: Generator,
    question: str,
    passages: tuple[FoundPassage, ...],
    max_tokens: int,
) -> DocumentAnswer:
    from luthier.data.conversations.citations import declines
    from luthier.documents.answers import DocumentAnswer, without_unknown_citations
    from luthier.models.decoding.sampling import Sampling
    from luthier.types import Message

    # An answer from documents must not differ between two calls.
    sampling = Sampling(temperature=0.0, max_tokens=max_tokens)
    turns, kept = fit_passages(generator, [Message("user", question)], passages, sampling)
    (reply,) = generator.answers([turns], sampling)
    text = without_unknown_citations(reply.text, len(kept)).strip()
    return DocumentAnswer(question, text, kept, declines(text), doubt(stored))


def doubt(stored: StoredModel) -> str:
    """Return a warning of a base model that is too small to answer reliably; empty for other
    models."""
    if stored.parent or (stored.manifest.parameters or SMALL_BASE) >= SMALL_BASE:
        return ""
    advice = "read the passages, or use a larger or tuned model"
    return f"{stored.id} is small and often answers wrong: {advice}."


def fit_passages(
    generator: Generator,
    turns: Sequence[Message],
    passages: Sequence[FoundPassage],
    sampling: Sampling,
) -> tuple[list[Message], tuple[FoundPassage, ...]]:
    """Return ``turns`` with the first ``passages`` that fit in the context, and these passages.

    Raises:
        RecipeError: if no passage fits.
    """
    from luthier.documents.answers import submit_passages

    def check(asked: list[Message]) -> list[Message]:
        if refusal := generator.refusal(asked, sampling):
            raise RecipeError(f"No passage fits in the prompt of the model: {refusal}")
        return asked

    contents = [each.passage.content for each in passages]
    asked, count = submit_passages(
        turns, contents, check, lambda error: isinstance(error, RecipeError)
    )
    return asked, tuple(passages[:count])


def _read_answer(reader: Any, question: str, passages: tuple[FoundPassage, ...]) -> DocumentAnswer:
    """Return the likeliest span of the passages."""
    from luthier.data.conversations.citations import DECLINED
    from luthier.data.shapes.questions import AnsweredQuestion
    from luthier.documents.answers import DocumentAnswer

    rows = [
        AnsweredQuestion("index", n, question, each.passage.content, ())
        for n, each in enumerate(passages, 1)
    ]
    spans = reader.answers(rows)
    found = [(each["score"], n) for n, each in enumerate(spans) if each["answer"]]
    if not found:
        return DocumentAnswer(question, DECLINED, passages, declined=True)
    _, best = max(found)
    return DocumentAnswer(question, f"{spans[best]['answer']} [{best + 1}]", passages)


@contextmanager
def open_retriever(name: str, reranker: str | None = None) -> Iterator[Retriever]:
    """Yield an index with its embedding model and a reranker.

    Raises:
        RecipeError: for an unknown index or model, or changed weights of the embedding model.
    """
    with heavy_imports():
        from luthier.documents.index import DocumentIndex
        from luthier.documents.retriever import PassageReranker, Retriever
        from luthier.library.models import find

    with DocumentIndex.open(name) as index:
        stored = find(index.model)
        if stored.content_hash != index.fingerprint:
            raise RecipeError(
                f"{index.model} has other weights than those that built the index {index.name}. Run "
                "`luthier index add` again."
            )
        ranks = None
        if reranker is not None:
            ranker = check_ranks(find(reranker, is_able=lambda objective: objective.task.ranks))
            ranks = PassageReranker(ranker.content_hash, load_once(ranker).rank)
        yield Retriever(index, load_once(stored).embed, ranks)


@contextmanager
def open_search(name: str | None) -> Iterator[PassageSearch | None]:
    """Yield the search of ``luthier ask`` in the index ``name``; None without a name."""
    if name is None:
        yield None
        return
    with heavy_imports():
        from luthier.documents.answers import PASSAGES, search_text

    with open_retriever(name) as retriever:

        def search(turns: Sequence[Message]) -> tuple[list[str], bool]:
            found, may_answer = retriever.search(search_text(turns), PASSAGES)
            return [each.passage.content for each in found], may_answer

        yield search


def check_ranks(stored: StoredModel) -> StoredModel:
    """Return an active reranker, or raise :class:`RecipeError`."""
    from luthier.library.models import check_active

    if not check_active(stored).objective.task.ranks:
        raise RecipeError(f"{stored.id} is not a reranker.", setting="reranker")
    return stored


def load_once(stored: StoredModel) -> Any:
    """Load a model, or return the model of an earlier call in this process."""
    return _load(stored.id, stored.content_hash)


@lru_cache(maxsize=3)  # a question needs an embedding model, a reranker and a model that answers
def _load(model_id: str, content_hash: str) -> Any:
    from luthier.cli.model import Model

    return Model(model_id).opened


def _check_question(question: str) -> str:
    if not question.strip():
        raise RecipeError("the question is empty")
    return question.strip()


def show_summary(found: IndexSummary | list[IndexSummary]) -> None:
    """Print the changes, documents without complete text, and the next command."""
    if isinstance(found, list):
        table = new_table(
            "index", "model", "documents", "passages", "updated", numbers=("documents", "passages")
        )
        for each in found:
            table.add_row(each.name, each.model, str(each.read), str(each.passages), each.updated)
        print_table(table)
        for each in found:
            _show_unfinished(each)
        return
    update = found.update
    if update is not None:
        print_text(update.text)
    for document in found.documents if update is None else update.problems:
        state = f"left out: {document.refused}"
        if not document.refused:
            state = f"{document.passages:,} passages" + f" ({document.note})" * bool(document.note)
        print_text(f"  {document.path}: {state}")
    print_text(found.summary()[0])
    _show_unfinished(found)
    if update is not None:
        note(f'next: luthier ask MODEL "a question" --index {found.name}')


def _show_unfinished(found: IndexSummary) -> None:
    for model, count in found.unfinished:
        print_text(
            f"unfinished: {found.name} with {model}, {count:,} documents so far. If no add runs, "
            f"continue: luthier index add FOLDER --name {found.name} --model {model}"
        )


def show_passages(found: FoundPassages) -> None:
    """Print each passage with place and score."""
    for each in found.passages:
        score = f"cosine {each.cosine:.3f}"
        if each.relevance is not None:
            score = f"relevance {each.relevance:.3f}, {score}"
        print_text(f"{each.place} ({score})\n  {each.excerpt()}")
    if found.declined:
        note("The passages are not nearer to the question than to other topics: `ask` declines it.")


def show_answer(found: DocumentAnswer) -> None:
    """Print the answer, then the sources."""
    print_text(found.text)
    if not found.declined:
        show_sources(found)
        if found.remark:
            note(found.remark)


def show_sources(found: DocumentAnswer) -> None:
    """Print the cited passages, or the nearest without citations."""
    from luthier.documents.answers import UNCITED

    print_text("" if found.cited else f"\n{UNCITED}")
    for n, each in found.sources.items():
        print_text(f"[{n}] {each.place}: {each.excerpt()}")


index_app = CommandGroup("Search in documents.")
for command in (
    Command(index_documents, show_summary, name="add"),
    Command(show_index, show_summary, name="show"),
    Command(search_documents, show_passages, name="search"),
    Command(remove_index, name="remove"),
):
    index_app.add(command)
