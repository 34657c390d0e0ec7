"""FID on MJHQ-30K and COCO-30K: how far pictures lie from real ones, as clean-fid measures it.

    python -m harmonkit.evals mjhq --data meta_data.json --reference mjhq30k_imgs/ --size 512
    python -m harmonkit.evals coco --data captions.json --reference coco_stats.npz --size 512
    python -m harmonkit.evals score mjhq FOLDER --reference mjhq30k_imgs/   # pictures that are there already

--data is MJHQ's meta_data.json, {key: {"category", "prompt"}} (not verified), or any prompt file that
sample.py reads, such as COCO's captions with a caption for each picture wanted. One PNG is drawn for each
prompt, in OUT/images. Without --reference the pictures are drawn and not scored.

The features and the distance are clean-fid's (GaParmar/clean-fid:cleanfid/fid.py @e88c4d6), from
pip install "harmon[evals]". Its modes are not comparable with each other: clean resizes by PIL's bicubic
filter, legacy_pytorch by bilinear interpolation without antialiasing. Which library, mode, captions and image
format stand behind the paper's figures is not verified.
"""
import importlib.metadata
import os
import sys
from pathlib import Path

import numpy as np

from harmonkit.devices import choose_device
from harmonkit.evals.benchmark import Item, Result
from harmonkit.prompts import parse_json, read_prompts, read_text, safe_name
from harmonkit.terminal import file_path

PER_PROMPT = 1
SEED_STRIDE = 100_000
FOLDER = "images"
FEW = 10_000                        # FID is biased upward for few images
WHOLE = 30_000
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
MODES = ("clean", "legacy_pytorch", "legacy_tensorflow")


def add_arguments(parser):
    add = parser.add_argument
    add("--data", type=file_path, help="MJHQ's meta_data.json, or any prompt file")
    add("--reference", type=file_path, help="folder of the real pictures, or their statistics (.npz)")
    add("--fid-mode", choices=MODES, default=MODES[0], help="of clean-fid; default: clean")
    add("--fid-batch-size", type=int, default=32, help="pictures at once for the features; default: 32")


def check(args):
    """Raise ValueError or FileNotFoundError before hours of drawing, if the score could not be computed."""
    if args.reference is not None:
        if not args.reference.exists():
            raise FileNotFoundError(f"{args.reference}: no such file or folder")
        if args.reference.is_dir():
            count_images(args.reference)
        else:
            read_statistics(args.reference)
        cleanfid()


def scorer(args):
    return {"reference": args.reference.name, "mode": args.fid_mode} if args.reference else None


# ---- prompts and pictures --------------------------------------------------------------------------------

def read(args) -> list:
    """An Item for each prompt; those of MJHQ know their category. Raises ValueError or FileNotFoundError."""
    if args.data is None:
        raise ValueError("--data is missing: MJHQ's meta_data.json, or any prompt file")
    categories = read_categories(args.data)
    items = []
    for prompt in read_prompts(args.data):
        fields = {"category": categories.get(prompt.name)} if categories else {}
        items.append(Item(prompt.name, prompt.text, fields))
    return items


def read_categories(path) -> dict:
    """{key: category} of MJHQ's meta_data.json; {} of other prompt files. Raises ValueError for a key
    without one.
    """
    if path.suffix != ".json" or not path.is_file():
        return {}
    try:
        content = parse_json(path, read_text(path))
    except ValueError:                                      # JSON lines, which read_prompts knows
        return {}
    is_keyed = isinstance(content, dict) and all(isinstance(entry, dict) for entry in content.values())
    if not is_keyed or not any("category" in entry for entry in content.values()):
        return {}
    categories = {}
    for key, entry in content.items():
        if not isinstance(entry.get("category"), str) or not entry["category"].strip():
            raise ValueError(f"{path}, entry {key!r}: no category, which other entries have")
        categories[safe_name(key)] = safe_name(entry["category"])
    return categories


def picture(number, item, sample) -> str:
    category = item.fields.get("category")
    return f"{FOLDER}/{item.name}.png" if category is None else f"{FOLDER}/{category}/{item.name}.png"


