"""MAR: the masked autoregressive image model whose encoder and decoder enclose the language model.

Paper: "Autoregressive Image Generation without Vector Quantization" (2406.11838); Harmon (2503.21979),
section 3.1. Parameter names are those of the published MAR checkpoints.

Letters: B batch, h×w token grid, N = h·w tokens, n buffer tokens, V visible tokens, D width, C latent
channels. A mask is a bool tensor (B, N), True = hidden.
"""
import math
from dataclasses import dataclass
from numbers import Integral, Real

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from diffusion_head import DiffusionHead, T, check_solver


@dataclass(frozen=True)
class MARConfig:
    img_size: int = 256            # pixels for which the position embeddings are made
    vae_stride: int = 16
    embed_dim: int = 768           # D, of encoder and decoder
    encoder_depth: int = 12
    decoder_depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4
    buffer_size: int = 64          # n: extra tokens that carry global information
    token_dim: int = 16            # C
    class_num: int = 1000          # of the class embedding, which only MAR's own pretraining uses
    dropout: float = 0.1           # in training: on attention weights, attention output and both mlp layers
    head_depth: int = 6
    head_width: int = 1024
    diffusion_steps: int = 100     # S of the sampler, out of 1000
    diffusion_batch_mul: int = 4   # draws of (t, noise) per token in training
    x0_clip: float | None = None   # see DiffusionHead

    @property
    def grid(self) -> int:
        """Rows (= columns) of the native token grid."""
        return self.img_size // self.vae_stride


# ---- the transformer -----------------------------------------------------------------------------

class Attention(nn.Module):
    def __init__(self, dim, num_heads, dropout):
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, L, D = x.shape
        q, k, v = self.qkv(x).view(B, L, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        y = scaled_dot_product_attention(q, k, v, dropout_p=dropout)        # (B, heads, L, D / heads)
        y = self.proj(y.transpose(1, 2).reshape(B, L, D))
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, dim, hidden_dim, dropout):
        super().__init__()
        self.dropout = dropout
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x):
        x = F.gelu(self.fc1(x))                                             # the exact GELU
        x = F.dropout(x, self.dropout, self.training)
        return F.dropout(self.fc2(x), self.dropout, self.training)


class Block(nn.Module):
    """A pre-norm ViT block."""

    def __init__(self, config):
        super().__init__()
        D = config.embed_dim
        self.norm1 = nn.LayerNorm(D, eps=1e-6)
        self.attn = Attention(D, config.num_heads, config.dropout)
        self.norm2 = nn.LayerNorm(D, eps=1e-6)
        self.mlp = MLP(D, int(D * config.mlp_ratio), config.dropout)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x


