"""Harmon in NumPy alone: the whole model and its losses, top to bottom, with nothing hidden in a library.

    python porting/numpy_harmon.py "three blue stars" --out x.png --seed 0          # text to image
    python porting/numpy_harmon.py --class 3 --out x.png                            # by class, MAR alone
    python porting/numpy_harmon.py --image x.png --ask "What color is the star?"    # image to text

    pixels --VAE--> latents --MAR encoder--> x_enc --proj_in--> z_enc --LLM, after the prompt--> z_llm
      --proj_out, + x_enc--> --MAR decoder--> z --diffusion head--> latents of masked tokens --VAE--> pixels

Letters: B batch, s the VAE's stride, h×w token grid, N = h·w image tokens, n buffer tokens, V visible tokens,
C latent channels, D MAR width, H LLM width, L tokens of this call, S = cached + L, d width of an attention
head, M rows and W width of the diffusion head. A mask is bool (B, N), True = hidden. Numbers are float32.
A function that mirrors a module gets the module's parameters p and shows its tensors under the module's name.
"""
import argparse
import math
import sys

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from parameters import layer, load, shown
from PIL import Image, ImageOps
from tokenizers import Tokenizer

NORM_EPS = 1e-6                  # of LayerNorm and GroupNorm; the eps of RMSNorm is in the configuration
IMAGE_TOKEN_ID = -200            # in input_ids: a position that an image embedding fills
IGNORE_INDEX = -100              # in labels: no loss here
START, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"

# ---- layers ------------------------------------------------------------------------------------------------

@layer
def linear(p, x):
    y = x @ p.weight.T                                                  # the weight is out × in
    return y + p.bias if "bias" in p else y

def normalize(x):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + NORM_EPS)

@layer
def layer_norm(p, x):
    return normalize(x) * p.weight + p.bias

@layer
def rms_norm(p, x):
    mean_square = (x * x).mean(-1, keepdims=True)
    return p.weight * (x / np.sqrt(mean_square + p.config["llm"]["rms_norm_eps"]))

@layer
def group_norm(p, x):                                                   # (B, c, h, w), 32 groups
    y = normalize(x.reshape(len(x), 32, -1)).reshape(x.shape)
    return y * p.weight[:, None, None] + p.bias[:, None, None]

@layer
def conv(p, x, stride=1):                                               # (B, c_in, h, w)
    c_out, _, k, _ = p.weight.shape
    side = k // 2 if stride == 1 else 0                                 # with stride 2 the caller pads
    x = np.pad(x, ((0, 0), (0, 0), (side, side), (side, side)))
    patches = sliding_window_view(x, (k, k), axis=(2, 3))[:, :, ::stride, ::stride]
    patches = patches.transpose(0, 2, 3, 1, 4, 5)                       # (B, h, w, c_in, k, k)
    patches = patches.reshape(*patches.shape[:3], -1)                   # (B, h, w, c_in·k·k)
    y = patches @ p.weight.reshape(c_out, -1).T + p.bias
    return y.transpose(0, 3, 1, 2)                                      # (B, c_out, h, w)

def silu(x):
    return 0.5 * x * (1 + np.tanh(0.5 * x))                             # x · sigmoid(x), without overflow

erf = np.vectorize(math.erf, otypes=[np.float32])

def gelu(x):
    return 0.5 * x * (1 + erf(x / math.sqrt(2)))                        # exact, not the tanh approximation

def mlp(p, x):
    return linear(p[2], silu(linear(p[0], x)))

def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)

def split_heads(x, heads):                                              # (B, L, heads·d) -> (B, heads, L, d)
    return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)

def attention(p, q, k, v, mask=True):
    """q (B, heads, L, d), k and v (B, kv_heads, S, d), mask (B, 1, L, S), True = seen -> (B, L, heads·d)."""
    B, heads, L, d = p.show("q", q).shape
    groups = heads // p.show("k", k).shape[1]                           # 1 but for the LLM
    k = k.repeat(groups, axis=1)                                        # serves consecutive query heads
    v = p.show("v", v).repeat(groups, axis=1)
    scores = q @ k.swapaxes(2, 3) / math.sqrt(d)                        # (B, heads, L, S)
    weights = p.show("weights", softmax(np.where(mask, scores, np.float32(-np.inf))))
    return (weights @ v).swapaxes(1, 2).reshape(B, L, -1)

# ---- VAE: pixels <-> latents -------------------------------------------------------------------------------

