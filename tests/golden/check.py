#!/usr/bin/env python3
"""Compare the project with recorded outputs of the original implementation.

    python tests/golden/check.py tests/golden/tiny.safetensors      (from the project's root)

Builds Harmon with the golden file's sizes, fills it with `reference_weight`, runs every component on the recorded inputs and
prints the relative error ||out - ref|| / ||ref|| of each. Exit status 1 if any is above its tolerance. float32, CPU.
"""
import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open

sys.path[:0] = [str(Path.cwd()), str(Path(__file__).resolve().parent)]
from reference_weights import golden_noise, reference_weight  # noqa: E402

TOLERANCE = 2e-5  # float32 against float64 of the original itself differs by up to 1e-6 (vb terms 4e-6)
failures = []


def read(path):
    with safe_open(path, "pt") as f:
        return {k: f.get_tensor(k) for k in f.keys()}, f.metadata()


def compare(name, out, golden, tol=TOLERANCE):
    key = name if name in golden else next((k for k in golden if k.startswith(name + "::")), None)
    if key is None:
        raise KeyError(name)
    ref = golden[key]
    out = torch.as_tensor(out).detach().to(ref.dtype)
    if "::" in key:
        out = out.flatten()[:: int(key.split("::")[1])]
    if out.shape != ref.shape:
        failures.append(name)
        print(f"FAIL {name}: shape {tuple(out.shape)}, expected {tuple(ref.shape)}")
        return
    if ref.dtype in (torch.int64, torch.bool):
        error = float((out != ref).float().mean())
        tol = 0
    else:
        error = float((out.double() - ref.double()).norm() / ref.double().norm().clamp_min(1e-12))
    ok = error <= tol
    if not ok:
        failures.append(name)
    print(f"{'ok  ' if ok else 'FAIL'} {name:28s} {error:.1e}")


def build(c):
    from harmon import Harmon, HarmonConfig
    from llm import QwenConfig
    from mar import MARConfig
    from vae import VAEConfig

    l, m, v = c["llm"], c["mar"], c["vae"]
    qwen = QwenConfig(**{k: l[k] for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                                           "num_key_value_heads", "rope_theta", "rms_norm_eps", "tie_word_embeddings")})
    mar = MARConfig(img_size=m["img_size"], vae_stride=m["vae_stride"], embed_dim=m["encoder_embed_dim"], encoder_depth=m["encoder_depth"],
                    decoder_depth=m["decoder_depth"], num_heads=m["encoder_num_heads"], mlp_ratio=4,
                    buffer_size=m["buffer_size"], token_dim=m["vae_embed_dim"], class_num=m["class_num"], dropout=0.1, head_depth=m["diffloss_d"],
                    head_width=m["diffloss_w"], diffusion_steps=int(m["num_sampling_steps"]), diffusion_batch_mul=m["diffusion_batch_mul"])
    vae = VAEConfig(ch=v["ch"], ch_mult=tuple(v["ch_mult"]), z_channels=v["embed_dim"])
    model = Harmon(HarmonConfig(llm=qwen, mar=mar, vae=vae, vae_scale=0.2325))
    tied = l["tie_word_embeddings"]
    weights = {}
    for name, p in model.state_dict().items():
        source = "llm.model.embed_tokens.weight" if tied and name == "llm.lm_head.weight" else name
        weights[name] = torch.from_numpy(reference_weight(source, tuple(p.shape)).copy())
    model.load_state_dict(weights, strict=True)
    return model.eval()


