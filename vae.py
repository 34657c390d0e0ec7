"""KL autoencoder: pixels <-> continuous latents. The "KL-16" of MAR, which is LDM's AutoencoderKL.

Paper: "High-Resolution Image Synthesis with Latent Diffusion Models" (2112.10752), appendix G; Harmon uses it
frozen. Parameter names are those of the published kl16.ckpt.

Letters: B batch, H×W pixels, h×w latent grid (H / stride, W / stride), C latent channels.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class VAEConfig:
    ch: int = 128                       # channels of the first level
    ch_mult: tuple = (1, 1, 2, 2, 4)    # channels of each level, in units of ch
    z_channels: int = 16                # C

    @property
    def stride(self):
        """Pixels per latent position: 16 for KL-16."""
        return 2 ** (len(self.ch_mult) - 1)


def norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)


def conv3x3(c_in, c_out):
    return nn.Conv2d(c_in, c_out, 3, padding=1)


class ResnetBlock(nn.Module):
    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1, self.conv1 = norm(c_in), conv3x3(c_in, c_out)
        self.norm2, self.conv2 = norm(c_out), conv3x3(c_out, c_out)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)
        self.has_shortcut = c_in != c_out

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return (self.nin_shortcut(x) if self.has_shortcut else x) + h


class AttnBlock(nn.Module):
    """Single-head self-attention over the positions of a feature map."""

    def __init__(self, c):
        super().__init__()
        self.norm = norm(c)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x):
        B, c, h, w = x.shape
        y = self.norm(x)
        q = self.q(y).reshape(B, 1, c, h * w).transpose(2, 3)               # (B, 1, hw, c)
        k = self.k(y).reshape(B, 1, c, h * w).transpose(2, 3)
        v = self.v(y).reshape(B, 1, c, h * w).transpose(2, 3)
        y = F.scaled_dot_product_attention(q, k, v)
        y = y.transpose(2, 3).reshape(B, c, h, w)
        return x + self.proj_out(y)


class Downsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # right and bottom only, as in LDM


class Upsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = conv3x3(c, c)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Middle(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = ResnetBlock(c, c), AttnBlock(c), ResnetBlock(c, c)

    def forward(self, x):
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        widths = [cfg.ch * m for m in cfg.ch_mult]
        self.conv_in = conv3x3(3, cfg.ch)
        self.down = nn.ModuleList()
        for i, (c_in, c) in enumerate(zip([cfg.ch] + widths, widths)):
            last = i == len(widths) - 1
            level = nn.Module()
            level.block = nn.ModuleList([ResnetBlock(c_in, c), ResnetBlock(c, c)])
            level.attn = nn.ModuleList([AttnBlock(c), AttnBlock(c)] if last else [])
            level.downsample = nn.Identity() if last else Downsample(c)
            self.down.append(level)
        self.mid = Middle(widths[-1])
        self.norm_out = norm(widths[-1])
        self.conv_out = conv3x3(widths[-1], 2 * cfg.z_channels)

    def forward(self, x):                               # (B, 3, H, W)
        x = self.conv_in(x)
        for level in self.down:
            for i, block in enumerate(level.block):
                x = block(x)
                if len(level.attn):
                    x = level.attn[i](x)
            x = level.downsample(x)                     # half the height and width, but for the last level
        x = self.mid(x)
        return self.conv_out(F.silu(self.norm_out(x)))  # (B, 2C, h, w)


class Decoder(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        widths = [cfg.ch * m for m in cfg.ch_mult]
        self.conv_in = conv3x3(cfg.z_channels, widths[-1])
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList()                       # stored shallowest first, run deepest first
        for i, (c, c_in) in enumerate(zip(widths, widths[1:] + widths[-1:])):
            level = nn.Module()
            level.block = nn.ModuleList([ResnetBlock(c_in, c), ResnetBlock(c, c), ResnetBlock(c, c)])
            level.upsample = Upsample(c) if i > 0 else nn.Identity()
            self.up.append(level)
        self.norm_out = norm(cfg.ch * cfg.ch_mult[0])
        self.conv_out = conv3x3(cfg.ch * cfg.ch_mult[0], 3)

    def forward(self, z):                               # (B, C, h, w)
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            for block in level.block:
                x = block(x)
            x = level.upsample(x)
        return self.conv_out(F.silu(self.norm_out(x)))  # (B, 3, H, W)


class Posterior:
    """The diagonal Gaussian q(z | pixels). mean, logvar: (B, C, h, w); logvar clamped to [-30, 20]."""

    def __init__(self, moments):
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)

    def mode(self):
        return self.mean

    def sample(self, generator=None):
        noise = torch.randn(self.mean.shape, generator=generator, device=self.mean.device,
                            dtype=self.mean.dtype)
        return self.mean + (0.5 * self.logvar).exp() * noise

    def kl(self):
        """KL(q || N(0, 1)) of each latent value in nats, (B, C, h, w)."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar)


class AutoencoderKL(nn.Module):
    """encode: pixels (B, 3, H, W) in [-1, 1] -> Posterior. decode: z (B, C, h, w) -> pixels, not clamped.

    Latents here are unscaled; `Harmon` multiplies by its `vae_scale`. H and W must be multiples of
    `config.stride`.
    """

    def __init__(self, config=VAEConfig()):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.z_channels, 2 * config.z_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.z_channels, config.z_channels, 1)

    def encode(self, pixels):
        H, W = pixels.shape[-2:]
        if H % self.config.stride or W % self.config.stride:
            raise ValueError(f"image is {H}x{W} pixels; height and width must be multiples of the VAE's "
                             f"stride, {self.config.stride}")
        return Posterior(self.quant_conv(self.encoder(pixels)))

    def decode(self, z):
        return self.decoder(self.post_quant_conv(z))
