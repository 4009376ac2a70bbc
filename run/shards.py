"""Models that do not fit one device, in parts over all processes: --fsdp.

    torchrun --nproc_per_node=4 train_distillation.py --teacher FOLDER --batch_size 64 --fsdp

Each of N processes keeps 1/N of every parameter of student and teacher, of its gradient and
optimizer state; a layer is gathered just before it is used (Zhao et al. 2023, 2304.11277). Modules
that a method adds stay whole. What is saved is whole: a run may resume with other processes.
"""

import torch
from torch import Tensor, nn

from . import parallel


def shard_model(model: nn.Module, device: torch.device) -> nn.Module:
    """Put this process's part of a Transformer, which comes on the CPU, on its device."""
    from torch.distributed.device_mesh import init_device_mesh  # half a second to import
    from torch.distributed.fsdp import FSDPModule, fully_shard

    mesh = init_device_mesh(device.type, (parallel.world_size(),))
    for layer in (*model.model.layers, model):
        fully_shard(layer, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # the sum over processes, not the mean
            module.set_force_sum_reduction_for_comms(True)
    # fully_shard gathers what it shards when the whole model is called. Where only the body is
    # called, and then the head's weight is used, the body gathers what belongs to no layer:
    # embedding, norm and head. One call of the whole tells fully_shard which module is outermost.
    model.model.register_forward_pre_hook(lambda body, inputs: model.unshard())
    with torch.no_grad():
        model(torch.zeros((1, 1), dtype=torch.long, device=device))
    model.reshard()
    return model


def is_sharded(value) -> bool:
    return isinstance(value, Tensor) and hasattr(value, "full_tensor")


def gather(value):
    """The same dict or list with every sharded tensor whole, on the CPU of rank 0; others get None.
    To be called by all processes."""
    if isinstance(value, dict):
        return {key: gather(item) for key, item in value.items()}
    if isinstance(value, list):
        return [gather(item) for item in value]
    if not is_sharded(value):
        return value
    whole = value.detach().full_tensor()
    return whole.cpu() if parallel.is_main() else None


def shard(value, like: Tensor):
    """This process's part of `value`, where `like` is a sharded tensor of the same shape."""
    if not is_sharded(like) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    # Every process has read the whole value, so none is sent: src_data_rank=None.
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
