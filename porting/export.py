"""Write vectors: the tensors of an answer, a picture, both losses and their gradients, as they are computed.

    python porting/export.py --model harmon-tiny --out vectors/     # any model of Harmon.from_pretrained
    python porting/export.py --random harmon-0.5b --out vectors/    # weights made from names, no checkpoint
    python porting/export.py --random harmon-tiny --out vectors/ --save-weights weights/

The NumPy port computes the tensors in float32; the gradients are torch's. PORTING.md describes the two files.
"""
import argparse
import json
import re
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy_harmon as port
from compare import relative_error
from parameters import Part, random_weight

try:
    import torch

    from harmon import Harmon, open_image
    from harmonkit.chat_template import GENERATE, UNCONDITIONAL, pad, prompt_ids, tokenize
    from harmonkit.checkpoints import BUNDLED, find_config, load_strict, write, write_text
    from harmonkit.images import image_to_pixels, pad_to_square
    from harmonkit.shapes_world import world
    from harmonkit.tokenizer import load_tokenizer
except ImportError as error:
    print(f"export.py: {error}; run `pip install -e .` in the project's root first", file=sys.stderr)
    sys.exit(2)

PASSES = ("understand", "generate", "train", "gradients", "resize", "class")
SETTINGS = dict(prompt="three blue stars", label=1, question="Describe the image.", answer="a red circle",
                num_iter=4, cfg=3.0, temperature=0.9, max_new_tokens=16, seed=0)
SKIPPED = re.compile("|".join((                                         # of repeated parts, all but the first
    r"(layers|_blocks)\.[1-9]\d*\.(?!in$|out$|self_attn\.[kv]$)",
    r"(step|train|token(?!0/)).*layers\.[1-9]\d*\.self_attn\.",         # except for the cache of the prompt
    r"vae\.(?!encoder\.down\.0\.block\.0\.).*((block|attn)\.|mid\.block_)\d\.(?!in$|out$)",
    r"step(?!1/).*diffloss\.(?!drawn)",
    r"/t(?!999/)\d+/mar\.diffloss\.net\.",
    r"class/vae\.",                                                     # as in generate/
    r"token(?![01]/)\d")))


class Recorder:
    """A trace that keeps the tensors; inputs and outputs of layers once, under their first name.

    disturbed: the output of every layer is changed in its last bit, up or down at random.
    """

    def __init__(self, disturbed=False):
        self.tensors = {}
        self.entries = []
        self.known = {}                                                 # id -> x, which keeps the id taken
        self.rng = np.random.default_rng(0) if disturbed else None

    def __call__(self, name, x, function):
        if self.rng is not None and name.endswith(".out"):
            eps = np.finfo(np.float32).eps
            x = x * self.rng.choice(np.float32([1 - eps, 1 + eps]), x.shape)
        again = id(x) in self.known and (name.endswith((".in", ".out")) or name in self.tensors)
        if again or SKIPPED.search(name):
            return x
        if name in self.tensors:
            raise RuntimeError(f"{name} is computed twice; give the second a place of its own")
        self.known[id(x)] = x
        self.tensors[name] = np.asarray(x, order="C")
        self.entries.append(dict(
            name=name, shape=x.shape, dtype=str(x.dtype), kind="computed" if function else "input",
            source=f"numpy_harmon.{function}" if function else "given"))
        return x


# ---- the passes --------------------------------------------------------------------------------------------

