"""Training: one loop, a table of recipes. The same file on a laptop and on many GPUs.

    python train.py tiny                                            # harmon-tiny from nothing, on a CPU: its stages in order
    python train.py stage3 --dry-run                                # what would be trained, how, in how much memory
    torchrun --nproc_per_node=8 train.py finetune --init wusize/Harmon-1_5B --mixture mixture.json
    torchrun --nproc_per_node=8 --nnodes=4 train.py stage1 --config harmon-1.5b --init-llm Qwen2.5-1.5B --init-mar mar_huge.pth --vae kl16.ckpt --mixture m.json

Runs live in runs/<recipe>; the same command goes on from the last checkpoint. Every micro-batch and every random draw of it is a function of
(seed, number of the micro-batch), so n steps, a kill and n more give the weights of 2n, on the CPU bit for bit, and the number of processes changes
nothing but the order of sums. Ctrl-C and SIGTERM save before they end; give torchrun time for that (--shutdown-timeout 1800, where it has that flag).
"""
import argparse
import contextlib
import math
import os
import random
import signal
import sys
from dataclasses import asdict, fields, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from harmonkit import checkpoints
from harmonkit.data.mixture import Batches, Ledger, Source, open_mixture, to_model, train_tokenizer
from harmon import Harmon
from harmonkit.data.latents import LatentCache, cache_latents
from harmonkit.training.monitor import Monitor, plot
from harmonkit.training.optim import PARTS, make_optimizer, parameter_groups, schedule
from pretrained import HarmonConfig, choose_device, load_tokenizer
from harmonkit.training.recipes import CHAINS, RECIPES, Recipe, accumulation, dry_run, named_numbers, override
from harmonkit.data.sources import open_source


# ---- losses ----------------------------------------------------------------------------------------------------------

class Losses(nn.Module):
    """The loss of a batch by its task, as a module, so that DistributedDataParallel sees one forward pass."""

    def __init__(self, model, recipe):
        super().__init__()
        self.model, self.recipe = model, recipe

    def forward(self, task, batch):
        model = self.model
        if task == "reconstruct":
            pixels, posterior = batch["pixels"], model.vae.encode(batch["pixels"])
            error = (model.vae.decode(posterior.sample()) - pixels).square().mean()
            nats = posterior.kl().mean(dim=(0, 2, 3))                # of each channel
            return error + self.recipe.kl * nats.clamp(min=self.recipe.free_nats).mean() + self.recipe.local * locality(pixels, posterior.mean)
        if task in ("text", "image2text"):
            return model.image2text_loss(**{"pixels": None} | batch)
        latents = batch["latents"] if "latents" in batch else self.encode(batch["pixels"])
        B, h, w, C = latents.shape
        ratio = 1.0 if torch.rand(()) < self.recipe.all_hidden else math.cos(math.pi / 2 * torch.rand(()).item()) if self.recipe.cosine_mask else None
        mask = model.draw_mask(B, h * w, ratio)
        if task != "mar":
            return model.text2image_loss(None, batch["input_ids"], batch["attention_mask"], latents=latents, mask=mask)
        mar, mul = model.mar, model.mar.config.diffusion_batch_mul   # by itself, as MAR's authors train it: the buffers tell the class
        z = mar.decode(mar.encode(latents.view(B, h * w, C), mask, (h, w), batch["labels"]), mask, (h, w))
        return mar.diffloss.loss(z.flatten(0, 1).repeat(mul, 1), latents.view(-1, C).repeat(mul, 1), mask.flatten().repeat(mul))

    @torch.no_grad()
    def encode(self, pixels):
        return self.model.encode(pixels)


