"""Sharded layers over processes, for networks larger than one device.

PyTorch's FSDP2 (``fully_shard``; Zhao et al. 2023, arXiv:2304.11277, based on stage 3 of ZeRO,
Rajbhandari et al. 2020, arXiv:1910.02054): each process stores an equal shard of each layer's
weights, gradients, float32 master weights and moments. A layer's weights are gathered right before
the forward or backward pass and freed afterwards. Gradients are reduced into the shards. Modules
outside the layers (embeddings, last norm, heads) are replicated.

Not implemented: one gradient exchange per step (sharded gradients are exchanged after each
micro-batch), CPU offloading, multi-dimensional meshes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

from luthier.models.networks.layers import layer_names

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from luthier.models.networks.network import Network
    from luthier.models.process_group import ProcessGroup


def shard_layers(network: Network, group: ProcessGroup, device: torch.device) -> None:
    """Shard the layers of ``network`` on ``device``; other modules are replicated.

    Afterwards all processes of ``group`` must run equal numbers of passes. Requires the flat
    layout.
    """
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (group.size,))
    # Sums of bfloat16 gradients would round once per process.
    precision = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    layers = [network.model.get_submodule(name) for name in layer_names(network.model)]
    for layer in layers:
        # Scalars cannot be sharded.
        single = {weight for weight in layer.parameters() if weight.dim() == 0}
        fully_shard(
            layer, mesh=mesh, reshard_after_forward=True, mp_policy=precision,
            ignored_params=single or None,
        )  # fmt: skip
    backbone = network.model.base_model
    # Objectives use embeddings, norm and head outside of the forward pass, where FSDP gathers no
    # weights.
    whole = {weight for weight in network.model.parameters() if not is_sharded(weight)}
    # The root owns no weights, but prefetches the layers.
    fully_shard(backbone, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    for module in (*layers, backbone):
        shards = cast(FSDPModule, module)
        # The engine divides once; gloo supports sums only.
        shards.set_gradient_divide_factor(1.0)
        shards.set_force_sum_reduction_for_comms(True)
    for tensor in (*whole, *network.model.buffers()):
        tensor.data = tensor.data.to(device)
    network.device, network.is_sharded = device, True


def is_sharded(tensor: Tensor) -> bool:
    """Return True if ``tensor`` is sharded (a ``DTensor``)."""
    return hasattr(tensor, "placements")  # an imported module implies sharding


def local_shard(tensor: Tensor) -> Tensor:
    """Return this process's shard of ``tensor`` without a copy; an unsharded tensor unchanged."""
    return cast(Any, tensor.detach()).to_local() if is_sharded(tensor) else tensor


def shard_like(whole: Tensor, like: Tensor) -> Tensor:
    """Return this process's shard of ``whole``, sharded like ``like``."""
    if not is_sharded(like):
        return whole
    from torch.distributed.tensor import distribute_tensor

    cut: Any = like
    # Every process has the whole tensor: with `src_data_rank=None` nothing is sent.
    sharded = distribute_tensor(
        whole.to(cut.device), cut.device_mesh, cut.placements, src_data_rank=None
    )
    return sharded.to_local()


def full_tensor(part: Tensor, like: Tensor) -> Tensor:
    """Return the whole tensor from the processes' shards ``part``, sharded like ``like``.

    A collective operation: every process must call this function in the same order.
    """
    if not is_sharded(like) or not part.dim():  # scalars are equal in all processes
        return part
    from torch.distributed.tensor import DTensor

    cut: Any = like
    # Shards can have unequal lengths, so DTensor cannot derive shape and stride.
    sharded = DTensor.from_local(
        part,
        cut.device_mesh,
        cut.placements,
        run_check=False,
        shape=cut.shape,
        stride=cut.stride(),
    )
    return sharded.full_tensor()


def gather_to_first(parts: Iterable[tuple[str, Tensor, Tensor]]) -> dict[str, Tensor]:
    """Return the whole tensor of each shard by name. Entries are name, shard, and a tensor with the
    sharding.

    A collective operation. Whole tensors of shards are on the CPU of the first process only.
    Unsharded tensors are returned unchanged in all processes.
    """
    found = {}
    for name, part, like in parts:
        whole = full_tensor(part, like)
        if whole is part:
            found[name] = part
        elif cast(Any, like).device_mesh.get_rank() == 0:
            found[name] = whole.cpu()
    return found
