"""Qwen2.5: the decoder-only language model in the middle of Harmon.

Report: "Qwen2.5 Technical Report" (2412.15115). Equal to transformers' Qwen2ForCausalLM; parameter names are its names.

Letters: B batch, L tokens of this call, S = cached + L, H width, d = H / heads.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from attention import attention


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

    @classmethod
    def from_name(cls, name):
        """Sizes of a published model: "qwen2.5-0.5b", "-1.5b", "-3b" or "-7b"."""
        if name not in QWEN_SIZES:
            raise ValueError(f"unknown language model {name!r}; known: {', '.join(QWEN_SIZES)}")
        return cls(**QWEN_SIZES[name])


QWEN_SIZES = {
    "qwen2.5-0.5b": dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2),
    "qwen2.5-1.5b": dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2),
    "qwen2.5-3b": dict(hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2),
    "qwen2.5-7b": dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
                       vocab_size=152064, tie_word_embeddings=False),
}


class KVCache:
    """Keys and values of the tokens seen so far: a pair of (B, kv_heads, capacity, d) a layer, the first `length` of them filled."""

    def __init__(self):
        self.length, self.layers = 0, []

    def append(self, layer, k, v):
        """New k, v (B, kv_heads, L, d) -> all of them, (B, kv_heads, length + L, d). The model adds L to `length` after its last layer."""
        end = self.length + k.shape[2]
        if layer == len(self.layers):
            self.layers.append((k[:, :, :0], v[:, :, :0]))
        if self.layers[layer][0].shape[2] < end:                                # at least double, so that growing costs little
            more = max(end, 2 * self.layers[layer][0].shape[2])
            self.layers[layer] = tuple(torch.cat([old[:, :, :self.length], old.new_empty(*old.shape[:2], more - self.length, old.shape[3])], dim=2)
                                       for old in self.layers[layer])
        for buffer, new in zip(self.layers[layer], (k, v)):
            buffer[:, :, self.length:end] = new
        return tuple(buffer[:, :, :end] for buffer in self.layers[layer])

    def truncate(self, length):
        self.length = min(self.length, length)


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


def rotary(positions, d, theta, dtype):
    """cos and sin, (B, 1, L, d), of the rotary embedding at integer positions (B, L); computed in float32."""
    inv_freq = theta ** -(torch.arange(0, d, 2, device=positions.device).float() / d)
    angle = positions[:, None, :, None].float() * inv_freq                      # (B, 1, L, d/2)
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x, cos, sin):
    """Half-split layout: channel i is paired with channel i + d/2."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.d, kv = cfg.hidden_size // cfg.num_attention_heads, cfg.num_key_value_heads
        self.q_proj = nn.Linear(cfg.hidden_size, cfg.hidden_size)
        self.k_proj = nn.Linear(cfg.hidden_size, kv * self.d)
        self.v_proj = nn.Linear(cfg.hidden_size, kv * self.d)
        self.o_proj = nn.Linear(cfg.hidden_size, cfg.hidden_size, bias=False)

    def forward(self, x, cos, sin, mask, cache, layer):
        B, L, H = x.shape
        q, k, v = (p(x).view(B, L, -1, self.d).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)                         # (B, heads, L, d), (B, kv_heads, L, d)
        if cache is not None:
            k, v = cache.append(layer, k, v)                                    # (B, kv_heads, S, d)
        y = attention(q, k, v, mask=mask, causal=mask is None)
        return self.o_proj(y.transpose(1, 2).reshape(B, L, H))


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.gate_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.up_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.down_proj = nn.Linear(cfg.intermediate_size, cfg.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = Attention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp = MLP(cfg)

    def forward(self, x, *context):
        x = x + self.self_attn(self.input_layernorm(x), *context)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen2(nn.Module):
    """forward gives hidden states after the final norm; `logits` turns them into scores over the vocabulary."""

    def __init__(self, config=QwenConfig()):
        super().__init__()
        self.config = config
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.model.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)

    def tie_weights(self):
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids=None, *, inputs_embeds=None, attention_mask=None, cache=None):
        """input_ids (B, L) int, or inputs_embeds (B, L, H) -> hidden states (B, L, H).

        attention_mask: (B, cached + L) bool, True = real; positions are its cumsum - 1. None: all real. cache: a KVCache,
        appended to. What padding positions return is finite but means nothing.
        """
        x = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        B, L, _ = x.shape
        past = cache.length if cache is not None else 0
        if attention_mask is None:
            positions, mask = torch.arange(past, past + L, device=x.device).expand(B, L), None
        else:
            if attention_mask.shape != (B, past + L):
                raise ValueError(f"attention_mask is {tuple(attention_mask.shape)}; expected (batch, cached + new) = {(B, past + L)}")
            real = attention_mask.bool()
            positions = (real.cumsum(1) - 1).clamp(min=0)[:, past:]
            causal = torch.ones(L, past + L, dtype=torch.bool, device=x.device).tril(past)
            itself = causal & ~causal.tril(past - 1)                            # so that no row is empty, padding or not
            mask = ((causal & real[:, None]) | itself)[:, None]                 # (B, 1, L, S)
        cos, sin = rotary(positions, self.config.hidden_size // self.config.num_attention_heads, self.config.rope_theta, x.dtype)
        for i, layer in enumerate(self.model.layers):
            x = layer(x, cos, sin, mask, cache, i)
        if cache is not None:
            cache.length = past + L
        return self.model.norm(x)

    def logits(self, hidden):
        """(…, H) -> (…, vocab)."""
        return self.lm_head(hidden)

    @torch.no_grad()
    def generate(self, inputs_embeds, *, max_new_tokens, eos_token_id=None):
        """Greedy decoding after inputs_embeds (1, L, H): yields int token ids, at most max_new_tokens, stopping before eos."""
        cache = KVCache()
        hidden = self(inputs_embeds=inputs_embeds, cache=cache)
        for i in range(max_new_tokens):
            token = self.logits(hidden[:, -1]).argmax(dim=-1)                   # (1,)
            if eos_token_id is not None and token.item() == eos_token_id:
                return
            yield token.item()
            if i + 1 < max_new_tokens:
                hidden = self(token[:, None], cache=cache)

    @torch.no_grad()
    def generate_batch(self, input_ids, attention_mask, *, max_new_tokens, eos_token_id):
        """Greedy decoding of several prompts (B, L), padded on the right (attention_mask (B, L) bool, True = real): a list of B lists of ids, without eos."""
        cache, real = KVCache(), attention_mask
        hidden = self(input_ids, attention_mask=real, cache=cache)
        last = real.sum(dim=1, keepdim=True) - 1                                # (B, 1), each row's last real position
        hidden = hidden.gather(1, last[..., None].expand(-1, -1, hidden.shape[-1]))
        said = []
        for i in range(max_new_tokens):
            said.append(self.logits(hidden[:, -1]).argmax(dim=-1))              # (B,)
            if i + 1 == max_new_tokens or (torch.stack(said) == eos_token_id).any(dim=0).all():
                break
            real = torch.cat([real, real.new_ones(real.shape[0], 1)], dim=1)
            hidden = self(said[-1][:, None], attention_mask=real, cache=cache)
        rows = torch.stack(said, dim=1).tolist()                                # (B, ≤ max_new_tokens)
        return [row[:row.index(eos_token_id)] if eos_token_id in row else row for row in rows]
