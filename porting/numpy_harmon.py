"""Harmon's inference in NumPy alone: the whole model, top to bottom, with nothing hidden in a library.

    python porting/numpy_harmon.py "three blue stars" --out x.png --seed 0          # text to image
    python porting/numpy_harmon.py --image x.png --ask "What color is the star?"    # image to text

    pixels --VAE--> latents --MAR encoder--> x_enc --proj_in--> z_enc --LLM, after the prompt--> z_llm
      --proj_out, + x_enc--> --MAR decoder--> z --diffusion head--> latents of masked tokens --VAE--> pixels

Letters: B batch, H×W pixels, h×w token grid, N = h·w image tokens, n buffer tokens, V visible tokens, C latent channels, D MAR width, E LLM
width, L tokens of this call, S = cached + L, d head width, M rows and W width of the diffusion head. All is float32. A function that mirrors
a module gets the module's place among the parameters, p, and shows (`show`, `@shown`) under the module's name what compare.py compares.
"""
import argparse
import math
import sys
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from parameters import load, shown
from PIL import Image
from tokenizers import Tokenizer

BUNDLED = Path(__file__).resolve().parent.parent / "checkpoints"
NORM_EPS = 1e-6                    # of LayerNorm and GroupNorm; RMSNorm's is in the configuration
IMAGE = -200                       # in ids: an image embedding goes here
USER, ASSISTANT, END, PAD = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>", "<|endoftext|>"

# ---- layers ----------------------------------------------------------------------------------------------------------

@shown
def linear(p, x):
    y = x @ p.weight.T                                                          # weight is out × in
    return y + p.bias if "bias" in p else y

def normalize(x):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + NORM_EPS)

@shown
def layer_norm(p, x):
    return normalize(x) * p.weight + p.bias

@shown
def rms_norm(p, x):
    return p.weight * (x / np.sqrt((x * x).mean(-1, keepdims=True) + p.config["llm"]["rms_norm_eps"]))

@shown
def group_norm(p, x):                                                           # (B, c, h, w), 32 groups
    return normalize(x.reshape(len(x), 32, -1)).reshape(x.shape) * p.weight[:, None, None] + p.bias[:, None, None]

@shown
def conv(p, x, stride=1):                                                       # (B, c_in, h, w); with stride 2 it comes padded
    c_out, _, k, _ = p.weight.shape
    side = k // 2 if stride == 1 else 0
    x = np.pad(x, ((0, 0), (0, 0), (side, side), (side, side)))
    patches = sliding_window_view(x, (k, k), axis=(2, 3))[:, :, ::stride, ::stride]            # (B, c_in, h, w, k, k)
    patches = patches.transpose(0, 2, 3, 1, 4, 5).reshape(len(x), *patches.shape[2:4], -1)     # (B, h, w, c_in·k·k)
    return (patches @ p.weight.reshape(c_out, -1).T + p.bias).transpose(0, 3, 1, 2)            # (B, c_out, h, w)

def silu(x):
    return 0.5 * x * (1 + np.tanh(0.5 * x))                                     # x · sigmoid(x), without overflow

erf = np.vectorize(math.erf, otypes=[np.float32])

def gelu(x):
    return 0.5 * x * (1 + erf(x / math.sqrt(2)))                                # exact, not the tanh approximation

def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)

def attention(p, q, k, v, mask=None):
    """q (B, heads, L, d); k, v (B, heads or a divisor of them, S, d); mask (B, 1, L, S), True = may look -> (B, heads, L, d)."""
    p.show("q", q), p.show("k", k), p.show("v", v)
    k, v = (x.repeat(q.shape[1] // x.shape[1], axis=1) for x in (k, v))         # each serves as many consecutive query heads
    scores = q @ k.swapaxes(2, 3) / math.sqrt(q.shape[3])                       # (B, heads, L, S)
    if mask is not None:
        scores = np.where(mask, scores, np.float32(-np.inf))
    return p.show("weights", softmax(scores)) @ v

def split_heads(x, heads):                                                      # (B, L, heads·d) -> (B, heads, L, d)
    return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)

def join_heads(x):                                                              # (B, heads, L, d) -> (B, L, heads·d)
    return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1)

# ---- VAE: pixels <-> latents -----------------------------------------------------------------------------------------