def locality(pixels, codes, scale=0.05):
    """How much codes (B, C, h, w) differ where pixels (B, 3, H, W) do not: mean squared difference over all pairs of tokens, weighted by the likeness of their pixels.

    A VAE with group norms and attention may give a patch of plain color any code, by what else is in the picture. Whoever generates tokens has to guess that.
    """
    patches = F.pixel_unshuffle(pixels, pixels.shape[-1] // codes.shape[-1])
    patches, codes = (x.permute(0, 2, 3, 1).flatten(0, 2) for x in (patches, codes))                     # (B·h·w, 3·s²), (B·h·w, C)
    apart = lambda x: (x.square().mean(1)[:, None] + x.square().mean(1) - 2 * x @ x.T / x.shape[1]).clamp(min=0)  # noqa: E731
    alike = torch.exp(-apart(patches) / (2 * scale ** 2))
    return (alike * apart(codes)).sum() / alike.sum()


def blocks_of(model):
    return [*model.mar.encoder_blocks, *model.mar.decoder_blocks, *model.llm.model.layers]


# ---- checkpoints -----------------------------------------------------------------------------------------------------

def checkpoints(folder):
    return sorted(Path(folder).glob("step-*.pt"))


def save(folder, step, model, averaged, optimizer, recipe, ranks, keep=2):
    state = model.state_dict()
    content = {"step": step, "config": model.config.to_json(), "model": state, "model_ema": state | averaged, "optimizer": optimizer.state_dict(),
               "recipe": asdict(recipe), "ranks": ranks}
    for cut_off in folder.glob(".step-*.pt"):   # left by a kill while saving
        cut_off.unlink()
    try:
        with checkpoints.atomic_write(folder / f"step-{step:06d}.pt") as temporary:
            torch.save(content, temporary)
    except (RuntimeError, OSError) as error:    # torch's own message does not speak of the disk
        raise OSError(f"the checkpoint of step {step} could not be written to {folder}; is the disk full? ({error}) "
                      f"The last one is {(checkpoints(folder) or ['none'])[-1]}, and the same command goes on from it") from None
    for old in checkpoints(folder)[:-keep]:
        old.unlink()


def last_checkpoint(folder):
    """(path, content) of the newest checkpoint that can be read, or None."""
    for path in reversed(checkpoints(folder)):
        try:
            return path, torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, EOFError, OSError, ValueError) as error:
            print(f"warning: {path} cannot be read, going back to the one before ({str(error).splitlines()[0]})", file=sys.stderr)
    return None


def model_of(content, which="model_ema", source="checkpoint"):
    """A checkpoint's content -> the model with its averaged or raw weights."""
    model = Harmon(HarmonConfig.from_json(content["config"], source))
    model.load_state_dict(content[which], strict=True)
    return model


def first_model(recipe, args):
    """The model a new run begins with."""
    if args.init:
        return Harmon.from_pretrained(args.init, vae=args.vae, tokenizer=args.tokenizer, device="cpu", dtype=torch.float32)
    if recipe.after and not args.init_llm:
        before = last_checkpoint(args.runs / recipe.after)
        if before is None:
            raise FileNotFoundError(f"{args.runs / recipe.after}: no checkpoint; {args.recipe} starts from {recipe.after}, which must run first, or from --init")
        return model_of(before[1], source=before[0])
    if not (args.recipe.startswith("tiny") or args.init_llm and args.init_mar and args.vae and args.config):
        raise ValueError(f"{args.recipe} starts from trained weights: give --init, a Harmon model, or --init-llm, --init-mar, --vae and --config")
    torch.manual_seed(recipe.seed)
    model = Harmon(checkpoints.find_config(args.config) if args.config else HarmonConfig.from_name("harmon-tiny"))
    for module, path, prefix in ((model.llm, args.init_llm, "llm."), (model.mar, args.init_mar, "mar."), (model.vae, args.vae, "vae.")):
        if path:
            checkpoints.load_strict(module, {k.removeprefix(prefix): v for k, v in checkpoints.read(path).items()}, path, device="cpu", dtype=torch.float32)
    return model