class MAR(nn.Module):
    """An encoder of the visible tokens, a decoder of all tokens, and the diffusion head."""

    def __init__(self, config: MARConfig = MARConfig()):
        super().__init__()
        self.config = config
        D, n, N = config.embed_dim, config.buffer_size, config.grid ** 2

        self.class_emb = nn.Embedding(config.class_num, D)                  # Harmon does not use it
        self.fake_latent = nn.Parameter(torch.zeros(1, D))                  # the buffer token without a class
        self.z_proj = nn.Linear(config.token_dim, D)
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, n + N, D))
        self.z_proj_ln = nn.LayerNorm(D, eps=1e-6)
        self.encoder_blocks = nn.ModuleList(Block(config) for _ in range(config.encoder_depth))
        self.encoder_norm = nn.LayerNorm(D, eps=1e-6)

        self.decoder_embed = nn.Linear(D, D)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, D))
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, n + N, D))
        self.decoder_blocks = nn.ModuleList(Block(config) for _ in range(config.decoder_depth))
        self.decoder_norm = nn.LayerNorm(D, eps=1e-6)
        self.diffusion_pos_embed_learned = nn.Parameter(torch.zeros(1, N, D))

        self.init_weights()
        self.diffloss = DiffusionHead(
            config.token_dim, D, config.head_depth, config.head_width, config.diffusion_steps, config.x0_clip)

    def encode(self, tokens, mask, grid, labels=None):
        """The visible tokens and the buffers through the encoder.

        tokens (B, N, C), mask (B, N) with equally many hidden in each row, grid (h, w) -> (B, n + V, D),
        buffers first. labels (B,) int: the classes that the buffers hold, -1 = none; for a MAR that draws by
        class.
        """
        B, n = len(tokens), self.config.buffer_size
        buffers = self.fake_latent.expand(B, -1)                            # (B, D)
        if labels is not None:
            buffers = torch.where(labels[:, None] < 0, buffers, self.class_emb(labels.clamp(min=0)))
        buffers = buffers[:, None].expand(-1, n, -1)                        # (B, n, D)

        x = torch.cat([buffers, self.z_proj(tokens)], dim=1)                # (B, n+N, D)
        x = x + self.position_embedding(self.encoder_pos_embed_learned, grid)
        x = self.z_proj_ln(x)
        # Hidden tokens are dropped.
        x = x[self.kept(mask)].view(B, -1, x.shape[-1])                     # (B, n+V, D)
        for block in self.encoder_blocks:
            x = block(x)
        return self.encoder_norm(x)

    def decode(self, x, mask, grid):
        """x (B, n + V, D), as `encode` gives it -> z (B, N, D): the condition for drawing each token."""
        B, n = len(x), self.config.buffer_size
        x = self.decoder_embed(x)
        keep = self.kept(mask)                                              # (B, n+N)
        full = self.mask_token.to(x.dtype).repeat(B, keep.shape[1], 1)      # (B, n+N, D)
        full[keep] = x.flatten(0, 1)

        x = full + self.position_embedding(self.decoder_pos_embed_learned, grid)
        for block in self.decoder_blocks:
            x = block(x)
        x = self.decoder_norm(x)[:, n:]                                     # (B, N, D)
        return x + self.position_embedding(self.diffusion_pos_embed_learned, grid)

    def kept(self, mask):
        """Mask (B, N) -> (B, n + N), True = a buffer or a visible token."""
        hidden = mask.sum(dim=1)
        if hidden.min() != hidden.max():
            raise ValueError(f"every row of a mask must hide equally many tokens, not {hidden.tolist()}")
        return F.pad(~mask, (self.config.buffer_size, 0), value=True)

    @torch.no_grad()
    def sample_steps(self, labels, settings, randomness):
        """Masked autoregressive generation by class: yields (tokens (B, N, C), mask (B, N)) after each of K
        steps.

        labels (B,) int64, -1 = no class. settings: a Sampling. randomness: a Randomness.
        """
        B, N, C = len(labels), self.config.grid ** 2, self.config.token_dim
        grid = (self.config.grid, self.config.grid)
        S = settings.num_sampling_steps or self.config.diffusion_steps
        tokens = torch.zeros(B, N, C, device=labels.device, dtype=torch.float32)
        mask = torch.ones(B, N, dtype=torch.bool, device=labels.device)
        orders = randomness.orders(B, N).to(labels.device)

        for num_masked in mask_schedule(N, settings.num_iter)[1:]:
            next_mask = first_masked(orders, num_masked)
            new = mask & ~next_mask                                         # (B, N): the tokens of this step
            if new.any():
                # Guidance has a second half without classes. The encoder sees the class, so both halves go
                # through it; rows = halves·B.
                weight = settings.guidance(num_masked, N)
                halves = 1 if weight == 1 else 2
                classes = torch.cat([labels, torch.full_like(labels, -1)])[:halves * B]
                seen = tokens.to(self.mask_token.dtype).repeat(halves, 1, 1)
                x_enc = self.encode(seen, mask.repeat(halves, 1), grid, classes)   # (rows, n+V, D)

                # Draw the new tokens of all images, in raster order.
                z = self.decode(x_enc, mask.repeat(halves, 1), grid)        # (rows, N, D)
                z = z[new.repeat(halves, 1)]                                # (halves·M, D)
                count = int(new[0].sum())                                   # M / B, tokens per image
                drawn = self.diffloss.sample(
                    z, temperature=settings.temperature, cfg=weight, solver=settings.solver,
                    noise_fn=randomness.noise(B, count, C, S, labels.device),
                    num_sampling_steps=settings.num_sampling_steps)
                tokens = tokens.clone()
                tokens[new] = drawn
            mask = next_mask
            yield tokens, mask

    @torch.no_grad()
    def sample(self, labels, *, cfg=1.0, cfg_schedule="linear", generator=None, orders=None, noise_fn=None,
               on_step=None, **settings):
        """Draw by class, as MAR's authors do: labels (B,) int, -1 = none -> scaled latents (B, h, w, C).

        cfg 1 = without guidance. settings: further fields of Sampling. generator, orders, noise_fn: see
        Randomness. on_step(k, tokens (B, h, w, C), mask (B, N)) is called after step k = 1 … K.
        Raises ValueError for labels that are no class and for settings outside their ranges.
        """
        settings = Sampling(cfg=cfg, cfg_schedule=cfg_schedule, **settings)
        labels = self.check_labels(labels)
        B, h, C = len(labels), self.config.grid, self.config.token_dim
        in_training = [module for module in self.modules() if module.training]
        self.eval()                                                         # without dropout
        try:
            steps = self.sample_steps(labels, settings, Randomness(generator, orders, noise_fn))
            for k, (tokens, mask) in enumerate(steps, start=1):
                if on_step is not None:
                    on_step(k, tokens.view(B, h, h, C), mask)
        finally:
            for module in in_training:
                module.training = True
        return tokens.view(B, h, h, C)

    def check_labels(self, labels):
        """Labels on the model's device, int64. Raises ValueError for numbers that are no class."""
        try:
            given = torch.as_tensor(labels)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"labels are {str(labels)[:60]!r}; whole numbers (B,) are expected") from None
        is_whole = not (given.is_floating_point() or given.is_complex() or given.dtype == torch.bool)
        if given.ndim != 1 or not len(given) or not is_whole:
            raise ValueError(f"labels have the shape {tuple(given.shape)} and the type {given.dtype}; whole "
                             "numbers (B,) are expected")
        given = given.to(self.mask_token.device, torch.int64)
        classes = self.config.class_num
        wrong = given[(given < -1) | (given >= classes)].tolist()
        if wrong:
            raise ValueError(f"label {wrong[0]}: this MAR has classes 0 to {classes - 1}, and -1 for none")
        return given

    def position_embedding(self, table, grid):
        """A table (1, n + N₀, D) or (1, N₀, D) of the native grid, its image part resized to grid (h, w)."""
        g, (h, w) = self.config.grid, grid
        if (h, w) == (g, g):
            return table
        buffers, image = table.split([table.shape[1] - g * g, g * g], dim=1)
        image = image.reshape(1, g, g, -1).permute(0, 3, 1, 2)              # (1, D, g, g)
        image = F.interpolate(image, size=(h, w), mode="bilinear", align_corners=False)
        return torch.cat([buffers, image.flatten(2).transpose(1, 2)], dim=1)

    @torch.no_grad()
    def init_weights(self):
        """All initialisation but the head's. Attention is local from the start."""
        config = self.config
        for p in (self.class_emb.weight, self.fake_latent, self.mask_token, self.encoder_pos_embed_learned,
                  self.decoder_pos_embed_learned, self.diffusion_pos_embed_learned):
            nn.init.normal_(p, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

        # In half of the heads the keys equal the queries, so a token attends to tokens like itself
        # (mimetic initialization, 2305.09828). Sines of row and column make neighbours alike (MAE,
        # 2111.06377).
        for block in (*self.encoder_blocks, *self.decoder_blocks):
            q, k, _ = block.attn.qkv.weight.chunk(3)
            rows = config.num_heads // 2 * (config.embed_dim // config.num_heads)
            nn.init.xavier_uniform_(q, gain=1.13)
            k[:rows] = q[:rows]
        for table in (self.encoder_pos_embed_learned, self.decoder_pos_embed_learned):
            table[:, config.buffer_size:] = get_2d_sincos_pos_embed(config.embed_dim, config.grid)


def get_2d_sincos_pos_embed(embed_dim, grid):
    """(grid², embed_dim): sin and cos of the row, then of the column, with wavelengths 4 … 4·grid."""
    n = embed_dim // 4
    frequencies = torch.pi / 2 * grid ** (-torch.arange(n) / n)             # (n,)
    rows, columns = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    rows = rows.flatten()[:, None] * frequencies                            # (grid², n)
    columns = columns.flatten()[:, None] * frequencies
    rest = torch.zeros(grid ** 2, embed_dim - 4 * n)                        # if 4 does not divide the width
    return torch.cat([rows.sin(), rows.cos(), columns.sin(), columns.cos(), rest], dim=1)


# ---- masks, order and noise of the generation loop -----------------------------------------------

@dataclass(frozen=True)
class Sampling:
    """Settings of masked autoregressive generation. Raises ValueError for values outside their ranges."""
    num_iter: int = 64                      # K ≥ 1, generation steps
    cfg: float = 3.0                        # w ≥ 0, classifier-free guidance; 1 = off
    cfg_schedule: str = "constant"          # or "linear": from 1 to cfg as tokens become visible
    temperature: float = 1.0                # ≥ 0, factor on the noise that the ancestral solver adds
    num_sampling_steps: int | None = None   # S, diffusion steps per token; None: MARConfig.diffusion_steps
    solver: str = "ancestral"               # of the diffusion head; or "ddim", "dpm++"

    def __post_init__(self):
        for name in ("cfg", "temperature"):
            value = getattr(self, name)
            if not isinstance(value, Real) or not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value!r}; it must be a number from 0 up")
        if not isinstance(self.num_iter, Integral) or self.num_iter < 1:
            raise ValueError(f"num_iter is {self.num_iter}; it must be a whole number from 1 up")
        S = self.num_sampling_steps
        if S is not None and (not isinstance(S, Integral) or not 1 <= S <= T):
            raise ValueError(f"num_sampling_steps is {S}; it must be a whole number from 1 to {T}")
        if self.cfg_schedule not in ("constant", "linear"):
            raise ValueError(f"cfg_schedule is {self.cfg_schedule!r}; known: constant, linear")
        check_solver(self.solver, self.temperature)

    def guidance(self, num_masked, num_tokens):
        """The weight of a step after which num_masked of num_tokens stay masked."""
        if self.cfg_schedule == "constant" or self.cfg == 1:
            return self.cfg
        # The original never counts fewer than one masked token here, also in the last step.
        return 1 + (self.cfg - 1) * (num_tokens - max(1, num_masked)) / num_tokens


