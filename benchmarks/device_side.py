"""Print score, speed and memory of a model in one form; a child of ``use_cases.py``.

    LUTHIER_BACKEND=llama.cpp LUTHIER_GGUF_TYPE=q4_k_m python benchmarks/device_side.py MODEL ROWS

All rows are graded in batches. Then eight prompts are answered one by one under one thread.
"""

from __future__ import annotations

import json
import sys
import time

import torch

from luthier.data.rows import load_rows
from luthier.engine.machine import begin_peak_memory, peak_memory
from luthier.graders import FirstLine
from luthier.inference.generation import Generator
from luthier.inference.inference import Chat
from luthier.library.models import find
from luthier.models.decoding.sampling import Sampling
from luthier.workflows.evaluate import grade_replies

MESSAGES = 4


def main() -> None:
    torch.set_num_threads(1)
    rows = load_rows(sys.argv[2])
    chats = [Chat(tuple(row.prompt_turns())) for row in rows[:MESSAGES]]
    # A new file is written and compared on the first call: no part of the measurement.
    Generator.open(find(sys.argv[1]))
    before = begin_peak_memory()
    generator = Generator.open(find(sys.argv[1]))
    generator.replies(chats[:1], Sampling(max_tokens=1))
    # Processor time: on a shared machine, a single thread waits for its turn.
    began, tokens = time.process_time(), 0
    for chat in chats:
        (answer,) = generator.answers([chat], Sampling(max_tokens=48))
        tokens += answer.tokens
    found = {"tokens_per_second": tokens / (time.process_time() - began)}
    found["memory_bytes"] = peak_memory() - before
    graded = grade_replies(generator, rows, {"first_line": FirstLine()}, 24)
    print(json.dumps({**found, "answers": graded.records}))


if __name__ == "__main__":
    main()
