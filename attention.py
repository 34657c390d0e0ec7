"""The one attention function: every transformer block and the VAE call it.

Letters: B batch, H query heads, G key/value heads (H is a multiple of G), L queries, S keys, d head width.
"""
import math

import torch
import torch.nn.functional as F

try:  # optional; used for CUDA half precision without a mask
    from flash_attn import flash_attn_func
except ImportError:
    flash_attn_func = None


def attention(q, k, v, *, mask=None, causal=False, dropout=0.0):
    """softmax(q kᵀ / √d) v, by FlashAttention when it is installed and applies, else by torch's SDPA.

    q (B, H, L, d); k, v (B, G, S, d), each key/value head serving H / G consecutive query heads.
    mask: bool, broadcastable to (B, H, L, S), True = may attend. causal: query i of L sees keys up to S - L + i, so that
    a cached prefix is visible to all. Give one or the other. dropout: probability on the attention weights.
    Returns (B, H, L, d).
    """
    if mask is not None and causal:
        raise ValueError("attention takes a mask or causal=True, not both: put the causal triangle into the mask")
    L, S = q.shape[2], k.shape[2]
    if flash_attn_func is not None and mask is None and q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and q.shape[3] <= 256:
        # FlashAttention wants (B, L, H, d), groups heads itself and aligns the causal triangle to the last key, as we do.
        out = flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), dropout_p=dropout, causal=causal)
        return out.transpose(1, 2)
    if k.shape[1] != q.shape[1] and L == 1:  # the heads of a group as queries of one head: nothing is copied
        B, G, _, d = k.shape
        mask = mask if mask is None else mask.expand(*q.shape[:3], S).reshape(B, G, -1, S)
        return F.scaled_dot_product_attention(q.reshape(B, G, -1, d), k, v, attn_mask=mask, dropout_p=dropout).reshape(q.shape)
    if k.shape[1] != q.shape[1]:  # repeating beats enable_gqa, which falls back to the slow path with a mask
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    if causal and L != S:  # torch aligns its triangle to the first key
        causal, mask = False, (None if L == 1 else torch.ones(L, S, dtype=torch.bool, device=q.device).tril(S - L))
    half = q.dtype != torch.float32 or torch.is_autocast_enabled("cpu")
    if q.device.type == "cpu" and half and torch.is_grad_enabled():
        return plain_attention(q, k, v, mask, causal, dropout)  # SDPA's half-precision backward on the CPU takes 5 times as long
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)


def plain_attention(q, k, v, mask=None, causal=False, dropout=0.0):
    """The definition, for as many key/value heads as query heads; causal wants L = S."""
    if causal:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    scores = q / math.sqrt(q.shape[3]) @ k.transpose(2, 3)                      # (B, H, L, S); scaling the smaller of the two
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return F.dropout(scores.softmax(dim=-1), dropout) @ v