@layer
def resnet_block(p, x):
    y = conv(p.conv1, silu(group_norm(p.norm1, x)))
    y = conv(p.conv2, silu(group_norm(p.norm2, y)))
    return (conv(p.nin_shortcut, x) if "nin_shortcut" in p else x) + y

@layer
def attn_block(p, x):                                                   # one head over all positions
    B, c, h, w = x.shape
    y = group_norm(p.norm, x)
    q, k, v = (conv(part, y).reshape(B, 1, c, h * w).swapaxes(2, 3) for part in (p.q, p.k, p.v))
    y = attention(p, q, k, v)                                           # (B, h·w, c)
    return x + conv(p.proj_out, y.swapaxes(1, 2).reshape(B, c, h, w))

def middle(p, x):
    return resnet_block(p.block_2, attn_block(p.attn_1, resnet_block(p.block_1, x)))

@shown("latents")
def encode(p, x):                                                       # (B, 3, s·h, s·w) -> (B, h, w, C)
    encoder = p.vae.encoder
    x = conv(encoder.conv_in, x)
    for level in encoder.down:
        for i, block in enumerate(level.block):
            x = resnet_block(block, x)
            if "attn" in level:                                         # in the last level only
                x = attn_block(level.attn[i], x)
        if "downsample" in level:                                       # after all but the last
            x = np.pad(x, ((0, 0), (0, 0), (0, 1), (0, 1)))             # at the bottom and right only
            x = conv(level.downsample.conv, x, stride=2)
    x = conv(encoder.conv_out, silu(group_norm(encoder.norm_out, middle(encoder.mid, x))))
    mean, logvar = np.split(conv(p.vae.quant_conv, x), 2, axis=1)       # (B, C, h, w), (B, C, h, w)
    return mean.transpose(0, 2, 3, 1) * p.config["vae_scale"]           # of about unit variance

@shown("decoded")
def decode(p, latents):                                                 # (B, h, w, C) -> (B, 3, s·h, s·w)
    decoder = p.vae.decoder
    z = (latents / p.config["vae_scale"]).transpose(0, 3, 1, 2)
    x = middle(decoder.mid, conv(decoder.conv_in, conv(p.vae.post_quant_conv, z)))
    for level in reversed(list(decoder.up)):                            # stored shallowest first
        for block in level.block:
            x = resnet_block(block, x)
        if "upsample" in level:
            x = conv(level.upsample.conv, x.repeat(2, axis=2).repeat(2, axis=3))
    return conv(decoder.conv_out, silu(group_norm(decoder.norm_out, x)))

# ---- LLM: Qwen2.5 ------------------------------------------------------------------------------------------

def rotary_embedding(positions, d, theta):                              # (B, L) -> cos, sin (B, 1, L, d)
    inv_freq = theta ** -(np.arange(0, d, 2, dtype=np.float32) / d)
    angles = positions[:, None, :, None].astype(np.float32) * inv_freq  # (B, 1, L, d/2)
    angles = np.concatenate([angles, angles], axis=-1)
    return np.cos(angles), np.sin(angles)

def rotate_half(x):
    a, b = np.split(x, 2, axis=-1)                                      # channel i is paired with i + d/2
    return np.concatenate([-b, a], axis=-1)

def apply_rotary_emb(x, cos, sin):
    return x * cos + rotate_half(x) * sin

@layer
def self_attention(p, x, cos, sin, mask, cache):
    config = p.config["llm"]
    q = split_heads(linear(p.q_proj, x), config["num_attention_heads"])     # (B, heads, L, d)
    k = split_heads(linear(p.k_proj, x), config["num_key_value_heads"])     # (B, kv_heads, L, d)
    v = split_heads(linear(p.v_proj, x), config["num_key_value_heads"])
    q = apply_rotary_emb(q, cos, sin)
    k = apply_rotary_emb(k, cos, sin)
    if p.name in cache:
        k = np.concatenate([cache[p.name][0], k], axis=2)               # (B, kv_heads, S, d)
        v = np.concatenate([cache[p.name][1], v], axis=2)
    cache[p.name] = k, v
    return linear(p.o_proj, attention(p, q, k, v, mask))

@layer
def decoder_layer(p, x, *context):
    x = x + self_attention(p.self_attn, rms_norm(p.input_layernorm, x), *context)
    y = rms_norm(p.post_attention_layernorm, x)
    y = silu(linear(p.mlp.gate_proj, y)) * linear(p.mlp.up_proj, y)     # SwiGLU
    return x + linear(p.mlp.down_proj, y)