def mask_schedule(num_tokens, num_iter):
    """How many tokens are masked before the first step and after each of them: a cosine from num_tokens to 0.

    If two neighbouring entries are equal, that step draws nothing.
    """
    masked = [num_tokens]
    for k in range(1, num_iter):
        cosine = math.floor(num_tokens * math.cos(math.pi / 2 * k / num_iter))
        masked.append(max(1, min(masked[-1] - 1, cosine)))
    return masked + [0]


def random_mask(B, N, ratio=None, device=None):
    """A mask of ceil(ratio · N) random tokens a row. ratio: default MAR's, normal (1, 0.25) in [0.7, 1]."""
    if ratio is None:
        low = 0.5 * math.erfc(1.2 / math.sqrt(2))                           # Φ((0.7 - 1) / 0.25)
        u = low + (0.5 - low) * torch.rand((), dtype=torch.float64)
        ratio = 1 + 0.25 * float(torch.special.ndtri(u))
    num_masked = max(1, min(N, math.ceil(ratio * N)))
    orders = torch.rand(B, N, device=device, dtype=torch.float32).argsort(dim=1)
    return first_masked(orders, num_masked)


def first_masked(orders, num_masked):
    """The mask (B, N) that hides the first num_masked tokens of each order (B, N)."""
    mask = torch.zeros_like(orders, dtype=torch.bool)
    return mask.scatter(1, orders[:, :num_masked], True)


