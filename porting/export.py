"""Write what a port is tested against: named intermediate tensors of one understanding pass, one generation and one training step.

    python porting/export.py --model harmon-tiny --out vectors/            # any model that Harmon.from_pretrained takes
    python porting/export.py --random harmon-0.5b --out vectors/           # name-seeded random weights: no checkpoint needed
    python porting/export.py --random harmon-tiny --out vectors/ --save-weights weights/

The folder gets vectors.safetensors and index.json, which lists the tensors in the order in which they were computed, each with its shape, its type, the
operation in words and the line of source that computed it; recorder.py is how.
"""
import argparse
import itertools
import json
import random
import re
import sys
import zlib
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from compare import relative_error
from recorder import Recorder, line_of, replaced, rounded_otherwise, watching  # puts the project's root on the path

import diffusion_head
import harmon
import llm
import shapes
import weights
from data import conversation
from harmon import Harmon, HarmonConfig
from images import image_to_pixels, pad_to_square
from pretrained import END
from random_weights import random_weight

PASSES = ("understand", "generate", "train", "resize")


# ---- the passes ------------------------------------------------------------------------------------------------------

@torch.no_grad()
def understand(model, record, image, question, max_new_tokens):
    """An image and a question: encoder, prompt, greedy answer. Recorded in full up to the first token that uses the cache."""
    h, w = model.token_grid()
    s = model.config.vae.stride
    pixels = image_to_pixels(pad_to_square(image), (h * s, w * s)).to(model.device, model.dtype)
    ids = torch.tensor([model.prompt_ids(question, image_tokens=h * w + model.config.mar.buffer_size)], device=model.device)
    record.inputs(pixels=pixels, input_ids=ids)
    with watching(model, record, itertools.chain(["token0", "token1"], itertools.repeat(""))):
        _, z_enc = model.visual_features(model.encode(pixels))
        answer = list(model.llm.generate(model.embed(ids, z_enc), max_new_tokens=max_new_tokens, eos_token_id=model.tokenizer.token_to_id(END)))
    record("answer", torch.tensor(answer, dtype=torch.int64), f"greedy answer: argmax of the logits, at most {max_new_tokens} ids, without {END}",
           line_of(llm.Qwen2.generate))
    return answer


@torch.no_grad()
def generate(model, record, prompt, rng, steps, cfg, temperature):
    """One image with guidance on the native grid, orders and noise given."""
    h, w = model.token_grid()
    ids, real = model.pad([model.prompt_ids(harmon.GENERATE.format(caption=prompt)), model.prompt_ids(harmon.UNCONDITIONAL)])
    ids, real = ids.to(model.device), real.to(model.device)
    orders = torch.from_numpy(rng.permutation(h * w)[None]).to(model.device)
    masked = harmon.masking_schedule(h * w, steps)
    size = model.config.mar.diffusion_steps, model.config.mar.token_dim
    noise = {k: torch.from_numpy(rng.standard_normal((size[0], m - m_next, size[1]), np.float32)).to(model.device)
             for k, (m, m_next) in enumerate(zip(masked, masked[1:]), 1) if m > m_next}
    record.inputs(input_ids=ids, attention_mask=real, orders=orders, **{f"step{k}__noise": x for k, x in noise.items()})
    record("masked", torch.tensor(masked), "how many tokens stay masked after each step", line_of(harmon.masking_schedule))
    step = iter(noise)
    draws = itertools.chain.from_iterable(noise.values())
    base = record.place

    def begin(method):                                                          # a step begins with the encoder and ends with on_step
        def wrapper(latents, mask, visible):
            record.place = f"{base}step{next(step)}/"
            record("hidden", mask, "which tokens are masked: the first m of orders")
            return method(latents, mask, visible)
        return wrapper

    def end(k, tokens, hidden):
        record("tokens", tokens, "the canvas after this step: latents, 0 where masked")
        record.place = base

    with watching(model, record, ["prompt"]), replaced(model, "visual_features", begin):
        return model.sample(ids, real, num_iter=steps, cfg=cfg, temperature=temperature, orders=orders, noise_fn=lambda shape: next(draws), on_step=end)