@layer
def llm(p, x, attention_mask, cache):
    """x (B, L, H), attention_mask (B, S), True = real -> hidden states (B, L, H).

    cache: {layer: (k, v)} of the S - L tokens before; this call's are appended.
    """
    config = p.config["llm"]
    L, S = x.shape[1], attention_mask.shape[1]

    # Padding does not count in positions.
    positions = np.cumsum(p.show("attention_mask", attention_mask), axis=1) - 1
    positions = p.show("positions", np.maximum(positions, 0)[:, S - L:])            # (B, L)
    d = config["hidden_size"] // config["num_attention_heads"]
    cos, sin = rotary_embedding(positions, d, config["rope_theta"])
    p.show("rotary.cos", cos)
    p.show("rotary.sin", sin)

    # Every position attends to itself, so softmax is defined on padding rows too.
    query, key = np.arange(S - L, S)[:, None], np.arange(S)
    mask = (key <= query) & attention_mask[:, None] | (key == query)    # (B, L, S)
    for block in p.model.layers:
        x = decoder_layer(block, x, cos, sin, mask[:, None], cache)
    return rms_norm(p.model.norm, x)

@shown("logits")
def logits(p, hidden_states):                                           # (…, H) -> (…, vocabulary)
    head = p.llm.lm_head if "lm_head" in p.llm else p.llm.model.embed_tokens    # tied
    return hidden_states @ head.weight.T

@shown("embeds")
def embed(p, input_ids, z_enc=None):                                    # (B, L), (B, N+n, H) -> (B, L, H)
    x = p.llm.model.embed_tokens.weight[np.maximum(input_ids, 0)]
    if z_enc is not None:
        x[input_ids == IMAGE_TOKEN_ID] = z_enc.reshape(-1, x.shape[-1])
    return x

# ---- MAR: encoder and decoder ------------------------------------------------------------------------------

@layer
def mar_attention(p, x):
    heads = p.config["mar"]["encoder_num_heads"]
    q, k, v = (split_heads(part, heads) for part in np.split(linear(p.qkv, x), 3, axis=-1))
    return linear(p.proj, attention(p, q, k, v))

@layer
def mar_block(p, x):
    x = x + mar_attention(p.attn, layer_norm(p.norm1, x))
    return x + linear(p.mlp.fc2, gelu(linear(p.mlp.fc1, layer_norm(p.norm2, x))))

def bilinear(new, old):
    """(new, old): the weights of the old positions in each new one; corners are not aligned, edges repeat."""
    position = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    return np.maximum(0, 1 - np.abs(position[:, None] - np.arange(old))).astype(np.float32)

@shown()
def position_embedding(p, name, grid):
    """A table of the native grid, (1, n+N₀, D) or (1, N₀, D) -> of grid (h, w), its image part resized."""
    g = p.config["mar"]["img_size"] // p.config["mar"]["vae_stride"]
    h, w = grid
    if h == w == g:
        return p.show(name, p[name])
    buffers, image = p[name][:, :-g * g], p[name][:, -g * g:].reshape(g, g, -1)
    image = np.einsum("hi,wj,ijd->hwd", bilinear(h, g), bilinear(w, g), image, optimize=True)
    return p.show(name, np.concatenate([buffers, image.reshape(1, h * w, -1)], axis=1))

def kept(p, mask):                                                      # (B, N) -> (B, n+N), True = kept
    return np.pad(~mask, ((0, 0), (p.config["mar"]["buffer_size"], 0)), constant_values=True)

@shown("x_enc")
def mar_encode(p, tokens, mask, grid, labels=None):
    """tokens (B, N, C), mask (B, N) with equally many hidden in each row -> (B, n+V, D), buffers first.

    labels (B,): the classes that the buffers hold, -1 = none; None in Harmon.
    """
    B, D = len(tokens), p.fake_latent.shape[1]
    buffers = np.tile(p.fake_latent, (B, p.config["mar"]["buffer_size"], 1))
    if labels is not None:
        buffers[labels >= 0] = p.class_emb.weight[labels[labels >= 0], None]
    x = np.concatenate([buffers, linear(p.z_proj, tokens)], axis=1)     # (B, n+N, D)
    x = layer_norm(p.z_proj_ln, x + position_embedding(p, "encoder_pos_embed_learned", grid))
    x = x[kept(p, mask)].reshape(B, -1, D)                              # (B, n+V, D): hidden ones are dropped
    for block in p.encoder_blocks:
        x = mar_block(block, x)
    return layer_norm(p.encoder_norm, x)