@shown
def resnet_block(p, x):
    y = conv(p.conv1, silu(group_norm(p.norm1, x)))
    y = conv(p.conv2, silu(group_norm(p.norm2, y)))
    return (conv(p.nin_shortcut, x) if "nin_shortcut" in p else x) + y

@shown
def attn_block(p, x):                                                           # one head over all positions
    B, c, h, w = x.shape
    y = group_norm(p.norm, x)
    q, k, v = (conv(part, y).reshape(B, 1, c, h * w).swapaxes(2, 3) for part in (p.q, p.k, p.v))     # (B, 1, hw, c)
    return x + conv(p.proj_out, attention(p, q, k, v).swapaxes(2, 3).reshape(B, c, h, w))

def pad_right_and_bottom(x):
    return np.pad(x, ((0, 0), (0, 0), (0, 1), (0, 1)))

@shown
def downsample(p, x):
    return conv(p.conv, pad_right_and_bottom(x), stride=2)

@shown
def upsample(p, x):
    return conv(p.conv, x.repeat(2, axis=2).repeat(2, axis=3))

def middle(p, x):
    return resnet_block(p.block_2, attn_block(p.attn_1, resnet_block(p.block_1, x)))

def vae_encode(p, x):                                                           # (B, 3, H, W)
    x = conv(p.encoder.conv_in, x)
    for level in p.encoder.down:
        for i, part in enumerate(level.block):
            x = resnet_block(part, x)
            x = attn_block(level.attn[i], x) if "attn" in level else x          # in the last level only
        x = downsample(level.downsample, x) if "downsample" in level else x     # after all but the last
    x = middle(p.encoder.mid, x)
    x = conv(p.encoder.conv_out, silu(group_norm(p.encoder.norm_out, x)))       # (B, 2C, h, w)
    return np.split(conv(p.quant_conv, x), 2, axis=1)                           # mean and log variance, each (B, C, h, w)

def vae_decode(p, z):                                                           # (B, C, h, w)
    x = middle(p.decoder.mid, conv(p.decoder.conv_in, conv(p.post_quant_conv, z)))
    for level in reversed(list(p.decoder.up)):                                  # stored shallowest first, run deepest first
        for part in level.block:
            x = resnet_block(part, x)
        x = upsample(level.upsample, x) if "upsample" in level else x
    return conv(p.decoder.conv_out, silu(group_norm(p.decoder.norm_out, x)))    # (B, 3, H, W)

def encode(p, pixels):                                                          # -> (B, h, w, C) of about unit variance
    mean, _ = vae_encode(p.vae, pixels)
    return p.show("latents", mean.transpose(0, 2, 3, 1) * p.config["vae_scale"])

def decode(p, latents):                                                         # -> (B, 3, H, W), about in [-1, 1]
    return p.show("decoded", vae_decode(p.vae, (latents / p.config["vae_scale"]).transpose(0, 3, 1, 2)))

# ---- LLM: Qwen2.5 ----------------------------------------------------------------------------------------------------

def rotary(positions, d, theta):                                                # (B, L) -> cos and sin, each (B, 1, L, d)
    angle = positions[:, None, :, None].astype(np.float32) * theta ** -(np.arange(0, d, 2, dtype=np.float32) / d)
    angle = np.concatenate([angle, angle], axis=-1)
    return np.cos(angle), np.sin(angle)

def rotate(x, cos, sin):
    a, b = np.split(x, 2, axis=-1)                                              # half-split: channel i is paired with i + d/2
    return x * cos + np.concatenate([-b, a], axis=-1) * sin

@shown
def self_attention(p, x, cos, sin, mask, past, cache):
    heads, kv_heads = p.config["llm"]["num_attention_heads"], p.config["llm"]["num_key_value_heads"]
    q = rotate(split_heads(linear(p.q_proj, x), heads), cos, sin)               # (B, heads, L, d)
    k = rotate(split_heads(linear(p.k_proj, x), kv_heads), cos, sin)            # (B, kv_heads, L, d)
    v = split_heads(linear(p.v_proj, x), kv_heads)
    if past is not None:
        k, v = np.concatenate([past[0], k], axis=2), np.concatenate([past[1], v], axis=2)      # (B, kv_heads, S, d)
    cache.append((k, v))
    return linear(p.o_proj, join_heads(attention(p, q, k, v, mask)))

@shown
def swiglu(p, x):
    return linear(p.down_proj, silu(linear(p.gate_proj, x)) * linear(p.up_proj, x))

