"""How long drawing, answering and training take, and how long they would at the machine's own rates.

    python -m harmonkit.scripts.benchmark                       # harmon-0.5b, 256 px, 16 steps, one image
    python -m harmonkit.scripts.benchmark --model harmon-1.5b --size 512 --dtype bfloat16 --out 1.5b.json
    python -m harmonkit.scripts.benchmark --what train --model harmon-1.5b --variants plain compiled
    python -m harmonkit.scripts.benchmark --what batches --model harmon-tiny --batch-sizes 1 8 32
    python -m harmonkit.scripts.benchmark --count --model harmon-1.5b --size 512 --steps 64

Weights are random: only sizes matter. GFLOP count products, convolutions and attention, with the head's
modulations batched (fast.py); a multiply-add is two. The floor is their time at the rate of a large linear
layer, or for a token of an answer the time to read the LLM's weights. Packed weights can be below it.
"""
import copy
import json
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from statistics import median

import torch
from torch.utils.benchmark.utils.timer import timer  # seconds; waits for the accelerator
from torch.utils.flop_counter import FlopCounterMode

from harmon import Harmon, Sampling
from harmonkit import fast
from harmonkit.checkpoints import find_config, write_text
from harmonkit.devices import DTYPES, choose_device
from harmonkit.pipeline import answer_batch, token_grid
from harmonkit.repeatable import make_repeatable
from harmonkit.scripts import argument_parser
from harmonkit.shapes_world import tokenizer, world
from harmonkit.terminal import errors_in_one_line
from harmonkit.training import losses, optim, recipes
from harmonkit.training.monitor import peak_memory
from mar import Randomness

VARIANTS = {                                    # of training: changes to the recipe finetune
    "plain": {"checkpointing": False},
    "pixels": {"checkpointing": False},         # through the VAE instead of from cached latents
    "checkpointing": {},
    "compiled": {"checkpointing": False, "compile": True},
}


def make_model(args, device):
    """A Harmon with random weights. On the meta device it has none, and running it computes nothing."""
    config = find_config(args.model)
    torch.set_default_dtype(DTYPES[args.dtype])
    with torch.device(device):
        model = Harmon(config).eval()
    torch.set_default_dtype(torch.float32)
    return model


# ---- measures: functions of run() that return (number, result) ---------------------------------------

def clock(run):
    """Seconds."""
    began = timer()
    result = run()
    return timer() - began, result


def count(run):
    """GFLOP."""
    with FlopCounterMode(display=False) as counter:
        result = run()
    return counter.get_total_flops() / 1e9, result


def seconds(run, repeat):
    """The median of `repeat` runs, after one that warms up."""
    run()
    return median(clock(run)[0] for _ in range(repeat))


def by_part(measure, model, run):
    """run() with the calls of the model's parts under `measure` -> {part: sum of their numbers}."""
    parts = {"encoder": (model.mar, "encode"), "LLM": (model.llm, "forward"),
             "decoder": (model.mar, "decode"), "head": (model.mar.diffloss, "sample"),
             "VAE decoder": (model.vae, "decode")}
    sums = dict.fromkeys(parts, 0)

    def measured(part, function, *args, **kwargs):
        number, result = measure(lambda: function(*args, **kwargs))
        sums[part] += number
        return result
    for part, (owner, name) in parts.items():
        setattr(owner, name, partial(measured, part, getattr(owner, name)))
    run()
    for owner, name in parts.values():
        delattr(owner, name)
    return sums


def machine_rates(device, dtype, repeat):
    """GFLOP/s of a large linear layer, plain and packed where fast.py packs; GB/s of reading memory."""
    n = 4096 if device.type == "cpu" else 8192
    x = torch.randn(n, n, device=device, dtype=dtype)
    layers = {"GFLOP/s": torch.nn.Linear(n, n, bias=False, device=device, dtype=dtype)}
    if fast.packable(device, dtype):
        layers["packed GFLOP/s"] = fast.packed_linear(copy.deepcopy(layers["GFLOP/s"]))
    rates = {key: 2e-9 * n ** 3 / seconds(partial(layer, x), repeat) for key, layer in layers.items()}
    large = torch.ones(2 ** 28, device=device)                              # 1 GB, more than caches hold
    rates["GB/s"] = 4e-9 * len(large) / seconds(large.sum, repeat)
    return {key: round(rate, 1) for key, rate in rates.items()}