@shown("z")
def mar_decode(p, x, mask, grid):
    """x (B, n+V, D), buffers first -> z (B, N, D), the conditions of the diffusion head for all tokens."""
    x = linear(p.decoder_embed, x)
    keep = kept(p, mask)                                                # (B, n+N)
    full = np.tile(p.mask_token, (*keep.shape, 1))                      # (B, n+N, D)
    full[keep] = x.reshape(-1, x.shape[-1])
    x = full + position_embedding(p, "decoder_pos_embed_learned", grid)
    for block in p.decoder_blocks:
        x = mar_block(block, x)
    x = layer_norm(p.decoder_norm, x)[:, p.config["mar"]["buffer_size"]:]   # (B, N, D)
    return x + position_embedding(p, "diffusion_pos_embed_learned", grid)

# ---- diffusion head: a condition -> a token ----------------------------------------------------------------

@layer
def time_embed(p, t):                                                   # (M,) -> (M, W)
    # At t = 999 the last bit of a frequency turns the angle by 6e-5, so the exponential is rounded only once.
    exponents = np.arange(128, dtype=np.float32) * np.float32(-math.log(10000) / 128)
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = t[:, None].astype(np.float32) * frequencies                # (M, 128)
    return mlp(p.mlp, np.concatenate([np.cos(angles), np.sin(angles)], axis=1))

@layer
def res_block(p, x, y):                                                 # (M, W), (M, W)
    shift, scale, gate = np.split(linear(p.adaLN_modulation[1], silu(y)), 3, axis=1)
    return x + gate * mlp(p.mlp, layer_norm(p.in_ln, x) * (1 + scale) + shift)

@layer
def final_layer(p, x, y):                                               # its LayerNorm has no weights
    shift, scale = np.split(linear(p.adaLN_modulation[1], silu(y)), 2, axis=1)
    return linear(p.linear, normalize(x) * (1 + scale) + shift)

@layer
def net(p, x, y):                                                       # noisy tokens, time + condition
    x = linear(p.input_proj, x)
    for block in p.res_blocks:
        x = res_block(block, x, y)
    return final_layer(p.final_layer, x, y)                             # (M, 2C): ε, then v

class GaussianDiffusion:
    """A process with some of the 1000 steps, evenly spaced. In methods t is one of them, or one a row."""

    def __init__(self, num_steps=1000):
        alpha_bar = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
        stride = 999 / max(1, num_steps - 1)
        self.timesteps = np.array([round(i * stride) for i in range(num_steps)])
        # From here on the constants are those of the steps in the process, columns (num_steps, 1).
        alphas_cumprod = np.cumprod(1 - betas)[self.timesteps, None]
        alphas_cumprod_prev = np.insert(alphas_cumprod[:-1], 0, 1.0, axis=0)
        betas = 1 - alphas_cumprod / alphas_cumprod_prev
        posterior_variance = betas * (1 - alphas_cumprod_prev) / (1 - alphas_cumprod)
        # β̃ is 0 at the first step; use the second step's value so that its log is finite.
        posterior_variance[0] = posterior_variance[min(1, num_steps - 1)]
        coef2 = (1 - alphas_cumprod_prev) * np.sqrt(1 - betas) / (1 - alphas_cumprod)
        self.sqrt_alphas_cumprod = np.float32(np.sqrt(alphas_cumprod))
        self.sqrt_one_minus_alphas_cumprod = np.float32(np.sqrt(1 - alphas_cumprod))
        self.sqrt_recip_alphas_cumprod = np.float32(np.sqrt(1 / alphas_cumprod))
        self.sqrt_recipm1_alphas_cumprod = np.float32(np.sqrt(1 / alphas_cumprod - 1))
        self.posterior_mean_coef1 = np.float32(betas * np.sqrt(alphas_cumprod_prev) / (1 - alphas_cumprod))
        self.posterior_mean_coef2 = np.float32(coef2)
        self.log_betas = np.float32(np.log(betas))
        self.posterior_log_variance = np.float32(np.log(np.maximum(posterior_variance, 1e-300)))

    def predict_x0(self, x_t, t, eps):
        return self.sqrt_recip_alphas_cumprod[t] * x_t - self.sqrt_recipm1_alphas_cumprod[t] * eps

    def q_posterior_mean(self, x0, x_t, t):
        return self.posterior_mean_coef1[t] * x0 + self.posterior_mean_coef2[t] * x_t

    def log_variance(self, v, t):                                       # -1: the posterior's; 1: log β
        fraction = (v + 1) / 2
        return fraction * self.log_betas[t] + (1 - fraction) * self.posterior_log_variance[t]

