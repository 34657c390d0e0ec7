"""Write any weights that Harmon loads as one folder of ours; of several models the mean.

    python -m harmonkit.scripts.convert harmon_1.5b.pth --vae kl16.ckpt --tokenizer Qwen2.5-1.5B --out folder
    python -m harmonkit.scripts.convert run-a run-b --out mean
"""
import torch

from harmon import Harmon
from harmonkit import checkpoints
from harmonkit.devices import DTYPES
from harmonkit.scripts import argument_parser
from harmonkit.terminal import errors_in_one_line


@torch.no_grad()
def mean_of(models):
    """The first of the models (any iterable), with the mean of their weights ("Model soups", 2203.05482)."""
    models = iter(models)
    mean = next(models)
    for count, model in enumerate(models, start=2):
        if model.config != mean.config:
            raise ValueError("the models to average differ in size or configuration")
        for p, q in zip(mean.parameters(), model.parameters(), strict=True):
            p.lerp_(q, 1 / count)                                           # a running mean
    return mean


def main(argv=None):
    parser = argument_parser(__doc__)
    parser.add_argument("models", nargs="+", help="official .pth, folders or hub ids; several of one size")
    parser.add_argument("--vae", help="the VAE's file, if the model's holds none (kl16.ckpt)")
    parser.add_argument("--tokenizer", help="tokenizer.json or its folder, if the model's folder holds none")
    parser.add_argument("--dtype", choices=DTYPES, help="default: that of the first model's file")
    parser.add_argument("--out", required=True, help="folder")
    args = parser.parse_args(argv)
    with errors_in_one_line("convert"):
        path = checkpoints.find_model(args.models[0])
        dtype = DTYPES.get(args.dtype) or next(iter(checkpoints.read(path).values())).dtype
        # A mean is taken in float32, so that it is rounded once.
        load_dtype = dtype if len(args.models) == 1 else torch.float32
        options = dict(vae=args.vae, tokenizer=args.tokenizer, device="cpu", dtype=load_dtype)
        model = mean_of(Harmon.from_pretrained(path, **options) for path in args.models)
        if model.tokenizer is None:
            raise ValueError(f"{path}: there is no tokenizer in it; give --tokenizer")
        model.save_pretrained(args.out, dtype=dtype)
        print(args.out)


if __name__ == "__main__":
    main()
