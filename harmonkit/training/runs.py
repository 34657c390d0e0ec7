"""A run in its folder: what it starts from, how it resumes, what it saves."""
import copy
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from harmon import Harmon, HarmonConfig
from harmonkit import checkpoints
from harmonkit.data.caching import cache_latents
from harmonkit.data.latents import LatentCache
from harmonkit.data.mixture import Fit, MixtureDataset, Source, open_mixture
from harmonkit.data.order import source_shares
from harmonkit.data.sources import open_source
from harmonkit.devices import barrier
from harmonkit.mar_files import SUBFOLDER, ClassConfig, ClassModel, read_tensors
from harmonkit.shapes_world import world
from harmonkit.shapes_world.tokenizer import train_tokenizer
from harmonkit.tokenizer import load_tokenizer
from harmonkit.training import changes, record
from harmonkit.training.checkpoint_files import (
    FORMAT,
    checkpoints_of,
    last_checkpoint,
    model_from_checkpoint,
    read_checkpoint,
    write_checkpoint,
)
from harmonkit.training.optim import EMA, load_state, make_optimizer, parameter_groups
from harmonkit.training.processes import lock
from harmonkit.training.recipes import check_size, flag_of, settings


class Run:
    """One run of a recipe, in the folder args.runs/name. `start` makes its model, optimizer and EMA.

    Raises ValueError where the command asks for another run than the folder holds, or another process trains
    there.
    """

    def __init__(self, name, recipe, args):
        self.name = name
        self.recipe = recipe
        self.args = args
        self.folder = args.runs / name
        self.found = self.find_checkpoint()
        self.step = self.found["step"] if self.found else 0                 # steps done
        self.sources = self.open_data()
        self.record = self.compare()
        if self.found:
            self.check_tokenizer()

    @property
    def is_finished(self):
        return self.step >= self.recipe.steps

    def find_checkpoint(self):
        """The content of the last checkpoint, or None: process 0 locks the folder and finds it for all.

        What process 0 refuses ends the others with status 2, so that one of them says why.
        """
        found, error = None, None
        if self.args.rank == 0:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self.lock = lock(self.folder)
                found = last_checkpoint(self.folder)
            except (ValueError, OSError) as raised:
                error = raised
        box = [found and found[0], error is not None]
        if dist.is_initialized():
            dist.broadcast_object_list(box)
        if error is not None:
            raise error
        path, is_refused = box
        if is_refused:
            sys.exit(2)
        if self.args.rank == 0:
            return found and found[1]
        if path and not path.exists():
            raise ValueError(f"{path}: process {self.args.rank} does not see this file of process 0; --runs "
                             "must be a folder that all nodes share")
        return read_checkpoint(path) if path else None

    def open_data(self) -> list:
        """The sources of --mixture, else of the shapes world, whose latents `start` adds.

        None if they cannot be opened, but the run is finished and needs them no more.
        """
        recipe, args = self.recipe, self.args
        if args.mixture:
            try:
                sources = open_mixture(args.mixture)
            except (ValueError, OSError):
                if self.is_finished:
                    return None
                raise
        else:
            sources = [shapes_source(task, recipe) for task in recipe.ratio]
        source_shares(sources, recipe.ratio)                                # checks the tasks
        return sources

    def compare(self) -> dict:
        """The record of this start. Says what differs from the run so far, or raises ValueError."""
        before = record.read(self.folder)
        now = record.describe(self.name, self.recipe, self.args, self.sources)
        start = record.describe_start(self.step, self.args)
        if self.found and before is None:
            before = {"settings": self.found["recipe"]}
            changes.say(["no run.json, so its start and its data cannot be compared"], self.args.rank)
        if self.found:
            said = changes.compare(self.folder, before, now, self.is_finished)
            start["changes"] = said + changes.compare_versions(before, start)
            changes.say(start["changes"], self.args.rank)
        # What a resumed run started from stays as it was.
        before = before or {}
        kept = ("name", "start", "tokenizer") if self.found else ("name",)
        return now | {key: before[key] for key in kept if key in before} | {
            "starts": [*before.get("starts", []), start]}

    def start(self) -> tuple:
        """-> model, optimizer and EMA, in the state of the checkpoint if there is one."""
        recipe, found = self.recipe, self.found
        if found:
            self.model = model_from_checkpoint(found, "model")
        else:
            self.model = first_model(self.name, recipe, self.args)
        check_size(recipe, self.model.config)
        self.model.tokenizer = self.own_tokenizer()
        self.model.grad_scale = recipe.grad_scale
        self.model.to(self.args.device).train()
        self.optimizer = make_optimizer(parameter_groups(self.model, recipe))
        trainable = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.ema = EMA(trainable, recipe.ema)
        if found:
            # A copy: torch would go on using the mapped file, whose space is needed after it is deleted.
            load_state(self.optimizer, copy.deepcopy(found["optimizer"]))
            for name, weight in self.ema.weights.items():
                weight.copy_(found["model_ema"][name])
        self.found = None                                                   # closes the memory-mapped file
        self.dataset = self.make_dataset()
        if self.args.rank == 0:
            record.write(self.folder, self.record, self.args.mixture)
        return self.model, self.optimizer, self.ema

    def check_tokenizer(self):
        """Raises ValueError unless the tokenizer beside the checkpoints is that of run and command."""
        file = self.folder / "tokenizer.json"
        if not file.exists():
            raise ValueError(f"{file}: no such file, but this run has trained with it; put it back, or that "
                             "of an exported model")
        own = load_tokenizer(file)
        if self.record.get("tokenizer", digest(own)) != digest(own):
            raise ValueError(f"{file}: not the tokenizer that this run has trained with; put that back")
        asked = self.args.tokenizer
        if asked and digest(load_tokenizer(asked)) != digest(own):
            raise ValueError(f"--tokenizer {asked}: {self.folder} has another; leave the flag out to go on, "
                             "or give another --runs")

    def own_tokenizer(self):
        """The tokenizer beside the run's checkpoints. Rank 0 puts it there when the run begins."""
        file = self.folder / "tokenizer.json"
        if self.args.rank == 0 and not self.found:
            checkpoints.write_tokenizer(file, first_tokenizer(self.model, self.args))
        barrier()
        if not file.exists():
            raise ValueError(f"{file}: process {self.args.rank} does not see this file of process 0; --runs "
                             "must be a folder that all nodes share")
        tokenizer = load_tokenizer(file, self.model.config.llm.vocab_size)
        self.record["tokenizer"] = digest(tokenizer)
        return tokenizer

    def make_dataset(self):
        """The micro-batches by number. Raises ValueError for latents of another VAE."""
        model, recipe, args = self.model, self.recipe, self.args
        sources = self.sources if args.mixture else with_latents(model, self.sources, recipe, args)
        for source in sources:
            if source.latents is not None:
                source.latents.check(model.encode, recipe.size)
        fit = Fit.of(model, recipe.size, recipe.max_length)
        return MixtureDataset(sources, recipe.ratio, recipe.micro_batch, recipe.size, recipe.seed, fit)

    def last_path(self) -> Path:
        """The last checkpoint's."""
        return checkpoints_of(self.folder)[-1]

    def say_finished(self) -> Path:
        if self.args.rank == 0:
            print(f"{self.folder}: finished, {self.step} steps; another --runs trains anew", file=sys.stderr)
        return self.last_path()

    def save(self, step):
        """Write the checkpoint after `step` steps. Raises OSError or ValueError as `write_checkpoint`."""
        content = {
            "format": FORMAT, "step": step, "config": self.model.config.to_json(),
            "recipe": settings(self.recipe), "model": self.model.state_dict(),
            "model_ema": self.ema.state_dict(self.model), "optimizer": self.optimizer.state_dict(),
        }
        if step == self.recipe.steps and "reconstruct" in self.recipe.ratio:
            # Before it is saved, so that a run with all its steps lacks nothing.
            vae = model_from_checkpoint(content).vae
            content["config"]["vae_scale"] = latent_scale(vae, self.dataset)
        write_checkpoint(self.folder, step, content)


