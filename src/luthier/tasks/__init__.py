"""Tasks, a file per task: the use of a model."""

from luthier.tasks.base import Task
from luthier.tasks.classification import CLASSIFICATION
from luthier.tasks.embedding import CATALOGUE, EMBEDDING
from luthier.tasks.generation import BIDIRECTIONAL, GENERATION, MASKED_WORDS
from luthier.tasks.rating import RATING
from luthier.tasks.reading import READING
from luthier.tasks.reranking import RERANKING
from luthier.tasks.reward import REWARD
from luthier.tasks.tagging import TAGGING

__all__ = [
    "BIDIRECTIONAL",
    "CATALOGUE",
    "CLASSIFICATION",
    "EMBEDDING",
    "GENERATION",
    "MASKED_WORDS",
    "RATING",
    "READING",
    "RERANKING",
    "REWARD",
    "TAGGING",
    "Task",
]
