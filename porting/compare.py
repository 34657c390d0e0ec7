"""Where does a port differ first? Compare its tensors with those that export.py wrote, in the order in which they were computed.

    python porting/compare.py vectors/ mine/

mine/ holds any number of .safetensors files with tensors under the names in vectors/index.json; half precision is read as float32. The relative error of
a tensor is max |a - b| / max(max |a|, 1e-3), a what was exported. Equal is what is within the tolerance of the exported type; integers and booleans must
be the same. Inputs need not be in mine/, and gradients not if there are none at all. Exit status: 0 all equal, 1 not so, 2 bad input.
"""
import argparse
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from parameters import read_safetensors

FLOOR = 1e-3                       # of max |a|: what is smaller everywhere is compared absolutely
TOLERANCE = {"float64": 1e-6, "float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}              # any other type: 0
ROUNDING = 15                      # times what a change of every layer's output in its last bit does to a tensor, if that is more than its tolerance
SHARPER = ((r"\.mlp\.fc2\.in$", 0.2),)                          # a factor where a usual mistake is smaller than the tolerance

CAUSES = (  # what usually makes a tensor of that name differ when all before it are equal; the first pattern that fits counts
    # VAE
    (r"downsample\.conv\.in$", "padding: the stride-2 convolution wants one row and column of zeros at the right and at the bottom, none at the left and top"),
    (r"upsample\.conv\.in$", "upsampling is nearest: every value twice in both directions, not bilinear"),
    (r"vae\..*norm\w*\.out$", "GroupNorm: 32 groups of consecutive channels, mean and variance over the group and all positions, variance / n, eps 1e-6 and not 1e-5"),
    (r"vae\..*(conv[12]|conv_out)\.in$", "swish is x · sigmoid(x), after the norm and before the convolution"),
    (r"vae\..*\.[qkv]$", "1×1 convolutions of the normed map, positions row by row: (B, 1, h·w, c)"),
    (r"vae\..*\.weights$", "one head over all positions, scores divided by √c, softmax over the keys"),
    (r"vae\..*quant_conv\.out$", "1×1 convolution between mean and log variance and the network; on the way back the z_channels of the latents"),
    (r"vae\.decoder\.up\.", "levels are stored shallowest first and run deepest first; three blocks each; upsampling in all but level 0"),
    (r"vae\.", "convolutions are cross-correlations, weight (out, in, row, column), zeros around; nin_shortcut only where the widths differ; the shortcut is added last"),
    (r"latents$", "vae_scale: latents are the mean (the first half of quant_conv's channels, no sampling) times vae_scale, channels last"),
    (r"decoded$", "the VAE decodes latents / vae_scale, channels first"),
    # MAR
    (r"resize/", "bilinear resize of the image part alone, position (i + ½) · old / new - ½ clamped to the edges (align_corners False, no antialiasing)"),
    (r"pos_embed_learned$", "position embedding: the table unchanged on the native grid; in encoder and decoder its first n rows are the buffers'"),
    (r"mar\.z_proj\.out$", "Linear is x @ weight.T + bias; tokens are the latents of positions row by row"),
    (r"z_proj_ln\.in$", "position embedding: buffers (fake_latent, n times) stand in front and take rows 0 … n-1, image token i takes row n + i"),
    (r"encoder_blocks\.0\.in$", "hidden tokens are dropped after z_proj_ln, not zeroed; buffers stay; visible tokens in raster order, not in the order of generation"),
    (r"decoder_embed\.out$", "decoder_embed comes before the scattering: mask_token does not go through it"),
    (r"decoder_blocks\.0\.in$", "scatter: visible tokens to their own places, mask_token elsewhere, then the position embedding on all"),
    (r"mar\..*(norm\d?|_ln)\.out$", "LayerNorm: eps 1e-6 and not torch's 1e-5, variance / n"),
    (r"_blocks\.\d+\.attn\.[qkv]$", "QKV packing: of qkv's 3·D outputs the first D are q of all heads, then k, then v; head j takes channels j·d … (j+1)·d - 1 of each"),
    (r"_blocks\.\d+\.attn\.weights$", "scores divided by √d, softmax over the keys, no mask: every token sees every token"),
    (r"attn\.proj\.in$", "heads are put side by side: (B, heads, L, d) -> (B, L, heads·d)"),
    (r"fc2\.in$", "GELU: exact, x · Φ(x) with erf, not the tanh approximation"),
    (r"(^|/)x_enc$", "encoder_norm comes after the last block"),
    (r"(^|/)z_enc$", "buffer order: for the LLM the n buffers are moved from the front to behind the image tokens, after proj_in"),
    (r"back_to_mar$", "buffer order: the last n outputs of proj_out are moved to the front again before x_enc is added; x_enc is added to all of them"),
    (r"(^|/)z$", "decoder_norm, then the n buffers are dropped, then diffusion_pos_embed_learned is added (without buffer rows)"),
    (r"coder_blocks\.\d+\.out$", "block: both branches are pre-norm residuals; the second one starts from the sum of the first"),
    (r"proj_(in|out)\.", "proj_in and proj_out are Linear, SiLU, Linear; they see buffers and visible tokens alike"),
    # LLM
    (r"(^|/)embeds$", "rows of embed_tokens, unscaled; where input_ids are -200 z_enc stands, in order"),
    (r"attention_mask$|llm\.positions$", "positions are cumsum(mask) - 1 over cached and new tokens: padding is on the right and does not count, the image goes on "
                                         "after the real prompt; the tokens of the step before must have been dropped from the cache"),
    (r"rotary\.", "rotary: angle = position · theta^(-2i/d), i = 0 … d/2 - 1, the d/2 angles twice, one after the other (not each one doubled)"),
    (r"self_attn\.[qk]$", "rotary layout: half-split, channel i is paired with i + d/2 (not 2i with 2i + 1): x · cos + [-x₂, x₁] · sin; "
                           "or the cache holds keys that are not rotated yet"),
    (r"self_attn\.v$", "values are not rotated; cached ones come first"),
    (r"self_attn\.weights$", "causal with the triangle aligned to the last key, padding masked, scores divided by √d; grouped queries: key head j serves "
                             "consecutive query heads j·g … (j+1)·g - 1"),
    (r"o_proj\.in$", "heads are put side by side; grouped queries: value head j serves consecutive query heads"),
    (r"llm\..*norm\.out$", "RMSNorm: no mean is subtracted, eps (rms_norm_eps, 1e-6) inside the root, times weight"),
    (r"[qkv]_proj\.out$", "q, k and v have biases, the other projections none"),
    (r"down_proj\.in$", "SwiGLU: silu of gate_proj times up_proj, not the other way around"),
    (r"llm\.cache\.", "the cache holds keys after the rotation and values, (B, kv_heads, S, d), with as many heads as there are key heads"),
    (r"layers\.0\.in$", "the prompt goes through once; each step sends only visible and buffer tokens, in z_enc's order, the same to both halves of guidance"),
    (r"layers\.\d+\.out$", "layer: both branches are pre-norm residuals"),
    (r"logits$", "the hidden states of the last position, after the final norm, times lm_head, which is embed_tokens where weights are tied"),
    (r"answer$", "greedy: the argmax of each step's logits, ended by <|im_end|>, which is not part of the answer"),
    # diffusion head and sampling
    (r"masked$", "masking schedule: m_k = max(1, min(m_(k-1) - 1, ⌊N · cos(π/2 · k/K)⌋)), m_K = 0"),
    (r"hidden$", "the first m_(k-1) entries of orders are masked when step k begins"),
    (r"time_embed\.in$", "respaced steps: the network is told round(i · 999 / (steps - 1)), not i"),
    (r"time_embed\.mlp\.0\.in$", "time features: 128 cosines first, then 128 sines; exponent -ln(10000) · i / 128; t is not divided by 1000"),
    (r"cond_embed\.in$", "rows: conditional ones, then unconditional ones; newly drawn tokens in raster order; in training the list of all tokens repeated as a whole"),
    (r"(mlp\.0|final_layer\.linear)\.in$", "modulation: adaLN_modulation gives shift, scale, gate in that order, and x becomes (1 + scale) · LayerNorm(x) + shift; "
                                        "the final layer's norm has no weights"),
    (r"adaLN_modulation\.1\.in$", "silu of the sum of time and condition embedding"),
    (r"res_blocks\.\d+\.out$", "x + gate · mlp(…): the gate multiplies the branch alone"),
    (r"t\d+/(eps|v)$", "of the head's 2·C outputs the first C are ε, the others v"),
    (r"t\d+/eps_guided$", "guidance: ε_u + w (ε_c - ε_u); the first half of the rows is conditional, the second unconditional"),
    (r"t\d+/mean$", "posterior mean: x_0 = x / √ᾱ - √(1/ᾱ - 1) · ε, clamped to ± x0_clip if the configuration has one, then β √ᾱ' / (1 - ᾱ) · x_0 + "
                    "(1 - ᾱ') √(ᾱ/ᾱ') / (1 - ᾱ) · x with ᾱ' of the step before and β = 1 - ᾱ/ᾱ', both of the respaced process"),
    (r"logvar$", "variance interpolation: f = (v + 1)/2, f · log β + (1 - f) · log β̃; β̃ of step 0 is that of step 1; v is the conditional rows'"),
    (r"t\d+/x$", "x = mean + exp(½ logvar) · noise · temperature; one draw for the start and one for each step but the last, in this order"),
    (r"drawn$", "no noise is added at the last step"),
    (r"tokens$", "drawn tokens go to their own places, image by image, in raster order"),
    (r"diffloss\.net\.in$", "x_t = √ᾱ · x_0 + √(1 - ᾱ) · noise with ᾱ of all 1000 steps; rows of tokens that are not masked are left out"),
    # losses and gradients
    (r"kl$", "KL of two Gaussians in nats, the true posterior's first; both means are of x_t, the predicted one with the network's ε"),
    (r"text2image/loss$", "mean over masked tokens of mean (ε - ε_θ)² plus the bound divided by ln 2; at t = 0 the bound is -log of the bin x_0 ± 1/255, "
                          "with the tanh approximation of Φ, and not the KL"),
    (r"image2text/loss$", "position i predicts label i + 1; mean over the labels that are not -100"),
    (r"image2text/gradient/(mar|proj_in)", "of the gradient into z_enc a tenth passes in understanding"),
    (r"gradient", "the bound trains v only (ε detached); dropout is off; tied weights add up the gradients of both uses"),
    (r".", "the operation itself, its parameters' names, or the layout of its weight (Linear is out × in)"),
)


@dataclass
class Result:
    entry: dict
    verdict: str                   # "equal", "differs", "missing", "shape" or "left out"
    error: float = 0.0
    tolerance: float = 0.0
    detail: str = ""


def cause_of(name):
    return next(cause for pattern, cause in CAUSES if re.search(pattern, name))


def relative_error(a, difference):
    """How large a difference from the tensor a is; 0 for empty ones."""
    return float(difference.max() / max(np.abs(a).max(), FLOOR)) if a.size else 0.0


def tolerance_of(entry, model, before):
    """By the tensor's type, or by the model's if that is coarser: float32 tensors of a half-precision model are computed from half-precision ones.

    It is wider where the exporter found that rounding alone moves the tensor further: the first diffusion steps magnify an error in ε up to 20,000 times.
    before: the error of the tensor before this one. Where a sharper look is due, it must not be taken for a mistake made here.
    """
    if entry["dtype"] not in TOLERANCE:
        return 0
    tolerance = max(TOLERANCE[entry["dtype"]], TOLERANCE[model] if model in ("float16", "bfloat16") else 0, ROUNDING * entry.get("rounding", 0))
    factor = next((factor for pattern, factor in SHARPER if re.search(pattern, entry["name"])), 1)
    return tolerance if tolerance > TOLERANCE["float32"] else min(tolerance, max(factor * tolerance, 4 * before))


def compare(index, expected, mine):
    """A Result for each tensor of the index, in its order. expected, mine: {name: array}; mine may use any of a tensor's names."""
    no_gradients = not any("/gradient" in name for name in mine)
    results = []
    for entry in index["tensors"]:
        name = next((name for name in [entry["name"], *entry["also"]] if name in mine), None)
        tolerance = tolerance_of(entry, index.get("dtype"), results[-1].error if results else 0)
        if name is None:
            optional = entry["kind"] == "input" or entry["kind"] == "gradient" and no_gradients
            results.append(Result(entry, "left out" if optional else "missing"))
            continue
        a, b = expected[entry["name"]], mine[name]
        if a.shape != b.shape:
            results.append(Result(entry, "shape", detail=f"shape {b.shape}, expected {a.shape}"))
            continue
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        difference = np.abs(a - b)
        if "real" in entry:                                                     # what is computed at padding means nothing
            mask, axis = expected[entry["real"][0]][:, -a.shape[entry["real"][1]]:], entry["real"][1]
            difference = np.where(mask.reshape([n if i in (0, axis) else 1 for i, n in enumerate(a.shape)]), difference, 0)
        difference = np.where(np.isnan(difference), np.inf, difference)
        worst = np.unravel_index(difference.argmax(), a.shape) if a.size else ()
        error = relative_error(a, difference)
        detail = f"at {[int(i) for i in worst]} {b[worst]:.6g}, expected {a[worst]:.6g}" if a.size else ""
        results.append(Result(entry, "equal" if error <= tolerance else "differs", error, tolerance, detail))
    return results


def report(results, out=print):
    """Print what was found; returns the exit status."""
    groups = {verdict: [r for r in results if r.verdict == verdict] for verdict in ("equal", "differs", "missing", "shape", "left out")}
    bad = [r for r in results if r.verdict in ("differs", "missing", "shape")]
    for r in groups["shape"]:
        out(f"wrong shape: {r.entry['name']}: {r.detail}")
    for r in groups["missing"][:10]:
        out(f"missing: {r.entry['name']}")
    if len(groups["missing"]) > 10:
        out(f"… and {len(groups['missing']) - 10} more are missing, the last one {groups['missing'][-1].entry['name']}")
    first = next((r for r in bad if r.verdict != "missing"), None)
    if first is not None:
        e, names = first.entry, [first.entry["name"], *first.entry["also"]]
        out(f"\nthe first tensor that differs, number {results.index(first) + 1} of {len(results)}:\n  {names[0]}  {e['dtype']} {e['shape']}")
        if first.verdict == "differs":
            out(f"  relative error {first.error:.1e}, tolerance {first.tolerance:.0e}; {first.detail}")
        else:
            out(f"  {first.detail}")
        out(f"  what it is:   {e['operation']}\n  computed by:  {e['source']}\n  usual cause:  {cause_of(names[0])}")
        later = [r for r in groups["differs"] + groups["shape"] if r is not first]
        out(f"  {len(later)} later ones differ as well\n")
    by_kind = {kind: sum(r.entry["kind"] == kind for r in groups["left out"]) for kind in ("input", "gradient")}
    out(f"{len(results)} tensors: {len(groups['equal'])} equal, {len(groups['differs'])} differ, {len(groups['shape'])} of a wrong shape, "
        f"{len(groups['missing'])} missing; not compared: {by_kind['input']} inputs, {by_kind['gradient']} gradients")
    wider = [r for r in groups["equal"] if 0 < r.tolerance <= ROUNDING * r.entry.get("rounding", 0)]
    plain = [r for r in groups["equal"] if not any(r is other for other in wider)]
    for among, what in ((plain, "largest relative error among the equal ones"), (wider, f"and among the {len(wider)} that rounding alone moves further")):
        if among:
            worst = max(among, key=lambda r: r.error)
            out(f"{what}: {worst.error:.1e} ({worst.entry['name']})")
    return 1 if bad else 0


def read(vectors, mine):
    """The index, its tensors and mine. Raises FileNotFoundError or ValueError."""
    try:
        index = json.loads((vectors / "index.json").read_text())
        index["tensors"]
    except FileNotFoundError:
        raise FileNotFoundError(f"{vectors}: no index.json in it; the first argument is a folder that export.py wrote") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{vectors / 'index.json'}: not an index of export.py ({error!r})") from None
    files = sorted(mine.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{mine}: no .safetensors file in it; the second argument is the folder that the port wrote")
    expected = read_safetensors(vectors / "vectors.safetensors")
    lost = [entry["name"] for entry in index["tensors"] if entry["name"] not in expected]
    if lost:
        raise ValueError(f"{vectors}: vectors.safetensors lacks {lost[0]} and {len(lost) - 1} more that index.json names")
    return index, expected, {name: x for file in files for name, x in read_safetensors(file).items()}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vectors", type=Path, help="what export.py wrote")
    parser.add_argument("mine", type=Path, help="what the port computed")
    args = parser.parse_args(argv)
    try:
        return report(compare(*read(args.vectors, args.mine)))
    except (ValueError, OSError) as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
