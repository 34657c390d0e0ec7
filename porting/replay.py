"""Recompute with the NumPy port what export.py wrote: both passes of inference and the losses of the training step.

    python porting/replay.py vectors/ mine/                       # then: python porting/compare.py vectors/ mine/

It takes the inputs and the weights' origin from the vectors' folder and writes every tensor that the index names, but for gradients.
"""
import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
from numpy_harmon import BUNDLED, answer, back_to_mar, embed, generate, linear, llm, logits, mar_decode, mix, net, position_embedding, process
from numpy_harmon import time_embed, visual_features
from parameters import Part, Trace, load, read_safetensors
from random_weights import random_weight
from safetensors.numpy import save_file

IGNORE = -100                      # in labels: no loss here


# ---- losses ----------------------------------------------------------------------------------------------------------

def normal_cdf(u):                                                              # the tanh approximation
    return 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u ** 3)))


def discretized_nll(x, mean, logvar):
    """-log probability of the bin x ± 1/255 in nats; the outermost bins are open."""
    upper, lower = (normal_cdf(np.exp(-0.5 * logvar) * (x - mean + side)) for side in (1 / 255, -1 / 255))
    return -np.log(np.maximum(np.where(x < -0.999, upper, np.where(x > 0.999, 1 - lower, upper - lower)), 1e-12))


def gaussian_kl(mean1, logvar1, mean2, logvar2):
    return 0.5 * (logvar2 - logvar1 - 1 + np.exp(logvar1 - logvar2) + (mean1 - mean2) ** 2 * np.exp(-logvar2))


def head_loss(p, z, x0, t, noise):
    """z (M, D) conditions, x0 (M, C) clean tokens, t (M,), noise (M, C) -> the ε error and the variational bound, a mean over rows."""
    now = {name: column[t][:, None] for name, column in process(1000)[1].items()}
    x_t = now["signal"] * x0 + now["sigma"] * noise
    eps, v = np.split(net(p.net, x_t, time_embed(p.net.time_embed, t) + linear(p.net.cond_embed, z)), 2, axis=1)
    mean = now["mean_from_x0"] * (now["x0_from_xt"] * x_t - now["x0_from_eps"] * eps) + now["mean_from_xt"] * x_t
    logvar = p.trace.show("logvar", mix(v, now["log_beta"], now["log_variance"]))
    kl = p.trace.show("kl", gaussian_kl(now["mean_from_x0"] * x0 + now["mean_from_xt"] * x_t, now["log_variance"], mean, logvar))
    bound = np.where(t[:, None] == 0, discretized_nll(x0, mean, logvar), kl).mean(axis=1) / math.log(2)
    return (((noise - eps) ** 2).mean(axis=1) + bound).mean()


def text2image_loss(p, ids, real, latents, mask, t, noise):
    B, h, w, C = latents.shape
    x_enc, z_enc = visual_features(p, latents, mask)
    text = p.show("embeds", p.llm.model.embed_tokens.weight[ids])
    hidden, _ = llm(p.llm, np.concatenate([text, z_enc], axis=1), np.concatenate([real, np.ones(z_enc.shape[:2], bool)], axis=1))
    z = p.show("z", mar_decode(p.mar, back_to_mar(p, x_enc, hidden[:, ids.shape[1]:]), mask, (h, w)))
    repeats = len(t) // mask.size
    rows = np.tile(mask.flatten(), repeats)                                     # of all tokens, repeated as a whole, those that were masked
    z, x0 = (np.tile(x.reshape(mask.size, -1), (repeats, 1))[rows] for x in (z, latents))
    return p.show("loss", head_loss(p.mar.diffloss, z, x0, t[rows], noise[rows]))


def image2text_loss(p, ids, real, latents, labels):
    _, z_enc = visual_features(p, latents)
    hidden, _ = llm(p.llm, embed(p, ids, z_enc), real)
    counted = labels[:, 1:] != IGNORE                                           # position i predicts label i + 1
    scores = logits(p, hidden[:, :-1][counted])
    scores = scores - scores.max(-1, keepdims=True)
    log_p = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    return p.show("loss", -log_p[np.arange(len(log_p)), labels[:, 1:][counted]].mean())


# ---- the vectors -----------------------------------------------------------------------------------------------------

def model_of(index):
    """The root Part of the model that an index tells of."""
    if index["weights"] == "random":
        weights = {name: random_weight(name, shape) for name, shape in index["parameters"].items()}
        return Part(weights, index["config"], Trace())
    folder = BUNDLED / index["weights"] if (BUNDLED / index["weights"]).is_dir() else Path(index["weights"])
    return load(folder)


def recompute(p, index, inputs):
    """{name: array} of every tensor in the index that inference or a loss computes."""
    names = [name for entry in index["tensors"] for name in [entry["name"], *entry["also"]]]
    p.trace.wanted, p.trace.kept = frozenset(names), {}
    settings, at, show = index["settings"], p.trace.at, p.trace.show
    g = index["config"]["mar"]["img_size"] // index["config"]["mar"]["vae_stride"]
    if "understand/pixels" in inputs:
        with at("understand"):
            said = answer(p, inputs["understand/input_ids"], inputs["understand/pixels"], end=settings["end"], most=settings["max_new_tokens"])
            show("answer", np.array(said, np.int64))
    if "generate/orders" in inputs:
        with at("generate"):
            generate(p, inputs["generate/input_ids"], inputs["generate/attention_mask"], inputs["generate/orders"],
                     lambda k, M: inputs[f"generate/step{k}/noise"], grid=(g, g), steps=settings["steps"], cfg=settings["cfg"],
                     temperature=settings["temperature"])
    if "train/text2image/latents" in inputs:
        for task, loss, given in (("text2image", text2image_loss, ("input_ids", "attention_mask", "latents", "mask", "t", "noise")),
                                  ("image2text", image2text_loss, ("input_ids", "attention_mask", "latents", "labels"))):
            with at("train"), at(task):
                loss(p, *(inputs[f"train/{task}/{name}"] for name in given))
    if any(name.startswith("resize/") for name in names):
        with at("resize"):
            for name in ("encoder_pos_embed_learned", "decoder_pos_embed_learned", "diffusion_pos_embed_learned"):
                position_embedding(p.mar, name, tuple(settings["resized_grid"]))
    return p.trace.kept


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vectors", type=Path, help="the folder that export.py wrote")
    parser.add_argument("mine", type=Path, help="the folder to write")
    args = parser.parse_args(argv)
    try:
        index = json.loads((args.vectors / "index.json").read_text())
        kept = recompute(model_of(index), index, read_safetensors(args.vectors / "vectors.safetensors"))
        args.mine.mkdir(parents=True, exist_ok=True)
        save_file(kept, args.mine / "vectors.safetensors")
        print(f"{args.mine / 'vectors.safetensors'}: {len(kept)} tensors")
    except (ValueError, OSError) as error:
        print(f"replay.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
