"""Random weights in the official files' layouts and at their real sizes: do they load, how long does it take, how much memory?

    python tests/official_size.py 0.5b --folder /tmp/official            # writes 2 to 12 GB there, then prints a table
    python tests/official_size.py 0.5b --folder /tmp/official --draw     # and draws one 256-pixel image with 4 steps

Peak is the process's largest resident set, mapped file pages that were touched included.
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

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

CASES = {  # name -> arguments of from_pretrained after the path, dtype
    "pth + ckpt, bfloat16": ("harmon.pth", True, "bfloat16"), "pth + ckpt, float32": ("harmon.pth", True, "float32"),
    "shards, bfloat16": ("hf", False, "bfloat16"), "shards, float32": ("hf", False, "float32")}


def write_files(size, folder):
    keys = json.loads((HERE / f"golden/keys-harmon-{size}.json").read_text())
    g = torch.Generator().manual_seed(0)
    make = lambda name, shape: (torch.ones(shape) if len(shape) == 1 and name.endswith("weight")  # noqa: E731
                                else torch.randn(shape, generator=g) * 0.02).bfloat16()
    state = {name: make(name, shape) for name, shape in keys.items() if name != "llm.lm_head.weight"}
    (folder / "hf").mkdir(parents=True, exist_ok=True)
    tied = state | {"llm.lm_head.weight": state["llm.model.embed_tokens.weight"]}
    torch.save({k: v for k, v in tied.items() if not k.startswith("vae.")}, folder / "harmon.pth")
    torch.save({"model": {k[4:]: v.float() for k, v in state.items() if k.startswith("vae.")}}, folder / "kl16.ckpt")
    names, index = list(state), {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({k: state[k] for k in part}, folder / "hf" / file)
        index |= dict.fromkeys(part, file)
    (folder / "hf" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    from harmon import HarmonConfig
    content = HarmonConfig.from_name(f"harmon-{size}").to_json()
    del content["vae"]
    (folder / "hf" / "config.json").write_text(json.dumps(content))
    shutil.copy(HERE / "qwen2.5-excerpt.json", folder / "hf" / "tokenizer.json")


def load(folder, case, draw):
    """In a process of its own: load, touch every weight, perhaps draw; print the figures."""
    from harmon import Harmon

    path, separate, dtype = CASES[case]
    began = time.time()
    model = Harmon.from_pretrained(folder / path, vae=folder / "kl16.ckpt" if separate else None, tokenizer=folder / "hf", device="cpu", dtype=getattr(torch, dtype))
    loaded = time.time() - began
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    for p in model.parameters():
        p.detach().flatten()[::1024].float().sum()  # every page
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    line = f"| {case} | {size / 1e9:.2f} GB | {peak / 1e9:.2f} GB | {loaded:.1f} s |"
    if draw:
        began = time.time()
        image = model.generate_image(["a dog on the left and a cat on the right."], num_iter=4)[0]
        line += f" {image.size[0]} px, 4 steps, CFG 3: {time.time() - began:.0f} s |"
    print(line, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=("0.5b", "1.5b"))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--draw", action="store_true")
    parser.add_argument("--case", choices=CASES, help="load this one in this process")
    args = parser.parse_args()
    if args.case:
        return load(args.folder, args.case, args.draw)
    if not (args.folder / "hf" / "tokenizer.json").exists():
        write_files(args.size, args.folder)
    print("| files, dtype | weights | peak memory | time to load |\n|---|---|---|---|", flush=True)
    for case in CASES:
        subprocess.run([sys.executable, __file__, args.size, "--folder", args.folder, "--case", case] + ["--draw"] * args.draw, check=True)


if __name__ == "__main__":
    main()
