"""How fast, and how close to what the machine can do.

    python benchmark.py                                              # harmon-0.5b with random weights, 256 px, 16 steps, one image
    python benchmark.py --model harmon-tiny --images 4
    python benchmark.py --model harmon-1.5b --size 512 --steps 64 --dtype bfloat16 --device cuda --out 1.5b.json
    python benchmark.py --what train --model harmon-1.5b --size 512 --repeat 20 --variants plain pixels checkpointing compiled
    python benchmark.py --count --model harmon-1.5b --size 512 --steps 64          # only count; nothing is computed, any size is quick

Each row: median seconds, the arithmetic counted while it ran (torch's FlopCounterMode: matrix products, convolutions, attention; a multiply-add is two), and
the share of the machine's own rate, that of a large matrix product in the same dtype, measured first. The floor is that arithmetic at that rate. With packed weights
less is possible where the same product is faster with a packed one; that rate is printed too. Beside it, the weights read, every pass all of a part's, and how long
that takes at the memory's bandwidth: the floor of answers, token by token, and of small batches on a GPU.
"""
import argparse
import json
import math
import platform
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from tqdm import tqdm

import train
from harmonkit import checkpoints
from harmonkit.fast import MODES, Packed, accelerate, packable, uncaptured
from harmon import GENERATE, IMAGE_TOKEN_ID, UNCONDITIONAL, Harmon
from harmonkit.training.monitor import peak_memory
from harmonkit.training.optim import make_optimizer, parameter_groups
from pretrained import HarmonConfig, choose_device
from harmonkit.training.recipes import RECIPES

SIZES = ("harmon-0.5b", "harmon-1.5b")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run, device, repeat, warm_up=1):
    """Median seconds of `run()`."""
    seconds = []
    for i in range(warm_up + repeat):
        synchronize(device)
        began = time.perf_counter()
        run()
        synchronize(device)
        seconds += [time.perf_counter() - began] if i >= warm_up else []
    return median(seconds)


# what FlopCounterMode does not know: oneDNN's linear layers, and attention on the CPU
COUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, out_shape=None, **__: sdpa_flop_count(q, k, v)}
if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
    COUNTED[torch.ops.mkldnn._linear_pointwise] = lambda x, *_, out_shape=None, **__: 2 * math.prod(out_shape) * x[-1]


def flops_of(run):
    with uncaptured(), FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        run()
    return counter.get_total_flops()


def machine(device, dtype, repeat):
    """The machine's rates: FLOP/s of a large matrix product, plain and (None where fast.py packs nothing) with a packed weight; bytes/s of reading memory."""
    n = 4096 if device.type == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    rate = lambda multiply: 2 * n ** 3 / timed(lambda: multiply(a), device, repeat)  # noqa: E731
    product = rate(lambda a: a @ b)
    packed = rate(Packed(SimpleNamespace(weight=b, bias=None))) if packable(device, dtype) else None
    big = torch.ones(2 ** 28 if device.type == "cpu" else 2 ** 30, device=device)                      # 1 or 4 GB of float32: no cache holds it
    reading = big.numel() * 4 / timed(big.sum, device, repeat)
    return product, packed, reading


