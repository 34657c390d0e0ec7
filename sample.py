"""Draw images from text, ask about images, chat.

    python sample.py "three blue stars"                              # text to image, bundled model -> out/
    python sample.py --image photo.jpg "What color is the circle?"   # image to text, streamed to stdout
    python sample.py --image photo.jpg --chat                        # a conversation about an image
    python sample.py --ask "How many sides does a triangle have?"    # a question without an image
    python sample.py --image x.png --mask m.png "a red circle"       # redraw what m.png marks in x.png
    python sample.py --image photo.jpg --reconstruct                 # look at it and draw it anew
    python sample.py --prompts prompts.json --out outdir             # or JSONL, text, CSV; also with torchrun
    python sample.py --classes "red circle" 7                        # by class, with the model's MAR alone
    python sample.py --model mar_huge.pth --vae kl16.ckpt --classes 207 "tree frog"   # or ImageNet's, by MAR
    python sample.py --model wusize/Harmon-1_5B --size 512 "a dog on the left and a cat on the right"
"""
from harmonkit.interrupts import quits_at_once

with quits_at_once("sample.py"):                    # torch takes seconds to import
    import sys

    from harmon import Harmon, open_image
    from harmonkit import by_class, drawing, inpainting, outputs, reconstruction
    from harmonkit.chat_template import DESCRIBE
    from harmonkit.devices import DTYPES, choose_device, choose_dtype, rank_and_world_size
    from harmonkit.fast import MODES, accelerate
    from harmonkit.images import open_mask
    from harmonkit.pipeline import token_grid
    from harmonkit.prompts import check_text, read_prompts
    from harmonkit.repeatable import make_repeatable
    from harmonkit.terminal import Parser, errors_in_one_line, file_path, next_line


def parse_arguments(argv=None):
    parser = Parser("sample.py", __doc__)
    add = parser.add_argument
    add("prompt", nargs="?", help="the picture to draw, or with --image or --ask the question; with "
                                  "--reconstruct an instruction, which is untrained")
    add("--image", type=file_path, help="ask about this image; with --mask, redraw a part of it")
    add("--mask", type=file_path, help="marks the part of --image that is redrawn: white, painted, or erased")
    add("--reconstruct", action="store_true", help="look at --image and draw it anew")
    add("--ask", action="store_true", help="the prompt is a question without an image")
    add("--chat", action="store_true", help="ask on, line by line, until an empty line")
    add("--classes", nargs="+", metavar="CLASS",
        help="draw by class with MAR alone: numbers, names, none, or all")
    add("--prompts", type=file_path, help="a .json, .jsonl, .txt, .csv or .tsv of prompts to draw")
    add("--model", default="harmon-tiny", help="harmon-tiny, a folder, an official .pth, or a hub id; "
                                             "with --classes a MAR checkpoint")
    add("--vae", type=file_path, help="the VAE's file, if the model's holds none (kl16.ckpt)")
    add("--tokenizer", type=file_path, help="a tokenizer.json or its folder, if the model has none beside it")
    add("--size", metavar="HxW", help="pixels, as 512 or 512x768; default: the native size")
    add("--num-images", type=int, help="images for each prompt or class; default: 4, with --prompts 1; "
                                       "with --classes all the number of all images")
    add("--batch-size", type=int, default=8, help="images drawn at once; default: 8")
    add("--num-iter", "--steps", type=int, help="steps K; default: 64, at most a quarter of the tokens; "
                                                "with --classes one a token")
    add("--cfg", type=float, help="classifier-free guidance, 1 = off; default: 3; with --classes "
                                  f"{by_class.DEFAULTS}")
    add("--cfg-schedule", help="constant (default), or linear: from 1 to --cfg (default with --classes)")
    add("--temperature", type=float, default=1.0, help="factor on the diffusion noise; default: 1")
    add("--solver", default="ancestral", help="of the head: ancestral (default), ddim or dpm++")
    add("--num-sampling-steps", type=int, help="diffusion steps S a token; default: the model's, 100")
    add("--max-new-tokens", type=int, default=1024, help="of an answer; default: 1024")
    add("--seed", type=int, default=0, help="image s of prompt p has the seed SEED + 100000·p + s")
    add("--device", help="cuda, cpu, mps, …; default: cuda if there is one")
    add("--dtype", choices=("auto", *DTYPES), default="auto", help="auto: float32 for small models on a CPU")
    add("--mode", choices=MODES, default="auto", help="packed (x86), compiled, eager; auto: the fastest")
    add("--out", type=file_path, default="out", help="folder for images; default: out")
    add("--overwrite", action="store_true", help="draw pictures anew that are in --out already")
    args, extra = parser.parse_known_args(argv)
    if extra:
        quotes = "" if extra[0].startswith("-") else "; put a prompt of several words in quotes"
        parser.error(f"unrecognized arguments: {' '.join(extra)}{quotes}")
    asks_about_image = args.image is not None and args.mask is None and not args.reconstruct
    args.draws = not (args.chat or args.ask or asks_about_image)
    if args.reconstruct and args.prompt is None:
        args.prompt = DESCRIBE                          # the request that reconstruction alignment trains
    return args


