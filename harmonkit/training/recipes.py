"""The recipes of train.py: what is trained on what, how fast and how long, and what that takes.

Add a recipe by adding a line to RECIPES; every field can be changed on the command line.
"""
from dataclasses import dataclass, fields, replace

import torch

from harmon import Harmon
from harmonkit.training.optim import PARTS, parameter_groups, part_of
from pretrained import HarmonConfig

# ---- recipes ---------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Recipe:
    ratio: dict                   # task -> part of the samples
    lr: dict                      # part of the model -> peak learning rate; what is not named is frozen
    steps: int
    batch: int                    # samples a step: devices × micro-batch × accumulation
    micro_batch: int = 8          # samples in a forward pass, all of one source
    size: int = 256               # side of the pictures, pixels
    after: str = ""               # the recipe whose averaged weights it starts from
    warmup: float = 0.01          # part of the steps; then cosine to 0
    weight_decay: float = 0.02    # none on 1-D parameters and the diffusion head
    clip: float = 1.0             # norm of the gradient
    ema: float = 0.9999           # averaged weights are what is sampled from and handed on
    max_length: int = 1024        # text tokens of a sample
    bf16: bool = True             # bfloat16 autocast over float32 weights
    checkpointing: bool = True    # recompute activations of blocks in the backward pass: much less memory, a third more time
    compile: bool = False         # torch.compile the blocks
    zero: bool = False            # optimizer state spread over the processes
    muon: bool = False            # Muon instead of AdamW for the matrices of the blocks (optim.py)
    seed: int = 0
    save_every: int = 1000        # steps
    sample_every: int = 1000      # steps; 0: never
    scenes: int = 40_000          # of the shapes world, when there is no mixture
    kl: float = 1e-2              # of the VAE's loss
    free_nats: float = 1.3        # of each of the VAE's channels, not charged: or it packs all it knows into two of them, in codes too fine to generate
    local: float = 0.05           # of the VAE's loss: the same pixels, the same code
    image_gradient: float = 0.1   # scale of the gradient into the embeddings of images that are only looked at
    all_hidden: float = 0.0       # part of the micro-batches of pictures with every token hidden: before the first is there, the caption decides alone
    cosine_mask: bool = False     # masking ratios as the sampler meets them, cos(π/2 · u), instead of the paper's [0.7, 1]


PAPER = Recipe(ratio={}, lr={}, steps=50_000, batch=4096)   # 2503.21979, Table 1
TINY = Recipe(ratio={}, lr={}, steps=0, batch=32, micro_batch=32, size=64, ema=0.998, warmup=0.05, checkpointing=False, save_every=200, sample_every=0, cosine_mask=True, muon=True)
ALL_TINY = {"mar-decoder": 7e-4, "mar-encoder": 7e-4, "llm": 7e-4}

RECIPES = {
    "stage1": replace(PAPER, ratio={"image2text": 1, "text2image": 2}, lr={"mar-decoder": 1e-4, "mar-encoder": 1e-5}),
    "stage2": replace(PAPER, ratio={"text": 1, "image2text": 3, "text2image": 8}, lr={"mar-decoder": 1e-4, "mar-encoder": 1e-5, "llm": 1e-5}, after="stage1"),
    "stage3": replace(PAPER, ratio={"text": 1, "image2text": 3, "text2image": 16}, lr={"mar-decoder": 2e-5, "mar-encoder": 2e-6, "llm": 2e-6}, size=512, batch=1024,
                      micro_batch=4, after="stage2"),
    "finetune": replace(PAPER, ratio={"text2image": 1}, lr={"mar-decoder": 2e-5, "mar-encoder": 2e-6, "llm": 2e-6}, size=512, batch=128, micro_batch=4, steps=2000, ema=0.999),
    "reca": replace(PAPER, ratio={"reca": 1, "image2text": 1}, lr={"mar-decoder": 1e-5, "mar-encoder": 1e-6, "llm": 1e-6}, size=512, batch=512, micro_batch=4, steps=3000, ema=0.999),
    "tiny-llm": replace(TINY, ratio={"text": 1}, lr={"llm": 1e-3}, steps=800),
    "tiny-vae": replace(TINY, ratio={"reconstruct": 1}, lr={"vae": 1e-3}, steps=3300, batch=16, micro_batch=16, after="tiny-llm", compile=True),
    "tiny-mar": replace(TINY, ratio={"mar": 1}, lr={"mar-decoder": 1e-3, "mar-encoder": 1e-3}, steps=1500, after="tiny-vae"),
    "tiny-align": replace(TINY, ratio={"text2image": 2, "image2text": 1}, lr={"mar-decoder": 7e-4, "mar-encoder": 7e-4}, steps=200, batch=48, micro_batch=16, after="tiny-mar"),
    "tiny-joint": replace(TINY, ratio={"text2image": 10, "image2text": 2, "text": 4}, lr=ALL_TINY, steps=25_000, batch=48, micro_batch=24, after="tiny-align", warmup=0.02,
                          image_gradient=0.3, all_hidden=0.25),
    "tiny-reca": replace(TINY, ratio={"reca": 2, "image2text": 1}, lr={part: 2e-4 for part in ALL_TINY}, steps=800, batch=48, micro_batch=24, after="tiny-joint", warmup=0.02,
                         image_gradient=0.3, all_hidden=0.2),
}
TRAINED_BY = {   # what parts of a model a task's loss depends on
    "text": {"llm"}, "image2text": {"llm", "mar-encoder"}, "text2image": {"llm", "mar-encoder", "mar-decoder"}, "reca": {"llm", "mar-encoder", "mar-decoder"},
    "mar": {"mar-encoder", "mar-decoder"}, "reconstruct": {"vae"},
}
CHAINS = {"tiny": ("tiny-llm", "tiny-vae", "tiny-mar", "tiny-align", "tiny-joint", "tiny-reca")}