# ---- the start of a new run --------------------------------------------------------------------------------

def first_model(name, recipe, args) -> Harmon:
    """The model of --init or of the recipe before, or one made of components and random weights."""
    if args.init and checkpoints_of(args.init):
        refuse_unused(args, "init", "init_llm", "init_mar", "config", "vae")
        return model_of_run(Path(args.init))
    if args.init:
        refuse_unused(args, "init", "init_llm", "init_mar", "config")
        return Harmon.from_pretrained(args.init, vae=args.vae, device="cpu", dtype=torch.float32)
    if recipe.after and not args.init_llm:
        refuse_unused(args, None, "init_mar", "config", "vae")
        return model_of_run(args.runs / recipe.after, wanted_by=name)
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


def refuse_unused(args, used, *others):
    """Raises ValueError if a flag is given that has no effect beside the used one."""
    for key in others:
        if getattr(args, key):
            where = f"beside --{used}, a whole model" if used else "without --init or --init-llm"
            raise ValueError(f"{flag_of(key)} {getattr(args, key)} has no effect {where}; leave it out")


def model_of_run(folder, wanted_by=None) -> Harmon:
    """The averaged weights of a run's last checkpoint. wanted_by: a recipe, for which it must be finished."""
    found = last_checkpoint(folder)
    if found is None:
        raise FileNotFoundError(f"{folder}: no checkpoint; {wanted_by} starts from {folder.name} (--after), "
                                "which must run first, or from --init")
    _, content = found
    steps = content["recipe"]["steps"]
    if wanted_by and content["step"] < steps:
        raise ValueError(f"{folder}: {content['step']} of {steps} steps are done, {wanted_by} needs all; "
                         f"--init {folder} starts from it as it is")
    return averaged_model(folder, content)