# ---- rows: pairs of a name and {"seconds": …, …} -----------------------------------------------------

@torch.no_grad()
def draw(model, args, num_sampling_steps=None):
    """Text to image with guidance, after prompts of 16 tokens."""
    h, w = token_grid(model, args.size)
    ids = torch.ones(2 * args.images, 16, dtype=torch.long, device=model.device)
    tokens = torch.zeros(args.images, h * w, model.config.mar.token_dim, device=model.device)
    # The mask's values are needed also where all else is on the meta device.
    mask_device = "cpu" if model.device.type == "meta" else model.device
    mask = torch.ones(args.images, h * w, dtype=torch.bool, device=mask_device)
    settings = Sampling(num_iter=args.steps, num_sampling_steps=num_sampling_steps)
    *_, (tokens, _) = model.sample_steps(ids, ids.bool(), settings, Randomness(), (tokens, mask), (h, w))
    model.decode(tokens.unflatten(1, (h, w)))


def draw_rows(args):
    meta_model = make_model(args, "meta")
    fast.batch_modulations(meta_model.mar.diffloss)
    # All diffusion steps take the same arithmetic, so one and two of them are counted.
    one, two = (by_part(count, meta_model, partial(draw, meta_model, args, S)) for S in (1, 2))
    more = meta_model.config.mar.diffusion_steps - 1
    gflop = {part: one[part] + more * (two[part] - one[part]) for part in one}
    gflop = {"text to image": sum(gflop.values())} | gflop
    rows = {name: {"GFLOP": number} for name, number in gflop.items()}
    if not args.count:
        model = fast.accelerate(make_model(args, args.device), args.mode)
        run = partial(draw, model, args)
        run()                                                               # warm-up
        times = [clock(partial(by_part, clock, model, run)) for _ in range(args.repeat)]
        for name, row in rows.items():
            row["seconds"] = median(parts.get(name, whole) for whole, parts in times)
    return rows.items()


def answer_rows(args):
    """Encoding and prefill; a token of an answer of 32, here and in transformers if that is installed."""
    model = fast.accelerate(make_model(args, args.device), args.mode)
    h, w = token_grid(model, args.size)
    s = model.config.vae.stride

    @torch.no_grad()
    def see():
        return model.look(model.encode(torch.zeros(1, 3, h * s, w * s)))

    def answer(inputs_embeds, max_new_tokens):
        return list(model.llm.generate(inputs_embeds, max_new_tokens=max_new_tokens))
    yield "image to text: prefill", {"seconds": seconds(lambda: answer(see(), 1), args.repeat)}
    answers = {"image to text: a token": answer}
    if find_spec("transformers"):
        answers["a token in transformers"] = partial(transformers_llm(model).generate, do_sample=False)
    gigabytes = sum(p.numel() * p.element_size() for p in model.llm.parameters()) / 1e9
    for name, answer in answers.items():
        run = partial(answer, inputs_embeds=see())
        first, last = (seconds(partial(run, max_new_tokens=n), args.repeat) for n in (1, 33))
        yield name, {"GB": gigabytes, "seconds": (last - first) / 32}


def batch_rows(args):
    """Short answers to questions of one length about different pictures, as benchmarks ask them."""
    model = make_repeatable(fast.accelerate(make_model(args, args.device), args.mode))
    model.tokenizer = tokenizer.train_tokenizer(512)
    for size in args.batch_sizes:
        questions = ["Is there a red circle? Answer the question using a single word or phrase."] * size
        images = [world.render(world.scene("benchmark", i)) for i in range(size)]
        took = seconds(partial(answer_batch, model, questions, images, size=args.size,
                               max_new_tokens=args.answer_tokens), args.repeat)
        yield f"image to text: batch of {size}", {"seconds": took, "answers/s": size / took}


def transformers_llm(model):
    import transformers

    sizes = asdict(model.config.llm)
    rope = {"rope_type": "default", "rope_theta": sizes.pop("rope_theta")}
    llm = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes, rope_parameters=rope))
    return llm.to(model.device, model.dtype).eval()


