"""Draw images from text, ask about images, chat.

    python sample.py "three blue stars"                                   # text to image, bundled model -> out/
    python sample.py --image photo.jpg "What color is the circle?"        # image to text, streamed to stdout
    python sample.py --image photo.jpg --chat                             # a conversation about an image
    python sample.py --ask "How many sides does a triangle have?"         # a question without an image
    python sample.py --image x.png --mask m.png "a red circle"            # draw anew where the mask is white
    python sample.py --prompts prompts.json --out outdir                  # [{"prompt": …}, …]; also under torchrun
    python sample.py --model wusize/Harmon-1_5B --size 512 "a dog on the left and a cat on the right"
"""
import argparse
import json
import os
import re
import sys
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from harmonkit import checkpoints
from diffusion_head import SOLVERS
from harmonkit.fast import MODES, accelerate
from harmon import Harmon
from pretrained import auto_dtype, choose_device

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("prompt", nargs="?", help="what to draw, or with --image or --ask what to ask")
    add("--image", type=Path, help="ask about this image; with --mask, redraw a part of it")
    add("--mask", type=Path, help="an image, white where --image is drawn anew")
    add("--ask", action="store_true", help="the prompt is a question without an image")
    add("--chat", action="store_true", help="ask on, line by line, until an empty line")
    add("--prompts", type=Path, help='a JSON list of {"prompt": …} to draw')
    add("--model", default="harmon-tiny", help="harmon-tiny, a folder, an official .pth, or a hub id (default: %(default)s)")
    add("--vae", type=Path, help="the VAE's file, when the model's holds none (kl16.ckpt)")
    add("--tokenizer", type=Path, help="a tokenizer.json or its folder, when the model has none beside it")
    add("--size", metavar="HxW", help="pixels, as 512 or 512x768 (default: the model's native size)")
    add("--num-images", type=int, help="images for each prompt (default: 4, with --prompts 1)")
    add("--batch-size", type=int, default=8, help="images drawn at once (default: %(default)s)")
    add("--steps", type=int, help="generation steps K (default: 64, or a quarter of the image tokens if that is fewer)")
    add("--cfg", type=float, default=3.0, help="classifier-free guidance, 1 = off (default: %(default)s)")
    add("--cfg-schedule", choices=("constant", "linear"), default="constant")
    add("--temperature", type=float, default=1.0, help="of the diffusion noise (default: %(default)s)")
    add("--solver", choices=SOLVERS, default="ancestral", help="of the diffusion head; ddim and dpm++ need fewer steps (default: %(default)s)")
    add("--diffusion-steps", type=int, help="of the diffusion head, for each token (default: the model's, 100)")
    add("--max-new-tokens", type=int, default=1024, help="of an answer")
    add("--seed", type=int, default=0)
    add("--device", help="cuda, cpu, mps, … (default: cuda if there is one)")
    add("--dtype", choices=DTYPES, default="auto", help="auto: bfloat16, but float32 for small models on the CPU and where that is not slower")
    add("--mode", choices=MODES, default="auto", help="fast paths: packed (weights, on x86 processors), graphs (CUDA), compiled, or eager (none); auto picks what wins")
    add("--out", type=Path, default=Path("out"), help="folder for images (default: %(default)s)")
    return parser.parse_args(argv)


def check_arguments(args):
    """Raise ValueError or OSError for what can be known to be wrong before a model is loaded."""
    if args.prompts is None and not args.chat and not (args.prompt or "").strip():
        raise ValueError("the prompt is empty; say what to draw or to ask, or give --prompts or --chat")
    if args.prompts is not None and (args.prompt or args.image or args.chat or args.ask):
        raise ValueError("--prompts only draws: it goes with neither a prompt, --image, --ask nor --chat")
    if args.mask is not None and (args.image is None or args.chat or args.ask):
        raise ValueError("--mask marks what is redrawn of --image; give both, with a prompt")
    if args.ask and args.image is not None:
        raise ValueError("--ask is for questions without an image; leave it out to ask about --image")
    for name, least in (("steps", 1), ("num_images", 1), ("batch_size", 1), ("max_new_tokens", 1), ("diffusion_steps", 1), ("cfg", 0), ("temperature", 0)):
        value = getattr(args, name)
        if value is not None and not value >= least:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")
    if args.solver != "ancestral" and args.temperature != 1:
        raise ValueError(f"--temperature scales the noise that --solver {args.solver} does not add; leave one of them out")
    if args.size is not None and not re.fullmatch(r"\d+(x\d+)?", args.size):
        raise ValueError(f"--size is {args.size!r}; give pixels as 512 or, height first, 512x768")
    return tuple(int(n) for n in (args.size.split("x") * 2)[:2]) if args.size else None