# ---- score -----------------------------------------------------------------------------------------------

def score(out, items, args):
    """FID of the pictures in OUT/images, or None without --reference. Raises ValueError."""
    if args.reference is None:
        print(f"{out / FOLDER}: drawn; --reference FOLDER of the real pictures, or their statistics (.npz), "
              "gives the FID")
        return None
    return distance(out / FOLDER, len(items), args)


def read_scores(file, args) -> Result:
    """FID of a folder of pictures; with --data there must be one for each prompt. Raises ValueError."""
    if args.reference is None:
        raise ValueError("--reference is missing: a folder of real pictures, or their statistics (.npz)")
    if not file.is_dir():
        raise ValueError(f"{file}: a folder of pictures is expected")
    check(args)
    if getattr(args, "limit", None) and args.data is None:
        raise ValueError("--limit: --data is missing, the prompts of which the pictures are the first ones")
    expected = count_images(file) if args.data is None else len(read(args)[:getattr(args, "limit", None)])
    return distance(file, expected, args)


def distance(folder, expected, args) -> Result:
    """The Result of `expected` pictures in a folder."""
    library, name = cleanfid()
    found = count_images(folder)
    if found != expected:
        raise ValueError(f"{folder}: {found} pictures for {expected} prompts")
    device = choose_device(getattr(args, "device", None))
    model = library.build_feature_extractor(args.fid_mode, device, use_dataparallel=False)
    # Its data loader needs fork: other systems cannot pickle its resizing functions.
    workers = min(8, os.cpu_count() or 1) if sys.platform == "linux" else 0

    def moments(path):
        features = library.get_folder_features(
            str(path), model, num_workers=workers, batch_size=args.fid_batch_size, device=device,
            mode=args.fid_mode, description="features", verbose=False)
        if len(features) != count_images(path):
            raise ValueError(f"{path}: {name} read {len(features)} of {count_images(path)} pictures")
        return features.mean(axis=0), np.cov(features, rowvar=False)
    real = read_statistics(args.reference) if args.reference.is_file() else moments(args.reference)
    fid = float(library.frechet_distance(*moments(folder), *real))

    protocol = f"{name}, mode {args.fid_mode}"
    counts, notes = {"pictures": found}, [f"FID by {protocol}, against {args.reference.name}."]
    if args.reference.is_dir():
        counts["reference pictures"] = count_images(args.reference)
    few = [f"{count} {what}" for what, count in counts.items() if count < FEW]
    if few:
        notes.append(f"{' and '.join(few)}: FID is biased upward below {FEW} and not comparable.")
    if found != WHOLE:
        notes.append(f"The benchmark has {WHOLE} pictures (not verified), here are {found}.")
    return Result({protocol: {"FID": fid}}, counts, tuple(notes))


def cleanfid() -> tuple:
    """(clean-fid's module fid, "clean-fid 0.1.35"). Raises ValueError if it is not installed."""
    try:
        from cleanfid import fid
    except ImportError as error:
        raise ValueError(f'FID needs clean-fid ({error}); pip install "harmon[evals]"') from None
    try:
        return fid, f"clean-fid {importlib.metadata.version('clean-fid')}"
    except importlib.metadata.PackageNotFoundError:
        return fid, "clean-fid"


def count_images(folder) -> int:
    """How many pictures lie in a folder and below. Raises ValueError for none."""
    count = sum(file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
                for file in Path(folder).rglob("*"))
    if not count:
        raise ValueError(f"{folder}: there is no picture in it")
    return count


def read_statistics(file) -> tuple:
    """(mu, sigma) of an .npz that clean-fid or pytorch-fid wrote. Raises ValueError."""
    try:
        with np.load(file, allow_pickle=False) as content:
            mu, sigma = content["mu"], content["sigma"]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{file}: not statistics with mu and sigma, as clean-fid writes them "
                         f"({' '.join(str(error).split())[:100]})") from None
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or not np.isfinite(sigma).all():
        raise ValueError(f"{file}: mu {mu.shape} and sigma {sigma.shape} are no statistics of one set")
    return mu, sigma