def gradient_norms(model):
    norms = {n: float(p.grad.double().norm()) for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return norms


def compare_gradients(name, norms, expected, tol=1e-3):
    worst, where = 0.0, ""
    for key, ref in expected.items():
        if ref is None or ref < 1e-7 or key == "llm.lm_head.weight":
            continue
        error = abs(norms.get(key, 0.0) - ref) / ref
        if error > worst:
            worst, where = error, key
    ok = worst <= tol
    if not ok:
        failures.append(name)
    print(f"{'ok  ' if ok else 'FAIL'} {name:28s} {worst:.1e}  worst {where}")


@torch.no_grad()
def check_components(model, g):
    noise_fn = lambda shape: torch.from_numpy(golden_noise(tuple(shape)))  # noqa: E731
    posterior = model.vae.encode(g["vae.pixels"])
    compare("vae.mean", posterior.mean, g)
    compare("vae.logvar", posterior.logvar, g)
    compare("vae.decoded", model.vae.decode(g["vae.z"]), g)
    compare("vae.mean_nonsquare", model.vae.encode(g["vae.pixels_nonsquare"]).mean, g)

    ids, mask = g["llm.input_ids"], g["llm.attention_mask"]
    hidden = model.llm(ids, attention_mask=mask)
    valid = mask[..., None]
    key = next(k for k in g if k.startswith("llm.logits"))
    logits = model.llm.logits(hidden)
    if "::" in key or bool(mask.all()):
        stride = int(key.split("::")[1]) if "::" in key else 1
        keep = valid.expand_as(logits).flatten()[::stride]
        compare("llm.logits(valid)", logits.flatten()[::stride][keep], {"llm.logits(valid)": g[key].flatten()[keep]})
    else:
        compare("llm.logits(valid)", logits[mask], {"llm.logits(valid)": g[key][mask]})
    from llm import KVCache

    cache = KVCache()
    model.llm(ids, attention_mask=mask, cache=cache)
    length = cache.length
    full = torch.cat([mask, mask.new_ones(g["llm.cont_embeds"].shape[:2])], 1)
    for _ in range(2):  # the second pass sees the cache as truncate left it
        out = model.llm(inputs_embeds=g["llm.cont_embeds"], attention_mask=full, cache=cache)
        cache.truncate(length)
    compare("llm.cont_hidden", out, g)

    native = int(round(g["mar.native.tokens"].shape[1] ** 0.5))
    grids = {"native": (native, native), "wide": (native + 1, native + 3)}
    for tag, grid in grids.items():
        tokens, hidden_mask = g[f"mar.{tag}.tokens"], g[f"mar.{tag}.mask"]
        encoded = model.mar.encode(tokens, hidden_mask, grid)
        compare(f"mar.{tag}.encoded", encoded, g)
        compare(f"mar.{tag}.decoded", model.mar.decode(encoded, hidden_mask, grid), g)
    latents = g["mar.native.tokens"].view(2, native, native, -1)
    x_enc, z_enc = model.visual_features(latents)
    compare("harmon.visual.x_enc", x_enc, g)
    compare("harmon.visual.z_enc", z_enc, g)
    compare("harmon.masked.x_enc", model.masked_features(latents, g["mar.native.mask"], ids, mask), g)

    head = model.mar.diffloss
    compare("head.out", head.net(g["head.x"], g["head.t"], g["head.z"]), g)
    value = head.loss(g["head.z"], g["head.loss.target"], g["head.loss.mask"], t=g["head.t"], noise=g["head.loss.noise"])
    compare("head.loss.value", value, g)
    compare("head.sample.plain", head.sample(g["head.sample.z"], temperature=1.0, noise_fn=noise_fn), g)
    compare("head.sample.cfg3", head.sample(g["head.sample.z"], temperature=0.9, cfg=3.0, noise_fn=noise_fn), g)

    for tag, rows, schedule in (("constant", 4, "constant"), ("linear", 4, "linear"), ("nocfg", 2, "constant")):
        cfg, temperature, num_iter = g[f"sample.{tag}.settings"].tolist()
        grid = {"linear": (native + 2, native + 1)}.get(tag, (native, native))
        pixels = model.sample(g["sample.input_ids"][:rows], g["sample.attention_mask"][:rows], num_iter=int(num_iter), cfg=cfg, cfg_schedule=schedule,
                              temperature=temperature, grid=grid, orders=g[f"sample.{tag}.orders"], noise_fn=noise_fn)
        compare(f"sample.{tag}.pixels", pixels, g, tol=2e-4)

    ids = g["chat.input_ids"]
    _, z_enc = model.visual_features(model.encode(g["train.pixels"][:1]))
    embeds = model.llm.model.embed_tokens(ids.clamp_min(0))
    embeds[ids == -200] = z_enc.flatten(0, 1)
    out = list(model.llm.generate(embeds, max_new_tokens=g["chat.generated"].shape[1]))
    compare("chat.generated", torch.tensor([[int(i) for i in out]]), g)


def check_training(model, g, meta):
    batch = g["train.pixels"], g["llm.input_ids"], g["llm.attention_mask"]
    loss = model.text2image_loss(*batch, mask=g["train.mask"], t=g["train.t"], noise=g["train.noise"])
    compare("train.text2image.loss", loss, g)
    loss.backward()
    compare_gradients("train.text2image.gradients", gradient_norms(model), json.loads(meta["grads.text2image"]))
    loss = model.image2text_loss(g["train.pixels"], g["train.image2text.input_ids"], g["train.image2text.attention_mask"], g["train.image2text.labels"])
    compare("train.image2text.loss", loss, g)
    loss.backward()
    compare_gradients("train.image2text.gradients", gradient_norms(model), json.loads(meta["grads.image2text"]))


def main():
    golden, meta = read(sys.argv[1])
    torch.manual_seed(0)
    model = build(json.loads(meta["config"]))
    check_components(model, golden)
    check_training(model, golden, meta)
    print(f"{len(failures)} failed" + (": " + ", ".join(failures) if failures else ""))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
