"""Inspect a mixture before a run, or cache the VAE latents of its images.

    python -m harmonkit.data inspect mixture.json    # formats, counts, broken samples, and 16 drawn samples
    python -m harmonkit.data inspect mixture.json --json   # a JSON object for each source, on a line
    python -m harmonkit.data cache mixture.json --vae kl16.ckpt --size 256 --out latents   # or under torchrun
"""
import argparse
import json
import sys
from pathlib import Path

import torch

from harmon import Harmon
from harmonkit.checkpoints import find_model, write_text
from harmonkit.data.inspect import inspect, look_at
from harmonkit.data.latents import cache_latents, vae_encoder
from harmonkit.data.mixture import open_mixture, read_mixture
from harmonkit.devices import choose_device, rank_and_world_size
from harmonkit.tokenizer import load_tokenizer


def cache(mixture, encode, size, crops, out):
    """Cache each source with images in a folder of its own, beside a mixture file that names the caches."""
    rank, world_size = rank_and_world_size()
    lines = read_mixture(mixture)
    for i, source in enumerate(open_mixture(mixture)):
        if source.task != "text":
            cache_latents(encode, source, out / str(i), size, crops=crops, rank=rank, world_size=world_size)
            lines[i]["latents"] = str(i)
    if rank == 0:
        write_text(out / "mixture.json", json.dumps(lines, indent=2) + "\n")
        print(out / "mixture.json")


def main(argv=None):
    parser = argparse.ArgumentParser("harmonkit.data", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("command", choices=("inspect", "cache"))
    add("mixture", type=Path)
    add("--model", default="harmon-tiny", help="whose tokenizer and VAE to use (default: harmon-tiny)")
    add("--tokenizer", help="tokenizer.json or its folder, instead of the model's")
    add("--vae", help="cache: kl16.ckpt, or another VAE of its form, instead of the model's")
    add("--size", type=int, default=256, help="side of the square images, pixels (default: 256)")
    add("--center", action="store_true", help="cache: one middle crop instead of two random ones")
    add("--device", help="default: cuda if there is one; under torchrun each process has its own")
    add("--json", action="store_true", help="inspect: JSON on stdout; draws nothing and needs no model")
    add("--out", type=Path, help="inspect: the contact sheet (default: out/inspect.png); cache: a folder")
    args = parser.parse_args(argv)
    try:
        if args.json and args.command != "inspect":
            raise ValueError("--json belongs to inspect")
        if args.json:
            for number, source in enumerate(open_mixture(args.mixture)):
                print(json.dumps(look_at(source, number, args.size).to_json()), flush=True)
        elif args.command == "inspect":
            tokenizer = load_tokenizer(args.tokenizer or find_model(args.model))
            print(f"in the tokens of {args.tokenizer or args.model}, at {args.size} pixels")
            inspect(open_mixture(args.mixture), tokenizer, args.size, args.out or Path("out/inspect.png"))
        elif args.out is None:
            raise ValueError("cache needs --out, a folder")
        else:
            device = choose_device(args.device)
            if args.vae:
                encode = vae_encoder(args.vae, device)
            else:
                encode = Harmon.from_pretrained(args.model, device=device, dtype=torch.float32).encode
            cache(args.mixture, encode, args.size, 0 if args.center else 2, args.out)
    except (ValueError, OSError) as error:
        print(f"harmonkit.data: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
