"""What is trained and how: parameter groups, their learning rates over the steps, and the optimizer.

AdamW for everything, as the papers have it; or, in recipes that say so, Muon ("Muon is Scalable for LLM Training", 2502.16982; torch's own) for the matrices of the
transformer blocks and AdamW for the rest: a small model then needs about half of the steps. Muon orthogonalises in bfloat16, so that one process and many agree
to that precision only; with AdamW they agree to rounding in float32.
"""
import math

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map_only

PARTS = {  # what learning rates are given to, by the prefixes of the parameters' names
    "mar-decoder": ("mar.decoder", "mar.mask_token", "mar.diffusion_pos_embed", "mar.diffloss", "proj_out"),
    "mar-encoder": ("mar.encoder", "mar.z_proj", "mar.fake_latent", "mar.class_emb", "proj_in"),
    "llm": ("llm",),
    "vae": ("vae",),
}
BLOCKS = ("mar.encoder_blocks.", "mar.decoder_blocks.", "llm.model.layers.")
MUON_RATE = 2                     # times the rate of the part, which is AdamW's


def part_of(name):
    return next((part for part, prefixes in PARTS.items() if name.startswith(prefixes)), None)


def parameter_groups(model, recipe):
    """What is trained, in groups of one learning rate, weight decay and optimizer; the rest is frozen."""
    groups = {}
    for name, p in model.named_parameters():
        part = part_of(name)
        p.requires_grad_(part in recipe.lr)
        if p.requires_grad:
            decay = 0.0 if p.ndim <= 1 or ".diffloss." in name else recipe.weight_decay
            muon = recipe.muon and p.ndim == 2 and name.startswith(BLOCKS)
            peak = recipe.lr[part] * (MUON_RATE if muon else 1)
            groups.setdefault((part, decay, muon), {"params": [], "part": part, "weight_decay": decay, "muon": muon, "peak": peak, "lr": peak})["params"].append(p)
    return list(groups.values())


def schedule(recipe, step):
    """Factor on the learning rates: linear warm-up, then cosine to 0."""
    return min(1.0, (step + 1) / max(1, recipe.warmup * recipe.steps)) * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))


def make_optimizer(groups, spread=False):
    """The optimizer of `parameter_groups`. spread: AdamW's state over the processes, each keeps its share of the parameters."""
    adamw = dict(lr=1e-4, betas=(0.9, 0.95), fused=True)                        # each group has its own rate
    matrices, others = [g for g in groups if g["muon"]], [g for g in groups if not g["muon"]]
    if spread:
        if matrices:
            raise ValueError("Muon's state cannot be spread over processes; leave out --zero or --muon")
        from torch.distributed.optim import zero_redundancy_optimizer as zero

        zero._broadcast_object = broadcast_object       # torch's own handles its bytes one by one: a checkpoint of some gigabytes takes it half an hour
        return zero.ZeroRedundancyOptimizer(others, torch.optim.AdamW, **adamw)
    if not matrices:
        return torch.optim.AdamW(others, **adamw)
    parts = [torch.optim.Muon(matrices, lr=1e-4, adjust_lr_fn="match_rms_adamw")] + ([torch.optim.AdamW(others, **adamw)] if others else [])
    return Together(parts)


def broadcast_object(obj, src_rank, group=None, device=None):
    """One process's object to all of a group."""
    box = [tree_map_only(torch.Tensor, torch.Tensor.cpu, obj)]
    dist.broadcast_object_list(box, src=src_rank, group=group, device=device)
    return box[0]


class Together:
    """Several optimizers as one."""

    def __init__(self, parts):
        self.parts = parts

    @property
    def param_groups(self):
        return [group for part in self.parts for group in part.param_groups]

    def step(self):
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none=True):
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self):
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states):
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)
