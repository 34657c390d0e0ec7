"""Training. One loop, a table of recipes.

    python train.py tiny                 # harmon-tiny from nothing, on the CPU: all stages in order, a few hours
    python train.py tiny-joint           # one of its stages
    python train.py tiny --export checkpoints/harmon-tiny
    python train.py tiny-joint --init harmon-tiny --runs runs/more --steps 2000 --lr 3e-4     # on from a finished model

Runs live in runs/<recipe>. Every run resumes exactly where its last checkpoint left off: batches and random draws are functions of
(seed, step), so n steps, an interruption and n more give the weights of 2n. Ctrl-C and SIGTERM save before they end.

As the paper starts from a pretrained MAR and a pretrained Qwen2.5 (its section 3.4), harmon-tiny starts from its own: a language
model that has read the world's text, a VAE and a MAR that has seen its pictures; then alignment (stage I) and joint training (stage II).
"""
import argparse
import json
import math
import signal
import sys
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from tqdm import tqdm

import weights
from data import ShapesWorld, encode_scenes, train_tokenizer
from harmon import Harmon
from pretrained import HarmonConfig, load_tokenizer


@dataclass(frozen=True)
class Recipe:
    sources: dict                 # task -> samples a step; each is one micro-batch
    steps: int
    trains: tuple                 # prefixes of the parameters that are trained; the rest is frozen
    after: str | None = None      # the recipe whose averaged weights it starts from
    lr: float = 1e-3              # peak; linear warm-up, then cosine to 0
    warmup: int = 100             # steps
    weight_decay: float = 0.02    # none on 1-D parameters and the diffusion head
    clip: float = 1.0             # norm of the gradient
    ema: float = 0.998            # averaged weights are what is evaluated and handed on
    scenes: int = 40_000          # pictures whose latents are cached
    kl: float = 2e-3              # of the VAE's loss
    cosine_mask: bool = False     # masking ratios as the sampler meets them, cos(π/2 · u), instead of the paper's [0.7, 1]
    seed: int = 0
    save_every: int = 200         # steps
    compile: bool = False         # torch.compile the loss


RECIPES = {
    "tiny-llm": Recipe(sources={"text": 32}, steps=1200, trains=("llm.",)),
    "tiny-vae": Recipe(sources={"reconstruct": 16}, steps=2500, trains=("vae.",), after="tiny-llm", compile=True),
    "tiny-mar": Recipe(sources={"mar": 32}, steps=800, trains=("mar.",), after="tiny-vae", cosine_mask=True),
    "tiny-align": Recipe(sources={"text2image": 32, "image2text": 12}, steps=200, trains=("mar.", "proj_in.", "proj_out."), after="tiny-mar", lr=5e-4, cosine_mask=True),
    "tiny-joint": Recipe(sources={"text2image": 32, "image2text": 12, "text": 4}, steps=5600, trains=("mar.", "proj_in.", "proj_out.", "llm."), after="tiny-align",
                         cosine_mask=True),
}
CHAINS = {"tiny": ("tiny-llm", "tiny-vae", "tiny-mar", "tiny-align", "tiny-joint")}


# ---- losses ----------------------------------------------------------------------------------------------------------

def loss_of(model, batch, recipe):
    """The loss of a batch, by its task."""
    task, batch = batch["task"], {k: v for k, v in batch.items() if k != "task"}
    if task == "reconstruct":
        posterior = model.vae.encode(batch["pixels"])
        return (model.vae.decode(posterior.sample()) - batch["pixels"]).square().mean() + recipe.kl * posterior.kl().mean()
    if task in ("mar", "text2image"):
        B, h, w, C = batch["latents"].shape
        mask = model.draw_mask(B, h * w, math.cos(math.pi / 2 * torch.rand(()).item()) if recipe.cosine_mask else None)
    if task == "mar":  # MAR by itself: no text, the buffers carry nothing but what they read off the visible tokens
        latents, mar, mul = batch["latents"], model.mar, model.mar.config.diffusion_batch_mul
        z = mar.decode(mar.encode(latents.view(B, h * w, C), mask, (h, w)), mask, (h, w))
        return mar.diffloss.loss(z.flatten(0, 1).repeat(mul, 1), latents.view(-1, C).repeat(mul, 1), mask.flatten().repeat(mul))
    if task == "text2image":
        return model.text2image_loss(None, mask=mask, **batch)
    return model.image2text_loss(None, **batch)