@shown
def decoder_layer(p, x, *context):
    x = x + self_attention(p.self_attn, rms_norm(p.input_layernorm, x), *context)
    return x + swiglu(p.mlp, rms_norm(p.post_attention_layernorm, x))

def llm(p, x, real, past=None):
    """x (B, L, E), real (B, S) bool, past: the cache of the S - L tokens before -> hidden states (B, L, E) and a cache of all S tokens."""
    c, L, S = p.config["llm"], x.shape[1], real.shape[1]
    positions = np.maximum(np.cumsum(p.show("attention_mask", real), axis=1) - 1, 0)[:, S - L:]     # padding does not count
    query, key = np.arange(S - L, S)[:, None], np.arange(S)
    mask = ((key <= query) & real[:, None] | (key == query))[:, None]           # (B, 1, L, S)
    cos, sin = rotary(p.show("positions", positions), c["hidden_size"] // c["num_attention_heads"], c["rope_theta"])
    p.show("rotary.cos", cos), p.show("rotary.sin", sin)
    cache = []
    for i, layer in enumerate(p.model.layers):
        x = decoder_layer(layer, x, cos, sin, mask, past and past[i], cache)
        p.show(f"cache.{i}.k", cache[i][0]), p.show(f"cache.{i}.v", cache[i][1])
    return rms_norm(p.model.norm, x), cache

def logits(p, hidden):                                                          # (…, E) -> (…, vocabulary)
    head = p.llm.lm_head if "lm_head" in p.llm else p.llm.model.embed_tokens    # tied
    return p.show("logits", hidden @ head.weight.T)

def embed(p, ids, z_enc):                                                       # (B, L) -> (B, L, E), z_enc (B, N+n, E) where ids are IMAGE
    x = p.llm.model.embed_tokens.weight[np.maximum(ids, 0)]
    x[ids == IMAGE] = z_enc.reshape(-1, x.shape[-1])
    return p.show("embeds", x)

# ---- MAR: encoder and decoder ----------------------------------------------------------------------------------------

@shown
def mar_attention(p, x):
    q, k, v = (split_heads(part, p.config["mar"]["encoder_num_heads"]) for part in np.split(linear(p.qkv, x), 3, axis=-1))
    return linear(p.proj, join_heads(attention(p, q, k, v)))

@shown
def mlp(p, x):
    return linear(p.fc2, gelu(linear(p.fc1, x)))

@shown
def block(p, x):
    x = x + mar_attention(p.attn, layer_norm(p.norm1, x))
    return x + mlp(p.mlp, layer_norm(p.norm2, x))

def bilinear(new, old):
    """(new, old): what each new position takes of the old ones; it looks at (i + ½) · old / new - ½, not beyond the edges."""
    at = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(old))).astype(np.float32)

def position_embedding(p, name, grid):
    """The table of that name, (1, n + N₀, D) or (1, N₀, D), for grid (h, w): buffers as they are, the image part resized."""
    g, (h, w), table = p.config["mar"]["img_size"] // p.config["mar"]["vae_stride"], grid, p[name]
    buffers, image = table[:, :-g * g], table[:, -g * g:].reshape(g, g, -1)
    image = np.einsum("hi,wj,ijd->hwd", bilinear(h, g), bilinear(w, g), image, optimize=True) if (h, w) != (g, g) else image
    return p.show(name, np.concatenate([buffers, image.reshape(1, h * w, -1)], axis=1))

def places(p, hidden):                                                          # (B, N) -> (B, n + N): what is there, buffers always
    return np.concatenate([np.ones((len(hidden), p.config["mar"]["buffer_size"]), bool), ~hidden], axis=1)

def mar_encode(p, tokens, hidden, grid):
    """tokens (B, N, C), hidden (B, N) bool, as many in each row -> (B, n + V, D), buffers first."""
    B, n, x = len(tokens), p.config["mar"]["buffer_size"], linear(p.z_proj, tokens)
    x = np.concatenate([np.broadcast_to(p.fake_latent, (B, n, x.shape[-1])), x], axis=1)       # (B, n+N, D)
    x = layer_norm(p.z_proj_ln, x + position_embedding(p, "encoder_pos_embed_learned", grid))
    x = x[places(p, hidden)].reshape(B, -1, x.shape[-1])                        # (B, n+V, D): hidden tokens are dropped
    for part in p.encoder_blocks:
        x = block(part, x)
    return layer_norm(p.encoder_norm, x)