def accumulation(recipe, ranks):
    """Micro-batches of one process in a step."""
    share = recipe.micro_batch * ranks
    if recipe.batch % share:
        raise ValueError(f"a batch of {recipe.batch} is no multiple of {ranks} processes × a micro-batch of {recipe.micro_batch}; "
                         f"--batch {max(1, round(recipe.batch / share)) * share} is")
    return recipe.batch // share


def override(recipe, args):
    """The recipe with what the command line changes of it."""
    changed = {f.name: getattr(args, f.name) for f in fields(Recipe) if getattr(args, f.name) is not None}
    recipe = replace(recipe, **changed)
    if args.only:
        if args.only not in recipe.lr:
            raise ValueError(f"--only {args.only}: {args.recipe} trains {', '.join(recipe.lr)}")
        recipe = replace(recipe, lr={args.only: recipe.lr[args.only]})
    for key in ("ratio", "lr"):
        known = {"ratio": TRAINED_BY, "lr": PARTS}[key]
        wrong = [k for k, v in getattr(recipe, key).items() if k not in known or v <= 0]
        if wrong:
            raise ValueError(f"--{key}: {wrong[0]!r} must be one of {', '.join(known)}, with a number above 0")
    if min(recipe.steps, recipe.batch, recipe.micro_batch, recipe.size, recipe.save_every, recipe.sample_every + 1) < 1:
        raise ValueError("steps, batch, micro-batch, size and save-every must be at least 1, sample-every at least 0")
    recipe = replace(recipe, ratio={task: part for task, part in recipe.ratio.items() if TRAINED_BY[task] & set(recipe.lr)})   # a task that nothing learns from has no gradient
    if not recipe.ratio:
        raise ValueError(f"--ratio: no task of it trains {', '.join(recipe.lr)}")
    return recipe


def named_numbers(text):
    """"a=1,b=2" -> {"a": 1.0, "b": 2.0}"""
    return {k: float(v) for k, v in (pair.split("=") for pair in text.split(","))}


def dry_run(name, recipe, args):
    """Print the recipe: parameters and learning rates by part, the arithmetic of the batch, an estimate of the memory."""
    with torch.device("meta"):
        model = Harmon(checkpoints.find_config(args.config or args.init or ("harmon-tiny" if name.startswith("tiny") else "harmon-1.5b")))
    groups = parameter_groups(model, recipe)
    counts = {part: sum(p.numel() for n, p in model.named_parameters() if part_of(n) == part) for part in PARTS}
    print(f"{name}: {recipe.steps} steps of {recipe.batch} samples, {recipe.size} px, " + " : ".join(f"{task} {part:g}" for task, part in recipe.ratio.items()))
    for part, count in counts.items():
        print(f"  {part:12} {count / 1e6:9.1f} M parameters   " + (f"learning rate {recipe.lr[part]:g}" if part in recipe.lr else "frozen"))
    for group in groups:
        print(f"    {group['part']}, weight decay {group['weight_decay']:g}: {sum(p.numel() for p in group['params']) / 1e6:.1f} M in {len(group['params'])} tensors")
    accumulate = accumulation(recipe, args.ranks)
    print(f"  batch {recipe.batch} = {args.ranks} processes × micro-batch {recipe.micro_batch} × accumulation {accumulate}")
    print(f"  warm-up {recipe.warmup * recipe.steps:.0f} steps, then cosine to 0; {recipe.steps * recipe.batch / 1e6:.1f} M samples in all")
    trained, everything = sum(counts[part] for part in recipe.lr), sum(counts.values())
    optimizer = 8 * trained / (args.ranks if recipe.zero else 1)   # of AdamW; Muon's matrices take half
    llm, mar = model.config.llm, model.config.mar
    tokens = (recipe.size // model.config.vae.stride) ** 2 + mar.buffer_size
    # what a block keeps for its backward pass, in 2-byte numbers per token: about 34 widths, 1 with checkpointing (and one block at a time in full)
    keep = recipe.micro_batch * tokens * 2 * sum((1 if recipe.checkpointing else 34) * depth * width for depth, width in (
        (mar.encoder_depth + mar.decoder_depth, mar.embed_dim), (llm.num_hidden_layers, llm.hidden_size)))
    keep += recipe.micro_batch * tokens * 2 * 34 * max(llm.hidden_size, mar.embed_dim) * recipe.checkpointing
    head = mar.diffusion_batch_mul * recipe.micro_batch * tokens * 2 * mar.head_depth * 8 * mar.head_width
    words = 10 * min(1024, recipe.micro_batch * recipe.max_length) * llm.vocab_size                # scores of as many positions as Harmon.image2text_loss takes at once
    rows = {"weights (float32)": 4 * everything, "gradients": 4 * trained, "AdamW": optimizer, "averaged weights": 4 * trained, "activations, roughly": keep + head + words}
    print("  memory per process, estimated: " + ", ".join(f"{k} {v / 1e9:.1f}" for k, v in rows.items()) + f"; in all {sum(rows.values()) / 1e9:.1f} GB")
