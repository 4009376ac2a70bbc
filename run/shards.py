"""Models that do not fit one device, in parts over all processes: --fsdp.

    torchrun --nproc_per_node=4 train_distillation.py --teacher FOLDER --batch_size 64 --fsdp

Each of N processes keeps 1/N of every parameter, and so of gradients and optimizer state. A layer's
parameters are gathered just before they are used and freed after; its gradients are summed, each
part where it is kept. This is PyTorch's fully_shard (Zhao et al. 2023, 2304.11277), on the
student and the teacher. What is saved is whole, so a run may go on with another number of
processes, or without --fsdp.
"""

import torch
from torch import Tensor, nn

from . import parallel

in_use = False  # whether parameters are sharded tensors (DTensor): set by `place`


def place(model: nn.Module, device: torch.device, args) -> nn.Module:
    """Put a Transformer on this process's device: whole, or with --fsdp only this process's part.

    The model comes on the CPU, so that with --fsdp no device ever holds more than one whole layer.
    """
    global in_use
    in_use = args.fsdp
    if not in_use:
        return model.to(device)
    from torch.distributed.device_mesh import init_device_mesh  # half a second to import
    from torch.distributed.fsdp import FSDPModule, fully_shard

    mesh = init_device_mesh(device.type, (parallel.world_size(),))
    for layer in (*model.model.layers, model):
        fully_shard(layer, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # the sum over processes, not the mean
            module.set_force_sum_reduction_for_comms(True)
    # fully_shard gathers what it shards when the whole model is called. The scripts call its body
    # and then use the head's weight, so the body gathers what belongs to no layer: embedding, norm
    # and head. The one call of the whole tells fully_shard which module is the outermost.
    model.model.register_forward_pre_hook(lambda body, inputs: model.unshard())
    with torch.no_grad():
        model(torch.zeros((1, 1), dtype=torch.long, device=device))
    model.reshard()
    return model


def gather(value):
    """The same dict or list with every sharded tensor whole, on the CPU of rank 0; others get None.

    To be called by all processes. Nothing changes where nothing is sharded.
    """
    if not in_use:
        return value
    from torch.distributed.tensor import DTensor

    if isinstance(value, dict):
        return {key: gather(item) for key, item in value.items()}
    if isinstance(value, list):
        return [gather(item) for item in value]
    if not isinstance(value, DTensor):
        return value
    whole = value.detach().full_tensor()
    return whole.cpu() if parallel.is_main() else None


def shard(value, like: Tensor):
    """This process's part of `value`, where `like` is a sharded tensor of the same shape."""
    if not in_use or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    # Every process has read the whole value, so none is sent: src_data_rank=None.
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
