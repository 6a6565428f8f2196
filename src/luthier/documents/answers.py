"""Answers from passages: prompts with numbered passages, citations, and questions without an answer.

Citations have the form ``[1]``. A question is declined if no passage is nearer to it than to
questions about other topics (:func:`calibrate`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from luthier.documents.index import DocumentIndex, FoundPassage
from luthier.graders.base import Embedder
from luthier.pages import Displayed
from luthier.types import Message

PASSAGES = 4
"""Number of passages in a prompt."""
ACCEPTED = 0.05
"""Share of the questions about other topics that are not declined."""
INSTRUCTIONS = (
    "Answer the question from the numbered passages alone, in the language of the question. After "
    "each statement, cite its passage, such as [1]. If the passages do not contain the answer, say "
    "that the documents do not answer the question."
)
DECLINED = "The documents do not answer this question."
_CITATION = re.compile(r"\[(\d{1,3})\]")
_UNFINISHED = re.compile(r"\[\d{0,3}$")
FOREIGN_QUESTIONS = {
    "en": (
        "How do I remove rust from a cast iron pan?", "Which clef does a viola use?",
        "How long does a hen sit on her eggs?", "What is the offside rule in football?",
        "How do I prune an apple tree in winter?", "Why does bread dough need to rest?",
        "Which stars form the Southern Cross?", "How is paper made from wood?",
        "What makes a bicycle chain skip?", "How many strings does a harp have?",
        "Who painted the ceiling of the Sistine Chapel?", "How do bees find their way home?",
        "What is the boiling point of ethanol?", "How do I tie a bowline knot?",
        "Which spices belong in a garam masala?", "Why do cats purr?",
        "How deep is the Mariana Trench?", "What is a haiku?",
        "How do I get candle wax out of a tablecloth?", "When was the printing press invented?",
        "How do glaciers move?", "Which pawn moves are special in chess?",
        "How do I calm a crying baby at night?", "What is the capital of Mongolia?",
        "How does a sewing machine form a stitch?", "Why is the sky red at sunset?",
        "What should I feed a hedgehog in autumn?", "How do I tune a guitar by ear?",
        "Which muscles does a push-up train?", "How is soy sauce fermented?",
        "What causes the northern lights?", "How do I fold a paper crane?",
        "Who was the first person in space?", "How do tides depend on the moon?",
        "Which wood is best for a cutting board?", "How do I train a puppy to sit?",
        "What is the difference between a crocodile and an alligator?", "How old can a tortoise get?",
        "How do I keep cut flowers fresh?", "What is the plot of Romeo and Juliet?",
    ),
    "vi": (
        "Làm sao để tẩy gỉ trên chảo gang?", "Gà mái ấp trứng trong bao lâu?",
        "Luật việt vị trong bóng đá là gì?", "Cách tỉa cây táo vào mùa đông?",
        "Vì sao bột bánh mì cần được ủ?", "Những ngôi sao nào tạo thành chòm Nam Thập Tự?",
        "Giấy được làm từ gỗ như thế nào?", "Đàn hạc có bao nhiêu dây?",
        "Ai đã vẽ trần nhà nguyện Sistine?", "Ong tìm đường về tổ bằng cách nào?",
        "Nhiệt độ sôi của cồn là bao nhiêu?", "Phở bò cần những gia vị nào?",
        "Vì sao mèo kêu gừ gừ?", "Rãnh Mariana sâu bao nhiêu?", "Thơ haiku là gì?",
        "Máy in được phát minh khi nào?", "Sông băng di chuyển ra sao?",
        "Trong cờ vua, quân tốt có những nước đi đặc biệt nào?", "Làm sao dỗ em bé khóc đêm?",
        "Thủ đô của Mông Cổ là gì?", "Máy may tạo mũi khâu như thế nào?",
        "Vì sao bầu trời đỏ lúc hoàng hôn?", "Cách lên dây đàn ghi ta bằng tai?",
        "Hít đất tập những cơ nào?", "Nước mắm được ủ như thế nào?",
        "Cực quang do đâu mà có?", "Cách gấp hạc giấy?", "Ai là người đầu tiên bay vào vũ trụ?",
        "Thủy triều phụ thuộc vào mặt trăng ra sao?", "Gỗ nào tốt nhất để làm thớt?",
        "Dạy chó con ngồi như thế nào?", "Cá sấu sống được bao nhiêu năm?",
        "Giữ hoa cắm lâu héo bằng cách nào?", "Truyện Kiều kể về điều gì?",
        "Làm sao tẩy sáp nến trên khăn trải bàn?", "Rùa có thể sống bao lâu?",
        "Cách trồng rau muống trong chậu?", "Vì sao nước biển mặn?",
        "Áo dài được may từ loại vải nào?", "Múa rối nước có từ thời nào?",
    ),
}  # fmt: skip
"""Questions about everyday topics, which few collections of documents answer, by language."""


@dataclass(frozen=True, repr=False)
class DocumentAnswer(Displayed):
    """An answer with its sources."""

    question: str
    text: str
    passages: tuple[FoundPassage, ...]
    """The passages of the prompt, in the order of their numbers."""
    declined: bool = False
    """True if the passages do not answer the question."""

    @property
    def cited(self) -> tuple[int, ...]:
        """Numbers of the cited passages, from 1, in the order of their first citation."""
        numbers = (int(each) for each in _CITATION.findall(self.text))
        return tuple(dict.fromkeys(n for n in numbers if 1 <= n <= len(self.passages)))

    def summary(self) -> list[str]:
        """Return the answer and the places of the cited passages."""
        places = [f"[{n}] {self.passages[n - 1].place}" for n in self.cited[:4]]
        return [self.text, *places]

    def plain(self) -> dict[str, object]:
        """Return JSON values."""
        return {
            "question": self.question,
            "answer": self.text,
            "declined": self.declined,
            "cited": list(self.cited),
            "passages": [each.plain() for each in self.passages],
        }


def prompt(
    question: str, passages: Sequence[FoundPassage], takes_system: bool = True
) -> list[Message]:
    """Return the turns that ask for an answer from ``passages``; see :func:`add_passages`."""
    return add_passages([Message("user", question)], passages, takes_system)


def add_passages(
    turns: Sequence[Message], passages: Sequence[FoundPassage], takes_system: bool = True
) -> list[Message]:
    """Return ``turns`` with ``passages`` in the last user turn, which has the question.

    Instructions become part of the system prompt, or precede the passages without
    ``takes_system``. Earlier replies lose their citations, which name other passages.
    """
    changed = [
        replace(turn, content=_CITATION.sub("", turn.content)) if turn.role == "assistant" else turn
        for turn in turns
    ]
    last = max(n for n, turn in enumerate(turns) if turn.role == "user")
    numbered = [f"[{n}] {each.passage.content}" for n, each in enumerate(passages, 1)]
    asked = "\n\n".join([*numbered, f"Question: {turns[last].content}"])
    if not takes_system:
        changed[last] = replace(turns[last], content=f"{INSTRUCTIONS}\n\n{asked}")
        return changed
    changed[last] = replace(turns[last], content=asked)
    if turns[0].role != "system":
        return [Message("system", INSTRUCTIONS), *changed]
    return [Message("system", f"{turns[0].content}\n\n{INSTRUCTIONS}"), *changed[1:]]


class Citations:
    """Citations in a stream of text. A number that names no passage of the prompt is removed."""

    def __init__(self, passages: int) -> None:
        self._passages, self._held = passages, ""
        self.length = 0
        """Number of characters that :meth:`add` has returned."""

    def add(self, text: str, last: bool = False) -> tuple[str, list[tuple[int, int]]]:
        """Return the next characters, and each citation's position and number.

        The beginning of a possible citation waits for the next call, except in the ``last`` call.
        """
        text = self._held + text
        unfinished = None if last else _UNFINISHED.search(text)
        self._held = unfinished[0] if unfinished else ""
        text = text.removesuffix(self._held)
        ready, found, start = "", list[tuple[int, int]](), 0
        for each in _CITATION.finditer(text):
            ready += text[start : each.start()]
            if 1 <= int(each[1]) <= self._passages:
                found.append((self.length + len(ready), int(each[1])))
                ready += each[0]
            start = each.end()
        ready += text[start:]
        self.length += len(ready)
        return ready, found


def without_unknown_citations(text: str, passages: int) -> str:
    """Return ``text`` without citations of passages that were not in the prompt."""
    return Citations(passages).add(text, last=True)[0]


def calibrate(index: DocumentIndex, embed: Embedder) -> float:
    """Return the cosine that :data:`ACCEPTED` of the foreign questions exceed.

    Cosines of unrelated texts differ between embedding models and collections (0.0 to 0.3 for
    MiniLM, 0.7 to 0.8 for E5), so the limit is measured for each index, again after each change.
    Documents in other languages than those of :data:`FOREIGN_QUESTIONS` get English questions.
    """
    threshold = index.threshold
    if threshold is None:
        questions = FOREIGN_QUESTIONS.get(index.language, FOREIGN_QUESTIONS["en"])
        threshold = float(np.quantile(index.best_cosines(embed(questions)), 1 - ACCEPTED))
        index.threshold = threshold
    return threshold
