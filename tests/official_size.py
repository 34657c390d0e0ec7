"""Random weights in the official files' layouts and sizes: do they load, how fast, in how much memory?

    python -m tests.official_size 0.5b --folder /tmp/official           # writes 2 to 12 GB, prints a table
    python -m tests.official_size 0.5b --folder /tmp/official --draw    # also draws 256 px in 4 steps

Run it in the project's root. Peak memory is the largest resident set of a process. It includes the pages of
the mapped file that were read, which the system can reclaim.
"""
import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from harmon import Harmon, HarmonConfig
from harmonkit.devices import DTYPES

HERE = Path(__file__).resolve().parent
CASES = {                       # name -> the model in --folder, whether its VAE is a file of its own, dtype
    "pth + ckpt, bfloat16": ("harmon.pth", True, "bfloat16"),
    "pth + ckpt, float32": ("harmon.pth", True, "float32"),
    "shards, bfloat16": ("hf", False, "bfloat16"),
    "shards, float32": ("hf", False, "float32"),
}


def random_state(size) -> dict:
    """{name: bfloat16 tensor} of a published model, by the recorded names and shapes."""
    shapes = json.loads((HERE / f"golden/keys-harmon-{size}.json").read_text())
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in shapes.items():
        is_norm = len(shape) == 1 and name.endswith("weight")
        values = torch.ones(shape) if is_norm else 0.02 * torch.randn(shape, generator=generator)
        state[name] = values.bfloat16()
    state["llm.lm_head.weight"] = state["llm.model.embed_tokens.weight"]
    return state


def write_files(size, folder):
    """The authors' layout, harmon.pth and kl16.ckpt in float32, and Hugging Face's, hf/ with two shards."""
    state = random_state(size)
    vae = {name[4:]: tensor.float() for name, tensor in state.items() if name.startswith("vae.")}
    rest = {name: tensor for name, tensor in state.items() if not name.startswith("vae.")}
    (folder / "hf").mkdir(parents=True, exist_ok=True)
    torch.save(rest, folder / "harmon.pth")
    torch.save({"model": vae}, folder / "kl16.ckpt")

    del state["llm.lm_head.weight"]                             # tied
    names = list(state)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: state[name] for name in part}, folder / "hf" / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "hf" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = HarmonConfig.from_name(f"harmon-{size}").to_json()
    del config["vae"]                                           # the published config.json has none
    (folder / "hf" / "config.json").write_text(json.dumps(config))
    shutil.copy(HERE / "qwen2.5-excerpt.json", folder / "hf" / "tokenizer.json")


def load(folder, case, draw):
    """Print a row of the table: load, read every page of the weights, and draw if asked to."""
    path, has_vae_file, dtype = CASES[case]
    began = time.time()
    model = Harmon.from_pretrained(folder / path, vae=folder / "kl16.ckpt" if has_vae_file else None,
                                   tokenizer=folder / "hf", device="cpu", dtype=DTYPES[dtype])
    seconds = time.time() - began
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    for p in model.parameters():
        p.detach().flatten()[::1024].float().sum()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    line = f"| {case} | {size / 1e9:.2f} GB | {peak / 1e9:.2f} GB | {seconds:.1f} s |"
    if draw:
        began = time.time()
        image = model.generate_image(["a dog on the left and a cat on the right."], num_iter=4)[0]
        line += f" {image.width} px, 4 steps, guidance 3: {time.time() - began:.0f} s |"
    print(line, flush=True)


def main():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("size", choices=("0.5b", "1.5b"))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--draw", action="store_true")
    parser.add_argument("--case", choices=[*CASES, "write"], help="only this one, in this process")
    args = parser.parse_args()
    if args.case == "write":
        write_files(args.size, args.folder)
    elif args.case:
        load(args.folder, args.case, args.draw)
    else:
        # A process each, since a child's peak is at least that of the process that starts it.
        is_written = (args.folder / "hf" / "tokenizer.json").exists()
        command = [sys.executable, "-m", "tests.official_size", *sys.argv[1:], "--case"]
        if not is_written:
            subprocess.run([*command, "write"], check=True)
        print("| files, dtype | weights | peak memory | time to load |\n|---|---|---|---|", flush=True)
        for case in CASES:
            subprocess.run([*command, case], check=True)


if __name__ == "__main__":
    main()