def training_batches(model, image, settings):
    """The arguments of both losses for two images: the second is mirrored and, to draw, has no caption."""
    rng = np.random.default_rng(settings["seed"])
    config = model.config.mar
    tokenizer = model.tokenizer
    N = config.grid ** 2
    pixels = image_to_pixels(pad_to_square(image), (config.img_size, config.img_size))
    with torch.no_grad():
        latents = model.encode(torch.cat([pixels, pixels.flip(3)])).contiguous()
    texts = GENERATE.format(caption=settings["prompt"]), UNCONDITIONAL
    input_ids, attention_mask = pad(tokenizer, [prompt_ids(tokenizer, text) for text in texts])
    mask = rng.permuted([np.arange(N)] * 2, axis=1) < -(-3 * N // 4)    # three quarters are hidden
    t = rng.integers(0, 1000, (config.diffusion_batch_mul, 2, N))
    t[0, :, ::8] = 0                                                    # where the bound is a likelihood
    noise = rng.standard_normal((t.size, config.token_dim), np.float32)
    draw = dict(input_ids=input_ids, attention_mask=attention_mask, latents=latents,
                mask=torch.from_numpy(mask), t=torch.from_numpy(t.flatten()), noise=torch.from_numpy(noise))

    question = prompt_ids(tokenizer, settings["question"], num_image_tokens=N + config.buffer_size)
    answer = [*tokenize(tokenizer, settings["answer"]), tokenizer.token_to_id(port.END)]
    input_ids, attention_mask = pad(tokenizer, [question + answer, question + answer[:-1] + answer])
    labels = input_ids.where(attention_mask, port.IGNORE_INDEX)
    labels[:, :len(question)] = port.IGNORE_INDEX                       # only the answers are learned
    tell = dict(input_ids=input_ids, attention_mask=attention_mask, latents=latents, labels=labels)
    return {"text2image": draw, "image2text": tell}


def run(p, tokenizer, batches, image, settings, passes=PASSES):
    """All passes in NumPy. The trace of p gets the tensors."""
    if "understand" in passes:
        port.chat(p.at("understand"), tokenizer, image, settings["question"], settings["max_new_tokens"])
    if "generate" in passes:
        options = {name: settings[name] for name in ("seed", "num_iter", "cfg", "temperature")}
        port.generate_image(p.at("generate"), tokenizer, settings["prompt"], **options)
    if "train" in passes:
        for task, loss in (("text2image", port.text2image_loss), ("image2text", port.image2text_loss)):
            place = p.at(f"train/{task}")
            loss(place, **{name: place.show(name, x.numpy()) for name, x in batches[task].items()})
    if "resize" in passes:
        g = p.config["mar"]["img_size"] // p.config["mar"]["vae_stride"]
        for stage in ("encoder", "decoder", "diffusion"):
            port.position_embedding(p.at("resize").mar, f"{stage}_pos_embed_learned", (g + 1, g + 3))
    if "class" in passes:
        options = {name: settings[name] for name in ("seed", "num_iter", "cfg", "temperature")}
        port.generate_class(p.at("class"), settings["label"], **options)


def gradients(model, batches):
    """{name: the norm of a parameter's gradient} of both losses, the last parameters first."""
    norms = {}
    for task, loss in (("text2image", model.text2image_loss), ("image2text", model.image2text_loss)):
        loss(None, **batches[task]).backward()
        for name, parameter in reversed(list(model.named_parameters())):
            if parameter.grad is not None:
                norms[f"train/{task}/gradient/{name}"] = parameter.grad.norm().numpy()
        model.zero_grad()
    return norms


# ---- the model and the folder ------------------------------------------------------------------------------

def random_model(name):
    """Harmon of an official size, or of a folder with a config.json, with weights made from their names."""
    with torch.device("meta"):
        model = Harmon(find_config(name))
    sizes = {name: tuple(x.shape) for name, x in model.named_parameters()}
    weights = {name: torch.from_numpy(random_weight(name, size)) for name, size in sizes.items()}
    load_strict(model, weights, name)
    model.llm.tie_weights()
    model.tokenizer = load_tokenizer(BUNDLED / "harmon-tiny")
    return model.eval()


def part_of(model):
    """The port's parameters, which are those of a torch model."""
    return Part({name: x.detach().numpy() for name, x in model.named_parameters()}, model.config.to_json())


def export(model, out, *, origin, image=None, passes=PASSES, settings=SETTINGS):
    """Write the folder `out`. origin: "random", or whose weights these are. Returns the number of tensors."""
    if not set(passes) <= set(PASSES):
        raise ValueError(f"passes are {', '.join(PASSES)}; given: {', '.join(passes)}")
    image = image or world.render(world.scene(0, 0))
    p = part_of(model)
    batches = training_batches(model, image, settings)
    recorder, again = Recorder(), Recorder(disturbed=True)
    for trace in (recorder, again):
        run(replace(p, trace=trace), model.tokenizer, batches, image, settings, passes)
    tensors, entries = recorder.tensors, recorder.entries
    for about in entries:
        name = about["name"]
        a, b = tensors[name], again.tensors.get(name)
        if a.dtype == np.float32 and b is not None and a.shape == b.shape:
            about["rounding"] = float(f"{relative_error(a, b)[0]:.1e}")
        # At padding positions the LLM's tensors mean nothing: the mask, and the axis that it belongs to.
        mask = f"{name.rpartition('/')[0]}/llm.attention_mask"
        if "/llm." in name and name != mask and not tensors[mask].all():
            about["attention_mask"] = mask, 2 if re.search(r"\.([qkv]|weights|cos|sin)$", name) else 1
    for name, norm in gradients(model, batches).items() if "gradients" in passes else ():
        tensors[name] = norm
        entries.append(dict(name=name, shape=(), dtype="float32", kind="gradient", source="torch.autograd"))

    sums = {name: zlib.crc32(np.ascontiguousarray(x)) for name, x in p.weights.items()}
    parameters = {name: dict(shape=x.shape, crc32=sums[name]) for name, x in p.weights.items()}
    index = dict(weights=origin, settings=settings, config=p.config, parameters=parameters, tensors=entries)
    write(Path(out) / "vectors.safetensors", {name: torch.tensor(x) for name, x in tensors.items()})
    write_text(Path(out) / "index.json", json.dumps(index, indent=1))
    return len(entries)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--model", default="harmon-tiny", help="harmon-tiny, a folder, an official .pth, or a hub id")
    add("--vae", type=Path, help="the VAE's file, when the model's holds none (kl16.ckpt)")
    add("--tokenizer", type=Path, help="a tokenizer.json or its folder, when the model has none beside it")
    add("--random", metavar="NAME", help="instead: random weights of an official size or a folder's config")
    add("--save-weights", type=Path, metavar="FOLDER", help="also write the model, for a port that reads it")
    add("--out", type=Path, required=True)
    add("--passes", default=",".join(PASSES), help="some of them, separated by commas (default: %(default)s)")
    add("--image", type=Path, help="default: a picture of the shapes world")
    for name, value in SETTINGS.items():
        flags = ["--num-iter", "--steps"] if name == "num_iter" else [f"--{name.replace('_', '-')}"]
        add(*flags, type=type(value), default=value, help="default: %(default)s")
    args = parser.parse_args(argv)
    try:
        if args.random:
            model = random_model(args.random)
        else:
            files = dict(vae=args.vae, tokenizer=args.tokenizer)
            model = Harmon.from_pretrained(args.model, **files, device="cpu", dtype=torch.float32)
        if args.save_weights:
            model.save_pretrained(args.save_weights)
        count = export(
            model, args.out, origin="random" if args.random else args.model, passes=args.passes.split(","),
            image=open_image(args.image) if args.image else None,
            settings={name: getattr(args, name) for name in SETTINGS})
        print(f"{args.out}: {count} tensors")
    except (ValueError, OSError) as error:
        print(f"export.py: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
