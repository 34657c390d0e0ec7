"""MAR: the masked autoregressive image model whose encoder and decoder enclose the language model.

Paper: "Autoregressive Image Generation without Vector Quantization" (2406.11838); Harmon (2503.21979), section 3.1.
Parameter names are those of the published MAR checkpoints.

Letters: B batch, h×w token grid, N = h·w tokens, n buffer tokens, V visible tokens, D width, C latent channels.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from attention import attention
from diffusion_head import DiffusionHead


@dataclass(frozen=True)
class MARConfig:
    img_size: int = 256            # pixels the position embeddings are made for
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
    diffusion_steps: int = 100     # of the sampler, out of 1000
    diffusion_batch_mul: int = 4   # draws of (t, noise) a token in training
    x0_clip: float | None = None   # see DiffusionHead

    @classmethod
    def from_name(cls, name):
        """Sizes of a published model: "mar-base", "mar-large" or "mar-huge" (underscores do as well)."""
        key = name.replace("_", "-")
        if key not in MAR_SIZES:
            raise ValueError(f"unknown MAR size {name!r}; known: {', '.join(MAR_SIZES)}")
        return cls(**MAR_SIZES[key])

    @property
    def grid(self):
        """Rows (= columns) of the native token grid."""
        return self.img_size // self.vae_stride


MAR_SIZES = {
    "mar-base": dict(embed_dim=768, encoder_depth=12, decoder_depth=12, num_heads=12, head_depth=6, head_width=1024),
    "mar-large": dict(embed_dim=1024, encoder_depth=16, decoder_depth=16, num_heads=16, head_depth=8, head_width=1280),
    "mar-huge": dict(embed_dim=1280, encoder_depth=20, decoder_depth=20, num_heads=16, head_depth=12, head_width=1536),
}


class Attention(nn.Module):
    def __init__(self, dim, num_heads, dropout):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        B, L, D = x.shape
        q, k, v = self.qkv(x).view(B, L, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)   # each (B, heads, L, d)
        y = attention(q, k, v, dropout=self.dropout if self.training else 0.0)
        return F.dropout(self.proj(y.transpose(1, 2).reshape(B, L, D)), self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, dim, hidden, dropout):
        super().__init__()
        self.fc1, self.fc2, self.dropout = nn.Linear(dim, hidden), nn.Linear(hidden, dim), dropout

    def forward(self, x):
        x = F.dropout(F.gelu(self.fc1(x)), self.dropout, self.training)
        return F.dropout(self.fc2(x), self.dropout, self.training)


class Block(nn.Module):
    """A pre-norm ViT block."""

    def __init__(self, cfg):
        super().__init__()
        self.norm1 = nn.LayerNorm(cfg.embed_dim, eps=1e-6)
        self.attn = Attention(cfg.embed_dim, cfg.num_heads, cfg.dropout)
        self.norm2 = nn.LayerNorm(cfg.embed_dim, eps=1e-6)
        self.mlp = MLP(cfg.embed_dim, int(cfg.embed_dim * cfg.mlp_ratio), cfg.dropout)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def sines(grid, width):
    """(grid², width): sines and cosines of row and column, of wavelengths from 4 tokens to 4 · grid, in equal parts."""
    n = width // 4
    frequency = torch.pi / 2 * grid ** (-torch.arange(n) / n)
    rows, columns = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    angles = [place.flatten()[:, None] * frequency for place in (rows, columns)]              # 2 × (grid², n)
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)] + [torch.zeros(grid ** 2, width - 4 * n)], dim=1)


def visible_index(mask):
    """Positions of the visible tokens, (B, V) int64 in ascending order. mask (B, N): True = hidden, equally many in each row."""
    hidden = mask.sum(dim=1)
    if int(hidden.min()) != int(hidden.max()):
        raise ValueError(f"every row of a mask must hide equally many tokens; these hide {hidden.tolist()}")
    return mask.to(torch.uint8).argsort(dim=1, stable=True)[:, :mask.shape[1] - int(hidden[0])]


class MAR(nn.Module):
    def __init__(self, config=MARConfig()):
        super().__init__()
        self.config = c = config
        D, n, N = c.embed_dim, c.buffer_size, c.grid ** 2
        self.class_emb = nn.Embedding(c.class_num, D)                      # of MAR's own pretraining; Harmon does not use it
        self.fake_latent = nn.Parameter(torch.zeros(1, D))                 # the buffer token
        self.z_proj, self.z_proj_ln = nn.Linear(c.token_dim, D), nn.LayerNorm(D, eps=1e-6)
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, n + N, D))
        self.encoder_blocks = nn.ModuleList(Block(c) for _ in range(c.encoder_depth))
        self.encoder_norm = nn.LayerNorm(D, eps=1e-6)
        self.decoder_embed = nn.Linear(D, D)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, D))
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, n + N, D))
        self.decoder_blocks = nn.ModuleList(Block(c) for _ in range(c.decoder_depth))
        self.decoder_norm = nn.LayerNorm(D, eps=1e-6)
        self.diffusion_pos_embed_learned = nn.Parameter(torch.zeros(1, N, D))
        self.init_weights()
        self.diffloss = DiffusionHead(c.token_dim, D, c.head_depth, c.head_width, c.diffusion_steps, c.x0_clip)

    def init_weights(self):
        """Position embeddings start as sines and cosines of row and column, and in half of the heads queries equal to keys: their attention is local from the start.

        It decides whether a small model learns in minutes to look at its neighbors, or in hours (MAE, 2111.06377; mimetic initialization, 2305.09828).
        """
        c = self.config
        for p in (self.class_emb.weight, self.fake_latent, self.mask_token, self.encoder_pos_embed_learned, self.decoder_pos_embed_learned,
                  self.diffusion_pos_embed_learned):
            nn.init.normal_(p, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        with torch.no_grad():
            for block in [*self.encoder_blocks, *self.decoder_blocks]:
                q, k, _ = block.attn.qkv.weight.chunk(3)
                half = c.num_heads // 2 * (c.embed_dim // c.num_heads)
                k[:half] = nn.init.xavier_uniform_(q, gain=1.13)[:half]
            place = sines(c.grid, c.embed_dim)
            for table in (self.encoder_pos_embed_learned, self.decoder_pos_embed_learned):
                table[:, c.buffer_size:] = place

    def position_embedding(self, table, grid):
        """table (1, n + N₀, D) or (1, N₀, D) for the native grid -> the same for `grid` = (h, w), resized bilinearly."""
        g, (h, w) = self.config.grid, grid
        if (h, w) == (g, g):
            return table
        buffers, image = table.split([table.shape[1] - g * g, g * g], dim=1)
        image = image.reshape(1, g, g, -1).permute(0, 3, 1, 2)             # (1, D, g, g)
        image = F.interpolate(image, size=(h, w), mode="bilinear", align_corners=False)
        return torch.cat([buffers, image.flatten(2).transpose(1, 2)], dim=1)

    def encode(self, tokens, mask, grid, labels=None, visible=None):
        """tokens (B, N, C), mask (B, N) bool with True = hidden, grid (h, w) -> (B, n + V, D), buffers first.

        visible (B, V) int: `visible_index(mask)`, where the caller has it: to find it waits for the device.
        labels (B,) int: classes that the buffers tell of, -1 = none; only for pretraining a MAR by itself.
        """
        B, n = tokens.shape[0], self.config.buffer_size
        buffers = self.fake_latent.expand(B, -1)                                                 # (B, D)
        if labels is not None:
            buffers = torch.where(labels[:, None] < 0, buffers, self.class_emb(labels.clamp(min=0)))
        x = torch.cat([buffers[:, None].expand(-1, n, -1), self.z_proj(tokens)], dim=1)          # (B, n+N, D)
        x = self.z_proj_ln(x + self.position_embedding(self.encoder_pos_embed_learned, grid))
        buffers, image = x[:, :n], x[:, n:]
        visible = visible_index(mask) if visible is None else visible
        index = visible[..., None].expand(-1, -1, x.shape[-1])                                   # (B, V, D)
        x = torch.cat([buffers, image.gather(1, index)], dim=1)                                  # (B, n+V, D)
        for block in self.encoder_blocks:
            x = block(x)
        return self.encoder_norm(x)

    def decode(self, x, mask, grid, visible=None):
        """x (B, n + V, D), buffers first, mask, grid and visible as in `encode` -> conditions z (B, N, D) for the diffusion head."""
        n = self.config.buffer_size
        x = self.decoder_embed(x)
        index = (visible_index(mask) if visible is None else visible)[..., None].expand(-1, -1, x.shape[-1])
        image = self.mask_token.to(x.dtype).expand(x.shape[0], mask.shape[1], -1).scatter(1, index, x[:, n:])
        buffers = x[:, :n]
        x = torch.cat([buffers, image], dim=1)                                                   # (B, n+N, D)
        x = x + self.position_embedding(self.decoder_pos_embed_learned, grid)
        for block in self.decoder_blocks:
            x = block(x)
        x = self.decoder_norm(x)[:, n:]                                                          # (B, N, D)
        return x + self.position_embedding(self.diffusion_pos_embed_learned, grid)
