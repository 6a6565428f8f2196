"""Training by several processes, for tests: objectives and adaptations on small networks.

Run ``python shared_training.py REQUEST OUTPUT`` in each process of a group; process 0 writes the
losses. With a third argument ``sharded`` the layers are sharded.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import test_pairs as pairs
from luthier.adaptations import ADAPTATIONS
from luthier.engine.checkpoints import Checkpoints
from luthier.engine.job import check_shardable
from luthier.engine.loop import Loop, row_gradients
from luthier.engine.metrics import MetricsFile, Reporter
from luthier.models.load import as_network, load_model
from luthier.models.process_group import ProcessGroup
from luthier.models.sharding import full_tensor, is_sharded, local_shard, shard_layers, shard_like
from luthier.models.tokenizer import load_chat_format
from luthier.objectives import OBJECTIVES
from luthier.objectives.base import add_modules

CPU = torch.device("cpu")
STEPS = 3


def train(
    method: str, how: dict[str, Any], folder: Path, own: Path, group: ProcessGroup, sharded: bool
) -> list[Any]:
    """Return the metrics of three steps without times.

    ``how`` has the fields of the adaptation.
    """
    objective = OBJECTIVES[method](**pairs.SETTINGS.get(method, {}))
    adaptation = ADAPTATIONS[how["method"]](**{**pairs.SETTINGS.get(how["method"], {}), **how})
    chat = objective.format(load_chat_format(folder))
    rows = pairs.rows_of(objective, folder)
    objective = objective.fit(rows, chat)
    examples = [objective.encode(row, index, chat) for index, row in enumerate(rows)]
    examples = [*objective.pack(examples, context=30)]
    torch.manual_seed(0)
    model = load_model(folder, torch.float32, CPU, objective.head())
    for module in model.modules():
        # Dropout is drawn per micro-batch, and two processes have different micro-batches.
        for attribute in ("p", "dropout", "activation_dropout"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)
    network = as_network(model, CPU, torch.float32)
    network.chat = chat
    adaptation.attach(model)
    pairs.join_others(network, objective, folder, examples, own / "cache")
    add_modules(model, objective.attach(model))
    training = pairs.training_of(examples).model_copy(update={"learning_rate": 1e-4})
    gradients = row_gradients(network, objective, examples, training, Reporter())
    adaptation.calibrate(network, gradients)
    if sharded:
        check_shardable(model, objective, adaptation)
        shard_layers(network, group, CPU)
    loop = Loop(
        network=network,
        objective=objective,
        training=training,
        examples=examples,
        validation=examples,
        steps=STEPS,
        checkpoints=Checkpoints(own / "checkpoints"),
        metrics=MetricsFile(own / "metrics.jsonl"),
        reporter=Reporter(),
        processes=group,
    )
    loop.run()
    if sharded:
        check_gathering(model, group)
    clock = {"seconds", "tokens_per_second", "rows_per_second", "memory_bytes"}
    return [{k: v for k, v in line.items() if k not in clock} for line in loop.metrics.read(True)]


def check_gathering(model: torch.nn.Module, group: ProcessGroup) -> None:
    """Check that gathered weights contain the shard of every process."""
    parts = 0
    with torch.no_grad():
        for weight in model.parameters():
            if not is_sharded(weight):
                continue
            parts += 1
            local_shard(weight).fill_(group.rank)
            whole = full_tensor(local_shard(weight), weight)
            expected = torch.empty(weight.shape)
            for rank, part in enumerate(expected.chunk(group.size)):
                part.fill_(rank)
            assert torch.equal(whole, expected)
            assert torch.equal(shard_like(expected, weight), local_shard(weight))
    assert parts


def train_each(
    request: list[tuple[str, str, dict[str, Any], str]], group: ProcessGroup, sharded: bool = False
) -> dict[str, list[Any]]:
    """Train each entry of the request: name, objective, adaptation, network."""
    lines = {}
    for name, method, how, folder in request:
        with TemporaryDirectory() as own:
            lines[name] = train(method, how, Path(folder), Path(own), group, sharded)
    return lines


def main(request: Path, output: Path, sharded: bool) -> None:
    """Run one process of a group; process 0 writes the results."""
    torch.set_num_threads(1)
    group = ProcessGroup.of_environment()
    group.connect()
    lines = train_each(json.loads(request.read_text()), group, sharded)
    if group.rank == 0:
        output.write_text(json.dumps(lines))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), "sharded" in sys.argv)
