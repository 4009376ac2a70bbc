"""Sparse experts: the Transformer of Mixtral, whose feed-forward layer is many, of which a token
uses few (Shazeer et al. 2017, 1701.06538; Mixtral, 2401.04088).

    y = sum over the k experts with the largest gate(x) of g_e * expert_e(x)
    expert_e(x) = w2 (silu(w1 x) * w3 x)          g = softmax over the k chosen gate logits

So a model has the parameters of E experts and the cost of k. Nothing makes the gate use all of
them but the balance loss (Switch, 2101.03961, for k = 1):

    balance = mean over layers of E * sum_e f_e P_e      f_e: share of tokens that chose e; sum k
                                                         P_e: mean of softmax(gate(x))_e; sum 1

It is k where both are even and E where one expert has all (k = 1). f has no gradient, P has. In
transformers all layers are pooled into one f and one P: there a layer that only uses expert 0 and
one that only uses expert 1 count as balanced (issue 31464), here they do not.

No noise is added to the gate, and no expert has a capacity beyond which it drops tokens.

Shapes: B batch, S sequence, N tokens, D width, E experts, k of them used by a token, L layers.
"""

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig
from .transformer import Block, Record, Transformer

MIXTRAL = "MixtralForCausalLM"
# What transformers takes for a key that a config.json leaves out.
DEFAULTS = {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072}


@dataclass(frozen=True)
class ExpertsConfig(ModelConfig):
    """A ModelConfig with experts, each of intermediate_size. Raises ValueError as that does."""

    num_local_experts: int = 8
    num_experts_per_tok: int = 2
    router_aux_loss_coef: float = 0.001

    def __post_init__(self):
        super().__post_init__()
        if self.num_experts_per_tok > self.num_local_experts:
            few = f"{self.num_experts_per_tok} experts per token of {self.num_local_experts}"
            raise ValueError(f"config: {few}: use fewer per token, or more")
        if self.attention_bias or self.qk_norm:
            raise ValueError("config: Mixtral has no attention_bias and no qk_norm: leave them out")

    def to_json(self) -> dict:
        shape = super().to_json() | {"architectures": [MIXTRAL], "model_type": "mixtral"}
        del shape["attention_bias"]
        return shape | {"sliding_window": None, "router_jitter_noise": 0.0}

    @classmethod
    def from_json(cls, config: dict) -> "ExpertsConfig":
        if (window := config.get("sliding_window")) is not None:
            other = f"{MIXTRAL} with sliding_window = {window!r} is not supported, only None"
            raise ValueError(f"{other}: choose another checkpoint")
        config = DEFAULTS | config | {"architectures": ["LlamaForCausalLM"]}
        if "rope_parameters" not in config:
            config = {"rope_theta": 1e6} | config
        shape = asdict(ModelConfig.from_json(config))
        return cls(
            **shape,
            num_local_experts=config.get("num_local_experts", 8),
            num_experts_per_tok=config.get("num_experts_per_tok", 2),
            router_aux_loss_coef=config.get("router_aux_loss_coef", 0.001),
        )


class Expert(nn.Module):
    """SwiGLU under Mixtral's names: x (..., D) -> (..., D)."""

    def __init__(self, config: ExpertsConfig):
        super().__init__()
        D, inner = config.hidden_size, config.intermediate_size
        self.w1 = nn.Linear(D, inner, bias=False)  # gate_proj of a SwiGLU
        self.w2 = nn.Linear(inner, D, bias=False)  # down_proj
        self.w3 = nn.Linear(D, inner, bias=False)  # up_proj

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


def route(router_logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Which k experts a token uses, and their weights: (..., E) -> two (..., k)."""
    top, chosen = at_least_float32(router_logits).topk(k, dim=-1)
    return chosen, top.softmax(-1)


def at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class SparseExperts(nn.Module):
    """The feed-forward layer: x (B, S, D) -> (B, S, D)."""

    def __init__(self, config: ExpertsConfig):
        super().__init__()
        self.k = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.num_local_experts, bias=False)
        self.experts = nn.ModuleList(Expert(config) for _ in range(config.num_local_experts))

    def forward(self, x: Tensor, record: Record | None = None) -> Tensor:
        tokens = x.flatten(0, -2)  # (B, S, D) -> (N, D)
        router_logits = self.gate(tokens)  # (N, E)
        if record is not None:
            record.add(router=router_logits.unflatten(0, x.shape[:-1]))
        chosen, weights = route(router_logits, self.k)  # (N, k) each
        mixed = torch.zeros_like(tokens)
        # An expert that nobody chose runs on no token: in several processes all must have the same
        # gradients to add up.
        for number, expert in enumerate(self.experts):
            rows, place = (chosen == number).nonzero(as_tuple=True)  # a token is in it once at most
            out = expert(tokens.index_select(0, rows)) * weights[rows, place, None]
            mixed = mixed.index_add(0, rows, out.to(mixed.dtype))
        return mixed.view_as(x)


class ExpertBlock(nn.Module):
    """A `Block` whose SwiGLU is replaced by experts; the rest is that block's."""

    def __init__(self, block: Block, config: ExpertsConfig):
        super().__init__()
        self.input_layernorm, self.self_attn = block.input_layernorm, block.self_attn
        self.post_attention_layernorm = block.post_attention_layernorm
        self.block_sparse_moe = SparseExperts(config)

    def forward(self, x: Tensor, rotary, cache=None, mask=None, record=None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary, cache, mask, record)
        return x + self.block_sparse_moe(self.post_attention_layernorm(x), record)


class RouterRecord(Record):
    """`model(input_ids, record=record)`: router is then a list over layers of (B, S, E) logits."""

    NAMES = (*Record.NAMES, "router")

    def __init__(self):
        super().__init__("router")
        self.router: list[Tensor] = []


@torch.no_grad()
def add_experts(model: Transformer, config: ExpertsConfig, std: float = 0.02) -> Transformer:
    """Replace each layer's SwiGLU by new experts, in place, before an optimizer is made; their
    weights are drawn as those of a new Transformer are."""
    model.config = model.model.config = config
    for index, block in enumerate(model.model.layers):
        model.model.layers[index] = ExpertBlock(block, config)
        for name, weight in model.model.layers[index].block_sparse_moe.named_parameters():
            residual = name.endswith("w2.weight")  # it writes into the residual stream
            scale = (2 * config.num_hidden_layers) ** -0.5 if residual else 1.0
            weight.normal_(0.0, std * scale)
    return model


def active_parameters(model: Transformer) -> int:
    """Parameters that one token uses, of all that are stored."""
    config, total = model.config, model.num_parameters()
    unused = config.num_local_experts - config.num_experts_per_tok
    return total - unused * sum(
        sum(weight.numel() for weight in layer.block_sparse_moe.experts[0].parameters())
        for layer in model.model.layers
    )


def balance_loss(router: list[Tensor], k: int, mask: Tensor) -> Tensor:
    """The balance loss, a scalar, k at best. router: a list over layers of logits (B, S, E); mask
    (B, S): the tokens that count. A product of two means, so it is one of the micro-batch."""
    losses = []
    for logits in router:
        E = logits.shape[-1]
        probs = at_least_float32(logits)[mask].softmax(-1)  # (N, E)
        chosen = F.one_hot(probs.topk(k, dim=-1).indices, E).sum(1)  # (N, E): 1 where it is used
        losses.append(E * (chosen.to(probs.dtype).mean(0) * probs.mean(0)).sum())
    return torch.stack(losses).mean()
