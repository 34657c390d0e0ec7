"""The runner of the drawing benchmarks: draw what is missing, then score.

A drawing benchmark is a module with

    PER_PROMPT, SEED_STRIDE       sample s of prompt p has the seed SEED + SEED_STRIDE·p + s
    add_arguments(parser)         its own flags; --data is its prompt file
    read(args)                    -> [Item, …]
    picture(number, item, sample) -> the path of a picture in the folder of results
    score(out, items, args)       -> Result, or None where a scorer is needed that is not here
    read_scores(file, args)       -> Result of a file that the official scorer wrote

and perhaps

    seed_number(number, item)     which stands for p
    grid(number, item)            -> the path of a grid of the item's pictures
    prepare(out, number, item)    writes what stands beside the pictures
    check(args)                   raises ValueError before the model is loaded
    scorer(args)                  -> a dictionary of what scores depend on besides the pictures, or None

A picture's PNG holds its prompt, seed and settings, so a killed run goes on where it was, with any number of
processes.
"""
import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from harmonkit import outputs
from harmonkit.devices import barrier, connected, rank_and_world_size
from harmonkit.drawing import (
    check_seed,
    default_num_iter,
    draw_in_fixed_batches,
    draw_prompts,
    parse_size,
    sampling_settings,
)
from harmonkit.evals import benchmark, manifest
from harmonkit.outputs import Picture, Sheet
from harmonkit.pipeline import token_grid


@dataclass(frozen=True)
class Job:
    """A run of a benchmark: everything that is known before the first picture is drawn."""
    module: object
    args: object
    out: Path
    items: list
    total: int                  # items of the whole benchmark, without --limit
    loaded: benchmark.Loaded
    settings: dict              # as each PNG says them
    sheets: list                # a Sheet for each item
    manifest: dict


def run(name, module, args, out):
    """Draw, score and show a benchmark in the folder `out` -> Result, or None where nothing could be scored.

    Raises ValueError or OSError before anything is drawn, if the flags, the data or the folder are wrong.
    """
    with connected():
        job = begin(name, module, args, out)
        draw(job, job.sheets)
        return finish(job)


# ---- begin -----------------------------------------------------------------------------------------------

def begin(name, module, args, out) -> Job:
    """Read, check and plan everything, and write the manifest."""
    out = Path(out)
    items = check(module, args, out)
    total = len(items)
    listed = json.dumps([(item.name, item.prompt) for item in items])
    prompts_digest = hashlib.sha256(listed.encode()).hexdigest()
    items = items[:args.limit]
    size = parse_size(args.size)
    loaded = benchmark.load(args)
    settings = settings_of(loaded, args, size)
    sheets = plan(module, items, args.seed, settings, out)
    elsewhere = (*outputs.NOT_COMPARED, "weights")
    compared = {key: value for key, value in settings.items() if key not in elsewhere}
    compared |= {"per_prompt": module.PER_PROMPT, "prompts_sha256": prompts_digest}
    about = manifest.start(
        out, name, args, loaded, settings=compared, data=benchmark.data_files(module, args),
        seed_rule=f"seed + {module.SEED_STRIDE}·prompt + sample",
        scorer=module.scorer(args) if hasattr(module, "scorer") else None)
    if rank_and_world_size()[0] == 0 and hasattr(module, "prepare"):
        for number, item in enumerate(items):
            module.prepare(out, number, item)
    barrier()
    return Job(module, args, out, items, total, loaded, settings, sheets, about)


def check(module, args, out) -> list:
    """All Items. Raises ValueError or OSError for flags, data or a folder that cannot be used."""
    benchmark.check_common(args)
    check_seed(args.seed)
    parse_size(args.size)
    sampling_settings(args)
    if hasattr(module, "check"):
        module.check(args)
    outputs.check_folder(out)
    return module.read(args)


def settings_of(loaded, args, size) -> dict:
    """What a picture depends on besides its prompt and seed, as its PNG says it."""
    model = loaded.model
    grid = token_grid(model, size)
    defaults = {"num_iter": default_num_iter(grid)}
    sampling = sampling_settings(args, **defaults)
    return vars(sampling) | {"size": [side * model.config.vae.stride for side in grid]} | loaded.about


def plan(module, items, seed, settings, out) -> list:
    """A Sheet for each item. Raises ValueError if two files are one."""
    about = json.dumps(settings)
    about_grid = json.dumps(settings | {"pictures": module.PER_PROMPT})
    sheets, prompt_of = [], {}
    for number, item in enumerate(items):
        p = module.seed_number(number, item) if hasattr(module, "seed_number") else number
        first = seed + module.SEED_STRIDE * p
        pictures = tuple(Picture(out / module.picture(number, item, s), item.prompt, first + s, about)
                         for s in range(module.PER_PROMPT))
        grid = None
        if hasattr(module, "grid"):
            grid = Picture(out / module.grid(number, item), item.prompt, first, about_grid)
        sheet = Sheet(pictures, grid)
        for file in sheet.files:
            if file.path in prompt_of:
                raise ValueError(f"{prompt_of[file.path]} and {item.name} both give the file {file.path}; "
                                 "each needs an id of its own")
            prompt_of[file.path] = item.name
        sheets.append(sheet)
    return sheets


# ---- draw and finish -------------------------------------------------------------------------------------

def draw(job, sheets):
    """Draw this process's part of what the sheets lack, and wait for the other processes."""
    size = job.settings["size"]
    draw_prompts(job.loaded.model, sheets, size, job.settings, job.args, draw=draw_in_fixed_batches)
    barrier()


def finish(job):
    """Score the pictures and write manifest.json and scores.json, in process 0 alone -> Result or None."""
    if rank_and_world_size()[0] != 0:
        return None
    pictures = len(job.items) * job.module.PER_PROMPT
    numbers = {"prompts": len(job.items), "of": job.total, "pictures": pictures}
    left = outputs.left_to_draw(job.sheets)
    if left:                        # processes that cannot talk to each other do not wait for each other
        numbers |= {"drawn": pictures - len(left) * job.module.PER_PROMPT, "missing prompts": len(left)}
        manifest.finish(job.out, job.manifest, numbers, status="drawing")
        print(f"{job.out}: {len(left)} of {len(job.items)} prompts are not drawn yet; the same command draws "
              "and scores them", file=sys.stderr)
        return None
    result = job.module.score(job.out, job.items, job.args)
    numbers |= {"drawn": pictures, "failed": 0}
    return manifest.finish(job.out, job.manifest, numbers, result)