def mar_decode(p, x, hidden, grid):                                             # (B, n + V, D) -> conditions z (B, N, D) of all tokens
    x, there = linear(p.decoder_embed, x), places(p, hidden)
    full = np.broadcast_to(p.mask_token, (*there.shape, x.shape[-1])).copy()    # (B, n+N, D)
    full[there] = x.reshape(-1, x.shape[-1])
    x = full + position_embedding(p, "decoder_pos_embed_learned", grid)
    for part in p.decoder_blocks:
        x = block(part, x)
    x = layer_norm(p.decoder_norm, x)[:, p.config["mar"]["buffer_size"]:]       # (B, N, D)
    return x + position_embedding(p, "diffusion_pos_embed_learned", grid)

# ---- diffusion head: a condition -> a token --------------------------------------------------------------------------

def process(steps):
    """What step of the 1000 each of `steps` is, and the process's constants there, each (steps,)."""
    alpha = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
    t = np.array([round(i * (999 / max(1, steps - 1))) for i in range(steps)])
    abar = np.cumprod(1 - np.minimum(1 - alpha[1:] / alpha[:-1], 0.999))[t]     # ᾱ: what is left of the variance of x_0
    before = np.append(1.0, abar[:-1])
    beta = 1 - abar / before
    variance = beta * (1 - before) / (1 - abar)                                 # of q(x_{t-1} | x_t, x_0)
    variance[0] = variance[min(1, steps - 1)]                                   # it is 0 there, and its log is needed
    table = dict(signal=abar ** 0.5, sigma=(1 - abar) ** 0.5, x0_from_xt=abar ** -0.5, x0_from_eps=(1 / abar - 1) ** 0.5,
                 mean_from_x0=beta * before ** 0.5 / (1 - abar), mean_from_xt=(1 - before) * (abar / before) ** 0.5 / (1 - abar),
                 log_beta=np.log(beta), log_variance=np.log(np.maximum(variance, 1e-300)))
    return t, {name: column.astype(np.float32) for name, column in table.items()}

@shown
def time_embed(p, t):                                                           # (M,) -> (M, W)
    exponent = np.arange(128, dtype=np.float32) * np.float32(-math.log(10000) / 128)
    angle = t[:, None].astype(np.float32) * np.exp(exponent, dtype=np.float64).astype(np.float32)      # the last bit counts a thousandfold
    return linear(p.mlp[2], silu(linear(p.mlp[0], np.concatenate([np.cos(angle), np.sin(angle)], axis=1))))

def modulate(x, shift, scale):
    return (1 + scale) * x + shift

@shown
def res_block(p, x, y):                                                         # (M, W), (M, W)
    shift, scale, gate = np.split(linear(p.adaLN_modulation[1], silu(y)), 3, axis=1)
    return x + gate * linear(p.mlp[2], silu(linear(p.mlp[0], modulate(layer_norm(p.in_ln, x), shift, scale))))

@shown
def final_layer(p, x, y):
    shift, scale = np.split(linear(p.adaLN_modulation[1], silu(y)), 2, axis=1)
    return linear(p.linear, modulate(normalize(x), shift, scale))

@shown
def net(p, x, y):                                                               # x (M, C) noisy, y (M, W) time + condition -> ε and v, (M, 2C)
    x = linear(p.input_proj, x)
    for part in p.res_blocks:
        x = res_block(part, x, y)
    return final_layer(p.final_layer, x, y)

def guide(eps, cfg):                                                            # (2M, C) -> (M, C)
    conditional, unconditional = np.split(eps, 2)
    return unconditional + cfg * (conditional - unconditional)

def mix(v, log_beta, log_variance):                                             # the learned log variance
    f = (v + 1) / 2                                                             # v = 1: log β; v = -1: the posterior's
    return f * log_beta + (1 - f) * log_variance

