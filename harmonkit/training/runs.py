"""Runs on disk: checkpoints from which a run resumes exactly, and the model that a new run starts with.

A checkpoint, step-000123.pt, holds the weights, their EMA, the optimizer's state, the model's configuration
and the recipe. Data and random draws follow from the recipe's seed and the number of the step.
"""
import contextlib
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch

from harmon import Harmon, HarmonConfig
from harmonkit import checkpoints
from harmonkit.data.latents import LatentCache, cache_latents
from harmonkit.data.mixture import Source, open_mixture
from harmonkit.data.sources import open_source
from harmonkit.devices import barrier
from harmonkit.mar_files import SUBFOLDER, ClassConfig, ClassModel, read_tensors
from harmonkit.shapes_world import world
from harmonkit.shapes_world.tokenizer import train_tokenizer
from harmonkit.tokenizer import load_tokenizer
from harmonkit.training.optim import load_state, make_optimizer, parameter_groups
from harmonkit.training.recipes import settings

FORMAT = 1                        # of checkpoints; raise it with a change after which none resumes exactly
DATA_SETTINGS = {"batch", "micro_batch", "seed", "ratio", "scenes"}         # the data depend on them


# ---- checkpoints -------------------------------------------------------------------------------------------

def checkpoints_of(folder) -> list:
    """The paths of a run's checkpoints, oldest first."""
    return sorted(Path(folder).glob("step-*.pt"))


def last_checkpoint(folder):
    """(path, content) of the newest readable checkpoint, or None. Raises ValueError for another FORMAT."""
    for path in reversed(checkpoints_of(folder)):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, EOFError, OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            print(f"warning: {path} cannot be read, going back to the one before ({reason})", file=sys.stderr)
            continue
        if content.get("format") != FORMAT:
            raise ValueError(
                f"{path}: its format is {content.get('format')}, this train.py reads {FORMAT}. Recipes "
                "and the arithmetic of the diffusion head differ, so the run cannot resume exactly. In the "
                "version that wrote it, add --export FOLDER to its command; here, begin with --init FOLDER "
                "and another --runs")
        return path, content


def model_from_checkpoint(content, which="model_ema") -> Harmon:
    """The model in a checkpoint, with its EMA weights or, which="model", with the weights in training."""
    model = Harmon(HarmonConfig.from_json(content["config"], "checkpoint"))
    model.load_state_dict(content[which], strict=True)
    return model


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


class Run:
    """One run of a recipe, in the folder args.runs/name. `start` makes its model, optimizer and EMA."""

    def __init__(self, name, recipe, args):
        self.name = name
        self.recipe = recipe
        self.args = args
        self.folder = args.runs / name
        _, self.found = last_checkpoint(self.folder) or (None, None)
        self.step = self.found["step"] if self.found else 0                 # steps done

    def start(self) -> tuple:
        """-> model, optimizer and EMA, in the state of the checkpoint if there is one."""
        recipe, found = self.recipe, self.found
        if found:
            self.compare_recipes(found["recipe"])
            self.model = model_from_checkpoint(found, "model")
        else:
            self.model = first_model(self.name, recipe, self.args)
        self.model.tokenizer = self.own_tokenizer()
        self.model.grad_scale = recipe.grad_scale
        self.model.to(self.args.device).train()
        self.optimizer = make_optimizer(parameter_groups(self.model, recipe))
        trainable = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.ema = EMA(trainable, recipe.ema)
        if found:
            load_state(self.optimizer, found["optimizer"])
            for name, weight in self.ema.weights.items():
                weight.copy_(found["model_ema"][name])
        self.found = None                                                   # closes the memory-mapped file
        return self.model, self.optimizer, self.ema

    def compare_recipes(self, before):
        """Warn of settings that differ from those before. Raises ValueError if other parts are trained."""
        now = settings(self.recipe)
        if set(before["lr"]) != set(now["lr"]):
            raise ValueError(f"{self.folder}: the run has trained {', '.join(sorted(before['lr']))} so far; "
                             "another choice needs another --runs")
        changed = [key for key in now if before.get(key) != now[key]]
        if changed and self.args.rank == 0:
            message = ", ".join(f"{key} {before.get(key)} -> {now[key]}" for key in changed)
            if DATA_SETTINGS & set(changed):
                message += "; from here the data come in another order than in one run"
            print(f"warning: the run goes on with {message}", file=sys.stderr)

    def own_tokenizer(self):
        """The tokenizer beside the run's checkpoints. Rank 0 puts it there when the run begins."""
        file = self.folder / "tokenizer.json"
        if self.args.rank == 0 and not self.found:
            with checkpoints.atomic_write(file) as temporary:
                first_tokenizer(self.model, self.args).save(temporary)
        barrier()
        if not file.exists():
            raise ValueError(f"{file}: process {self.args.rank} does not see this file of process 0; --runs "
                             "must be a folder that all nodes share")
        return load_tokenizer(file, self.model.config.llm.vocab_size)

    def save(self, step):
        """Write the checkpoint after `step` steps; keep the newest two. Raises OSError on a full disk."""
        content = {
            "format": FORMAT, "step": step, "config": self.model.config.to_json(),
            "recipe": settings(self.recipe), "model": self.model.state_dict(),
            "model_ema": self.ema.state_dict(self.model), "optimizer": self.optimizer.state_dict(),
        }
        for unfinished in self.folder.glob(".step-*.pt"):                   # a kill left it
            unfinished.unlink()
        try:
            with checkpoints.atomic_write(self.folder / f"step-{step:06d}.pt") as temporary:
                torch.save(content, temporary)
        except (RuntimeError, OSError) as error:                            # torch does not name the disk
            last = (checkpoints_of(self.folder) or ["none"])[-1]
            raise OSError(
                f"the checkpoint of step {step} could not be written to {self.folder}; is the disk full? "
                f"({error}) The last one is {last}, and the same command goes on from it") from None
        for old in checkpoints_of(self.folder)[:-2]:
            old.unlink()