def open_image(path):
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow says SyntaxError of broken PNGs
        raise ValueError(f"{path}: not an image that can be read ({error})") from None


def read_prompts(path):
    try:
        rows = json.loads(path.read_text())
        prompts = [row["prompt"] for row in rows]
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{path}: expected a JSON list of {{"prompt": …}} ({error!r})') from None
    if not prompts or not all(isinstance(p, str) and p.strip() for p in prompts):
        raise ValueError(f"{path}: there is an empty prompt, or none at all")
    return prompts


def save_png(path, image, **text):
    """Atomically, with the given texts as PNG metadata."""
    info = PngInfo()
    for key, value in text.items():
        info.add_itxt(key, str(value))
    with checkpoints.atomic_write(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def grid_of(images):
    columns = next(c for c in range(1, len(images) + 1) if c * c >= len(images))
    w, h = images[0].size
    sheet = Image.new("RGB", (columns * w, -(-len(images) // columns) * h), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * w, i // columns * h))
    return sheet


def image_seed(seed, prompt_index, sample_index):
    """Every image has a seed of its own, which no other image and no number of processes changes."""
    return seed + 100_000 * prompt_index + sample_index


def draw(model, args, size):
    """Every prompt's images to args.out: PROMPT-0.png … and, of several, the grid PROMPT.png. Prints the paths."""
    prompts = [args.prompt] if args.prompts is None else read_prompts(args.prompts)
    per_prompt = args.num_images or (4 if args.prompts is None else 1)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    h, w = model.token_grid(size)
    steps = args.steps or min(64, -(-h * w // 4))
    settings = dict(num_iter=steps, cfg=args.cfg, cfg_schedule=args.cfg_schedule, temperature=args.temperature, solver=args.solver, diffusion_steps=args.diffusion_steps, size=size)
    edit = {} if args.image is None else dict(image=open_image(args.image), mask=open_image(args.mask))
    jobs = [(p, s) for p in range(rank, len(prompts), world) for s in range(per_prompt)]
    done = {}
    bar = tqdm(range(0, len(jobs), args.batch_size), desc="batches", disable=None if len(jobs) > args.batch_size else True)
    for start in bar:
        part = jobs[start:start + args.batch_size]
        seeds = [image_seed(args.seed, p, s) for p, s in part]
        images = model.generate_image([prompts[p] for p, _ in part], seed=seeds, progress=True, **settings, **edit)
        for (p, s), seed, image in zip(part, seeds, images):
            slug = re.sub(r"\W+", "-", prompts[p].lower()).strip("-")[:60] or "image"
            name = slug if args.prompts is None else f"{p:05d}-{slug}"
            about = dict(prompt=prompts[p], seed=seed, settings=json.dumps(settings | {"model": str(args.model)}))
            path = args.out / (f"{name}.png" if per_prompt == 1 else f"{name}-{s}.png")
            save_png(path, image, **about)
            done.setdefault(p, []).append(image)
            if per_prompt > 1 and len(done[p]) == per_prompt:
                path = args.out / f"{name}.png"
                save_png(path, grid_of(done[p]), **(about | {"seed": image_seed(args.seed, p, 0)}))
            if len(done[p]) == per_prompt:
                print(path, flush=True)
                done[p] = []


def answer(model, args, size):
    """One answer, or with --chat one for each line of stdin, streamed to stdout."""
    image = open_image(args.image) if args.image else None
    history, question = [], args.prompt
    while True:
        if question is None:
            if sys.stdin.isatty():
                print("> ", end="", flush=True)
            question = sys.stdin.readline().strip()
        if not question:
            return
        pieces = []
        for piece in model.chat(question, image, history=history, max_new_tokens=args.max_new_tokens, size=size):
            print(piece, end="", flush=True)
            pieces.append(piece)
        print(flush=True)
        if not args.chat:
            return
        history.append((question, "".join(pieces)))
        question = None


def main(argv=None):
    args = parse_arguments(argv)
    try:
        size = check_arguments(args)
        for path in (args.image, args.mask):
            if path is not None:
                open_image(path)
        device = choose_device(args.device)
        if args.mode == "graphs" and device.type != "cuda":
            raise ValueError(f"--mode graphs captures CUDA graphs; the device is {device}")
        dtype = DTYPES[args.dtype] or auto_dtype(args.model, device)
        model = accelerate(Harmon.from_pretrained(args.model, vae=args.vae, tokenizer=args.tokenizer, device=device, dtype=dtype), args.mode)
        if args.dtype == "auto" and dtype != torch.float32:
            print(f"{args.model} on {device} in {str(dtype).removeprefix('torch.')}", file=sys.stderr)
        if args.chat or args.ask or (args.image is not None and args.mask is None):
            answer(model, args, size)
        else:
            draw(model, args, size)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"sample.py: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nsample.py: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