@shown("drawn")
def sample_tokens(p, z, noise, cfg, temperature):
    """z (2M, D) = [conditional; unconditional] -> tokens (M, C).

    noise (M, num_sampling_steps, C): the start, then one draw for each step but the last.
    """
    M, num_steps, _ = noise.shape
    diffusion = GaussianDiffusion(num_steps)
    x0_clip = p.config["mar"].get("x0_clip") or math.inf
    time = time_embed(p.net.time_embed, diffusion.timesteps)            # (num_steps, W)
    condition = linear(p.net.cond_embed, z)                             # (2M, W)
    x = noise[:, 0]
    for i in reversed(range(num_steps)):
        step = p.at(f"t{diffusion.timesteps[i]}")
        out = net(step.net, np.tile(step.show("x", x), (2, 1)), time[i] + condition)
        eps, v = np.split(out, 2, axis=1)                               # (2M, C), (2M, C)
        cond_eps, uncond_eps = np.split(eps, 2)
        eps = step.show("eps_guided", uncond_eps + cfg * (cond_eps - uncond_eps))
        x0 = np.clip(diffusion.predict_x0(x, i, eps), -x0_clip, x0_clip)
        x = step.show("mean", diffusion.q_posterior_mean(x0, x, i))
        if i > 0:                                                       # no noise at the last step
            logvar = step.show("logvar", diffusion.log_variance(v[:M], i))  # v of the conditional rows
            x = x + np.exp(0.5 * logvar) * noise[:, num_steps - i] * temperature
    return x

# ---- Harmon: see, think, draw ------------------------------------------------------------------------------

@shown()
def see(p, tokens, mask, grid):
    """tokens (B, N, C), mask (B, N) -> x_enc (B, n+V, D), buffers first; z_enc (B, V+n, H), buffers last."""
    n = p.config["mar"]["buffer_size"]
    x_enc = mar_encode(p.mar, tokens, p.show("mask", mask), grid)
    z_enc = mlp(p.proj_in, x_enc)
    return x_enc, p.show("z_enc", np.concatenate([z_enc[:, n:], z_enc[:, :n]], axis=1))

def think(p, z_enc, attention_mask, cache):
    """z_enc (B, V+n, H) through the LLM, after the prompt in `cache` with its attention_mask -> z_llm."""
    attention_mask = np.concatenate([attention_mask, np.ones(z_enc.shape[:2], bool)], axis=1)
    return llm(p.llm, z_enc, attention_mask, dict(cache))               # a copy: the prompt's cache stays

@shown("x_dec")
def add_residual(p, x_enc, z_llm):                                      # (B, n+V, D), (B, V+n, H)
    n = p.config["mar"]["buffer_size"]
    residual = mlp(p.proj_out, z_llm)                                   # (B, V+n, D)
    return x_enc + np.concatenate([residual[:, -n:], residual[:, :-n]], axis=1)

def draw(p, x_enc, z_llm, mask, grid):                                  # -> z (B, N, D)
    return mar_decode(p.mar, add_residual(p, x_enc, z_llm), mask, grid)

def mask_schedule(num_tokens, num_iter):
    """How many tokens are masked before the first step and after each: a cosine from num_tokens to 0."""
    masked = [num_tokens]
    for k in range(1, num_iter):
        cosine = math.floor(num_tokens * math.cos(math.pi / 2 * k / num_iter))
        masked.append(max(1, min(masked[-1] - 1, cosine)))
    return masked + [0]

