"""A MAR checkpoint of random weights at a published size: does it load, how fast, in how much memory?

    python -m tests.official_mar mar_base --folder /tmp/mar             # writes 3 to 15 GB, prints a table
    python -m tests.official_mar mar_base --folder /tmp/mar --draw      # also draws a class in 4 steps

Run it in the project's root. Peak memory is the largest resident set of a process. It includes torch, and the
pages of the mapped file that were read, which the system can reclaim.
"""
import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

from harmonkit import mar_files
from harmonkit.config import MAR_SIZES
from harmonkit.devices import DTYPES
from mar import MAR
from vae import AutoencoderKL

CASES = {                       # name -> folder, dtype
    "as distributed, float32": ("distributed", "float32"),
    "as distributed, bfloat16": ("distributed", "bfloat16"),
    "with args and optimizer, float32": ("trained", "float32"),
    "with args and optimizer, bfloat16": ("trained", "bfloat16"),
}


def random_state(make) -> dict:
    """{name: float32 tensor} of random weights for the module that make() returns."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in make().state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in shapes.items():
        is_norm = len(shape) == 1 and name.endswith("weight")
        state[name] = torch.ones(shape) if is_norm else 0.02 * torch.randn(shape, generator=generator)
    return state


def write_files(size, folder):
    """checkpoint-last.pth as authors distribute it and as their training writes it, and kl16.ckpt."""
    ema = random_state(lambda: MAR(MAR_SIZES[size]))
    raw = {name: tensor + 1 for name, tensor in ema.items()}                # not to be taken
    for name in ("distributed", "trained"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    torch.save({"model": raw, "model_ema": ema}, folder / "distributed" / "checkpoint-last.pth")
    moments = {i: {"step": torch.tensor(1.0), "exp_avg": p, "exp_avg_sq": p}
               for i, p in enumerate(list(raw.values())[:20])}
    torch.save({
        "model": raw, "model_ema": {name: torch.nn.Parameter(tensor) for name, tensor in ema.items()},
        "optimizer": {"state": moments, "param_groups": [{"lr": 8e-4, "params": list(moments)}]},
        "epoch": 799, "scaler": {"scale": 65536.0},
        "args": argparse.Namespace(model=size, diffloss_d=6, data_path="/x"),
    }, folder / "trained" / "checkpoint-last.pth")
    torch.save({"model": random_state(AutoencoderKL)}, folder / "kl16.ckpt")


def load(size, folder, case, draw):
    """Print a row of the table: load, read every page of the weights, and draw if asked to."""
    name, dtype = CASES[case]
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    began = time.time()
    model = mar_files.load(folder / name, vae=folder / "kl16.ckpt", device="cpu", dtype=DTYPES[dtype])
    seconds = time.time() - began
    assert model.config.mar == MAR_SIZES[size] and model.mar.class_emb.weight.mean() < 0.5, "the averages"
    num_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    for p in model.parameters():
        p.detach().flatten()[::1024].float().sum()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    line = (f"| {case} | {num_bytes / 1e9:.2f} GB | {(peak - base) / 1e9:.2f} GB over torch's "
            f"{base / 1e9:.2f}: {(peak - base) / num_bytes:.2f} × | {seconds:.1f} s |")
    if draw:
        began = time.time()
        image = model.generate_image([207], num_iter=4, cfg=2.9)[0]
        line += f" {image.width} px, 4 steps, guidance 2.9: {time.time() - began:.0f} s |"
    print(line, flush=True)


def main():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("size", choices=[size for size in MAR_SIZES if size != "tiny"])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--draw", action="store_true")
    parser.add_argument("--case", choices=[*CASES, "write"], help="only this one, in this process")
    args = parser.parse_args()
    if args.case == "write":
        write_files(args.size, args.folder)
    elif args.case:
        load(args.size, args.folder, args.case, args.draw)
    else:
        # A process each, since a child's peak is at least that of the process that starts it.
        command = [sys.executable, "-m", "tests.official_mar", *sys.argv[1:], "--case"]
        if not (args.folder / "kl16.ckpt").exists():
            subprocess.run([*command, "write"], check=True)
        print("| file, dtype | weights | peak memory | time to load |\n|---|---|---|---|", flush=True)
        for case in CASES:
            subprocess.run([*command, case], check=True)


if __name__ == "__main__":
    main()
