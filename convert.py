"""Turn any weights that Harmon loads into one folder: config.json, model.safetensors, tokenizer.json.

    python convert.py harmon_1.5b.pth --vae kl16.ckpt --tokenizer Qwen2.5-1.5B-Instruct --out Harmon-1_5B
"""
import argparse
import sys
from pathlib import Path

import torch

from harmon import Harmon


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="an official .pth, a folder or a hub id")
    parser.add_argument("--vae", type=Path, help="the VAE's file, when the model's holds none (kl16.ckpt)")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a tokenizer.json or its folder")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    try:
        model = Harmon.from_pretrained(args.model, vae=args.vae, tokenizer=args.tokenizer, device="cpu", dtype=getattr(torch, args.dtype))
        model.save_pretrained(args.out)
    except (ValueError, OSError) as error:
        print(f"convert.py: {error}", file=sys.stderr)
        sys.exit(2)
    print(args.out)


if __name__ == "__main__":
    main()