class Randomness:
    """Everything random in a generation: the order of the tokens and the diffusion noise.

    generator: a torch.Generator, or a list with one for each image, so that no image depends on its batch.
    orders (B or more, N) and noise_fn(shape) replace the draws: tests and ports record them.
    """

    def __init__(self, generator=None, orders=None, noise_fn=None):
        self.generator = generator
        self.recorded_orders = orders
        self.recorded_noise = noise_fn

    def orders(self, B, N):
        """(B, N) int64: row b's first m entries are the tokens that are masked when m are."""
        if self.recorded_orders is not None:
            return self.recorded_orders[:B]
        generators = self.generator if isinstance(self.generator, list) else [self.generator] * B
        return torch.stack([torch.randperm(N, generator=generator) for generator in generators])

    def noise(self, B, count, C, num_sampling_steps, device):
        """A noise_fn for `count` new tokens in each of B images; everything is drawn at once, by image."""
        if self.recorded_noise is not None:
            return self.recorded_noise
        S = num_sampling_steps
        if isinstance(self.generator, list):
            noise = [torch.randn(S, count, C, generator=g, device=g.device, dtype=torch.float32)
                     for g in self.generator]
            noise = torch.stack(noise, dim=1)                               # (S, B, count, C)
        else:
            device_of_draws = "cpu" if self.generator is None else self.generator.device
            noise = torch.randn(S, B, count, C, generator=self.generator, device=device_of_draws,
                                dtype=torch.float32)
        noise = iter(noise.to(device).flatten(1, 2))                        # S × (B·count, C)
        return lambda shape: next(noise)
