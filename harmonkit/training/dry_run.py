"""`python train.py RECIPE --dry-run`: what a recipe trains, at which rates, in how much memory."""
import torch

from harmon import Harmon, HarmonConfig
from harmonkit.checkpoints import find_config
from harmonkit.config import infer_config
from harmonkit.data.mixture import open_mixture
from harmonkit.data.order import source_shares
from harmonkit.training.checkpoint_files import checkpoints_of, read_checkpoint
from harmonkit.training.optim import PARTS, parameter_groups, part_of
from harmonkit.training.recipes import accumulation, check_size
from harmonkit.weight_files import find_model, read


def config_of(recipe, args) -> HarmonConfig:
    """The sizes of the model that the command would train. Raises ValueError or OSError."""
    if args.config or not args.init:
        return find_config(args.config or recipe.from_scratch or "harmon-1.5b")
    if checkpoints_of(args.init):
        newest = checkpoints_of(args.init)[-1]
        return HarmonConfig.from_json(read_checkpoint(newest)["config"], newest)
    path = find_model(args.init)
    return find_config(args.init) if path.is_dir() else infer_config(read(path), path)


def dry_run(name, recipe, args):
    """Print the recipe called `name`. args: of train.py.

    Raises ValueError or OSError where the run would, before it loads weights.
    """
    config = config_of(recipe, args)
    check_size(recipe, config)
    if args.mixture:
        source_shares(open_mixture(args.mixture), recipe.ratio)
    with torch.device("meta"):
        model = Harmon(config)
    groups = parameter_groups(model, recipe)
    millions = dict.fromkeys(PARTS, 0.0)
    for parameter_name, p in model.named_parameters():
        millions[part_of(parameter_name)] += p.numel() / 1e6
    accumulate = accumulation(recipe, args.world_size)
    ratio = " : ".join(f"{task} {part:g}" for task, part in recipe.ratio.items())
    print(f"{name}: {recipe.steps} steps of {recipe.batch} samples, {recipe.size} px, {ratio}")
    for part, count in millions.items():
        rate = f"learning rate {recipe.lr[part]:g}" if part in recipe.lr else "frozen"
        print(f"  {part:12} {count:9.1f} M parameters   {rate}")
    for group in groups:
        count = sum(p.numel() for p in group["params"]) / 1e6
        print(f"    {group['part']}, weight decay {group['weight_decay']:g}: "
              f"{count:.1f} M in {len(group['params'])} tensors")
    print(f"  batch {recipe.batch} = {args.world_size} processes × micro-batch {recipe.micro_batch} "
          f"× accumulation {accumulate}")
    print(f"  warm-up {recipe.warmup * recipe.steps:.0f} steps, then cosine to 0; "
          f"{recipe.steps * recipe.batch / 1e6:.1f} M samples in all")

    # Gigabytes. Muon keeps half of AdamW's state.
    trainable = sum(millions[part] for part in recipe.lr) / 1e3
    memory = {"weights (float32)": 4 * sum(millions.values()) / 1e3, "gradients": 4 * trainable,
              "AdamW": 8 * trainable, "averaged weights": 4 * trainable,
              "activations, roughly": activation_bytes(model.config, recipe) / 1e9}
    print(f"  memory per process, estimated: {', '.join(f'{k} {v:.1f}' for k, v in memory.items())}; "
          f"in all {sum(memory.values()):.1f} GB")


def activation_bytes(config, recipe) -> float:
    """Roughly what the forward pass of a micro-batch keeps for the backward pass."""
    llm, mar = config.llm, config.mar
    tokens = recipe.micro_batch * ((recipe.size // config.vae.stride) ** 2 + mar.buffer_size)
    # A block keeps about 34 numbers a channel; with checkpointing 1, and one block at a time all 34.
    channels = llm.num_hidden_layers * llm.hidden_size
    channels += (mar.encoder_depth + mar.decoder_depth) * mar.embed_dim
    blocks = 34 * channels
    if recipe.checkpointing:
        blocks = channels + 34 * max(llm.hidden_size, mar.embed_dim)
    head = mar.diffusion_batch_mul * mar.head_depth * 8 * mar.head_width
    # Scores over the vocabulary, for as many positions as `fast.chunk_next_token_loss` takes at once.
    scores = 10 * llm.vocab_size * min(1024, recipe.micro_batch * recipe.max_length)
    return 2 * tokens * (blocks + head) + scores                            # numbers of 2 bytes
