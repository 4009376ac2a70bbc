"""A decoder-only Transformer by hand: the architecture of Llama, Qwen2 and Qwen3.

Read it bottom up: `Transformer` = embedding -> L x `Block` -> norm -> head, where
`Block` = x + `Attention`(norm(x)), then x + `SwiGLU`(norm(x)).

    RMSNorm   x / sqrt(mean(x^2) + eps) * g                 Zhang & Sennrich 2019, 1910.07467
    RoPE      rotate pairs (i, i + d/2) of q and k by       Su et al. 2021, 2104.09864
              position * theta^(-2i/d)
    GQA       H query heads share K key-value heads         Ainslie et al. 2023, 2305.13245
    SwiGLU    down(silu(gate(x)) * up(x))                   Shazeer 2020, 2002.05202

Shapes: B batch, S sequence, V vocabulary, D width, H heads, K key-value heads, L layers, d head
width. Module names are Hugging Face's, so a state_dict is a Llama checkpoint.
"""

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import Llama3Scaling, ModelConfig

SHORT = 512  # tokens of a sequence whose scores, S x S for every head, may be in memory


class RMSNorm(nn.Module):
    """Scale the last dimension of x (..., D) to unit root mean square, in float32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight


def rotary_frequencies(
    head_dim: int, theta: float, scaling: Llama3Scaling | None = None, device=None
) -> Tensor:
    """The angle per position of every pair i, theta^(-2i/d), as (d/2,).

    scaling: since Llama 3.1 the slow pairs turn still more slowly, so that a text `factor` times
    longer than those of the first training brings no new angle. Pairs that turn often within such a
    text, and so tell neighbours apart, stay as they are (Grattafiori et al. 2024, 2407.21783; the
    formula is that of Meta's code):

        turns = original_max_position_embeddings * frequency / (2 pi)
        kept  = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor), within 0 to 1
        frequency * (kept + (1 - kept) / factor)
    """
    frequencies = theta ** (-torch.arange(0, head_dim, 2, device=device) / head_dim)
    if scaling is None:
        return frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def rotary_tables(
    positions: Tensor, head_dim: int, theta: float, scaling: Llama3Scaling | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles: positions (B, S) -> two (B, 1, S, d) in float32."""
    frequencies = rotary_frequencies(head_dim, theta, scaling, positions.device)
    angles = positions[:, None, :, None].float() * frequencies  # (B, 1, S, d/2)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (B, heads, S, d) by the tables of `rotary_tables`; pairs are (i, i + d/2)."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(query key^T / sqrt(d)) value; causal where there is no mask.
    query (B, H, S, d), key and value (B, K, keys, d): a key-value head serves H / K query heads."""
    # On a CPU the kernel takes a fifth longer in bfloat16 than in float32, twice as long backward;
    # for short sequences the formula itself, compiled, is faster than either.
    device = query.device.type
    slow = device == "cpu" and query.dtype == torch.bfloat16
    if slow and torch.compiler.is_compiling() and mask is None and query.shape[2] <= SHORT:
        return attention_by_formula(query, key, value, None)[1]
    if slow:
        query, key, value = query.float(), key.float(), value.float()
    options = {"is_causal": mask is None, "enable_gqa": query.shape[1] != key.shape[1]}
    with torch.autocast(device, enabled=False) if slow else nullcontext():
        return F.scaled_dot_product_attention(query, key, value, mask, **options)


def attention_by_formula(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None):
    """What `attend` computes, written out: the maps (B, H, S, keys) and their mix (B, H, S, d)."""
    B, H, S, d = query.shape
    K, keys = key.shape[1:3]
    query = query.reshape(B * K, H // K * S, d)  # all queries that look at one key-value head
    key, value = key.reshape(B * K, keys, d), value.reshape(B * K, keys, d)
    scores = torch.bmm(query, key.transpose(1, 2)).view(B, H, S, keys).float() / d**0.5
    if mask is None:
        mask = torch.ones(S, keys, dtype=torch.bool, device=query.device).tril(keys - S)
    probs = scores.masked_fill(~mask, -torch.inf).softmax(-1).to(value.dtype)
    mixed = torch.bmm(probs.view(B * K, H // K * S, keys), value)
    return probs, mixed.view(B, H, S, d)


class Record:
    """What a forward pass leaves behind on request: `model(input_ids, record=record)`.

    Record("hidden", "attention") names what is wanted; each is then a list over layers:
    hidden      L + 1 of (B, S, D): the embedding, then the stream after each layer, before the norm
    attention   L of (B, H, S, keys), rows that sum to 1; by the formula, as no kernel tells them
    queries     L of (B, H, S, d), keys and values L of (B, K, keys, d), after rotation
    and logits (B, S, V)."""

    NAMES = ("hidden", "attention", "queries", "keys", "values")

    def __init__(self, *wanted: str):
        for name in wanted:
            if name not in self.NAMES:
                raise ValueError(f"no record of '{name}': use {', '.join(self.NAMES)}")
        self.wanted = set(wanted or self.NAMES)
        self.hidden, self.attention, self.queries, self.keys, self.values = [], [], [], [], []
        self.logits: Tensor | None = None

    def add(self, **tensors: Tensor) -> None:
        for name in self.wanted & tensors.keys():
            getattr(self, name).append(tensors[name])


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        H, K, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        D, bias = config.hidden_size, config.attention_bias
        self.head_dim, self.qk_norm = d, config.qk_norm
        self.q_proj = nn.Linear(D, H * d, bias=bias)
        self.k_proj = nn.Linear(D, K * d, bias=bias)
        self.v_proj = nn.Linear(D, K * d, bias=bias)
        self.o_proj = nn.Linear(H * d, D, bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(d, config.rms_norm_eps)
            self.k_norm = RMSNorm(d, config.rms_norm_eps)

    def forward(self, x: Tensor, rotary, cache=None, mask=None, record=None) -> Tensor:
        """x (B, S, D) -> the same. mask (B, 1, S, keys): where a query may look; None is causal."""
        projected = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        heads = (-1, self.head_dim)  # (B, S, heads * d) -> (B, heads, S, d)
        query, key, value = (x.unflatten(-1, heads).transpose(1, 2) for x in projected)
        if self.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = apply_rotary(query, *rotary), apply_rotary(key, *rotary)
        if cache is not None:
            key, value = cache.append(self, key, value)
        if record is not None:
            record.add(queries=query, keys=key, values=value)
        if record is not None and "attention" in record.wanted:
            probs, mixed = attention_by_formula(query, key, value, mask)
            record.add(attention=probs)
        else:
            mixed = attend(query, key, value, mask)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))  # (B, H, S, d) -> (B, S, H * d)


class SwiGLU(nn.Module):
    """The gated feed-forward layer, x (B, S, D) -> (B, S, D)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        D, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, inner, bias=False)
        self.up_proj = nn.Linear(D, inner, bias=False)
        self.down_proj = nn.Linear(inner, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer: attention then feed-forward, each normalised before and added after."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x: Tensor, rotary, cache=None, mask=None, record=None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary, cache, mask, record)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, blocks and the last norm: input_ids (B, S) -> hidden states (B, S, D)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids, positions=None, cache=None, mask=None, record=None) -> Tensor:
        if positions is None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        c = self.config
        rotary = rotary_tables(positions, c.head_dim, c.rope_theta, c.rope_scaling)
        x = self.embed_tokens(input_ids)
        if record is not None:
            record.add(hidden=x)
        for layer in self.layers:
            x = layer(x, rotary, cache, mask, record)
            if record is not None:
                record.add(hidden=x)
        return self.norm(x)


class Transformer(nn.Module):
    """`Transformer(config)(input_ids)`: input_ids (B, S) -> logits (B, S, V) for the next token.

    Logits at position s say what comes at s + 1; labels are shifted in dataset/, never here.
    positions (B, S), cache and mask (B, 1, S, keys) serve generation; right-padded training batches
    need no mask, as a causal query never sees what stands to its right."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if not self.lm_head.weight.is_meta:  # there are only shapes, for load_model
            self.initialize()
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @torch.no_grad()
    def initialize(self, std: float = 0.02) -> None:
        """Normal weights; those that write into the residual stream are scaled by 1 / sqrt(2L), so
        that its variance does not grow with depth (GPT-2, Radford et al. 2019)."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                scale = (2 * self.config.num_hidden_layers) ** -0.5 if residual else 1.0
                parameter.normal_(0.0, std * scale)

    def forward(self, input_ids, positions=None, cache=None, mask=None, record=None) -> Tensor:
        # With a record the body runs as it is written, also where --compile has compiled it.
        body = self.model if record is None else self.model.forward
        logits = self.lm_head(body(input_ids, positions, cache, mask, record))
        if record is not None:
            record.logits = logits
        return logits

    def num_parameters(self) -> int:
        """Parameters that are stored; a tied head counts once."""
        return sum(parameter.numel() for parameter in self.parameters())
