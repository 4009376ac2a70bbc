"""What a run costs, and when it has spent enough: tokens, seconds, floating-point operations.

Counted are matrix products, 2 operations per multiply-add, forward and backward, by torch's
formulas; those know no attention on a CPU, so attention has one of its own everywhere:

    forward    2 products (queries with keys, maps with values) of 2 * B * H * S * keys * d each
    backward   5 such products: the two gradients of each, and the maps once more; 4 on CUDA in
               float32 with shared key-value heads, where torch has no kernel and keeps the maps

Counting is slow, so of each kind of work (a shape of micro-batch, or sampling) the first 4 are
counted and then one in 97; the others are taken to cost as much per token.
"""

import contextlib
import time

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from model.device import not_compiled

from . import parallel

FIRST, EVERY = 4, 97
TIMED = 20  # steps after which --seconds becomes a number of steps


def attention_forward(query, key, value, *_, **__) -> int:
    """query (B, H, S, d), key and value (B, K, keys, d)."""
    B, H, S, d = query.shape
    return 4 * B * H * S * key.shape[2] * d


def attention_backward(grad_out, query, key, value, *_, **__) -> int:
    return attention_forward(query, key, value) * 5 // 2


aten = torch.ops.aten
FORMULAS = {**flop_registry, aten.addmm_: flop_registry[aten.addmm]}  # of each kernel's arguments
for kernel in "efficient_attention cudnn_attention flash_attention flash_attention_for_cpu".split():
    # None, which no operation is, where this torch has no such kernel.
    FORMULAS[getattr(aten, f"_scaled_dot_product_{kernel}", None)] = attention_forward
    FORMULAS[getattr(aten, f"_scaled_dot_product_{kernel}_backward", None)] = attention_backward


class CountFlops(TorchDispatchMode):
    """A context that adds up the operations inside. (torch's own FlopCounterMode takes some
    backward kernels to pieces, which changes the last bits of what is computed.)"""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, formula = kwargs or {}, FORMULAS.get(func._overloadpacket)
        if formula is None and torch.is_inference_mode_enabled():  # whole layers arrive there
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        self.flops += formula(*args, **kwargs, out_val=result) if formula else 0
        return result


class Meter:
    """Counts for one run; what `kept` has is part of what is resumed."""

    def __init__(self, args):
        self.args = args
        self.tokens, self.flops = 0, 0.0
        self.kinds: dict[str, list[float]] = {}  # kind: times seen, tokens and flops counted
        self.planned_steps: int | None = None  # of --seconds, once it is known
        self.earlier_seconds, self.started = 0.0, time.perf_counter()
        self.uncollected = 0.0  # flops of this process that are not in self.flops yet
        self.step_ends: list[float] = []

    @contextlib.contextmanager
    def count(self, kind: str, tokens: int):
        """Charge what is computed inside, `tokens` tokens of work of one kind."""
        times, counted_tokens, counted_flops = self.kinds.get(kind, [0, 0, 0.0])
        if times < FIRST or times % EVERY == 0:
            with CountFlops() as counter, not_compiled(self.args.compile):
                yield
            spent = float(counter.flops)
            counted_tokens, counted_flops = counted_tokens + tokens, counted_flops + spent
        else:
            yield
            spent = counted_flops * tokens / counted_tokens
        self.kinds[kind] = [times + 1, counted_tokens, counted_flops]
        self.uncollected += spent

    def seconds(self) -> float:
        return self.earlier_seconds + time.perf_counter() - self.started

    def end_step(self, step: int, labels: int) -> bool:
        """Count a step; returns whether it, the last of TIMED, turned --seconds into steps."""
        self.tokens += labels
        self.flops += float(parallel.total(torch.tensor(self.uncollected, dtype=torch.float64)))
        self.uncollected = 0.0
        if self.args.seconds is None or self.planned_steps is not None:
            return False
        self.step_ends.append(time.perf_counter())
        left = parallel.broadcast_from_rank0(self.args.seconds - self.seconds())
        if len(self.step_ends) > TIMED or left <= 0:
            times = sorted(b - a for a, b in zip(self.step_ends, self.step_ends[1:], strict=False))
            typical = parallel.broadcast_from_rank0(times[len(times) // 2]) if times else 1.0
            self.planned_steps = step + int(max(0.0, left) / typical)
        return self.planned_steps is not None

    def total_steps(self, step: int) -> float:
        """Steps of the whole run, as far as is known after `step` of them; else infinity."""
        if self.args.flops is not None:
            return step * self.args.flops / self.flops if self.flops else float("inf")
        if self.args.seconds is not None:
            return float("inf") if self.planned_steps is None else self.planned_steps
        return self.args.steps

    def is_spent(self, step: int) -> bool:
        if self.args.flops is not None:
            return self.flops >= self.args.flops
        return step >= self.total_steps(step)

    def state_dict(self) -> dict:
        kept = ("tokens", "flops", "kinds", "planned_steps")
        return {name: getattr(self, name) for name in kept} | {"seconds": self.seconds()}

    def load_state_dict(self, state: dict) -> None:
        state = dict(state)
        self.earlier_seconds = state.pop("seconds")
        vars(self).update(state)