def find_tokenizer(model, folder, recipe, args):
    """That of --tokenizer, --init-llm or --init; else the run's own, that of the run before, or one made for the shapes world. A run keeps its own beside its checkpoints."""
    given = args.tokenizer or (args.init_llm if args.init_llm and Path(args.init_llm).is_dir() else None)
    file, before = folder / "tokenizer.json", args.runs / recipe.after / "tokenizer.json"
    if args.rank == 0 and (given or model.tokenizer is not None or not file.exists()):
        tokenizer = load_tokenizer(given) if given else model.tokenizer or (load_tokenizer(before) if recipe.after and before.exists() else train_tokenizer(model.config.llm.vocab_size))
        with checkpoints.atomic_write(file) as temporary:
            tokenizer.save(temporary)
    barrier()   # every process comes here, whether the file was there or not
    if not file.exists():
        raise ValueError(f"{file}: process {args.rank} does not see what process 0 wrote; --runs must be a folder that all nodes share")
    return load_tokenizer(file)


# ---- many processes --------------------------------------------------------------------------------------------------

def barrier():
    if dist.is_initialized():
        dist.barrier()


def shapes_world(model, recipe, args):
    """The sources of the shapes world; latents of its pictures are encoded once and kept beside the runs."""
    sources = [Source("shapes", task, 1, open_source("shapes-text" if task == "text" else "shapes", seed=f"train-{recipe.seed}", count=recipe.scenes)) for task in recipe.ratio]
    folder = args.runs / f"latents-{recipe.seed}-{recipe.scenes}"
    seeing = [s for s in sources if s.task not in ("text", "reconstruct")]
    if seeing:
        cache_latents(model.encode, seeing[0], folder, recipe.size, crops=0, rank=args.rank, ranks=args.ranks)
        barrier()
    return [replace(s, latents=LatentCache(folder)) if s in seeing else s for s in sources]


# ---- the loop --------------------------------------------------------------------------------------------------------