def averaged_model(folder, content) -> Harmon:
    """The averaged weights of a checkpoint's content, with the run's tokenizer."""
    model = model_from_checkpoint(content)
    model.tokenizer = load_tokenizer(folder, model.config.llm.vocab_size)
    return model


def first_tokenizer(model, args):
    """That of --tokenizer, --init-llm, --init or the recipe before, else one trained on the shapes world."""
    vocab_size = model.config.llm.vocab_size
    if args.tokenizer:
        return load_tokenizer(args.tokenizer, vocab_size)
    if args.init_llm and Path(args.init_llm).is_dir():
        return load_tokenizer(args.init_llm, vocab_size)
    return model.tokenizer or train_tokenizer(vocab_size)


def digest(tokenizer) -> str:
    """8 hexadecimal digits that tell tokenizers apart."""
    return f"{zlib.crc32(tokenizer.to_str().encode()):08x}"


# ---- the shapes world --------------------------------------------------------------------------------------

def shapes_source(task, recipe) -> Source:
    """The data of a task where there is no mixture."""
    kind = "shapes-text" if task == "text" else "shapes"
    samples = open_source(kind, seed=f"train-{recipe.seed}", count=recipe.tiny.scenes)
    return Source(kind, task, 1, samples)


def with_latents(model, sources, recipe, args) -> list:
    """The sources of the shapes world with latents, computed once and kept beside the runs."""
    folder = args.runs / f"latents-{recipe.seed}-{recipe.tiny.scenes}"
    opened = []
    for source in sources:
        if source.task not in ("text", "reconstruct"):
            # One task for all recipes, whose squares of these square images are the same.
            cache_latents(model.encode, replace(source, task="text2image"), folder, recipe.size, crops=0,
                          rank=args.rank, world_size=args.world_size)
            barrier()
            source = replace(source, latents=LatentCache(folder))
        opened.append(source)
    return opened


# ---- at the end --------------------------------------------------------------------------------------------

@torch.no_grad()
def latent_scale(vae, dataset, count=125) -> float:
    """1 / standard deviation of the latents of the first `count` micro-batches."""
    latents = [vae.encode(dataset[number]["pixels"]).mode() for number in range(count)]
    return round(1 / torch.cat(latents).std().item(), 4)


def export(folder, target):
    """Write the EMA weights of a run's last checkpoint as a model folder, in half precision.

    After a run by class the folder also holds its MAR alone, for `sample.py --classes`.
    """
    _, content = last_checkpoint(folder)
    model = averaged_model(folder, content)
    model.save_pretrained(target, dtype=torch.float16)
    if set(content["recipe"]["ratio"]) == {"mar"}:
        # The MAR draws by class now. It is kept apart, because training with prompts makes it forget.
        names = tuple(world.class_names()) if model.config.mar.class_num == world.LABELS else ()
        config = ClassConfig(model.config.mar, model.config.vae, model.config.vae_scale, names)
        by_class = ClassModel(config)
        by_class.mar = model.mar
        by_class.save_pretrained(Path(target) / SUBFOLDER, dtype=torch.float16, with_vae=False)
