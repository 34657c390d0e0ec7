"""Parameter groups, their learning rates over the steps, the optimizers, and the average of the weights.

AdamW for everything, as in the papers. With the recipe's `muon`: Muon ("Muon is Scalable for LLM Training",
2502.16982; torch's own) for the matrices of the transformer blocks and AdamW for the rest. A small model then
needs half of the steps. Muon orthogonalises in bfloat16: one process and many agree only to that precision.
"""
import math

import torch

PARTS = {                         # part of the model -> the prefixes of its parameters' names
    "mar-decoder": ("mar.decoder", "mar.mask_token", "mar.diffusion_pos_embed", "mar.diffloss", "proj_out"),
    "mar-encoder": ("mar.encoder", "mar.z_proj", "mar.fake_latent", "mar.class_emb", "proj_in"),
    "llm": ("llm",),
    "vae": ("vae",),
}
BLOCKS = ("mar.encoder_blocks.", "mar.decoder_blocks.", "llm.model.layers.")
MUON_RATE = 2                     # Muon's learning rate, in multiples of the part's, which is AdamW's


def part_of(name):
    """The part of the model that a parameter belongs to, by its name."""
    for part, prefixes in PARTS.items():
        if name.startswith(prefixes):
            return part


def parameter_groups(model, recipe) -> list:
    """A group for each learning rate, weight decay and optimizer. Parts without a rate are frozen."""
    groups = {}
    for name, p in model.named_parameters():
        part = part_of(name)
        p.requires_grad_(part in recipe.lr)
        if not p.requires_grad:
            continue
        has_decay = p.ndim > 1 and ".diffloss." not in name
        decay = recipe.weight_decay if has_decay else 0.0
        muon = recipe.tiny.muon and p.ndim == 2 and name.startswith(BLOCKS)
        peak = recipe.lr[part] * (MUON_RATE if muon else 1)
        group = {"params": [], "part": part, "weight_decay": decay, "muon": muon, "peak": peak, "lr": peak}
        groups.setdefault((part, has_decay, muon), group)["params"].append(p)
    return list(groups.values())


def schedule(recipe, step: int) -> float:
    """Factor on the peak learning rates at `step`, counted from 0: linear warm-up, then a cosine to 0."""
    warmup = min(1.0, (step + 1) / max(1, recipe.warmup * recipe.steps))
    return warmup * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))


def make_optimizer(groups):
    """AdamW, or Muon and AdamW, over the groups of `parameter_groups`."""
    matrices = [group for group in groups if group["muon"]]
    others = [group for group in groups if not group["muon"]]
    optimizers = []
    # torch insists on a default learning rate; each group has its own.
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=1e-4, adjust_lr_fn="match_rms_adamw"))
    if others:
        optimizers.append(torch.optim.AdamW(others, lr=1e-4, betas=(0.9, 0.95), fused=True))
    return optimizers[0] if len(optimizers) == 1 else MultiOptimizer(optimizers)


def load_state(optimizer, state):
    """`load_state_dict`, but learning rates and weight decays stay those of the optimizer."""
    groups = optimizer.param_groups
    optimizer.load_state_dict(state)
    for loaded, group in zip(optimizer.param_groups, groups, strict=True):
        loaded.update(group)


class MultiOptimizer:
    """Several optimizers behind the interface of one."""

    def __init__(self, optimizers):
        self.optimizers = optimizers

    @property
    def param_groups(self):
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none=True):
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self):
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_state_dict(self, states):
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)


class EMA:
    """The exponential moving average of the trainable weights, {name: parameter}."""

    def __init__(self, trainable, decay):
        self.trainable = trainable
        self.decay = decay
        self.weights = {name: p.detach().clone() for name, p in trainable.items()}

    @torch.no_grad()
    def update(self, step):
        """Average in the weights after `step`, counted from 0."""
        # The decay grows with the steps, so that the initial weights soon leave the average.
        decay = min(self.decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(self.weights.values()), list(self.trainable.values()), 1 - decay)

    @torch.no_grad()
    def swap(self):
        """Exchange the model's weights and the averages, in place."""
        for name, p in self.trainable.items():
            own = p.clone()
            p.copy_(self.weights[name])
            self.weights[name].copy_(own)

    def state_dict(self, model):
        """The model's state dict, with averages in place of its trainable weights."""
        # By address: tied weights have two names there.
        average_of = {p.data_ptr(): self.weights[name] for name, p in self.trainable.items()}
        return {name: average_of.get(p.data_ptr(), p) for name, p in model.state_dict().items()}
