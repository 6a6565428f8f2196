"""What the processes of a group really send in a step, for tests: bytes of their TCP sockets.

``python counted_bytes.py FOLDER OUTPUT`` in each process of a group: a network with the tokenizer of
``FOLDER`` learns by full tuning and LoRA, whole and in shards. The first process writes, for each, the
bytes that the processes sent in a step (Linux counts them for each socket) and what was predicted.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from transformers import LlamaConfig, LlamaForCausalLM

import test_pairs as pairs
from luthier.adaptations import Adaptation, Full, LoRA
from luthier.engine.checkpoints import Checkpoints
from luthier.engine.loop import Loop
from luthier.engine.memory import trained_numbers
from luthier.engine.metrics import MetricsFile, Reporter
from luthier.models.load import as_network
from luthier.models.process_group import ProcessGroup
from luthier.models.sharding import shard_layers
from luthier.models.tokenizer import load_chat_format
from luthier.objectives import SFT
from luthier.workflows.estimate.communication import StepExchange, data_parallel, fully_sharded

CPU = torch.device("cpu")
TCP_INFO_BYTES, BYTES_SENT = 256, 200
"""Of the kernel's ``tcp_info``, and where its ``tcpi_bytes_sent`` stands."""


def sent_bytes() -> int:
    """All that the open TCP sockets of this process have sent."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as found:
                if found.family not in (socket.AF_INET, socket.AF_INET6):
                    continue
                info = found.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES)
        except OSError:  # closed meanwhile, or of another kind
            continue
        total += struct.unpack_from("Q", info, BYTES_SENT)[0]
    return total


def count(folder: Path, adaptation: Adaptation, sharded: bool, group: ProcessGroup) -> list[float]:
    """Bytes of a step of this process, and those that were predicted."""
    objective, chat = SFT(), load_chat_format(folder)
    rows = [objective.encode(row, n, chat) for n, row in enumerate(pairs.ROWS["prompt"])]
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(chat.tokenizer), hidden_size=256, intermediate_size=512,
            num_hidden_layers=3, num_attention_heads=4, tie_word_embeddings=True,
        )
    )  # fmt: skip
    network = as_network(model, CPU, torch.float32)
    network.chat = chat
    adaptation.attach(model)
    predicted: StepExchange = data_parallel(trained_numbers(model))
    if sharded:
        ring = fully_sharded(model, 4)
        predicted = replace(ring, scattered=2 * ring.scattered)  # by gloo
        shard_layers(network, group, CPU)
    with TemporaryDirectory() as own:
        loop = Loop(
            network=network,
            objective=objective,
            # A row for each process, and all of them in one micro-batch.
            training=pairs.training_of(rows).model_copy(
                update={"batch_size": len(rows), "micro_batch_tokens": 10_000}
            ),
            examples=rows,
            validation=[],
            steps=2,
            checkpoints=Checkpoints(Path(own)),
            metrics=MetricsFile(Path(own) / "metrics.jsonl"),
            reporter=Reporter(),
            processes=group,
        )
        network.group = group
        loop.step()
        group.sum(0.0)
        before = sent_bytes()
        loop.step()
        group.sum(0.0)  # so that what is on its way was sent
        sent = sent_bytes() - before
    network.close()
    return [sent, predicted.sent(group.size)]


def main(folder: Path, output: Path) -> None:
    """Each pair, one after the other; the mean over the processes of what they sent."""
    torch.set_num_threads(1)
    group = ProcessGroup.of_environment()
    group.connect()
    found = {}
    for adaptation in (Full(), LoRA(rank=16)):
        for sharded in (False, True):
            counted = group.gather(count(folder, adaptation, sharded, group))
            name = f"{adaptation.method} {'shards' if sharded else 'whole'}"
            found[name] = [sum(each[0] for each in counted) / group.size, counted[0][1]]
    if group.rank == 0:
        output.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