@shown()
def sample(p, input_ids, attention_mask, orders, noise, grid, num_iter, cfg, temperature):
    """Prompts [conditional; unconditional], input_ids and attention_mask (2B, L) -> pixels (B, 3, s·h, s·w).

    orders (B, N): row b's first m entries are the tokens that are masked when m are.
    noise (B, N, num_sampling_steps, C): the diffusion noise of each token.
    """
    B, N, _, C = noise.shape
    rank = orders.argsort(axis=1)                                       # (B, N): a token's place in the order
    tokens = np.zeros((B, N, C), np.float32)
    masked = p.show("masked", np.array(mask_schedule(N, num_iter)))

    # The prompt goes through the LLM once.
    prompt = p.at("prompt")
    cache = {}
    llm(prompt.llm, embed(prompt, input_ids), attention_mask, cache)

    for k in range(1, num_iter + 1):
        mask = rank < masked[k - 1]
        new = mask & (rank >= masked[k])                                # the tokens of this step
        if not new.any():
            continue
        # Both halves of guidance see the same tokens; only their prompts differ.
        step = p.at(f"step{k}")
        x_enc, z_enc = (np.tile(x, (2, 1, 1)) for x in see(step, tokens, mask, grid))
        z_llm = think(step, z_enc, attention_mask, cache)
        z = draw(step, x_enc, z_llm, np.tile(mask, (2, 1)), grid)       # (2B, N, D)

        # Draw the new tokens of all images, in raster order.
        step.show("new_tokens", np.nonzero(new)[1].reshape(B, -1))
        tokens = tokens.copy()
        z = z[np.tile(new, (2, 1))]                                     # (2M, D)
        tokens[new] = sample_tokens(step.mar.diffloss, z, noise[new], cfg, temperature)
        step.show("tokens", tokens)
    return decode(p, tokens.reshape(B, *grid, C))

@shown()
def sample_classes(p, labels, orders, noise, grid, num_iter, cfg, temperature):
    """MAR alone: labels (B,), -1 = no class -> pixels (B, 3, s·h, s·w). orders, noise: as in `sample`.

    Guidance is linear: it grows from 1 as tokens become visible.
    """
    B, N, _, C = noise.shape
    rank = orders.argsort(axis=1)
    tokens = np.zeros((B, N, C), np.float32)
    masked = p.show("masked", np.array(mask_schedule(N, num_iter)))
    classes = np.concatenate([labels, np.full_like(labels, -1)])        # (2B,)
    for k in range(1, num_iter + 1):
        hidden, after = (rank < count for count in masked[k - 1:k + 1])     # (B, N), (B, N)
        new = hidden & ~after
        if not new.any():
            continue
        # The halves differ in what their buffers hold, so both are encoded.
        step = p.at(f"step{k}")
        rows = np.tile(step.show("mask", hidden), (2, 1))
        x_enc = mar_encode(step.mar, np.tile(tokens, (2, 1, 1)), rows, grid, classes)   # (2B, n+V, D)
        z = mar_decode(step.mar, x_enc, rows, grid)                     # (2B, N, D)
        # The mask after the step weighs, and the last step counts one masked token.
        weight = step.show("weight", np.float32(1 + (cfg - 1) * (N - max(1, masked[k])) / N))
        step.show("new_tokens", np.nonzero(new)[1].reshape(B, -1))
        tokens = tokens.copy()
        z = z[np.tile(new, (2, 1))]                                     # (2M, D)
        tokens[new] = sample_tokens(step.mar.diffloss, z, noise[new], weight, temperature)
        step.show("tokens", tokens)
    return decode(p, tokens.reshape(B, *grid, C))

def look(p, latents):                                                   # (B, h, w, C) -> z_enc (B, N+n, H)
    B, h, w, C = latents.shape
    _, z_enc = see(p, latents.reshape(B, h * w, C), np.zeros((B, h * w), bool), (h, w))
    return z_enc

@shown("answer")
def answer(p, input_ids, pixels, end, max_new_tokens):
    """Greedy decoding: input_ids (1, L), pixels (1, 3, s·h, s·w) -> ids of the answer, without `end`."""
    x = embed(p, input_ids, look(p, encode(p, pixels)))
    attention_mask = np.ones(input_ids.shape, bool)
    cache = {}
    tokens = []
    while len(tokens) < max_new_tokens:
        step = p.at(f"token{len(tokens)}")
        hidden_states = llm(step.llm, x, attention_mask, cache)
        token = int(logits(step, hidden_states[:, -1]).argmax())
        if token == end:
            break
        tokens.append(token)
        x = p.llm.model.embed_tokens.weight[[[token]]]                  # (1, 1, H)
        attention_mask = np.pad(attention_mask, ((0, 0), (0, 1)), constant_values=True)
    return np.array(tokens, np.int64)

# ---- losses ------------------------------------------------------------------------------------------------

def gaussian_kl(mean1, logvar1, mean2, logvar2):                        # in nats
    return 0.5 * (logvar2 - logvar1 - 1 + np.exp(logvar1 - logvar2) + (mean1 - mean2) ** 2 * np.exp(-logvar2))