def train(model, record, image, question, answer, caption, rng):
    """Both losses of two images, the second mirrored and, to draw, without its caption; the norm of every gradient. Dropout is off (eval mode)."""
    h, w = model.token_grid()
    s, N, mul, C = model.config.vae.stride, h * w, model.config.mar.diffusion_batch_mul, model.config.mar.token_dim
    pixels = image_to_pixels(image, (h * s, w * s))
    with torch.no_grad():
        latents = model.encode(torch.cat([pixels, pixels.flip(3)])).contiguous()
    ids, real = model.pad([model.prompt_ids(harmon.GENERATE.format(caption=caption)), model.prompt_ids(harmon.UNCONDITIONAL)])
    hidden = -(-3 * N // 4)
    mask = torch.from_numpy(np.stack([rng.permutation(N) for _ in range(2)]) < hidden)
    t = torch.from_numpy(rng.integers(0, diffusion_head.T, mul * 2 * N))
    t[:2 * N][mask.flatten()] *= torch.arange(2 * hidden) % 8 > 0               # an eighth of the counted rows of the first round is at t = 0
    noise = torch.from_numpy(rng.standard_normal((mul * 2 * N, C), np.float32))
    batch = {k: x.to(model.device) for k, x in dict(input_ids=ids, attention_mask=real, latents=latents, mask=mask, t=t, noise=noise).items()}
    with record.at("text2image"):
        record.inputs(**batch)
        with watching(model, record), gradients(model, record):
            loss = model.text2image_loss(None, batch.pop("input_ids"), batch.pop("attention_mask"), **batch)
            record("loss", loss, "mean over masked tokens of the ε error and the variational bound in bits")
            loss.backward()

    rows = [conversation(model, [turn], N + model.config.mar.buffer_size) for turn in ((question, answer), (question, f"{answer} {answer}"))]
    ids, real = model.pad([row for row, _ in rows])
    labels = torch.tensor([said + [harmon.IGNORE_INDEX] * (ids.shape[1] - len(said)) for _, said in rows])
    batch = {k: x.to(model.device) for k, x in dict(input_ids=ids, attention_mask=real, latents=latents.clone(), labels=labels).items()}
    with record.at("image2text"):
        record.inputs(**batch)
        with watching(model, record), gradients(model, record):
            loss = model.image2text_loss(None, batch["input_ids"], batch["attention_mask"], batch["labels"], latents=batch["latents"])
            record("loss", loss, "mean cross-entropy of the labelled tokens")
            loss.backward()


@torch.no_grad()
def resize(model, record, grid):
    """The three position embeddings for a grid that is not the native one."""
    with watching(model, record):
        for table in (model.mar.encoder_pos_embed_learned, model.mar.decoder_pos_embed_learned, model.mar.diffusion_pos_embed_learned):
            model.mar.position_embedding(table, grid)


@contextmanager
def gradients(model, record):
    """The norm of each parameter's gradient, in the order in which backward finishes them, and of all together."""
    modules, square, handles = dict(model.named_modules()), 0.0, []
    for name, p in model.named_parameters():                                    # tied weights: under their first name

        def see(p, name=name):
            nonlocal square
            norm = p.grad.float().norm()
            square += float(norm) ** 2
            owner = name
            while type(modules[owner := owner.rpartition(".")[0]]).__module__.startswith("torch."):
                pass                                                            # up to the project's module that holds the layer
            record(f"gradient/{name}", norm, "Euclidean norm of the gradient", line_of(type(modules[owner])), kind="gradient")
        handles.append(p.register_post_accumulate_grad_hook(see))
    yield
    record("gradient", torch.tensor(square ** 0.5), "Euclidean norm of all gradients together", line_of(Harmon.text2image_loss), kind="gradient")
    for handle in handles:
        handle.remove()
    model.zero_grad(set_to_none=True)


# ---- the model and the folder ----------------------------------------------------------------------------------------

class WordIds:
    """In place of a tokenizer, for models that have none: a word's id is a hash of it."""

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size

    def token_to_id(self, word):
        return zlib.crc32(word.encode()) % self.vocab_size

    def encode(self, text, add_special_tokens=False):
        return SimpleNamespace(ids=[self.token_to_id(word) for word in re.findall(r"<\|\w+\|>|\w+|[^\w ]", text)])


def random_model(config, dtype=torch.float32):
    """Harmon of any size with name-seeded weights."""
    with torch.device("meta"):
        model = Harmon(config)
    tensors = {name: torch.from_numpy(random_weight(name, tuple(p.shape))) for name, p in model.named_parameters()}
    weights.assign(model, tensors, "random weights", device="cpu", dtype=dtype)
    model.llm.tie_weights()
    return model.eval()


def export(model, out, *, origin, passes=PASSES, image=None, question=None, prompt=None, steps=4, cfg=3.0, temperature=0.9, max_new_tokens=16, seed=0):
    """Write the folder `out`. origin: "random" or where the weights are from. Returns the number of tensors."""
    if not set(passes) <= set(PASSES):
        raise ValueError(f"passes are {', '.join(PASSES)}; given: {', '.join(passes)}")
    if model.tokenizer is None:
        model.tokenizer = WordIds(model.config.llm.vocab_size)
    scene, g = shapes.scene(seed, 0, kind="pair"), model.config.mar.grid
    asked, answer = next((q, a) for kind, q, a in shapes.questions(scene, random.Random(seed)) if kind == "color")
    image, prompt, question = image or shapes.render(scene), prompt or shapes.describe(scene), question or asked
    settings = dict(prompt=prompt, question=question, steps=steps, cfg=cfg, temperature=temperature, max_new_tokens=max_new_tokens,
                    end=model.tokenizer.token_to_id(END), resized_grid=[g + 1, g + 3], seed=seed)
    runs = dict(understand=lambda record, rng: understand(model, record, image, question, max_new_tokens),
                generate=lambda record, rng: generate(model, record, prompt, rng, steps, cfg, temperature),
                train=lambda record, rng: train(model, record, image, question, answer, prompt, rng),
                resize=lambda record, rng: resize(model, record, (g + 1, g + 3)))
    record = Recorder()
    for number, name in enumerate(PASSES):
        if name in passes:
            again = Recorder()
            with record.at(name):
                runs[name](record, np.random.default_rng([seed, number]))
            with again.at(name), rounded_otherwise(model):
                runs[name](again, np.random.default_rng([seed, number]))
            for entry in record.entries:
                a, b = (tensors.get(entry["name"]) for tensors in (record.tensors, again.tensors))
                if b is not None and a.is_floating_point() and a.shape == b.shape:
                    entry["rounding"] = float(f"{relative_error(a.double().numpy(), (a.double() - b.double()).abs().numpy()):.1e}")
    index = dict(weights=str(origin), dtype=str(model.dtype).removeprefix("torch."), settings=settings, config=model.config.to_json(),
                 parameters={name: list(p.shape) for name, p in model.named_parameters()}, tensors=record.entries)
    weights.write(Path(out) / "vectors.safetensors", record.tensors)
    with weights.replacing(Path(out) / "index.json") as temporary:
        head = {k: v for k, v in index.items() if k != "tensors"}
        lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in record.entries)
        Path(temporary).write_text(f"{json.dumps(head, ensure_ascii=False, indent=1)[:-2]},\n \"tensors\": [\n{lines}\n]}}\n")
    return len(record.entries)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="harmon-tiny", help="harmon-tiny, a folder, an official .pth, or a hub id (default: %(default)s)")
    add("--vae", type=Path, help="the VAE's file, when the model's holds none (kl16.ckpt)")
    add("--tokenizer", type=Path, help="a tokenizer.json or its folder, when the model has none beside it")
    add("--random", metavar="NAME", help="instead: name-seeded random weights at the size of harmon-tiny, harmon-0.5b, harmon-1.5b or of a folder with a config.json")
    add("--save-weights", type=Path, metavar="FOLDER", help="also write the model's weights, for a port that does not make random ones itself")
    add("--out", type=Path, required=True)
    add("--passes", default=",".join(PASSES), help="some of them, separated by commas (default: %(default)s)")
    add("--image", type=Path, help="default: a picture from the world of shapes")
    add("--question")
    add("--prompt", help="what the generation draws")
    add("--steps", type=int, default=4, help="of generation (default: %(default)s)")
    add("--cfg", type=float, default=3.0)
    add("--temperature", type=float, default=0.9)
    add("--max-new-tokens", type=int, default=16)
    add("--seed", type=int, default=0, help="of orders, noise, masks and the default picture")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    args = parser.parse_args(argv)
    try:
        dtype = getattr(torch, args.dtype)
        if args.random:
            model = random_model(HarmonConfig.of(args.random), dtype)
        else:
            model = Harmon.from_pretrained(args.model, vae=args.vae, tokenizer=args.tokenizer, device="cpu", dtype=dtype)
        if args.save_weights:
            model.save_pretrained(args.save_weights)
        image = Image.open(args.image).convert("RGB") if args.image else None
        count = export(model, args.out, origin="random" if args.random else args.model, passes=args.passes.split(","), image=image, question=args.question,
                       prompt=args.prompt, steps=args.steps, cfg=args.cfg, temperature=args.temperature, max_new_tokens=args.max_new_tokens, seed=args.seed)
        print(f"{args.out}: {count} tensors, {(args.out / 'vectors.safetensors').stat().st_size / 1e6:.1f} MB")
    except (ValueError, OSError) as error:
        print(f"export.py: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
