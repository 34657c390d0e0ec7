"""VAE latents of a source's images, computed once: training then needs neither the pixels nor the VAE.

latents.py describes the folder, reads it and compares it with the source. `cache_latents` writes it, and
when it runs again, computes what is missing, damaged or of images that have changed since.

Letters: B batch, S image side in pixels, h×w token grid, C latent channels.
"""
import contextlib
import json
import math
import os
import random
import re
import sys
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from harmonkit import checkpoints
from harmonkit.config import HarmonConfig
from harmonkit.data import latents as cached
from harmonkit.data.latents import (
    NOTHING,
    Shard,
    bits_of,
    check_vae,
    checksums,
    difference,
    is_alike,
    origin_at,
    origin_of,
    pack_texts,
    probe,
    read_about,
    shard_file,
    shared,
    squares_of,
    why_another_task,
)
from harmonkit.data.records import SkipSample, lacking
from harmonkit.images import image_to_pixels, reject_reason, training_squares
from vae import AutoencoderKL, VAEConfig

UNFINISHED = re.compile(r"\.(\d+\.safetensors|about\.json)\..*")


@torch.no_grad()
def cache_latents(encode, source, folder, size, *, crops=2, batch=50, rank=0, world_size=1, everything=False):
    """Write the latents of a source's images to a folder. Each rank writes its own shards.

    encode: pixels (B, 3, S, S) -> latents (B, h, w, C). size: S. batch: the B from which `encode` is called.
    crops: random squares of each image, 0 = the middle one; for understanding one padded image instead.
    everything: compare all samples with those of the shards that exist, and all checksums; otherwise some.
    Raises ValueError if the folder's latents come from another size, task, source or VAE, or if not one image
    is usable, and OSError if the disk is full.
    """
    folder = Path(folder)
    count = len(source.samples)
    about = {"format": cached.FORMAT, "size": size, "squares": squares_of(source.task, crops),
             "task": source.task, "count": count, "source": os.path.basename(source.path),
             "fingerprint": source.samples.fingerprint(), "torch": torch.__version__, "probe": probe(encode)}
    if not all(map(math.isfinite, about["probe"])):
        raise ValueError(f"{source.path}: the VAE's latents are not finite; is its file damaged?")
    for unfinished in folder.glob(".*"):                        # a kill left it
        if UNFINISHED.fullmatch(unfinished.name):
            unfinished.unlink(missing_ok=True)
    before = read_about(folder) if (folder / "about.json").exists() else None
    if before and shards_in(folder):
        refuse(folder, before, about, source)
        about = before | {key: about[key] for key in ("count", "fingerprint")}
        source = replace(source, task=about["task"])            # a new shard is made like the others
        crops = 0 if about["squares"] == "middle" else crops
    if rank == 0 and about != before:
        write(checkpoints.write_text, folder / "about.json", json.dumps(about))

    shards = range(-(-count // cached.SHARD))
    mine = shards[rank::world_size]
    for k in tqdm(mine, desc=f"latents of {source.path}", disable=None, leave=False):
        file = shard_file(folder, k)
        samples = range(k * cached.SHARD, min(count, (k + 1) * cached.SHARD))
        if file.exists():
            reason = why_anew(file, about, source.samples, samples, everything)
            if not reason:
                continue
            tqdm.write(f"{file}: made again: {reason}", file=sys.stderr)
        tensors = encode_samples(encode, source, samples, size, crops, batch)
        about_text = torch.frombuffer(bytearray(json.dumps(shared(about)).encode()), dtype=torch.uint8)
        write(checkpoints.write, file, tensors | {"about": about_text})
    if rank == 0:
        for file in shards_in(folder):
            if int(file.stem) not in shards:                    # of a source that was longer
                file.unlink(missing_ok=True)
    refuse_nothing(folder, source.path, shards)


def shards_in(folder) -> list:
    return [file for file in sorted(folder.glob("*.safetensors")) if file.stem.isdigit()]


def write(save, file, content):
    """save(file, content). Another process may take its temporary file for one that a kill left; then again.

    Raises OSError that names the file.
    """
    for _ in range(5):
        try:
            return save(file, content)
        except FileNotFoundError as error:
            failed = error
        except OSError as error:
            failed = error
            break
    named = str(failed) if str(failed).startswith(f"{file}: ") else f"{file}: could not be written ({failed})"
    raise OSError(f"{named}; what is complete stays, and the same command goes on from there") from None


def refuse(folder, before, now, source):
    """Raises ValueError unless what a folder holds can be made that of `now`; both as in about.json."""
    check_vae(folder, before, now["probe"], now["size"])
    task, another, shards = before["task"], "", []
    for file in shards_in(folder):
        with contextlib.suppress(ValueError):                   # a damaged one will be made again
            shards.append(Shard(file))
    if task != now["task"]:
        another = why_another_task(shards, task, now["task"], now["size"])
    if another or "random" in before["squares"] + now["squares"] and before["squares"] != now["squares"]:
        raise ValueError(f"{folder}: latents for the task {task} ({before['squares']} squares), but those "
                         f"for {now['task']} ({now['squares']} squares) are wanted; give another folder")
    if before["source"] != now["source"] and shards:
        first = int(shards[0].file.stem) * cached.SHARD
        now_there = origin_at(source.samples, first) if first < now["count"] else NOTHING
        differs = difference(shards[0].origin(0), now_there)
        if differs:
            raise ValueError(f"{folder}: latents of {before['source']}, but {now['source']} is another "
                             f"source: {differs}; give another folder")


def refuse_nothing(folder, path, shards):
    """Raises ValueError if all shards are there, and without one usable image."""
    reasons = []
    for k in shards:
        try:
            shard = Shard(shard_file(folder, k))
        except ValueError:                                      # another process has not made it yet
            return
        if len(shard.latents):
            return
        reasons.append(shard.reason(0))
    raise ValueError(f"{path}: not one of its images is usable, the first: {reasons[0]}")


def why_anew(file, about, source, samples, everything) -> str:
    """Why an existing shard of these samples of a source has to be made again, or ""."""
    try:
        shard = Shard(file)
    except ValueError as error:
        return str(error).removeprefix(f"{file}: ").partition("; run")[0]
    if not is_alike(shard.about, about):
        return "it is of another caching than about.json"
    if len(shard) != len(samples):
        return f"it has {len(shard)} samples, and {len(samples)} are expected"
    step = 1 if everything else -(-about["count"] // cached.LOOKED_AT)
    for i in range(0, len(samples), step):
        changed = difference(shard.origin(i), origin_at(source, samples[i]))
        if changed:
            return f"sample {samples[i] + 1}: {changed}"
        if everything and shard.row[i] >= 0 and shard.is_damaged(i, samples[i]):
            return f"the latents of sample {samples[i] + 1} are damaged"
    return ""


def encode_samples(encode, source, samples, size, crops, batch) -> dict:
    """The tensors of a shard, without "about". Raises ValueError for latents that are not finite."""
    origins, sides, rows, reasons, bad, pixels, latents = [], [], [], [], [], [], []
    count = 0
    for i in samples:
        origin, side, reason, is_bad = NOTHING, (0, 0), "", False
        try:
            sample = source.samples[i]
            origin = origin_of(sample)
            if sample.image is None:
                raise SkipSample(sample.name, lacking("image", sample))
            image = sample.image()
            side = image.size
            reason = reject_reason(image, source.task, size)
            if reason:
                raise SkipSample(sample.name, reason, bad=False)
            squares = training_squares(image, source.task, crops, random.Random(i))
            pixels += [image_to_pixels(square, (size, size)) for square in squares]
        except SkipSample as error:
            tqdm.write(f"skipped {error}", file=sys.stderr)
            reason, is_bad = error.reason, error.bad
        rows.append(-1 if reason else count)
        count += not reason
        origins.append(origin)
        sides.append(side)
        reasons.append(reason)
        bad.append(is_bad)
        if len(pixels) >= batch or (pixels and i == samples[-1]):
            latents.append(encode(torch.cat(pixels)).to("cpu", torch.bfloat16))
            pixels = []
            if not latents[-1].isfinite().all():
                raise ValueError(f"{source.path}: the latents of sample {i + 1} or the {batch} before it are "
                                 "not finite; is the VAE's file damaged?")
    if latents:
        latents = torch.cat(latents).unflatten(0, (count, -1))
    else:
        latents = torch.zeros(0, 1, 1, 1, 1, dtype=torch.bfloat16)
    usable = [i for i, row in zip(samples, rows, strict=True) if row >= 0]
    crc = [checksums(crops, i) for i, crops in zip(usable, bits_of(latents), strict=True)]
    return {
        "latents": latents, "crc": torch.tensor(crc, dtype=torch.int64),
        "row": torch.tensor(rows, dtype=torch.int32), "sides": torch.tensor(sides, dtype=torch.int32),
        "origin": torch.tensor([[size, mtime] for _, size, mtime in origins]), "bad": torch.tensor(bad),
        **pack_texts("names", [name for name, _, _ in origins]), **pack_texts("reasons", reasons),
    }


def vae_encoder(path, device):
    """The scaled `encode` of a VAE file of the official form (kl16.ckpt), for `cache_latents`."""
    with torch.device("meta"):
        vae = AutoencoderKL(VAEConfig())
    tensors = {name.removeprefix("vae."): tensor for name, tensor in checkpoints.read(path).items()}
    checkpoints.load_strict(vae, tensors, path, device=device, dtype=torch.float32)

    def encode(pixels):
        return vae.encode(pixels.to(device)).mode().permute(0, 2, 3, 1) * HarmonConfig.vae_scale

    return encode