def train(name, recipe, args, stop_at=None):
    """Run a recipe to its end (or to step stop_at); returns the last checkpoint's path. args: see `main`."""
    folder, last = args.runs / name, stop_at or recipe.steps
    device, accumulate = args.device, accumulation(recipe, args.ranks)
    found = last_checkpoint(folder)
    step = found[1]["step"] if found else 0
    if step >= last:
        if args.rank == 0:
            print(f"{folder}: finished, {step} steps; give another --runs to train anew", file=sys.stderr)
        return found[0]
    if found and set(found[1]["recipe"]["lr"]) != set(recipe.lr):
        raise ValueError(f"{folder}: the run has trained {', '.join(sorted(found[1]['recipe']['lr']))} so far; another choice needs another --runs")
    model = model_of(found[1], "model", found[0]) if found else first_model(recipe, args)
    model.tokenizer = find_tokenizer(model, folder, recipe, args)
    model.gradient_into_image = recipe.image_gradient
    model.to(device).train()

    optimizer = make_optimizer(parameter_groups(model, recipe), spread=recipe.zero and args.ranks > 1)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    averaged = {n: p.detach().clone() for n, p in trained.items()}
    if found:
        optimizer.load_state_dict(found[1]["optimizer"])
        averaged = {n: found[1]["model_ema"][n].clone().to(device) for n in trained}
        for p, state in optimizer.optim.state.items() if hasattr(optimizer, "optim") else ():
            state["step"] = state["step"].to(p.device)     # ZeroRedundancyOptimizer loads it onto the CPU, where the fused AdamW cannot use it
        changed = {key: f"{key} {value} -> {getattr(recipe, key)}" for key, value in found[1]["recipe"].items() if getattr(recipe, key) != value}
        if changed and args.rank == 0:
            order = "; from here the data come in another order than in one run" if {"batch", "micro_batch", "seed", "ratio", "scenes"} & set(changed) else ""
            print(f"warning: the run goes on with {', '.join(changed.values())}{order}", file=sys.stderr)
    sources = open_mixture(args.mixture) if args.mixture else shapes_world(model, recipe, args)
    for source in sources:
        if source.latents is not None:
            source.latents.check(model.encode, recipe.size)
    batches, ledger = Batches(sources, recipe.ratio, recipe.micro_batch, recipe.size, recipe.seed), Ledger(sources)

    losses = outfit(Losses(model, recipe), recipe)
    wrapped = DistributedDataParallel(losses, device_ids=[device.index] if device.type == "cuda" else None, find_unused_parameters=True,
                                      gradient_as_bucket_view=True) if args.ranks > 1 else losses

    # micro-batch a of process r in step s is number (s · accumulate + a) · ranks + r of the run
    numbers = range(step * accumulate * args.ranks + args.rank, last * accumulate * args.ranks, args.ranks)
    loader = iter(torch.utils.data.DataLoader(batches, batch_size=None, sampler=numbers, num_workers=args.workers, pin_memory=device.type == "cuda",
                                              worker_init_fn=leave_signals_to_the_trainer))
    monitor = Monitor(folder, name, recipe.ratio, step, last, args.rank, args.ranks)
    stopped, not_finite = [], 0
    handlers = {s: signal.signal(s, lambda *_: stopped.append(True)) for s in (signal.SIGINT, signal.SIGTERM)}
    number = numbers.start
    for step in range(step, last):
        for a in range(accumulate):
            with monitor.waiting():
                batch = next(loader)
            ledger.add(batch, monitor.say)
            draws = random.Random(f"{recipe.seed}/{number}").getrandbits(63)
            torch.manual_seed(draws)                       # every draw of this micro-batch: dropout, masks, t, noise
            number += args.ranks
            whole = wrapped.no_sync() if args.ranks > 1 and a + 1 < accumulate else contextlib.nullcontext()
            arguments = to_model(model, batch, recipe.max_length)
            with whole:
                with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bf16 and batch["task"] != "reconstruct"):
                    loss = wrapped(batch["task"], arguments)
                (loss / accumulate).backward()
            monitor.saw(batch["task"], arguments, loss)
        norm = update(optimizer, trained, averaged, recipe, step)
        not_finite = 0 if torch.isfinite(norm) else not_finite + 1
        if not_finite:
            monitor.say(f"step {step + 1}: the gradient is not finite, step skipped ({not_finite} in a row)")
        if not_finite == 10:
            raise ValueError(f"step {step + 1}: ten steps in a row without a finite gradient; the last checkpoint is {checkpoints(folder)[-1:] or 'none'}")
        monitor.step(step + 1, norm, schedule(recipe, step), finite=not not_finite, unusable=sum(ledger.skipped))
        stop = anywhere(bool(stopped), device)
        if (step + 1) % recipe.save_every == 0 or step + 1 == last or stop:
            if hasattr(optimizer, "consolidate_state_dict"):
                optimizer.consolidate_state_dict(to=0)
            if args.rank == 0:
                save(folder, step + 1, model, averaged, optimizer, recipe, args.ranks)
        if recipe.sample_every and (step + 1) % recipe.sample_every == 0 and args.rank == 0:
            monitor.samples(step + 1, model, averaged, recipe.size)
        if stop:
            monitor.say(f"stopped and saved at step {step + 1}; the same command goes on from here")
            sys.exit(130)
    for s, handler in handlers.items():
        signal.signal(s, handler)
    monitor.close()
    barrier()
    if "reconstruct" in recipe.ratio and last == recipe.steps and args.rank == 0:
        set_latent_scale(folder, batches)
    barrier()
    return checkpoints(folder)[-1]


def outfit(losses, recipe):
    """Losses whose blocks recompute their activations and are compiled, as the recipe says: from outside, the model's code knows of neither."""
    for block in blocks_of(losses.model):
        if recipe.checkpointing:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        if recipe.compile:
            block.compile()
    if recipe.compile and "vae" in recipe.lr:
        losses.compile(dynamic=False)
    return losses


def update(optimizer, trained, averaged, recipe, step):
    """Clip the gradients, move weights and averages, unless a gradient is not finite; then clear them. Returns their norm."""
    norm = torch.nn.utils.clip_grad_norm_(trained.values(), recipe.clip)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * schedule(recipe, step)
    if torch.isfinite(norm):
        optimizer.step()
        decay = min(recipe.ema, (step + 1) / (step + 10))  # an average over few steps at first
        torch._foreach_lerp_(list(averaged.values()), [p.detach() for p in trained.values()], 1 - decay)
    optimizer.zero_grad(set_to_none=True)
    return norm