# ---- the start of a new run --------------------------------------------------------------------------------

def first_model(name, recipe, args) -> Harmon:
    """The model of --init or of the recipe before, or one made of components and random weights."""
    if args.init:
        return Harmon.from_pretrained(args.init, vae=args.vae, device="cpu", dtype=torch.float32)
    if recipe.after and not args.init_llm:
        before = args.runs / recipe.after
        found = last_checkpoint(before)
        if found is None:
            raise FileNotFoundError(f"{before}: no checkpoint; {name} starts from {recipe.after}, which must "
                                    "run first, or from --init")
        model = model_from_checkpoint(found[1])
        model.tokenizer = load_tokenizer(before, model.config.llm.vocab_size)
        return model
    if not recipe.from_scratch and not (args.init_llm and args.init_mar and args.vae and args.config):
        raise ValueError(f"{name} starts from trained weights: give --init, a Harmon model, or --init-llm, "
                         "--init-mar, --vae and --config")
    torch.manual_seed(recipe.seed)
    if args.config:
        model = Harmon(checkpoints.find_config(args.config))
    else:
        model = Harmon(HarmonConfig.from_name(recipe.from_scratch))
    for part, path in (("llm", args.init_llm), ("mar", args.init_mar), ("vae", args.vae)):
        if path and part == "mar":
            checkpoints.load_strict(model.mar, read_tensors(Path(path))[0], path, dtype=torch.float32)
        elif path:
            tensors = {key.removeprefix(f"{part}."): p for key, p in checkpoints.read(path).items()}
            checkpoints.load_strict(getattr(model, part), tensors, path, dtype=torch.float32)
    model.llm.tie_weights()
    return model


def first_tokenizer(model, args):
    """That of --tokenizer, --init-llm, --init or the recipe before, else one trained on the shapes world."""
    vocab_size = model.config.llm.vocab_size
    if args.tokenizer:
        return load_tokenizer(args.tokenizer, vocab_size)
    if args.init_llm and Path(args.init_llm).is_dir():
        return load_tokenizer(args.init_llm, vocab_size)
    return model.tokenizer or train_tokenizer(vocab_size)


def open_sources(model, recipe, args) -> list:
    """The sources of --mixture, else of the shapes world. Raises ValueError for latents of another VAE."""
    sources = open_mixture(args.mixture) if args.mixture else shapes_world(model, recipe, args)
    for source in sources:
        if source.latents is not None:
            source.latents.check(model.encode, recipe.size)
    return sources


def shapes_world(model, recipe, args) -> list:
    """A source for each task of the recipe. The latents are computed once and kept beside the runs."""
    folder = args.runs / f"latents-{recipe.seed}-{recipe.tiny.scenes}"
    sources = []
    for task in recipe.ratio:
        kind = "shapes-text" if task == "text" else "shapes"
        samples = open_source(kind, seed=f"train-{recipe.seed}", count=recipe.tiny.scenes)
        source = Source(kind, task, 1, samples)
        if task not in ("text", "reconstruct"):
            cache_latents(model.encode, source, folder, recipe.size, crops=0,
                          rank=args.rank, world_size=args.world_size)
            barrier()
            source = replace(source, latents=LatentCache(folder))
        sources.append(source)
    return sources


# ---- at the end --------------------------------------------------------------------------------------------

@torch.no_grad()
def set_latent_scale(folder, dataset, count=125):
    """Write vae_scale = 1 / standard deviation of `count` micro-batches' latents into the checkpoint."""
    path, content = last_checkpoint(folder)
    vae = model_from_checkpoint(content).vae
    latents = [vae.encode(dataset[number]["pixels"]).mode() for number in range(count)]
    content["config"]["vae_scale"] = round(1 / torch.cat(latents).std().item(), 4)
    with checkpoints.atomic_write(path) as temporary:
        torch.save(content, temporary)


def export(folder, target):
    """Write the EMA weights of a run's last checkpoint as a model folder, in half precision.

    After a run by class the folder also holds its MAR alone, for `sample.py --classes`.
    """
    _, content = last_checkpoint(folder)
    model = model_from_checkpoint(content)
    model.tokenizer = load_tokenizer(folder)
    model.save_pretrained(target, dtype=torch.float16)
    if set(content["recipe"]["ratio"]) == {"mar"}:
        # The MAR draws by class now. It is kept apart, because training with prompts makes it forget.
        names = tuple(world.class_names()) if model.config.mar.class_num == world.LABELS else ()
        config = ClassConfig(model.config.mar, model.config.vae, model.config.vae_scale, names)
        by_class = ClassModel(config)
        by_class.mar = model.mar
        by_class.save_pretrained(Path(target) / SUBFOLDER, dtype=torch.float16, with_vae=False)


# ---- signals -----------------------------------------------------------------------------------------------

@contextlib.contextmanager
def collect_signals():
    """In this block SIGINT and SIGTERM do not end the process. They go into the list that the block gets."""
    received = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in before:
            signal.signal(number, lambda number, _: received.append(number))
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_signals(_):
    """For processes that read data: a signal goes to the whole group, and the run still ends its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.setpgrp()