def normal_cdf(u):                                                      # the tanh approximation
    return 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u ** 3)))

def discretized_nll(x, mean, logvar):
    """-log probability of the bin x ± 1/255 under a Gaussian, in nats; the outermost bins are open."""
    upper = normal_cdf(np.exp(-0.5 * logvar) * (x - mean + 1 / 255))
    lower = normal_cdf(np.exp(-0.5 * logvar) * (x - mean - 1 / 255))
    probability = np.where(x > 0.999, 1 - lower, upper - lower)
    return -np.log(np.maximum(np.where(x < -0.999, upper, probability), 1e-12))

@shown()
def head_loss(p, z, x0, t, noise):                                      # (M, D), (M, C), (M,), (M, C)
    """The ε error plus the variational bound, which trains v only, in bits per channel; a mean over rows."""
    diffusion = GaussianDiffusion()
    x_t = diffusion.sqrt_alphas_cumprod[t] * x0 + diffusion.sqrt_one_minus_alphas_cumprod[t] * noise
    y = time_embed(p.net.time_embed, t) + linear(p.net.cond_embed, z)
    eps, v = np.split(net(p.net, x_t, y), 2, axis=1)
    mean = diffusion.q_posterior_mean(diffusion.predict_x0(x_t, t, eps), x_t, t)
    logvar = p.show("logvar", diffusion.log_variance(v, t))
    true_mean = diffusion.q_posterior_mean(x0, x_t, t)
    kl = p.show("kl", gaussian_kl(true_mean, diffusion.posterior_log_variance[t], mean, logvar))
    bound = np.where(t[:, None] == 0, discretized_nll(x0, mean, logvar), kl) / math.log(2)
    return ((noise - eps) ** 2 + bound).mean()

@shown("loss")
def text2image_loss(p, input_ids, attention_mask, latents, mask, t, noise):
    """latents (B, h, w, C), mask (B, N), t (R,), noise (R, C): rows are all B·N tokens, several times."""
    B, h, w, C = latents.shape
    x_enc, z_enc = see(p, latents.reshape(B, h * w, C), mask, (h, w))
    x = np.concatenate([embed(p, input_ids), z_enc], axis=1)            # (B, L+V+n, H)
    attention_mask = np.concatenate([attention_mask, np.ones(z_enc.shape[:2], bool)], axis=1)
    z_llm = llm(p.llm, x, attention_mask, {})[:, input_ids.shape[1]:]
    z = draw(p, x_enc, z_llm, mask, (h, w))
    repeats = len(t) // mask.size
    rows = np.tile(mask.flatten(), repeats)                             # the masked tokens count
    z, x0 = (np.tile(x.reshape(mask.size, -1), (repeats, 1))[rows] for x in (z, latents))
    return head_loss(p.mar.diffloss, z, x0, t[rows], noise[rows])

@shown("loss")
def image2text_loss(p, input_ids, attention_mask, latents, labels):
    hidden_states = llm(p.llm, embed(p, input_ids, look(p, latents)), attention_mask, {})
    targets = labels[:, 1:]                                             # position i predicts label i + 1
    labelled = targets != IGNORE_INDEX
    scores = logits(p, hidden_states[:, :-1][labelled])
    return -np.log(softmax(scores)[np.arange(len(scores)), targets[labelled]]).mean()

# ---- text and images, in and out ---------------------------------------------------------------------------

def text_ids(tokenizer, text):
    tokenizer.encode_special_tokens = True                              # those in a question are text
    return tokenizer.encode(text, add_special_tokens=False).ids

def prompt_ids(tokenizer, question, num_image_tokens=0):
    start, end = tokenizer.token_to_id(START), tokenizer.token_to_id(END)
    user = text_ids(tokenizer, f"user\n{question}")
    if num_image_tokens:                                                # apart before and after the image
        image = [IMAGE_TOKEN_ID] * num_image_tokens
        user = text_ids(tokenizer, "user\n") + image + text_ids(tokenizer, f"\n{question}")
    between, assistant = text_ids(tokenizer, "\n"), text_ids(tokenizer, "assistant\n")
    return [start, *user, end, *between, start, *assistant]

@shown("picture")
def to_picture(p, pixels):                                              # -> uint8 (s·h, s·w, 3)
    return np.clip(127.5 * pixels[0].transpose(1, 2, 0) + 128, 0, 255).astype(np.uint8)

