"""Draw images from text, ask about images, chat.

    python sample.py "three blue stars"                              # text to image, bundled model -> out/
    python sample.py --image photo.jpg "What color is the circle?"   # image to text, streamed to stdout
    python sample.py --image photo.jpg --chat                        # a conversation about an image
    python sample.py --ask "How many sides does a triangle have?"    # a question without an image
    python sample.py --image x.png --mask m.png "a red circle"       # redraw x.png where the mask is white
    python sample.py --prompts prompts.json --out outdir             # [{"prompt": …}, …]; also with torchrun
    python sample.py --model wusize/Harmon-1_5B --size 512 "a dog on the left and a cat on the right"
"""
import argparse
import json
import re
import sys
from dataclasses import asdict, fields
from pathlib import Path

from tqdm import tqdm

from harmon import Harmon, Sampling, open_image
from harmonkit.config import read_json
from harmonkit.devices import DTYPES, choose_device, choose_dtype, rank_and_world_size
from harmonkit.fast import MODES, accelerate
from harmonkit.images import image_grid, save_png
from harmonkit.pipeline import token_grid


def parse_arguments(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("prompt", nargs="?", help="the picture to draw, or with --image or --ask the question")
    add("--image", type=Path, help="ask about this image; with --mask, redraw a part of it")
    add("--mask", type=Path, help="an image, white where --image is redrawn")
    add("--ask", action="store_true", help="the prompt is a question without an image")
    add("--chat", action="store_true", help="ask on, line by line, until an empty line")
    add("--prompts", type=Path, help='a JSON list of {"prompt": …} to draw')
    add("--model", default="harmon-tiny", help="harmon-tiny, a folder, an official .pth, or a hub id")
    add("--vae", type=Path, help="the VAE's file, if the model's holds none (kl16.ckpt)")
    add("--tokenizer", type=Path, help="a tokenizer.json or its folder, if the model has none beside it")
    add("--size", metavar="HxW", help="pixels, as 512 or 512x768; default: the native size")
    add("--num-images", type=int, help="images for each prompt; default: 4, with --prompts 1")
    add("--batch-size", type=int, default=8, help="images drawn at once; default: 8")
    add("--num-iter", "--steps", type=int, help="steps K; default: 64, at most a quarter of the tokens")
    add("--cfg", type=float, default=3.0, help="classifier-free guidance, 1 = off; default: 3")
    add("--cfg-schedule", default="constant", help="constant (default), or linear: from 1 to --cfg")
    add("--temperature", type=float, default=1.0, help="factor on the diffusion noise; default: 1")
    add("--solver", default="ancestral", help="of the head: ancestral (default), ddim or dpm++")
    add("--num-sampling-steps", type=int, help="diffusion steps S a token; default: the model's, 100")
    add("--max-new-tokens", type=int, default=1024, help="of an answer; default: 1024")
    add("--seed", type=int, default=0, help="image s of prompt p has the seed SEED + 100000·p + s")
    add("--device", help="cuda, cpu, mps, …; default: cuda if there is one")
    add("--dtype", choices=("auto", *DTYPES), default="auto", help="auto: float32 for small models on a CPU")
    add("--mode", choices=MODES, default="auto", help="packed (x86), compiled, eager; auto: the fastest")
    add("--out", type=Path, default=Path("out"), help="folder for images; default: out")
    return parser.parse_args(argv)


def check_arguments(args):
    """The size (H, W) or None. Raises ValueError or OSError for mistakes that show without a model."""
    if args.prompts is None and not args.chat and not (args.prompt or "").strip():
        raise ValueError("the prompt is empty; say what to draw or to ask, or give --prompts or --chat")
    if args.prompts is not None and (args.prompt or args.image or args.chat or args.ask):
        raise ValueError("--prompts only draws: it goes with neither a prompt, --image, --ask nor --chat")
    if args.mask is not None and (args.image is None or args.chat or args.ask):
        raise ValueError("--mask marks the part of --image that is redrawn; give both, with a prompt")
    if args.ask and args.image is not None:
        raise ValueError("--ask is for questions without an image; leave it out to ask about --image")
    for name in ("num_images", "batch_size", "max_new_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    for path in (args.image, args.mask):
        if path is not None:
            open_image(path)
    if args.size is None:
        return None
    if not re.fullmatch(r"\d+(x\d+)?", args.size):
        raise ValueError(f"--size is {args.size!r}; give pixels as 512 or, height first, 512x768")
    sides = [int(side) for side in args.size.split("x")]
    return sides[0], sides[-1]


def sampling_settings(args):
    """The Sampling of the flags. Raises ValueError that names the flag."""
    given = {field.name: getattr(args, field.name) for field in fields(Sampling)}
    if given["num_iter"] is None:
        given["num_iter"] = Sampling.num_iter
    try:
        return Sampling(**given)
    except ValueError as error:
        field, message = str(error).split(" ", 1)
        raise ValueError(f"--{field.replace('_', '-')} {message}") from None


def read_prompts(path):
    try:
        prompts = [row["prompt"] for row in read_json(path)]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{path}: expected a JSON list of {{"prompt": …}} ({error!r})') from None
    if not prompts or not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
        raise ValueError(f"{path}: there is an empty prompt, or none at all")
    return prompts


def image_seed(seed, prompt_index, sample_index):
    """Every image has a seed of its own, which depends on no other image and no number of processes."""
    return seed + 100_000 * prompt_index + sample_index


def draw(model, args, size):
    """Draw every prompt's images to args.out, and their grid; print the path of the grid or image."""
    prompts = [args.prompt] if args.prompts is None else read_prompts(args.prompts)
    per_prompt = args.num_images or (4 if args.prompts is None else 1)
    h, w = token_grid(model, size)
    if args.num_iter is None:
        args.num_iter = min(Sampling.num_iter, -(-h * w // 4))
    settings = asdict(sampling_settings(args))
    about = json.dumps(settings | {"size": size, "model": str(args.model)})
    inpainting = {}
    if args.mask is not None:
        inpainting = {"image": open_image(args.image), "mask": open_image(args.mask)}

    # Each process of torchrun draws the prompts rank, rank + world_size, …
    rank, world_size = rank_and_world_size()
    jobs = [(p, s) for p in range(rank, len(prompts), world_size) for s in range(per_prompt)]
    images_of = {}
    bar_is_off = None if len(jobs) > args.batch_size else True
    for start in tqdm(range(0, len(jobs), args.batch_size), desc="batches", disable=bar_is_off):
        batch = jobs[start:start + args.batch_size]
        seeds = [image_seed(args.seed, p, s) for p, s in batch]
        images = model.generate_image([prompts[p] for p, _ in batch], size=size, seed=seeds, progress=True,
                                      **settings, **inpainting)
        for (p, s), seed, image in zip(batch, seeds, images):
            slug = re.sub(r"\W+", "-", prompts[p].lower()).strip("-")[:60] or "image"
            name = slug if args.prompts is None else f"{p:05d}-{slug}"
            path = args.out / (f"{name}.png" if per_prompt == 1 else f"{name}-{s}.png")
            save_png(path, image, prompt=prompts[p], seed=seed, settings=about)
            images_of.setdefault(p, []).append(image)
            if len(images_of[p]) < per_prompt:
                continue
            if per_prompt > 1:
                path = args.out / f"{name}.png"
                first_seed = image_seed(args.seed, p, 0)
                save_png(path, image_grid(images_of[p]), prompt=prompts[p], seed=first_seed, settings=about)
            print(path, flush=True)
            del images_of[p]


def answer(model, args, size):
    """Stream one answer to stdout, or with --chat an answer to each line of stdin."""
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
        for piece in model.chat(question, image, history=history, size=size,
                                max_new_tokens=args.max_new_tokens):
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
        sampling_settings(args)
        device = choose_device(args.device)
        dtype = DTYPES[args.dtype] if args.dtype != "auto" else choose_dtype(args.model, device)
        model = Harmon.from_pretrained(
            args.model, vae=args.vae, tokenizer=args.tokenizer, device=device, dtype=dtype)
        model = accelerate(model, args.mode)
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
