"""Inspect a mixture before a run, or cache the VAE latents of its images.

    python -m harmonkit.data inspect mixture.json    # formats, counts, broken samples, and 16 drawn samples
    python -m harmonkit.data inspect mixture.json --json   # a JSON object for each source, on a line
    python -m harmonkit.data cache mixture.json --vae kl16.ckpt --size 256 --out latents   # or under torchrun

Run again, cache computes what is missing, and the latents of images that have changed.
"""
from harmonkit.interrupts import quits_at_once

with quits_at_once("harmonkit.data"):               # torch takes seconds to import
    import contextlib
    import json
    import signal
    from pathlib import Path

    import torch

    from harmon import Harmon
    from harmonkit.checkpoints import find_model, write_text
    from harmonkit.data.caching import cache_latents, vae_encoder, write
    from harmonkit.data.inspect import inspect, look_at
    from harmonkit.data.mixture import WITHOUT_LATENTS, Fit, open_mixture, read_mixture
    from harmonkit.devices import choose_device, rank_and_world_size
    from harmonkit.terminal import Parser, errors_in_one_line, file_path
    from harmonkit.tokenizer import load_tokenizer
    from vae import VAEConfig


def parse_arguments(argv=None):
    parser = Parser("harmonkit.data", __doc__)
    add = parser.add_argument
    add("command", choices=("inspect", "cache"))
    add("mixture", type=file_path)
    add("--model", default="harmon-tiny", help="whose tokenizer and VAE to use (default: harmon-tiny)")
    add("--tokenizer", type=file_path, help="tokenizer.json or its folder, instead of the model's")
    add("--vae", type=file_path, help="cache: kl16.ckpt, or another VAE of its form, instead of the model's")
    add("--size", type=int, default=256, help="side of the square images, pixels (default: 256)")
    add("--max-length", type=int, default=1024, help="inspect: text tokens at most (default: 1024)")
    add("--center", action="store_true", help="cache: one middle crop instead of two random ones")
    add("--device", help="default: cuda if there is one; under torchrun each process has its own")
    add("--json", action="store_true", help="inspect: JSON on stdout; draws nothing")
    add("--out", type=file_path, help="inspect: the sheet (default: out/inspect.png); cache: a folder")
    args = parser.parse_args(argv)
    if args.json and args.command != "inspect":
        raise ValueError("--json belongs to inspect")
    if args.command == "cache" and args.out is None:
        raise ValueError("cache needs --out, a folder")
    for flag, value in (("--size", args.size), ("--max-length", args.max_length)):
        if value < 1:
            raise ValueError(f"{flag} is {value}; a whole number from 1 is expected")
    return args


def report(args):
    tokenizer = load_tokenizer(args.tokenizer or find_model(args.model))
    fit = Fit(tokenizer, num_image_tokens=1, max_length=args.max_length)    # only the text is counted
    if args.json:
        for number, source in enumerate(open_mixture(args.mixture)):
            print(json.dumps(look_at(source, number, args.size, fit).to_json()), flush=True)
        return
    print(f"in the tokens of {args.tokenizer or args.model}, at {args.size} pixels")
    inspect(open_mixture(args.mixture), fit, args.size, args.out or Path("out/inspect.png"))


def cache(args):
    """Cache each source with images in a folder of its own, beside a mixture file that names the caches."""
    sources = open_mixture(args.mixture, with_latents=False)
    rank, world_size = rank_and_world_size()
    device = choose_device(args.device)
    if args.vae:
        encode, stride = vae_encoder(args.vae, device), VAEConfig().stride
    else:
        model = Harmon.from_pretrained(args.model, device=device, dtype=torch.float32)
        encode, stride = model.encode, model.config.vae.stride
    if args.size % stride:
        raise ValueError(f"--size is {args.size}; a multiple of {stride} is expected, the VAE's stride")

    lines = read_mixture(args.mixture)
    crops = 0 if args.center else 2
    for i, source in enumerate(sources):
        if source.task in WITHOUT_LATENTS:
            lines[i].pop("latents", None)
        else:
            cache_latents(encode, source, args.out / str(i), args.size, crops=crops, rank=rank,
                          world_size=world_size, everything=True)
            lines[i]["latents"] = str(i)
    if rank == 0:
        for unfinished in args.out.glob(".mixture.json.*"):                 # a kill left it
            unfinished.unlink(missing_ok=True)
        write(write_text, args.out / "mixture.json", json.dumps(lines, indent=2) + "\n")
        print(args.out / "mixture.json")


@contextlib.contextmanager
def interrupted_by_signals():
    """In this block SIGTERM is a KeyboardInterrupt like Ctrl-C. The first signal counts, so that no second
    one, of torchrun, disturbs the end.
    """
    def interrupt(*_):
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:                                   # as of a background job
            signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is interrupt:
                signal.signal(number, handler)


def main(argv=None):
    with interrupted_by_signals(), errors_in_one_line("harmonkit.data"):
        args = parse_arguments(argv)
        cache(args) if args.command == "cache" else report(args)


if __name__ == "__main__":
    main()