def check_flags(args):
    """Raise ValueError for flags that do not go together, or outside their ranges."""
    others = [name for name in ("mask", "chat", "ask", "prompts", "classes") if getattr(args, name, None)]
    if args.reconstruct and (args.image is None or others):
        wrong = f"leave out --{others[0]}" if others else "give it"
        raise ValueError(f"--reconstruct draws --image anew, with an instruction or none; {wrong}")
    if args.classes is not None:
        apart = ("image", "mask", "ask", "chat", "prompts", "tokenizer")
        others = [name for name in apart if getattr(args, name)]
        if args.prompt is not None or others:
            wrong = f"--{others[0]}" if others else "the prompt"
            raise ValueError(f"--classes draws by class alone; leave out {wrong}")
    elif args.prompts is None and not args.chat and not (args.prompt or "").strip():
        raise ValueError("the prompt is empty; say what to draw or to ask, or give --prompts or --chat")
    check_text(args.prompt or "", "the prompt")
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
    if (args.num_images or 1) > 100_000:
        raise ValueError(f"--num-images is {args.num_images}; a prompt has seeds for 100000 images")
    drawing.check_seed(args.seed)


def open_inputs(args) -> dict:
    """The flags' image, mask and prompts, by name. Raises ValueError or OSError that name the file."""
    inputs = {}
    if args.draws:
        outputs.check_folder(args.out)
    if args.prompts is not None:
        inputs["prompts"] = read_prompts(args.prompts)
    if args.image is not None:
        inputs["like" if args.reconstruct else "image"] = open_image(args.image)
    if args.mask is not None:
        mask, how = open_mask(args.mask)
        inputs["image"], inputs["mask"] = inpainting.picture_and_mask(inputs["image"], mask)
        if rank_and_world_size()[0] == 0:
            redrawn = inpainting.share(inputs["mask"])
            print(f"redrawing {redrawn:.0%} of the picture: {how} in {args.mask}", file=sys.stderr)
    return inputs


# ---- draw ----------------------------------------------------------------------------------------

def all_settings(model, args, size, inputs) -> dict:
    """What a picture depends on besides its prompt and seed, as its PNG says it."""
    grid = token_grid(model, size)
    if "mask" in inputs:
        grid = inpainting.nearest_grid(inputs["image"].size, grid)
    if args.num_iter is None:
        args.num_iter = drawing.default_num_iter(grid)
    drawn_size = [side * model.config.vae.stride for side in grid]
    settings = drawing.about(model, drawing.sampling_settings(args), drawn_size, args)
    if "like" in inputs:
        settings |= {"reconstruct": True, "image": args.image.name,
                     "image_sha256": outputs.file_digest(args.image)}
    if "mask" in inputs:
        settings |= {"image": args.image.name, "image_sha256": outputs.file_digest(args.image),
                     "mask": args.mask.name, "mask_sha256": outputs.file_digest(args.mask),
                     "redrawn": round(inpainting.share(inputs["mask"]), 4)}
    return settings


def say_what_is_seen(picture, file, size):
    part = reconstruction.middle(picture, size)
    if part.size != picture.size:
        print(f"looking at the middle of {file}: {part.width}×{part.height} of {picture.width}×"
              f"{picture.height} pixels", file=sys.stderr)


def draw(model, args, size, inputs, settings):
    """Draw to args.out what is not there yet; print the path of each prompt's grid or only image."""
    per_prompt = args.num_images or (4 if args.prompts is None else 1)
    planned = (per_prompt, args.seed, settings, args.out, inputs.get("like"))
    rank, world_size = rank_and_world_size()
    if args.prompts is not None:
        sheets = outputs.plan(inputs.pop("prompts"), *planned)
    elif args.reconstruct:
        words = "reconstructed" if args.prompt == DESCRIBE else args.prompt
        sheets = outputs.plan_single(args.prompt, *planned, overwrite=args.overwrite,
                                     words=f"{args.image.stem} {words}")
        if rank == 0:
            say_what_is_seen(inputs["like"], args.image, settings["size"])
    else:
        sheets = outputs.plan_single(args.prompt, *planned, overwrite=args.overwrite)
    drawing.draw_prompts(model, sheets, size, settings, args, progress=True, **inputs)


# ---- answer --------------------------------------------------------------------------------------

def answer(model, args, size, image=None):
    """Stream one answer to stdout, or with --chat an answer to each line of stdin. Ctrl-C ends a chat's
    answer; at the prompt it ends the conversation.
    """
    history, question = [], args.prompt
    while True:
        question = question or next_line()
        if not question:
            return
        pieces = []
        try:
            for piece in model.chat(question, image, history=history, size=size,
                                    max_new_tokens=args.max_new_tokens):
                print(piece, end="", flush=True)
                pieces.append(piece)
        except KeyboardInterrupt:
            if not args.chat:
                raise
        print(flush=True)
        if not args.chat:
            return
        if pieces:
            history.append((question, "".join(pieces)))
        question = None


def main(argv=None):
    with errors_in_one_line("sample.py"):
        args = parse_arguments(argv)
        check_flags(args)
        size = drawing.parse_size(args.size)
        drawing.sampling_settings(args)
        if args.classes is not None:
            by_class.draw(args, size)
            return
        inputs = open_inputs(args)
        device = choose_device(args.device)
        dtype = DTYPES[args.dtype] if args.dtype != "auto" else choose_dtype(args.model, device)
        model = Harmon.from_pretrained(
            args.model, vae=args.vae, tokenizer=args.tokenizer, device=device, dtype=dtype)
        settings = all_settings(model, args, size, inputs) if args.draws else None
        model = accelerate(model, args.mode)
        if args.draws:
            make_repeatable(model)
            draw(model, args, size, inputs, settings)
        else:
            answer(model, args, size, **inputs)


if __name__ == "__main__":
    main()
