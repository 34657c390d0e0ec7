"""What several test files share: a very small configuration, random weights, a tokenizer."""
import signal
from pathlib import Path

import pytest
import torch

from harmon import Harmon, HarmonConfig
from harmonkit.shapes_world.tokenizer import train_tokenizer
from llm import QwenConfig
from mar import MARConfig
from vae import VAEConfig

ROOT = Path(__file__).resolve().parent.parent

# A background job ignores Ctrl-C, and so do the processes that it starts; tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

SMALL = HarmonConfig(
    llm=QwenConfig(vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                   num_attention_heads=4, num_key_value_heads=2),
    mar=MARConfig(img_size=32, vae_stride=8, embed_dim=32, encoder_depth=2, decoder_depth=2, num_heads=4,
                  buffer_size=4, token_dim=4, class_num=2, head_depth=2, head_width=32, diffusion_steps=8,
                  x0_clip=3.0),
    vae=VAEConfig(ch=32, ch_mult=(1, 1, 1, 1), z_channels=4),
    vae_scale=0.5)


@torch.no_grad()
def shake(model, seed=0):
    """Random weights everywhere, so that nothing that starts at zero hides a mistake."""
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        mean = 1 if p.ndim == 1 and name.endswith("weight") else 0
        std = 0.1 if p.ndim <= 1 else p[0].numel() ** -0.5
        p.copy_(mean + std * torch.randn_like(p))
    return model.eval()


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(512)


@pytest.fixture(scope="session")
def small(tokenizer):
    """A very small Harmon with random weights and a real tokenizer. Do not change its weights."""
    model = shake(Harmon(SMALL))
    model.tokenizer = tokenizer
    return model
