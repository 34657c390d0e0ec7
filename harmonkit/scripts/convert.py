"""Turn any weights that Harmon loads into one folder: config.json, model.safetensors, tokenizer.json.

    python convert.py harmon_1.5b.pth --vae kl16.ckpt --tokenizer Qwen2.5-1.5B-Instruct --out Harmon-1_5B
    python convert.py run-a run-b --out mean         # several: the mean of their weights ("Model soups", 2203.05482)
"""
import argparse
import sys
from pathlib import Path

import torch

from harmonkit import checkpoints
from harmon import Harmon
from pretrained import locate


@torch.no_grad()
def mean_of(models):
    """Models of one size, trained from the same start (any iterable) -> the first, with the mean of their weights."""
    models = iter(models)
    mean = next(models)
    for count, model in enumerate(models, 2):
        if model.config != mean.config:
            raise ValueError("the models to average differ in size or configuration")
        for p, q in zip(mean.parameters(), model.parameters()):
            p.lerp_(q, 1 / count)
    return mean


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="model", help="an official .pth, a folder or a hub id; several of one size, trained from the same start, are averaged")
    parser.add_argument("--vae", type=Path, help="the VAE's file, when the model's holds none (kl16.ckpt)")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json or its folder, when the model's folder holds none")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="default: that of the first model's file")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    try:
        dtype = getattr(torch, args.dtype) if args.dtype else next(iter(checkpoints.read(find_model(args.models[0])).values())).dtype
        exact = dtype if len(args.models) == 1 else torch.float32
        model = mean_of(Harmon.from_pretrained(path, vae=args.vae, tokenizer=args.tokenizer, device="cpu", dtype=exact) for path in args.models)
        if model.tokenizer is None:
            raise ValueError(f"{args.models[0]}: there is no tokenizer in it; give --tokenizer, a tokenizer.json or its folder")
        model.save_pretrained(args.out, dtype=dtype)
    except (ValueError, OSError) as error:
        print(f"convert.py: {error}", file=sys.stderr)
        sys.exit(2)
    print(args.out)


if __name__ == "__main__":
    main()