def generate_image(p, tokenizer, prompt, *, seed=0, num_iter=None, cfg=3.0, temperature=1.0):
    config = p.config["mar"]
    rng = np.random.default_rng(seed)
    g = config["img_size"] // config["vae_stride"]
    texts = f"Generate an image: {prompt}", "Generate an image."
    rows = [prompt_ids(tokenizer, text) for text in texts]
    L = max(map(len, rows))
    padding = tokenizer.token_to_id(PAD)
    input_ids = p.show("input_ids", np.array([row + [padding] * (L - len(row)) for row in rows]))
    attention_mask = np.arange(L) < np.array([[len(row)] for row in rows])
    orders = p.show("orders", rng.permutation(g * g)[None])
    size = (1, g * g, int(config["num_sampling_steps"]), config["vae_embed_dim"])
    noise = p.show("noise", rng.standard_normal(size, np.float32))
    num_iter = num_iter or min(64, -(-g * g // 4))
    pixels = sample(p, input_ids, attention_mask, orders, noise, (g, g), num_iter, cfg, temperature)
    return to_picture(p, pixels)

def generate_class(p, label, *, seed=0, num_iter=None, cfg=3.0, temperature=1.0):
    config = p.config["mar"]
    if not -1 <= label < config["class_num"]:
        raise ValueError(f"class {label}: there are 0 to {config['class_num'] - 1}, and -1 for none")
    rng = np.random.default_rng(seed)
    g = config["img_size"] // config["vae_stride"]
    labels = p.show("labels", np.array([label]))
    orders = p.show("orders", rng.permutation(g * g)[None])
    size = (1, g * g, int(config["num_sampling_steps"]), config["vae_embed_dim"])
    noise = p.show("noise", rng.standard_normal(size, np.float32))
    num_iter = num_iter or min(256, g * g)                              # as a rule one token a step
    return to_picture(p, sample_classes(p, labels, orders, noise, (g, g), num_iter, cfg, temperature))

def chat(p, tokenizer, image, question, max_new_tokens=1024):
    # The image centred on a grey square, so that nothing is cut off.
    side = max(image.size)
    size = p.config["mar"]["img_size"]
    square = Image.new("RGB", (side, side), (127, 127, 127))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    pixels = np.asarray(square.resize((size, size), Image.BICUBIC), np.float32)
    pixels = p.show("pixels", pixels.transpose(2, 0, 1)[None] / 127.5 - 1)      # (1, 3, s·h, s·w)
    num_image_tokens = p.mar.encoder_pos_embed_learned.shape[1]         # N + n
    input_ids = p.show("input_ids", np.array([prompt_ids(tokenizer, question, num_image_tokens)]))
    ids = answer(p, input_ids, pixels, tokenizer.token_to_id(END), max_new_tokens)
    return tokenizer.decode(ids.tolist())

def open_image(path):                                                   # upright, transparency on white
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("prompt", nargs="?", help="what to draw")
    add("--model", default="harmon-tiny", help="bundled, or a folder written by harmonkit.scripts.convert")
    add("--class", dest="label", type=int, metavar="N", help="instead: a class, by MAR alone; -1 = none")
    add("--out", default="out.png", help="the image's file (default: %(default)s)")
    add("--seed", type=int, default=0)
    add("--num-iter", "--steps", type=int, help="steps (default: 64, at most a quarter of the image tokens; "
                                                "with --class one a token)")
    add("--cfg", type=float, default=3.0, help="guidance (default: %(default)s)")
    add("--image", help="the image that --ask is about")
    add("--ask", metavar="QUESTION")
    args = parser.parse_args(argv)
    try:
        given = [args.prompt, args.ask, args.label]
        if (args.ask is None) != (args.image is None) or given.count(None) != 2:
            raise ValueError("give a prompt to draw, or --class, or --image with --ask")
        if args.label is not None:
            p, _ = load(args.model, by_class=True)
            picture = generate_class(p, args.label, seed=args.seed, num_iter=args.num_iter, cfg=args.cfg)
            Image.fromarray(picture).save(args.out)
            print(args.out)
            return
        p, folder = load(args.model)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        if args.ask is not None:
            print(chat(p, tokenizer, open_image(args.image), args.ask))
        else:
            options = dict(seed=args.seed, num_iter=args.num_iter, cfg=args.cfg)
            Image.fromarray(generate_image(p, tokenizer, args.prompt, **options)).save(args.out)
            print(args.out)
    except (ValueError, OSError) as error:
        print(f"numpy_harmon.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