def parameter_groups(model, recipe):
    """What is trained, in two groups: with weight decay and without. Everything else is frozen."""
    decayed, plain = [], []
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith(recipe.trains))
        if p.requires_grad:
            (plain if p.ndim <= 1 or ".diffloss." in name else decayed).append(p)
    return [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]


def learning_rate(recipe, step):
    return recipe.lr * min(1.0, (step + 1) / recipe.warmup) * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))


# ---- checkpoints -----------------------------------------------------------------------------------------------------

def checkpoints(folder):
    return sorted(Path(folder).glob("step-*.pt"))


def save(folder, step, model, averaged, optimizer, keep=2):
    state = model.state_dict()
    content = {"step": step, "config": model.config.to_json(), "model": state, "model_ema": state | averaged, "optimizer": optimizer.state_dict()}
    with weights.replacing(folder / f"step-{step:06d}.pt") as temporary:
        torch.save(content, temporary)
    for old in checkpoints(folder)[:-keep]:
        old.unlink()


def load_run(path, which="model_ema"):
    """A run's checkpoint -> (model with its averaged or raw weights, the checkpoint's content)."""
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    model = Harmon(HarmonConfig.from_json(content["config"], path))
    model.load_state_dict(content[which], strict=True)
    return model, content


def start(name, recipe, runs, init=None):
    """The model a run begins or goes on with, the step it is at, and the checkpoint it came from (None: a new run)."""
    own = checkpoints(runs / name)
    if own:
        model, content = load_run(own[-1], "model")
        return model, content["step"], content
    if init is not None:
        return Harmon.from_pretrained(init, device="cpu", dtype=torch.float32), 0, None
    if recipe.after is None:
        torch.manual_seed(recipe.seed)
        return Harmon(HarmonConfig.from_name("harmon-tiny")), 0, None
    before = checkpoints(runs / recipe.after)
    if not before:
        raise FileNotFoundError(f"{runs / recipe.after}: no checkpoint; {name} starts from {recipe.after}, which must run first")
    return load_run(before[-1])[0], 0, None


def world(model, recipe, runs):
    """The training data; latents of its pictures are encoded once and kept beside the runs."""
    file = runs / "tokenizer.json"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        (model.tokenizer or train_tokenizer(model.config.llm.vocab_size)).save(str(file))
    model.tokenizer = load_tokenizer(file)
    latents = None
    if not {"reconstruct", "text"} >= set(recipe.sources):
        cache = runs / f"latents-{recipe.scenes}.safetensors"
        if not cache.exists():
            weights.write(cache, {"latents": encode_scenes(model, f"train-{recipe.seed}", recipe.scenes)})
        latents = weights.read(cache)["latents"]
    return ShapesWorld(model, f"train-{recipe.seed}", latents)


# ---- the loop --------------------------------------------------------------------------------------------------------

