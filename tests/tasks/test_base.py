"""Tests of tasks: printed predictions, next commands and ONNX outputs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from luthier.media.tasks import AUTOENCODING, DENOISING, TRANSCRIPTION
from luthier.objectives import OBJECTIVES
from luthier.objectives.base import predicts
from luthier.tasks import (
    CLASSIFICATION,
    EMBEDDING,
    GENERATION,
    MASKED_WORDS,
    RATING,
    READING,
    RERANKING,
    REWARD,
    TAGGING,
    Task,
)
from luthier.tasks.generation import PretrainingTask

ENTITY = {"label": "city", "text": "Rome", "start": 3, "end": 7, "score": 0.5}


@pytest.mark.parametrize(
    ("task", "answer", "text"),
    [
        (CLASSIFICATION, {"scores": {"a": 0.25, "b": 0.5, "c": 0.25}}, " 50.0%  b\n 25.0%  a"),
        (RATING, {"rating": 2.5}, "2.500"),
        (REWARD, {"reward": -1.0}, "-1.000"),
        (RERANKING, {"score": 0.75}, "0.750"),
        (TAGGING, {"entities": [ENTITY]}, 'city: "Rome" [3:7] 50.0%'),
        (TAGGING, {"entities": []}, "(no entities)"),
        (READING, {"answer": "Rome", "start": 3, "end": 7, "score": 0.5}, "Rome  [3:7]  50.0%"),
        (READING, {"answer": "", "start": 0, "end": 0, "score": 0.5}, "(no answer)  50.0%"),
        (
            EMBEDDING,
            {"embedding": [0.6, 0.8, 0.0]},
            "3 numbers: 0.600, 0.800, … (--json prints all)",
        ),
        (AUTOENCODING, {"score": 2.0, "anomalous": True}, "2.000  anomalous (above 1.000)"),
        (TRANSCRIPTION, {"text": ""}, "(no text)"),
    ],
)
def test_prediction_as_text(task: Task, answer: dict[str, Any], text: str) -> None:
    assert task.show(answer, 1.0, 2) == text


@pytest.mark.parametrize(
    ("task", "reads", "command"),
    [
        (CLASSIFICATION, "text", 'predict m "some text"'),
        (CLASSIFICATION, "image", "predict m photo.png"),
        (READING, "text", "predict m --input questions.jsonl"),
        (RERANKING, "text", "predict m --input pairs.jsonl"),
        (EMBEDDING, "text", 'nearest m DATA "some text"'),
        (GENERATION, "text", "chat m"),
        (MASKED_WORDS, "text", "tune DATA --base m"),
        (AUTOENCODING, "window", "predict m --input series.csv --output scores.jsonl"),
        (DENOISING, "image", "sample m --output samples.png"),
    ],
)
def test_next_command(task: Task, reads: str, command: str) -> None:
    chat: Any = SimpleNamespace(
        reads=reads, template=SimpleNamespace(images=None), has_tokenizer=True
    )
    assert task.command("m", chat) == command


def test_objectives_predict_unless_models_generate_or_are_bases() -> None:
    for name, kind in OBJECTIVES.items():
        generates = kind.task.writes or kind.task.draws or isinstance(kind.task, PretrainingTask)
        objective: Any = kind.model_construct()
        assert predicts(objective) is not generates or kind.task.reconstructs, name


def test_onnx_outputs_of_row_and_token_heads() -> None:
    able = (CLASSIFICATION, RATING, REWARD, TAGGING, EMBEDDING)
    assert all(task.exports_onnx for task in able)
    # Pairs of a reranker and a reader can need segments, which exported networks lack.
    assert not RERANKING.exports_onnx and not READING.exports_onnx and not GENERATION.exports_onnx