class Components:
    """Times and counts the parts of a model while it runs, by wrapping the functions that its passes call."""

    def __init__(self, model):
        self.device, self.seconds, self.flops, self.read, self.counting = model.device, {}, {}, {}, False
        mar, size = model.mar, lambda *modules: sum(p.numel() * p.element_size() for m in modules for p in m.parameters())  # noqa: E731
        self.places = {"encoder": (mar, "encode"), "LLM": (model.llm, "forward"), "decoder": (mar, "decode"), "head": (mar.diffloss, "sample"), "VAE decoder": (model.vae, "decode")}
        net, S = mar.diffloss.net, mar.config.diffusion_steps
        modulating = size(*(layer.adaLN_modulation for layer in (*net.res_blocks, net.final_layer)))
        looping = size(net.input_proj, net.res_blocks, net.final_layer) - modulating

        def head(z, **_):   # the modulations of some steps are computed at once, see DiffusionHead.solve
            return size(net) + (S - 1) * looping + (math.ceil(S / max(1, mar.diffloss.rows_at_once // len(z))) - 1) * modulating

        self.weight = {"encoder": lambda *_: size(mar.encoder_blocks), "LLM": lambda *_: size(model.llm.model.layers), "decoder": lambda *_: size(mar.decoder_blocks),
                       "head": head, "VAE decoder": lambda *_: size(model.vae.decoder)}                # bytes of weights read in one call

    @contextmanager
    def watching(self, counting):
        self.counting, self.seconds, self.read = counting, dict.fromkeys(self.places, 0.0), dict.fromkeys(self.places, 0)
        self.flops = dict.fromkeys(self.places, 0) if counting else self.flops
        for name, (owner, function) in self.places.items():
            setattr(owner, function, self.wrapped(name, getattr(owner, function)))
        try:
            yield
        finally:
            for owner, function in self.places.values():
                delattr(owner, function)

    def wrapped(self, name, function):
        def run(*args, **kwargs):
            result = []
            synchronize(self.device)
            began = time.perf_counter()
            if self.counting:
                self.flops[name] += flops_of(lambda: result.append(function(*args, **kwargs)))
            else:
                result.append(function(*args, **kwargs))
            synchronize(self.device)
            self.seconds[name] += time.perf_counter() - began
            self.read[name] += self.weight[name](*args)
            return result[0]
        return run


def prompt_of(model, text, length=16):
    """Token ids of a text; without a tokenizer as many random ones as a short prompt has."""
    if model.tokenizer is not None:
        return model.prompt_ids(text)
    return torch.randint(model.config.llm.vocab_size, (length,), generator=torch.Generator().manual_seed(0)).tolist()


def drawing(model, args):
    """Rows of text-to-image: the whole, then its parts."""
    grid = model.token_grid(args.size)
    rows = [prompt_of(model, GENERATE.format(caption="three blue stars"))] * args.images + [prompt_of(model, UNCONDITIONAL, 12)] * args.images
    L = max(map(len, rows))
    ids, real = torch.tensor([row + [0] * (L - len(row)) for row in rows]), torch.tensor([[i < len(row) for i in range(L)] for row in rows])
    run = lambda **k: model.sample(ids, real, num_iter=args.steps, grid=grid, generator=torch.Generator().manual_seed(0), progress=True, **k)  # noqa: E731
    parts, times, S = Components(model), [], model.config.mar.diffusion_steps
    if args.count:                                                   # arithmetic is linear in the head's steps: one and two tell what S take
        counts = []
        for diffusion_steps in (1, 2):
            with parts.watching(counting=True):
                run(diffusion_steps=diffusion_steps)
            counts.append(parts.flops)
        parts.flops = {k: counts[0][k] + (S - 1) * (counts[1][k] - counts[0][k]) for k in parts.places}
    else:
        with parts.watching(counting=True):                          # also the warm-up
            run()
        if args.mode in ("graphs", "compiled"):
            run()                                                    # and theirs: what is captured or compiled
    for _ in range(args.repeat):
        with parts.watching(counting=False):
            synchronize(model.device)
            began = time.perf_counter()
            run()
            synchronize(model.device)
            times.append({"whole": time.perf_counter() - began} | parts.seconds)
    rows = [{"what": f"  {k}", "flops": parts.flops[k], "bytes": parts.read[k]} for k in parts.places]
    rows = [{"what": "text to image", **{k: sum(row[k] for row in rows) for k in ("flops", "bytes")}}] + rows
    if not times:
        return rows
    for row, k in zip(rows, ("whole", *parts.places)):
        row["seconds"] = median(t[k] for t in times)
    return rows + [{"what": "  the rest", "flops": 0, "seconds": rows[0]["seconds"] - sum(row["seconds"] for row in rows[1:])}]


def answering(model, args):
    """Rows of understanding: encoding with prefill, and the tokens of an answer."""
    h, w = model.token_grid(args.size)
    s, n = model.config.vae.stride, h * w + model.config.mar.buffer_size
    pixels, tail = torch.zeros(1, 3, h * s, w * s), prompt_of(model, "Describe the image.")
    ids = torch.tensor([[IMAGE_TOKEN_ID] * n + tail], device=model.device)

    def embeds():
        with torch.no_grad():
            return model.embed(ids, model.visual_features(model.encode(pixels))[1])

    def answer(count):
        return lambda: [*model.llm.generate(embeds(), max_new_tokens=count)]
    first, all_ = timed(answer(1), model.device, args.repeat), timed(answer(args.tokens), model.device, args.repeat)
    weight = sum(p.numel() * p.element_size() for p in model.llm.parameters())
    rows = [{"what": f"image to text: prefill, {n} image tokens", "seconds": first, "flops": flops_of(answer(1))},
            {"what": f"image to text: a token, over {args.tokens}", "seconds": (all_ - first) / max(1, args.tokens - 1), "bytes": weight}]
    try:
        rows.append({"what": "  the same LLM in transformers", "seconds": in_transformers(model, embeds(), args), "bytes": weight})
    except ImportError:
        pass
    return rows


def in_transformers(model, embeds, args):
    """Seconds a token of transformers' greedy generate, of the same weights."""
    import transformers

    cfg = model.config.llm
    with torch.device("meta"):
        judge = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**{k: getattr(cfg, k) for k in cfg.__dataclass_fields__ if k != "rope_theta"},
                                                                       rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta}))
    judge = judge.to_empty(device=model.device).to(model.dtype)
    judge.load_state_dict(model.llm.state_dict(), strict=False)
    judge.model.rotary_emb = type(judge.model.rotary_emb)(judge.config).to(model.device)
    answer = lambda count: lambda: judge.eval().generate(inputs_embeds=embeds, max_new_tokens=count, min_new_tokens=count, do_sample=False)  # noqa: E731
    first, all_ = timed(answer(1), model.device, args.repeat), timed(answer(args.tokens), model.device, args.repeat)
    return (all_ - first) / max(1, args.tokens - 1)


