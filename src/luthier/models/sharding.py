"""The layers of a network in shards over processes, for networks that one device does not hold.

PyTorch's FSDP2 (``fully_shard``; Zhao et al. 2023, arXiv:2304.11277, after stage 3 of ZeRO, Rajbhandari
et al. 2020, arXiv:1910.02054): of each weight of each layer a process holds an equal part, with its
gradient, float32 master and moments. The weights of a layer are gathered right before it runs, forward
or backward, and let go of after; gradients are summed into the shards. What stands outside of the
layers (embeddings, last norm, heads) stays whole.

Left out: gradients that are exchanged once a step (they are after each micro-batch, as their sums are
sharded, too), shards that wait in the processor's memory, and meshes of several dimensions.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

from luthier.models.layers import layer_names

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from luthier.models.network import Network
    from luthier.models.process_group import ProcessGroup


def shard_layers(network: Network, group: ProcessGroup, device: torch.device) -> None:
    """Shard the layers of ``network`` on ``device``, where the rest of it goes as a whole.

    From here on all processes of ``group`` run it alike, in equal numbers of passes.
    It must have the flat layout.
    """
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (group.size,))
    precision = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    layers = [network.model.get_submodule(name) for name in layer_names(network.model)]
    for layer in layers:
        # A single number cannot be cut.
        single = {weight for weight in layer.parameters() if weight.dim() == 0}
        fully_shard(
            layer, mesh=mesh, reshard_after_forward=True, mp_policy=precision,
            ignored_params=single or None,
        )  # fmt: skip
    backbone = network.model.base_model
    whole = {weight for weight in network.model.parameters() if not is_sharded(weight)}
    # It has no weights of its own then; it lets the layers gather ahead of their turn.
    fully_shard(backbone, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    for module in (*layers, backbone):
        shards = cast(FSDPModule, module)
        # The engine divides, once; gloo knows no other reduction than the sum.
        shards.set_gradient_divide_factor(1.0)
        shards.set_force_sum_reduction_for_comms(True)
    for tensor in (*whole, *network.model.buffers()):
        tensor.data = tensor.data.to(device)
    network.device, network.is_sharded = device, True


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only a part of ``tensor`` (a ``DTensor``)."""
    return hasattr(tensor, "placements")  # its module is not imported where nothing is sharded


def local_shard(tensor: Tensor) -> Tensor:
    """This process's shard of ``tensor``, in the same memory; all of one that is not sharded."""
    return cast(Any, tensor.detach()).to_local() if is_sharded(tensor) else tensor


def shard_like(whole: Tensor, like: Tensor) -> Tensor:
    """This process's shard of ``whole``, which is sharded as ``like`` is."""
    if not is_sharded(like):
        return whole
    from torch.distributed.tensor import distribute_tensor

    cut: Any = like
    sharded = distribute_tensor(
        whole.to(cut.device), cut.device_mesh, cut.placements, src_data_rank=None
    )
    return sharded.to_local()


def full_tensor(part: Tensor, like: Tensor) -> Tensor:
    """The whole tensor of which ``part`` is this process's shard, sharded as ``like`` is.

    A collective: every process must call it, in the same order.
    """
    if not is_sharded(like) or not part.dim():  # single numbers are the same in all
        return part
    from torch.distributed.tensor import DTensor

    cut: Any = like
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
    """By name the whole tensor of each shard; the tensor behind it says how it is sharded.

    A collective. Whole tensors of shards come in the memory of the processor and to the first process
    alone; what is not sharded comes back as it is, in all.
    """
    found = {}
    for name, part, like in parts:
        whole = full_tensor(part, like)
        if whole is part:
            found[name] = part
        elif cast(Any, like).device_mesh.get_rank() == 0:
            found[name] = whole.cpu()
    return found