def draw(p, z, noise, cfg=1.0, temperature=1.0):
    """z (M, D), or [conditional; unconditional] (2M, D); noise (steps, M, C): the start, then one for each step but the last -> tokens (M, C)."""
    (timesteps, table), clip, show = process(len(noise)), p.config["mar"].get("x0_clip") or math.inf, p.trace.show
    time, condition = time_embed(p.net.time_embed, timesteps), linear(p.net.cond_embed, z)
    x, M = noise[0], noise.shape[1]
    for i, fresh in zip(reversed(range(len(noise))), [*noise[1:], 0]):
        now = {name: float(column[i]) for name, column in table.items()}
        with p.trace.at(f"t{timesteps[i]}"):
            out = net(p.net, np.tile(show("x", x), (len(z) // M, 1)), time[i] + condition)
            eps, v = np.split(out, 2, axis=1)
            show("eps", eps), show("v", v)
            eps = show("eps_guided", guide(eps, cfg) if len(z) > M else eps)    # v is the conditional rows'
            x0 = np.clip(now["x0_from_xt"] * x - now["x0_from_eps"] * eps, -clip, clip)
            x = show("mean", now["mean_from_x0"] * x0 + now["mean_from_xt"] * x)
            x = x + np.exp(0.5 * show("logvar", mix(v[:M], now["log_beta"], now["log_variance"]))) * fresh * temperature
    return p.trace.show("drawn", x)

# ---- Harmon ----------------------------------------------------------------------------------------------------------

def buffers_last(p, x):                                                         # the LLM, being causal, then sees the image first
    n = p.config["mar"]["buffer_size"]
    return np.concatenate([x[:, n:], x[:, :n]], axis=1)

def buffers_first(p, x):
    n = p.config["mar"]["buffer_size"]
    return np.concatenate([x[:, -n:], x[:, :-n]], axis=1)

def project(p, x):
    return linear(p[2], silu(linear(p[0], x)))

def visual_features(p, latents, hidden=None):
    """latents (B, h, w, C), hidden (B, N) or None for nothing hidden -> x_enc (B, n + V, D) and z_enc (B, V + n, E)."""
    B, h, w, C = latents.shape
    hidden = p.show("hidden", np.zeros((B, h * w), bool) if hidden is None else hidden)
    x_enc = p.show("x_enc", mar_encode(p.mar, latents.reshape(B, h * w, C), hidden, (h, w)))
    return x_enc, p.show("z_enc", buffers_last(p, project(p.proj_in, x_enc)))

def back_to_mar(p, x_enc, z_llm):                                               # (B, n+V, D), (B, V+n, E) -> (B, n+V, D)
    return p.show("back_to_mar", x_enc + buffers_first(p, project(p.proj_out, z_llm)))

def masking_schedule(N, steps):                                                 # how many stay masked after each step: a cosine from N to 0
    masked = [N]
    for k in range(1, steps):
        masked.append(max(1, min(masked[-1] - 1, math.floor(N * math.cos(math.pi / 2 * k / steps)))))
    return masked + [0]

def generate(p, ids, real, orders, noise, *, grid, steps, cfg=3.0, temperature=1.0):
    """B images, (B, 3, H, W), of 2B prompts [conditional; unconditional], or of B without guidance: ids, real (2B, L), padded on the right.

    orders (B, N): the first m are masked when m are. noise(k, M): step k's noise (diffusion steps, M, C). grid (h, w).
    """
    (h, w), (B, N), C = grid, orders.shape, p.config["mar"]["vae_embed_dim"]
    halves = (len(ids) // B, 1, 1)
    with p.trace.at("prompt"):
        _, cache = llm(p.llm, p.llm.model.embed_tokens.weight[ids], real)
    tokens, masked = np.zeros((B, N, C), np.float32), p.show("masked", masking_schedule(N, steps))
    for k, (m, m_next) in enumerate(zip(masked, masked[1:]), start=1):
        if m_next == m:
            continue
        with p.trace.at(f"step{k}"):
            hidden, new = np.zeros((B, N), bool), np.zeros((B, N), bool)
            np.put_along_axis(hidden, orders[:, :m], True, axis=1)
            np.put_along_axis(new, orders[:, m_next:m], True, axis=1)
            x_enc, z_enc = (np.tile(x, halves) for x in visual_features(p, tokens.reshape(B, h, w, C), hidden))     # the same for both halves
            seen = np.concatenate([real, np.ones((len(ids), z_enc.shape[1]), bool)], axis=1)
            z_llm, _ = llm(p.llm, z_enc, seen, cache)                           # the cache stays as the prompt left it
            z = p.show("z", mar_decode(p.mar, back_to_mar(p, x_enc, z_llm), np.tile(hidden, halves[:2]), grid))     # (2B, N, D)
            z = z[np.tile(new, halves[:2])]                                     # (2M, D), image by image, in raster order
            tokens[new] = draw(p.mar.diffloss, z, noise(k, int(new.sum())), cfg, temperature)
            p.show("tokens", tokens.reshape(B, h, w, C))
    return decode(p, tokens.reshape(B, h, w, C))

def answer(p, ids, pixels, *, end, most):
    """Greedy decoding: ids (1, L) with IMAGE at the image's places, pixels (1, 3, H, W) -> a list of at most `most` ids, without `end`."""
    _, z_enc = visual_features(p, encode(p, pixels))
    x, cache, said = embed(p, ids, z_enc), None, []
    while len(said) < most:
        with p.trace.at(f"token{len(said)}"):
            hidden, cache = llm(p.llm, x, np.ones((1, ids.shape[1] + len(said)), bool), cache)
            token = int(logits(p, hidden[:, -1]).argmax())
        if token == end:
            break
        said.append(token)
        x = p.llm.model.embed_tokens.weight[[[token]]]                          # (1, 1, E)
    return said

# ---- text and images, in and out -------------------------------------------------------------------------------------

def pad(tokenizer, texts):                                                      # -> ids and real, each (B, L), padded on the right
    rows = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    lengths = np.array([len(row) for row in rows])[:, None]
    return np.array([row + [tokenizer.token_to_id(PAD)] * (lengths.max() - len(row)) for row in rows]), np.arange(lengths.max()) < lengths

def draw_image(p, tokenizer, prompt, *, seed=0, steps=None, cfg=3.0):
    """A PIL image of the native size."""
    rng, g = np.random.default_rng(seed), p.config["mar"]["img_size"] // p.config["mar"]["vae_stride"]
    ids, real = pad(tokenizer, [f"{USER}{text}{END}\n{ASSISTANT}" for text in (f"Generate an image: {prompt}", "Generate an image.")])
    size = (int(p.config["mar"]["num_sampling_steps"]), p.config["mar"]["vae_embed_dim"])
    x = generate(p, ids, real, rng.permutation(g * g)[None], lambda k, M: rng.standard_normal((size[0], M, size[1]), np.float32),
                 grid=(g, g), steps=steps or min(64, -(-g * g // 4)), cfg=cfg)
    return Image.fromarray(np.clip(127.5 * x[0].transpose(1, 2, 0) + 128, 0, 255).astype(np.uint8))

def ask(p, tokenizer, image, question, most=1024):
    side, c = max(image.size), p.config["mar"]
    square = Image.new("RGB", (side, side), (127, 127, 127))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    pixels = np.asarray(square.resize((c["img_size"],) * 2, Image.BICUBIC), np.float32).transpose(2, 0, 1)[None] / 127.5 - 1
    before, after = (pad(tokenizer, [text])[0] for text in (USER, f"\n{question}{END}\n{ASSISTANT}"))
    places = np.full((1, (c["img_size"] // c["vae_stride"]) ** 2 + c["buffer_size"]), IMAGE)
    ids = np.concatenate([before, places, after], axis=1)
    return tokenizer.decode(answer(p, ids, pixels, end=tokenizer.token_to_id(END), most=most))

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", help="what to draw")
    parser.add_argument("--model", default="harmon-tiny", help="the bundled model, or a folder that convert.py wrote (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out.png"), help="the image's file (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="generation steps (default: 64, or a quarter of the image tokens if that is fewer)")
    parser.add_argument("--cfg", type=float, default=3.0, help="guidance (default: %(default)s)")
    parser.add_argument("--image", type=Path, help="the image that --ask is about")
    parser.add_argument("--ask", metavar="QUESTION")
    args = parser.parse_args(argv)
    try:
        folder = BUNDLED / args.model if (BUNDLED / args.model).is_dir() else Path(args.model)
        if (args.ask is None) != (args.image is None) or (args.ask is None) == (args.prompt is None):
            raise ValueError("give a prompt to draw, or --image with --ask")
        p, tokenizer = load(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
        if args.ask is not None:
            return print(ask(p, tokenizer, Image.open(args.image).convert("RGB"), args.ask))
        draw_image(p, tokenizer, args.prompt, seed=args.seed, steps=args.steps, cfg=args.cfg).save(args.out)
        print(args.out)
    except (ValueError, OSError) as error:
        print(f"numpy_harmon.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
