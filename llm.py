"""Qwen2.5: the decoder-only language model in the middle of Harmon.

Report: "Qwen2.5 Technical Report" (2412.15115). Equal to transformers' Qwen2ForCausalLM, with its parameter
names.

Letters: B batch, L tokens of this call, S = cached + L, H width, d = H / heads.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import scaled_dot_product_attention


@dataclass(frozen=True)
class QwenConfig:
    vocab_size: int = 151936
    hidden_size: int = 896             # H
    intermediate_size: int = 4864      # of the SwiGLU mlp
    num_hidden_layers: int = 24
    num_attention_heads: int = 14
    num_key_value_heads: int = 2       # each serves heads / kv_heads query heads
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True   # lm_head shares the embedding's weight


class KVCache:
    """Keys and values of the tokens so far: one pair (B, kv_heads, S, d) for each layer."""

    def __init__(self):
        self.layers = []

    def append(self, layer, k, v):
        """New k, v (B, kv_heads, L, d) of a layer -> all of its keys and values, (B, kv_heads, S, d)."""
        if layer == len(self.layers):
            self.layers.append((k, v))
        else:
            old_k, old_v = self.layers[layer]
            self.layers[layer] = torch.cat([old_k, k], dim=2), torch.cat([old_v, v], dim=2)
        return self.layers[layer]

    @property
    def length(self):
        """Tokens held, padding included."""
        return self.layers[0][0].shape[2] if self.layers else 0

    def truncate(self, length):
        self.layers = [(k[:, :, :length], v[:, :, :length]) for k, v in self.layers]


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


def rotary_embedding(positions, d, theta, dtype):
    """cos and sin, each (B, 1, L, d), of the rotary embedding at positions (B, L); computed in float32."""
    inv_freq = theta ** -(torch.arange(0, d, 2, device=positions.device).float() / d)
    angles = positions[:, None, :, None].float() * inv_freq                 # (B, 1, L, d/2)
    angles = torch.cat([angles, angles], dim=-1)                            # (B, 1, L, d)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate_half(x):
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)


def apply_rotary_emb(x, cos, sin):
    """Rotate x (B, heads, L, d). Half-split layout: channel i is paired with channel i + d/2."""
    return x * cos + rotate_half(x) * sin


class Attention(nn.Module):
    """Grouped-query attention: each key/value head serves heads / kv_heads consecutive query heads."""

    def __init__(self, config):
        super().__init__()
        H = config.hidden_size
        self.d = H // config.num_attention_heads
        self.groups = config.num_attention_heads // config.num_key_value_heads
        self.q_proj = nn.Linear(H, H)
        self.k_proj = nn.Linear(H, config.num_key_value_heads * self.d)
        self.v_proj = nn.Linear(H, config.num_key_value_heads * self.d)
        self.o_proj = nn.Linear(H, H, bias=False)

    def forward(self, x, cos, sin, mask, cache, layer):
        B, L, H = x.shape
        q = self.q_proj(x).view(B, L, -1, self.d).transpose(1, 2)           # (B, heads, L, d)
        k = self.k_proj(x).view(B, L, -1, self.d).transpose(1, 2)           # (B, kv_heads, L, d)
        v = self.v_proj(x).view(B, L, -1, self.d).transpose(1, 2)
        q = apply_rotary_emb(q, cos, sin)
        k = apply_rotary_emb(k, cos, sin)
        if cache is not None:
            k, v = cache.append(layer, k, v)                                # (B, kv_heads, S, d)
        k = k.repeat_interleave(self.groups, dim=1)                         # (B, heads, S, d)
        v = v.repeat_interleave(self.groups, dim=1)
        y = scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o_proj(y.transpose(1, 2).reshape(B, L, H))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, mask, cache, layer):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache, layer)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x


class Qwen2(nn.Module):
    """`forward` gives hidden states after the final norm, `logits` their scores over the vocabulary."""

    def __init__(self, config: QwenConfig = QwenConfig()):
        super().__init__()
        self.config = config
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.model.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()
        self.init_weights()

    def tie_weights(self):
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def init_weights(self):
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, input_ids=None, *, inputs_embeds=None, attention_mask=None, cache=None):
        """input_ids (B, L) int, or inputs_embeds (B, L, H) -> hidden states (B, L, H).

        attention_mask: (B, cached + L) bool, True = real; None: all real. Positions are its cumsum - 1, so
        padding does not count. cache: a KVCache, appended to. Ignore the outputs at padding positions.
        Raises ValueError for a mask of another shape.
        """
        x = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        B, L, H = x.shape
        past = cache.length if cache is not None else 0
        S = past + L
        if attention_mask is None:
            attention_mask = torch.ones(B, S, dtype=torch.bool, device=x.device)
        if attention_mask.shape != (B, S):
            raise ValueError(f"attention_mask is {tuple(attention_mask.shape)}; "
                             f"expected (batch, cached + new) = {(B, S)}")
        attention_mask = attention_mask.bool()

        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, past:]   # (B, L)
        d = H // self.config.num_attention_heads
        cos, sin = rotary_embedding(positions, d, self.config.rope_theta, x.dtype)

        # Every position attends to itself, so softmax is defined on padding rows too.
        query = torch.arange(past, S, device=x.device)[:, None]             # (L, 1)
        key = torch.arange(S, device=x.device)                              # (S,)
        mask = (key <= query) & attention_mask[:, None] | (key == query)    # (B, L, S)

        for layer, block in enumerate(self.model.layers):
            x = block(x, cos, sin, mask[:, None], cache, layer)
        return self.model.norm(x)

    def logits(self, hidden_states):
        """(…, H) -> (…, vocab)."""
        return self.lm_head(hidden_states)

    @torch.no_grad()
    def generate(self, inputs_embeds, *, max_new_tokens, eos_token_id=None):
        """Greedy decoding after inputs_embeds (1, L, H): yields max_new_tokens ids at most, without eos.

        Raises ValueError if the weights or inputs hold NaN or infinity.
        """
        cache = KVCache()
        hidden_states = self(inputs_embeds=inputs_embeds, cache=cache)
        for i in range(max_new_tokens):
            token = most_likely(self.logits(hidden_states[:, -1]))          # (1,)
            if token.item() == eos_token_id:
                return
            yield token.item()
            if i + 1 < max_new_tokens:
                hidden_states = self(token[:, None], cache=cache)


def most_likely(logits):
    """Logits (B, vocab) -> the token of each row's largest, (B,). Raises ValueError for NaN and infinity."""
    # argmax would take NaN for the largest. The extremes show both, sooner than isfinite() of all.
    if not (logits.is_meta or torch.stack(logits.aminmax()).isfinite().all()):
        raise ValueError("the language model's output is not finite: the weights hold NaN or infinity, "
                         "or the dtype overflows")
    return logits.argmax(dim=-1)