VARIANTS = {   # of training: what is changed in stage III
    "plain": dict(checkpointing=False),
    "pixels": dict(checkpointing=False),     # through the VAE in every step instead of from cached latents
    "checkpointing": {},
    "compiled": dict(checkpointing=False, compile=True),
}


def training(model, args):
    """Rows of one optimizer step of stage III, in its variants, on made-up data: 20 micro-batches in its ratio of tasks, forward and backward under bfloat16 autocast over float32
    weights, clipping, AdamW, averaging. Prompts have 64 tokens, answers 128, texts 512. The arithmetic is the model's: what checkpointing computes twice counts once. The rate is that of bfloat16 products."""
    model.float().train()
    h, w = model.token_grid(args.size)
    s, n, B, device = model.config.vae.stride, h * w + model.config.mar.buffer_size, args.batch, model.device
    pictures = {"latents": torch.randn(B, h, w, model.config.mar.token_dim, device=device), "pixels": torch.rand(B, 3, h * s, w * s, device=device) * 2 - 1}

    def batch(task, variant, rows):
        images, question, answer = {"text2image": (0, 64, 0), "image2text": (n, 64, 128), "text": (0, 64, 448)}[task]
        ids = torch.tensor([[IMAGE_TOKEN_ID] * images + [1] * (question + answer)] * rows, device=device)
        made = {"input_ids": ids, "attention_mask": torch.ones_like(ids, dtype=torch.bool)}
        if task != "text2image":
            made["labels"] = torch.where(torch.arange(ids.shape[1], device=device) < images + question, -100, ids)
        if task != "text":
            made |= {"pixels": pictures["pixels"][:rows]} if variant == "pixels" else {"pixels": None, "latents": pictures["latents"][:rows]}
        return made

    def backward(losses, task, variant, rows=B):
        torch.manual_seed(0)
        with torch.autocast(device.type, torch.bfloat16):
            loss = losses(task, batch(task, variant, rows))
        loss.backward()

    rows, rate = [], machine(device, torch.bfloat16, args.repeat)[0]
    for variant in args.variants:
        recipe = replace(RECIPES["stage3"], **VARIANTS[variant])
        tasks = [task for task, count in recipe.ratio.items() for _ in range(count)]
        optimizer = make_optimizer(parameter_groups(model, recipe))
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        averaged = {name: p.detach().clone() for name, p in trained.items()}
        losses = train.Losses(model, recipe)
        flops = B * sum(count * flops_of(lambda: backward(losses, task, variant, 1)) for task, count in recipe.ratio.items())  # noqa: B023
        model.zero_grad(set_to_none=True)
        train.outfit(losses, recipe)

        def step():
            for task in tasks:  # noqa: B023
                backward(losses, task, variant)  # noqa: B023
            train.update(optimizer, trained, averaged, recipe, 0)  # noqa: B023
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        row = {"what": f"training step, {len(tasks)} × {B} samples, {variant}", "flops": flops, "rate": rate}
        try:
            row["seconds"] = timed(step, device, args.repeat)
            row |= {"samples/s": len(tasks) * B / row["seconds"], "peak GB": peak_memory(device) / 1e9}
            row["what"] += f": {row['samples/s']:.3g} samples/s, peak {row['peak GB']:.3g} GB"
        except torch.OutOfMemoryError:
            row["what"] += ": out of memory"
        rows.append(row)
        model.zero_grad(set_to_none=True)
        for block in train.blocks_of(model):     # the outfit comes off again
            vars(block).pop("forward", None)
            block._compiled_call_impl = None
    return rows