def leave_signals_to_the_trainer(_):
    """Readers of data go on while a stopping run ends its step: terminals and torchrun signal the whole process group."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.setpgrp()


def anywhere(flag, device):
    """Whether the flag is set in any process."""
    if not dist.is_initialized():
        return flag
    flag = torch.tensor(float(flag), device=device)
    dist.all_reduce(flag)
    return flag.item() > 0


@torch.no_grad()
def set_latent_scale(folder, batches, count=125):
    """After the VAE's training: vae_scale = 1 / standard deviation of its latents, written into the checkpoint."""
    path, content = last_checkpoint(folder)
    model = model_of(content)
    latents = torch.cat([model.encode(batches[j]["pixels"]) for j in range(count)]) / model.config.vae_scale
    content["config"]["vae_scale"] = round(1 / latents.std().item(), 4)
    with checkpoints.atomic_write(path) as temporary:
        torch.save(content, temporary)


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=[*CHAINS, *RECIPES])
    parser.add_argument("--mixture", type=Path, help="JSON or TOML file that lists the data (see data.py); default: the shapes world")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs (default: runs)")
    parser.add_argument("--init", help="start from this Harmon model (a name, folder, .pth or hub id) instead of the recipe before")
    parser.add_argument("--init-llm", help="start from this Qwen2.5 folder or file")
    parser.add_argument("--init-mar", help="start from this MAR checkpoint")
    parser.add_argument("--vae", help="kl16.ckpt")
    parser.add_argument("--tokenizer", help="tokenizer.json or its folder")
    parser.add_argument("--config", help="sizes for --init-llm and --init-mar, and for --dry-run: harmon-0.5b, harmon-1.5b or a model folder")
    parser.add_argument("--only", choices=PARTS, help="train this part alone")
    parser.add_argument("--device", help="default: cuda when there is one; under torchrun each process has its own")
    parser.add_argument("--workers", type=int, default=None, help="processes that read data, for each process that trains (default: 8 on a GPU, else none)")
    parser.add_argument("--export", type=Path, help="at the end, write the averaged weights there as a model folder, in half precision")
    parser.add_argument("--dry-run", action="store_true", help="print what would be trained, with which arithmetic and memory, and stop")
    parser.add_argument("--plot", action="store_true", help="draw the run's losses so far to runs/<recipe>/loss.png, and stop")
    for field in fields(Recipe):
        kind = {bool: truth, dict: named_numbers}.get(field.type, field.type)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, metavar={bool: "true|false", dict: "NAME=X,…"}.get(field.type, field.type.__name__),
                            help="override the recipe's value")
    args = parser.parse_args(argv)
    args.rank, args.ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        args.device = choose_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    args.workers = args.workers if args.workers is not None else 8 if args.device.type == "cuda" else 0
    return args


def truth(text):
    """"true" or "false" -> bool"""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def main():
    args = arguments()
    names = CHAINS.get(args.recipe, (args.recipe,))
    try:
        recipes = {name: override(RECIPES[name], args) for name in names}
        if args.dry_run or args.plot:
            for name, recipe in recipes.items():
                dry_run(name, recipe, args) if args.dry_run else print(plot(args.runs / name))
            return
        if args.ranks > 1:
            on_gpu = args.device.type == "cuda"
            dist.init_process_group("nccl" if on_gpu else "gloo", device_id=args.device if on_gpu else None, timeout=timedelta(hours=1))   # a large checkpoint takes long to write
        for name, recipe in recipes.items():
            args.recipe = name
            path = train(name, recipe, args)
            args.init = None
        if args.export and args.rank == 0:
            model = model_of(last_checkpoint(path.parent)[1])
            model.tokenizer = load_tokenizer(path.parent)
            model.save_pretrained(args.export, dtype=torch.float16)
            print(args.export)
    except (ValueError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
