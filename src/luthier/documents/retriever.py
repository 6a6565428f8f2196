"""Search with an optional reranker, and questions that the documents do not answer.

A question is declined if its best passage has no higher score than the best passages of questions about
other topics. The limit is measured for each index, and for each reranker.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from luthier.documents.index import DocumentIndex, FoundPassage
from luthier.graders.base import Embedder

CANDIDATES = 20
"""Number of passages for a reranker."""
ACCEPTED = 0.05
"""Share of the questions about other topics that are not declined."""
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


@dataclass(frozen=True)
class PassageReranker:
    """A model for scores of passages."""

    fingerprint: str
    """SHA-256 of the model's files."""
    rank: Callable[[str, Sequence[str]], list[float]]
    """Return the relevance of each text to a question."""


@dataclass(frozen=True)
class Retriever:
    """Index with the models of its searches."""

    index: DocumentIndex
    embed: Embedder
    reranker: PassageReranker | None = None

    def search(self, question: str, count: int) -> tuple[list[FoundPassage], bool]:
        """Return the ``count`` best passages, and whether they may answer the question."""
        if self.reranker is None:
            query_1H = self.embed([question])
            found = self.index.search(question, query_1H[0], count)
            if not found:
                return [], False
            limit = calibrate(self.index, lambda asked: self.index.best_cosines(self.embed(asked)))
            return found, bool(self.index.best_cosines(query_1H)[0] >= limit)
        reranker = self.reranker

        def best(questions: Sequence[str]) -> NDArray[np.float32]:
            firsts = [self._rerank(reranker, each)[0].relevance for each in questions]
            return np.array(firsts, np.float32)

        scored = self._rerank(reranker, question)
        if not scored:
            return [], False
        limit = calibrate(self.index, best, reranker.fingerprint)
        return scored[:count], (scored[0].relevance or 0.0) >= limit

    def _rerank(self, reranker: PassageReranker, question: str) -> list[FoundPassage]:
        """Return the best passages, the most relevant first."""
        found = self.index.search(question, self.embed([question])[0], CANDIDATES)
        scores = reranker.rank(question, [each.passage.content for each in found])
        scored = [replace(each, relevance=s) for each, s in zip(found, scores, strict=True)]
        return sorted(scored, key=lambda each: -(each.relevance or 0.0))


def calibrate(
    index: DocumentIndex, best: Callable[[Sequence[str]], NDArray[np.float32]], scorer: str = ""
) -> float:
    """Return the score that :data:`ACCEPTED` of the foreign questions exceed; see
    :meth:`DocumentIndex.threshold`.

    Cosines of unrelated texts differ between embedding models and collections (0.0 to 0.3 for
    MiniLM, 0.7 to 0.8 for E5). Documents in other languages than those of
    :data:`FOREIGN_QUESTIONS` get English questions.

    Args:
        index: Index, which stores the limit.
        best: Returns the score of the best passage of each question.
        scorer: Reranker of the scores; empty for cosines.
    """
    threshold = index.threshold(scorer)
    if threshold is None:
        questions = FOREIGN_QUESTIONS.get(index.language, FOREIGN_QUESTIONS["en"])
        threshold = float(np.quantile(best(questions), 1 - ACCEPTED))
        index.keep_threshold(threshold, scorer)
    return threshold