def train(name, recipe, runs, device, stop_at=None, init=None):
    """Run a recipe to its end (or to step stop_at), from the model `init` if given; returns the last checkpoint's path."""
    folder, last = runs / name, stop_at or recipe.steps
    model, step, content = start(name, recipe, runs, init)
    if step >= last:
        return checkpoints(folder)[-1]
    model.to(device).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe), lr=recipe.lr, betas=(0.9, 0.95), fused=True)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    averaged = {n: p.detach().clone() for n, p in trained.items()}
    if content is not None:
        optimizer.load_state_dict(content["optimizer"])
        averaged = {n: content["model_ema"][n].clone().to(device) for n in trained}
    data = world(model, recipe, runs)
    loss_fn = torch.compile(loss_of, dynamic=False) if recipe.compile else loss_of
    stopped = []
    handlers = {s: signal.signal(s, lambda *_: stopped.append(True)) for s in (signal.SIGINT, signal.SIGTERM)}
    folder.mkdir(parents=True, exist_ok=True)
    sums, total, began = {}, sum(recipe.sources.values()), time.time()
    bar = tqdm(range(step, last), initial=step, total=last, desc=name, disable=None)
    with open(folder / "log.jsonl", "a") as log:
        for step in bar:
            torch.manual_seed(recipe.seed * 1_000_003 + step)  # every draw of this step: dropout, masks, t, noise
            for task, size in recipe.sources.items():
                with torch.autocast(device.type, torch.bfloat16, enabled=task != "reconstruct"):
                    loss = loss_fn(model, data.batch(task, step, size), recipe)
                (loss * size / total).backward()           # every sample of the step counts the same
                sums.setdefault(task, []).append(loss.detach())
            norm = torch.nn.utils.clip_grad_norm_(trained.values(), recipe.clip)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe, step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            decay = min(recipe.ema, (step + 1) / (step + 10))  # an average over few steps at first
            torch._foreach_lerp_(list(averaged.values()), [p.detach() for p in trained.values()], 1 - decay)
            if (step + 1) % 25 == 0:
                means = {task: round(torch.stack(v).mean().item(), 4) for task, v in sums.items()}
                log.write(json.dumps({"step": step + 1, "loss": means, "lr": learning_rate(recipe, step), "norm": round(norm.item(), 3),
                                      "seconds": round(time.time() - began, 1)}) + "\n")
                log.flush()
                bar.set_postfix(means)
                sums = {}
            if (step + 1) % recipe.save_every == 0 or step + 1 == last or stopped:
                save(folder, step + 1, model, averaged, optimizer)
            if stopped:
                print(f"stopped and saved at step {step + 1}; the same command goes on from here", file=sys.stderr)
                sys.exit(130)
    for s, handler in handlers.items():
        signal.signal(s, handler)
    if "reconstruct" in recipe.sources and last == recipe.steps:
        set_latent_scale(folder, min(2000, recipe.scenes))
    return checkpoints(folder)[-1]


def set_latent_scale(folder, count):
    """After the VAE's training: vae_scale = 1 / standard deviation of its latents, written into the checkpoint."""
    path = checkpoints(folder)[-1]
    model, content = load_run(path)
    latents = encode_scenes(model, "scale", count).float() / model.config.vae_scale
    content["config"]["vae_scale"] = round(1 / latents.std().item(), 4)
    with weights.replacing(path) as temporary:
        torch.save(content, temporary)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=[*CHAINS, *RECIPES])
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs (default: runs)")
    parser.add_argument("--init", help="start from this model (a folder, a name) instead of the recipe before")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--export", type=Path, help="at the end, write the averaged weights there as a model folder, in half precision")
    for field in fields(Recipe):
        if field.type in (int, float):
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=field.type, help="override the recipe's value")
    args = parser.parse_args()
    overrides = {f.name: getattr(args, f.name) for f in fields(Recipe) if getattr(args, f.name, None) is not None}
    try:
        chain = CHAINS.get(args.recipe, (args.recipe,))
        for name in chain:
            path = train(name, replace(RECIPES[name], **overrides), args.runs, torch.device(args.device), init=args.init if name == chain[0] else None)
        if args.export:
            model, _ = load_run(path)
            model.tokenizer = load_tokenizer(args.runs / "tokenizer.json")
            model.save_pretrained(args.export, dtype=torch.float16)
            print(args.export)
    except (ValueError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
