"""Checkpoints of a run: step-000123.pt, written whole or not at all, and checked once when they are read.

A checkpoint holds the weights, their average, the optimizer's state, the model's configuration and the
recipe. Data and random draws follow from the recipe's seed and the number of the step.
"""
import sys
import zipfile
import zlib
from pathlib import Path

import torch

from harmon import Harmon, HarmonConfig
from harmonkit.checkpoints import atomic_write, first_not_finite
from harmonkit.weight_files import check_crc

FORMAT = 1                        # of checkpoints; raise it with a change after which none resumes exactly
KEPT = 2                          # checkpoints


def step_of(path) -> int:
    return int(path.stem.removeprefix("step-"))


def checkpoints_of(folder) -> list:
    """The paths of a run's checkpoints, oldest first."""
    found = [path for path in Path(folder).glob("step-*.pt") if path.stem.removeprefix("step-").isdecimal()]
    return sorted(found, key=step_of)


def last_checkpoint(folder):
    """(path, content) of the newest readable checkpoint, memory-mapped; None if there are no checkpoints.

    Newer ones that are damaged are renamed to step-000123.pt.damaged. Raises ValueError if all are damaged,
    or for another FORMAT.
    """
    damaged = {}
    for path in reversed(checkpoints_of(folder)):
        try:
            check_crc(path)                                                 # torch checks no mapped file
            content = read_checkpoint(path)
        except PermissionError:
            raise
        except (RuntimeError, EOFError, OSError, ValueError) as error:
            damaged[path] = str(error).splitlines()[0].removeprefix(f"{path}: ")
            continue
        set_aside(damaged, path)
        check_format(path, content)
        return path, content
    if damaged:
        path, reason = next(iter(damaged.items()))
        raise ValueError(f"{folder}: none of {len(damaged)} checkpoints can be read; {path.name}: {reason}; "
                         "put a good copy in its place, or train anew with another --runs")
    return None


def read_checkpoint(path) -> dict:
    """The content of a checkpoint, memory-mapped and unchecked."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def set_aside(damaged, good):
    """Rename damaged checkpoints, {path: reason}, so that none is taken for the newest again."""
    for path, reason in damaged.items():
        path.rename(f"{path}.damaged")
        print(f"warning: {path} cannot be read, going back to {good.name} ({reason}); it is now "
              f"{path.name}.damaged", file=sys.stderr)


def check_format(path, content):
    """Raises ValueError for a checkpoint of another FORMAT."""
    format = content.get("format") if isinstance(content, dict) else None
    if format != FORMAT:
        raise ValueError(
            f"{path}: its format is {format}, this train.py reads {FORMAT}. Recipes "
            "and the arithmetic of the diffusion head differ, so the run cannot resume exactly. In the "
            "version that wrote it, add --export FOLDER to its command; here, begin with --init FOLDER "
            "and another --runs")


def write_checkpoint(folder, step, content):
    """Write the checkpoint after `step` steps, and keep KEPT in all.

    Raises ValueError for numbers that are not finite, OSError on a full disk; what was saved before stays.
    """
    saved = checkpoints_of(folder)[-1:]
    last = f"the last checkpoint is {saved[0]}" if saved else "nothing has been saved yet"
    for part in ("model", "model_ema"):
        name = first_not_finite(content[part])
        if name:
            raise ValueError(f"step {step}: {name} is not finite in {part}, so this step is not saved; "
                             f"{last}; try a lower --lr or --clip")
    for unfinished in folder.glob(".step-*.pt"):                            # a kill left it
        unfinished.unlink()
    try:
        with atomic_write(folder / f"step-{step:06d}.pt") as temporary:
            torch.save(content, temporary)
    except (RuntimeError, OSError) as error:                                # torch does not name the disk
        raise OSError(f"the checkpoint of step {step} could not be written to {folder}; is the disk full? "
                      f"({error}); {last}, and the same command goes on from there") from None
    older = [path for path in checkpoints_of(folder) if step_of(path) < step]
    for path in older[:len(older) - KEPT + 1]:
        path.unlink()


def model_from_checkpoint(content, which="model_ema") -> Harmon:
    """The model in a checkpoint, with its EMA weights or, which="model", with the weights in training."""
    model = Harmon(HarmonConfig.from_json(content["config"], "checkpoint"))
    model.load_state_dict(content[which], strict=True)
    return model


def fingerprint_of(path) -> str:
    """8 hexadecimal digits that tell the contents of checkpoints apart, from the checksums in the file."""
    with zipfile.ZipFile(path) as archive:
        checksums = [(entry.filename.partition("/")[2], entry.CRC) for entry in archive.infolist()]
    return f"{zlib.crc32(repr(checksums).encode()):08x}"