def train_row(args, variant):
    """Optimizer steps of finetune, one micro-batch with prompts of 64 tokens each."""
    model = make_model(args, args.device).float().train()
    recipe = replace(recipes.RECIPES["finetune"], **VARIANTS[variant])
    optimizer = optim.make_optimizer(optim.parameter_groups(model, recipe))
    ema = optim.EMA({name: p for name, p in model.named_parameters() if p.requires_grad}, recipe.ema)
    fast.patch_attention(args.device)
    losses.wrap_blocks(model, recipe)
    loss_of = losses.Losses(model, recipe)
    h, w = token_grid(model, args.size or recipe.size)
    s = model.config.vae.stride
    ids = torch.ones(recipe.micro_batch, 64, dtype=torch.long, device=args.device)
    inputs = {"input_ids": ids, "attention_mask": ids.bool()}
    if variant == "pixels":
        inputs["pixels"] = torch.zeros(len(ids), 3, h * s, w * s)
    else:
        inputs["latents"] = torch.zeros(len(ids), h, w, model.config.mar.token_dim, device=args.device)

    def step():
        with torch.autocast(args.device.type, torch.bfloat16):
            loss = loss_of("text2image", inputs)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(ema.trainable.values(), recipe.clip)
        optimizer.step()
        ema.update(0)
        optimizer.zero_grad()
    if args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    took = seconds(step, args.repeat)
    return {"seconds": took, "samples/s": len(ids) / took, "peak GB": peak_memory(args.device) / 1e9}


def train_rows(args):
    for variant in args.variants:
        yield f"training step, {variant}", train_row(args, variant)


# ---- the command -------------------------------------------------------------------------------------

def main(argv=None):
    parser = argument_parser(__doc__)
    flag = parser.add_argument
    flag("--what", nargs="+", choices=("draw", "answer", "batches", "train"), default=["draw", "answer"])
    flag("--model", default="harmon-0.5b", help="harmon-0.5b, harmon-1.5b, harmon-tiny or a model folder")
    flag("--size", type=int, help="pixels (default: the native size; for training 512)")
    flag("--steps", type=int, default=16)
    flag("--images", type=int, default=1)
    flag("--batch-sizes", type=int, nargs="+", default=[1, 8, 32], help="of batches of questions")
    flag("--answer-tokens", type=int, default=4, help="of answers in batches")
    flag("--variants", nargs="+", choices=VARIANTS, default=["plain", "checkpointing"], help="of training")
    flag("--repeat", type=int, default=3, help="runs to take the median of")
    flag("--device", help="default: cuda if there is one")
    flag("--dtype", choices=DTYPES, default="float32")
    flag("--mode", choices=fast.MODES, default="auto", help="fast paths of drawing and answering")
    flag("--count", action="store_true", help="only count the arithmetic of drawing")
    flag("--out", help="write the rows there as JSON")
    args = parser.parse_args(argv)
    with errors_in_one_line("benchmark"):
        if min(args.steps, args.images, args.repeat, args.answer_tokens, *args.batch_sizes) < 1:
            raise ValueError("--steps, --images, --repeat, --batch-sizes and --answer-tokens must be at "
                             "least 1")
        about = vars(args) | {"torch": torch.__version__, "threads": torch.get_num_threads()}
        args.device = choose_device(args.device)
        if not args.count:
            about |= machine_rates(args.device, DTYPES[args.dtype], args.repeat)
        print(about)
        rows = {}
        rows_of = {"draw": draw_rows, "answer": answer_rows, "batches": batch_rows, "train": train_rows}
        for what in ["draw"] if args.count else args.what:
            for name, row in rows_of[what](args):
                unit = "GFLOP" if "GFLOP" in row else "GB"
                if unit in row and "seconds" in row:
                    row["floor"] = row[unit] / about[f"{unit}/s"]
                    row["times the floor"] = row["seconds"] / row["floor"]
                rows[name] = row
                numbers = ", ".join(f"{key} {value:.4g}" for key, value in row.items())
                print(f"{name}: {numbers}", flush=True)
        print(f"peak memory {peak_memory(args.device) / 1e9:.2f} GB")
        if args.out:
            write_text(args.out, json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
