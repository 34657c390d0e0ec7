"""Pictures that are equal to the byte in any batch and for any number of processes, on CPUs.

A sum's last bits depend on how a library orders it. Matrix products of few rows have kernels of their own,
so here small products get at least ROWS rows. The VAE's convolutions split their sums among threads, so here
they run in one. Prompts are padded to whole blocks by pipeline.py, because attention sums in blocks.
"""
import torch
import torch.nn.functional as F
from torch import nn

from vae import AutoencoderKL

ROWS = 16


class PaddedLinear(nn.Linear):
    """A linear layer that computes at least ROWS rows and returns those that were asked for."""

    def forward(self, x):
        rows = x.numel() // x.shape[-1]
        if rows >= ROWS:
            return super().forward(x)
        padded = F.pad(x.reshape(rows, x.shape[-1]), (0, 0, 0, ROWS - rows))         # (ROWS, in)
        return super().forward(padded)[:rows].view(*x.shape[:-1], self.out_features)


class OneThreadVAE(AutoencoderKL):
    def encode(self, pixels):
        return in_one_thread(super().encode, pixels)

    def decode(self, z):
        return in_one_thread(super().decode, z)


def in_one_thread(function, x):
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return function(x)
    finally:
        torch.set_num_threads(num_threads)


def make_repeatable(model):
    """Let a Harmon on a CPU draw the same bytes in any batch. In place, after `fast.accelerate`."""
    if model.device.type == "cpu":
        model.vae.__class__ = OneThreadVAE
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = PaddedLinear
    return model
