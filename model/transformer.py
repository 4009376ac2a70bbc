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

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig

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


def rotary_tables(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles: positions (B, S) -> two (B, 1, S, d) in float32."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, device=positions.device) / head_dim)
    angles = positions[:, None, :, None].float() * frequencies  # (B, 1, S, d/2)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (B, heads, S, d) by the tables of `rotary_tables`; pairs are (i, i + d/2)."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(query key^T / sqrt(d)) value; causal where there is no mask.

    query (B, H, S, d), key and value (B, K, keys, d): every key-value head serves H / K
    neighbouring query heads.

    On a CPU the kernel takes a fifth longer in bfloat16 than in float32, and twice as long in the
    backward pass; the formula itself, compiled, is still faster for short sequences.
    """
    device = query.device.type
    slow = device == "cpu" and query.dtype == torch.bfloat16
    if slow and torch.compiler.is_compiling() and mask is None and query.shape[2] <= SHORT:
        return causal_attention(query, key, value)
    if slow:
        query, key, value = query.float(), key.float(), value.float()
    with torch.autocast(device, enabled=False) if slow else nullcontext():
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=query.shape[1] != key.shape[1],
        )


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What `attend` computes without a mask, written out; the scores (B, H, S, S) are in memory."""
    B, H, S, d = query.shape
    K = key.shape[1]
    query = query.reshape(B * K, H // K * S, d)  # all queries that look at one key-value head
    key, value = key.reshape(B * K, S, d), value.reshape(B * K, S, d)
    scores = torch.bmm(query, key.transpose(1, 2)).view(B * K, H // K, S, S) / d**0.5
    future = torch.full((S, S), -torch.inf, device=query.device).triu(1)  # 0 where one may look
    probs = (scores.float() + future).softmax(-1).to(value.dtype)
    return torch.bmm(probs.view(B * K, -1, S), value).view(B, H, S, d)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads = config.num_attention_heads
        self.key_value_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        query_width = self.heads * self.head_dim
        key_value_width = self.key_value_heads * self.head_dim
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, query_width, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, key_value_width, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, key_value_width, bias=bias)
        self.o_proj = nn.Linear(query_width, config.hidden_size, bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.qk_norm = config.qk_norm

    def forward(self, x: Tensor, rotary, cache=None, mask: Tensor | None = None) -> Tensor:
        """x (B, S, D) -> (B, S, D). mask (B, 1, S, keys) is true where a query may look;
        without it attention is plainly causal."""
        B, S, _ = x.shape
        # (B, S, heads * d) -> (B, heads, S, d)
        query = self.q_proj(x).view(B, S, self.heads, self.head_dim).transpose(1, 2)
        key = self.k_proj(x).view(B, S, self.key_value_heads, self.head_dim).transpose(1, 2)
        value = self.v_proj(x).view(B, S, self.key_value_heads, self.head_dim).transpose(1, 2)
        if self.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = apply_rotary(query, *rotary), apply_rotary(key, *rotary)
        if cache is not None:
            key, value = cache.append(self, key, value)
        mixed = attend(query, key, value, mask)
        return self.o_proj(mixed.transpose(1, 2).reshape(B, S, self.heads * self.head_dim))


class SwiGLU(nn.Module):
    """The gated feed-forward layer, x (B, S, D) -> (B, S, D)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

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

    def forward(self, x: Tensor, rotary, cache=None, mask=None, keep=None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary, cache, mask)
        if keep is not None:  # from here on a token is by itself
            x = x.flatten(0, 1).index_select(0, keep)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, blocks and the last norm: input_ids (B, S) -> hidden states (B, S, D).

    keep (N,): places of the flattened (B * S) tokens; only theirs come back, (N, D). The others
    still are keys and values for them, but spare the last block's feed-forward layer.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, input_ids: Tensor, positions=None, cache=None, mask=None, keep: Tensor | None = None
    ) -> Tensor:
        if positions is None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        rotary = rotary_tables(positions, self.config.head_dim, self.config.rope_theta)
        x = self.embed_tokens(input_ids)
        *first, last = self.layers
        for layer in first:
            x = layer(x, rotary, cache, mask)
        return self.norm(last(x, rotary, cache, mask, keep))


class Transformer(nn.Module):
    """`Transformer(config)(input_ids)`: input_ids (B, S) -> logits (B, S, V) for the next token.

    Logits at position s say what comes at s + 1; labels are shifted in dataset/, never here.
    positions (B, S), cache and mask (B, 1, S, keys) serve generation. Right-padded training
    batches need no mask: a causal query never sees what stands to its right.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.initialize()
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @torch.no_grad()
    def initialize(self, std: float = 0.02) -> None:
        """Normal weights; what writes into the residual stream is scaled by 1 / sqrt(2L), so that
        the stream's variance does not grow with depth (GPT-2, Radford et al. 2019)."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                scale = (2 * self.config.num_hidden_layers) ** -0.5 if residual else 1.0
                parameter.normal_(0.0, std * scale)

    def forward(self, input_ids: Tensor, positions=None, cache=None, mask=None) -> Tensor:
        return self.lm_head(self.model(input_ids, positions, cache, mask))

    def num_parameters(self) -> int:
        """Parameters that are stored; a tied head counts once."""
        return sum(parameter.numel() for parameter in self.parameters())
