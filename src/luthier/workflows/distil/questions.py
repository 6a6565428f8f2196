"""Questions about passages of documents with their answers, written by a teacher.

The teacher gets one passage per prompt. A question is kept if the passage has most of the words of
the answer, and if a search for the question finds the passage. The search also gives the wrong
passages of the row.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from luthier.data.shapes.passages import CitedAnswer
from luthier.documents.cited_rows import mix_passages
from luthier.documents.passages import cut
from luthier.documents.readers import DocumentPage
from luthier.documents.retriever import CANDIDATES
from luthier.evaluation.retrieval import BM25Index
from luthier.graders.similarity import supports
from luthier.workflows.distil.insights import Insight

PER_PASSAGE = 2
"""Number of questions for a passage."""
LEAST_WORDS = 20
"""Minimum number of words of a passage."""
_PROMPT = """Write {count} questions that the passage answers, each with a short answer in the \
words of the passage. A reader without the passage must understand the questions. Use the language \
of the passage, and this form:

Question: the question
Answer: the answer

Passage:
{passage}"""
_PAIR = re.compile(
    r"^\W*(?:question|q)[\s\d*]*[:.][\s*]*(.+)\n+\W*(?:answer|a)[\s\d*]*[:.][\s*]*(.+)", re.I | re.M
)


def prompts_of(texts: Iterable[str]) -> Iterator[dict[str, str]]:
    """Yield a prompt row for each passage of documents."""
    for text in texts:
        for each in cut([DocumentPage(text)]):
            if len(each.text.split()) >= LEAST_WORDS:
                prompt = _PROMPT.format(count=PER_PASSAGE, passage=each.content)
                yield {"prompt": prompt, "passage": each.content}


def cited_answers(accepted: Sequence[Insight]) -> tuple[list[CitedAnswer], str]:
    """Return rows for the questions in accepted replies, and a sentence about rejected questions."""
    replies = [(str((each.row.members or {})["passage"]), each) for each in accepted]
    passages = [*dict.fromkeys(passage for passage, _ in replies)]
    index = BM25Index(passages)
    rows = dict[str, CitedAnswer]()
    written = unsupported = 0
    for passage, each in replies:
        for question, answer in _PAIR.findall(each.answer or ""):
            question, answer = question.strip(" *"), answer.strip(" *")
            written += 1
            found = [passages[n] for n in index.nearest(question, CANDIDATES)]
            if not supports(passage, answer):
                unsupported += 1
            elif passage in found:
                wrong = [text for text in found if not supports(text, answer)]
                cited = mix_passages(each.row, question, answer, [passage], wrong, written)
                rows.setdefault(question, cited)
    return [*rows.values()], (
        f"{len(rows):,} of {written:,} questions are kept; {unsupported:,} have an answer that is not "
        f"in the passage, {written - unsupported - len(rows):,} do not find the passage or repeat"
    )