def make_model(args):
    if args.model in SIZES:                  # random weights: no file is needed to know how long it takes
        with torch.device("meta"):
            model = Harmon(HarmonConfig.from_name(args.model))
        if args.count:
            return model.to(args.dtype).eval()
        model.to_empty(device=args.device).to(args.dtype)
        torch.manual_seed(0)
        with torch.no_grad():
            for p in tqdm(list(model.parameters()), desc="random weights", disable=None, leave=False):
                p.normal_(std=0.02)
        model.llm.tie_weights()
        return model.eval()
    return Harmon.from_pretrained(args.model, device=args.device, dtype=args.dtype)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="harmon-0.5b", help="harmon-0.5b or harmon-1.5b with random weights, or anything sample.py takes")
    parser.add_argument("--what", nargs="+", choices=("draw", "answer", "train"), default=["draw", "answer"])
    parser.add_argument("--size", type=int, help="pixels (default: the native size)")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=32, help="of an answer")
    parser.add_argument("--batch", type=int, default=4, help="micro-batch of training")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["plain", "pixels", "checkpointing"], help="of training")
    parser.add_argument("--repeat", type=int, default=3, help="runs to take the median of; of training, steps; of the machine's rates, measurements")
    parser.add_argument("--device", help="default: cuda when there is one")
    parser.add_argument("--dtype", type=DTYPES.get, default=torch.float32, metavar="|".join(DTYPES))
    parser.add_argument("--mode", choices=MODES, default="auto", help="fast paths, see fast.py; training is always eager")
    parser.add_argument("--count", action="store_true", help="only count the arithmetic and the weights read of drawing; random weights' sizes only")
    parser.add_argument("--out", type=Path, help="write the rows there as JSON")
    args = parser.parse_args()
    try:
        args.device = choose_device(args.device)
        if args.dtype is None or min(args.steps, args.images, args.tokens, args.batch, args.repeat) < 1:
            raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, and all counts at least 1")
        if args.count:
            if args.model not in SIZES:
                raise ValueError(f"--count knows {', '.join(SIZES)}; --model is {args.model}")
            args.what, args.repeat = ["draw"], 0
        product, packed, reading = (float("nan"), None, float("nan")) if args.count else machine(args.device, args.dtype, args.repeat)
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(args.device)          # machine() takes gigabytes
        device = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
        about = {"device": device, "torch": torch.__version__, "dtype": str(args.dtype).removeprefix("torch."), "model": args.model, "size": args.size, "steps": args.steps,
                 "images": args.images, "mode": args.mode, "GFLOP/s": round(product / 1e9, 1), **({"packed GFLOP/s": round(packed / 1e9, 1)} if packed else {}),
                 "GB/s": round(reading / 1e9, 1), "date": time.strftime("%Y-%m-%d")}
        print(", ".join(f"{k} {v}" for k, v in about.items()) + "\n\n| | seconds | GFLOP | of the machine's rate | floor, s | times the floor | weights read, GB | in s |\n" + "|---" * 8 + "|")
        model, rows = make_model(args), []
        if "train" not in args.what and not args.count:
            accelerate(model, args.mode)
        for what in args.what:
            for row in {"draw": drawing, "answer": answering, "train": training}[what](model, args):
                flops, read, seconds, rate = row.get("flops", 0), row.get("bytes", 0), row.get("seconds", float("nan")), row.get("rate", product)
                row["floor"] = flops / rate if flops else read / reading
                rows.append(row)
                print(f"| {row['what']} | {seconds:.4g} | {flops / 1e9:.4g} | {flops / seconds / rate:.0%} | {row['floor']:.4g} | "
                      f"{seconds / row['floor'] if row['floor'] else float('nan'):.2f} | {read / 1e9:.4g} | {read / reading:.4g} |".replace("nan%", "").replace("nan", ""), flush=True)
        if not args.count:
            about |= {"GB of weights": round(sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9, 2), "peak GB": round(peak_memory(args.device) / 1e9, 2)}
            print(f"\npeak memory {about['peak GB']} GB, of which {about['GB of weights']} GB are weights")
        if args.out:
            with checkpoints.atomic_write(args.out) as temporary:
                Path(temporary).write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    except (ValueError, OSError) as error:
        print(f"benchmark.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
