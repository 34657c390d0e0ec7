"""Write what a port is tested against: named intermediate tensors of one understanding pass, one generation and one training step.

    python porting/export.py --model harmon-tiny --out vectors/            # any model that Harmon.from_pretrained takes
    python porting/export.py --random harmon-0.5b --out vectors/           # name-seeded random weights: no checkpoint needed
    python porting/export.py --random harmon-tiny --out vectors/ --save-weights weights/

The folder gets vectors.safetensors and index.json, which lists the tensors in the order in which they were computed, each with its shape, its type, the
operation in words and the line of source that computed it. Nothing in the model's files knows of this: modules are watched with hooks, the few
functions between them by wrapping them for the time of the export, and the lines are found by `inspect` while it runs.
"""
import argparse
import inspect
import itertools
import json
import random
import re
import sys
import zlib
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "porting")]

import diffusion_head  # noqa: E402
import harmon  # noqa: E402
import llm  # noqa: E402
import mar  # noqa: E402
import shapes  # noqa: E402
import vae  # noqa: E402
import weights  # noqa: E402
from attention import attention  # noqa: E402
from data import conversation  # noqa: E402
from harmon import Harmon, HarmonConfig  # noqa: E402
from images import image_to_pixels, pad_to_square  # noqa: E402
from pretrained import END  # noqa: E402
from random_weights import random_weight  # noqa: E402

PASSES = ("understand", "generate", "train", "resize")


# ---- what an operation is called, and where it is written ------------------------------------------------------------

MODULES = {  # what a module of the project computes
    "ResnetBlock": "shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x))))))",
    "AttnBlock": "x + proj_out(attention over all positions, one head, of norm(x))",
    "Downsample": "pad right and bottom by one, 3×3 convolution of stride 2",
    "Upsample": "nearest ×2, 3×3 convolution",
    "RMSNorm": "x / √(mean(x²) + eps) · weight",
    "Block": "x + attn(norm1(x)), then x + mlp(norm2(x))",
    "DecoderLayer": "x + self_attn(input_layernorm(x)), then x + mlp(post_attention_layernorm(x))",
    "TimestepEmbedder": "linear, silu, linear of cos and sin of t · exp(-ln(10000) · i / 128)",
    "ResBlock": "x + gate · mlp((1 + scale) · in_ln(x) + shift)",
    "FinalLayer": "linear((1 + scale) · LayerNorm(x) + shift): ε, then v",
    "SimpleMLPAdaLN": "ε and v of noisy tokens x_t at steps t under conditions z",
}
INPUTS = (  # what is computed on the way into a module, by the end of its name
    (r"downsample\.conv", "padded by one, on the right and at the bottom only"),
    (r"upsample\.conv", "nearest ×2"),
    (r"conv2|conv1|conv_out", "silu of the norm before"),
    (r"layers\.0", "embeddings of the tokens of this call: of the prompt, and z_enc where the image is"),
    (r"z_proj_ln", "buffers (fake_latent) in front of z_proj(tokens), plus the position embedding"),
    (r"encoder_blocks\.0", "hidden tokens dropped: buffers, then the visible tokens in raster order"),
    (r"decoder_blocks\.0", "scattered to full length with mask_token in hidden places, plus the position embedding"),
    (r"o_proj|attn\.proj|proj_out", "attention weights @ v, heads side by side"),
    (r"mlp\.fc2", "exact GELU of fc1"),
    (r"down_proj", "silu(gate_proj) · up_proj"),
    (r"time_embed\.mlp\.0", "cos, then sin, of t · exp(-ln(10000) · i / 128), i = 0 … 127"),
    (r"res_blocks\.\d+\.mlp\.0", "(1 + scale) · in_ln(x) + shift"),
    (r"final_layer\.linear", "(1 + scale) · LayerNorm without weights + shift"),
    (r"adaLN_modulation\.1", "silu(time + condition)"),
    (r"mlp\.2|proj_(in|out)\.2", "silu of the linear before"),
    (r"diffloss\.net", "x_t = √ᾱ · x_0 + √(1 - ᾱ) · noise"),
)


def operation_of(module):
    """What a module computes, in words; sizes are read from the module."""
    if isinstance(module, nn.Linear):
        return f"x @ weight.T{'' if module.bias is None else ' + bias'}, weight {module.out_features}×{module.in_features} (out × in)"
    if isinstance(module, nn.Conv2d):
        return f"convolution {module.kernel_size[0]}×{module.kernel_size[1]}, stride {module.stride[0]}, padding {module.padding[0]}"
    if isinstance(module, nn.LayerNorm):
        return f"LayerNorm over the last axis, eps {module.eps}"
    if isinstance(module, nn.GroupNorm):
        return f"GroupNorm, {module.num_groups} groups, eps {module.eps}"
    if isinstance(module, nn.Embedding):
        return "rows of weight"
    return MODULES.get(type(module).__name__, f"{type(module).__name__} as in its source")


def lines_of(function):
    """The last line of a function of the project, which returns what it computes, as "file:line name"."""
    lines, first = inspect.getsourcelines(function)
    return f"{Path(inspect.getsourcefile(function)).name}:{first + len(lines) - 1} {function.__qualname__}"


def class_of(module):
    return f"{Path(inspect.getsourcefile(type(module))).name}:{inspect.getsourcelines(type(module))[1]} {type(module).__name__}"


def call_site():
    """The line of the model's source that is being run, as "file:line function"."""
    frame = inspect.currentframe()
    while frame.f_back is not None and Path(frame.f_code.co_filename).parent != ROOT:
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {getattr(frame.f_code, 'co_qualname', frame.f_code.co_name)}"


# ---- the recorder ----------------------------------------------------------------------------------------------------

class Recorder:
    """Tensors under the names of the places they come from, each once: what is handed on as it is becomes another name of the same entry."""

    def __init__(self):
        self.tensors, self.entries, self.place = {}, [], ""
        self.known, self.alive = {}, []                 # id of a tensor -> its entry; the tensors, so that ids stay theirs
        self.call = None                                # place of the last call of the language model
        self.padding = None                             # name of the (B, S) mask of real positions, while some are not

    @contextmanager
    def at(self, place):
        before, self.place = self.place, self.place if self.place is None or place is None else f"{self.place}{place}/"
        yield
        self.place = before

    @contextmanager
    def silence(self, silent=True):
        before, self.place = self.place, None if silent else self.place
        yield
        self.place = before

    def __call__(self, name, x, operation, source, kind="computed"):
        if self.place is None:
            return
        name = self.place + name
        if id(x) in self.known:
            entry = self.known[id(x)]
            if name != entry["name"] and name not in entry["also"]:
                entry["also"].append(name)
            return
        if name in self.tensors:
            raise RuntimeError(f"{name} is computed twice; give the second a place of its own")
        stored = x.detach().cpu().clone(memory_format=torch.contiguous_format)
        entry = dict(name=name, also=[], shape=list(stored.shape), dtype=str(stored.dtype).removeprefix("torch."), kind=kind, operation=operation, source=source)
        if self.padding is not None:
            entry["real"] = [self.padding, 2 if re.search(r"\.([qkv]|weights|cos|sin)$", name) else 1]
        self.tensors[name] = stored
        self.entries.append(entry)
        self.known[id(x)] = entry
        self.alive.append(x)

    def inputs(self, **tensors):
        for name, x in tensors.items():
            self(name.replace("__", "/"), x, "an input", "given", kind="input")


@contextmanager
def replaced(owner, name, make):
    """owner.name is make(what it was), inside the block."""
    before, own = getattr(owner, name), name in vars(owner)
    setattr(owner, name, make(before))
    try:
        yield
    finally:
        setattr(owner, name, before) if own else delattr(owner, name)


# ---- modules: hooks --------------------------------------------------------------------------------------------------

UNSEEN = (nn.Sequential, nn.ModuleList, nn.Identity, nn.SiLU, harmon.Harmon, vae.AutoencoderKL, llm.Qwen2, mar.MAR, diffusion_head.DiffusionHead)
STACK = re.compile(r"(.*\.(?:layers|encoder_blocks|decoder_blocks|res_blocks|block|attn))\.(\d+)\.|(vae\..*\.mid\.)(\w+)\.")


def watched(name, module):
    """Every block; what is inside of blocks, in the first of each stack."""
    if isinstance(module, UNSEEN) or type(module) is nn.Module or name in ("llm.lm_head", "llm.model.embed_tokens"):
        return False
    inside = STACK.match(name)
    if not inside:
        return True
    if name.startswith("vae."):
        return name.startswith(("vae.encoder.down.0.block.0.", "vae.encoder.mid.attn_1.", "vae.decoder.mid.attn_1."))
    return inside[2] == "0"


def hook(stack, record, model):
    """Record what goes into every watched module and what comes out."""
    def before(name, module):
        def see(_, args):
            words = next((words for pattern, words in INPUTS if re.search(rf"(^|\.)({pattern})$", name)), f"what {type(module).__name__} gets")
            record(f"{name}.in", args[0], words, call_site())
        return see

    def after(name, module):
        ours = not type(module).__module__.startswith("torch.")

        def see(_, args, out):
            record(f"{name}.out", out, operation_of(module), lines_of(type(module).forward) if ours else call_site())
        return see

    for name, module in model.named_modules():
        if watched(name, module):
            stack.callback(module.register_forward_pre_hook(before(name, module)).remove)
            stack.callback(module.register_forward_hook(after(name, module)).remove)


# ---- functions between modules: wrappers -----------------------------------------------------------------------------

def wrap_method(record, name, operation):
    """A method whose result is recorded under `name`, or whose results under the names of a tuple."""
    def make(method):
        def wrapper(*args, **options):
            out = method(*args, **options)
            for label, x in zip((name,) if isinstance(name, str) else name, (out,) if isinstance(name, str) else out):
                record(label, x, operation if isinstance(operation, str) else operation[label], lines_of(method))
            return out
        return wrapper
    return make


def wrap_attention(record, inside):
    """q, k, v and the attention weights of the first blocks. `inside` is the stack of names of the attention modules being run."""
    def make(function):
        def wrapper(q, k, v, **options):
            name, module = inside[-1]
            if watched(f"{name}.q", module):
                with torch.no_grad():
                    identity = torch.eye(k.shape[2], dtype=q.dtype, device=q.device).expand(*k.shape[:3], -1)
                    seen = function(q, k, identity, **options)                  # softmax(q kᵀ / √d) · 1
                where = call_site()
                for what, x in (("q", q), ("k", k), ("v", v)):
                    record(f"{name}.{what}", x, f"{what} as attention gets it: (B, heads, positions, d){', rotated' if 'llm' in name and what != 'v' else ''}", where)
                record(f"{name}.weights", seen, "softmax(q kᵀ / √d), masked", lines_of(attention))
            return function(q, k, v, **options)
        return wrapper
    return make


def wrap_rotary(record):
    def make(function):
        def wrapper(positions, d, theta, dtype):
            cos, sin = function(positions, d, theta, dtype)
            record("llm.positions", positions, "cumsum(attention_mask) - 1: padding does not count, cached tokens do", call_site())
            for what, x in (("cos", cos), ("sin", sin)):
                record(f"llm.rotary.{what}", x, f"{what}(position · theta^(-2i/d)), the d/2 frequencies twice, one after the other", lines_of(function))
            return cos, sin
        return wrapper
    return make


def wrap_llm(record, places):
    """The language model: one place for each call (None: stay where we are), its mask, and after the first call what is in the cache."""
    places = iter(places)

    def make(forward):
        def wrapper(*args, attention_mask=None, cache=None, **options):
            call = next(places, None)
            with record.at(call), record.silence(call == ""):
                padded = attention_mask is not None and not bool(attention_mask.all()) and record.place is not None
                if attention_mask is not None:
                    record("llm.attention_mask", attention_mask, "which positions are real: True; cached ones first", call_site())
                record.padding = record.known[id(attention_mask)]["name"] if padded else None
                out = forward(*args, attention_mask=attention_mask, cache=cache, **options)
                record.call = call
                if call in ("token0", "prompt"):
                    for i, layer in enumerate(cache.layers):
                        for what, x in zip("kv", layer):
                            record(f"llm.cache.{i}.{what}", x, f"{'rotated keys' if what == 'k' else 'values'} of layer {i}: (B, kv_heads, S, d)",
                                   lines_of(llm.KVCache.append))
                record.padding = None
            return out
        return wrapper
    return make


def wrap_logits(record):
    def make(method):
        def wrapper(hidden):
            out = method(hidden)
            with record.at(record.call), record.silence(record.call == ""):         # of the call before
                record("logits", out, "hidden states @ lm_head.weight.T; lm_head is embed_tokens where tied", lines_of(method))
            return out
        return wrapper
    return make


def wrap_position_embedding(record, model):
    names = {id(p): name for name, p in model.named_parameters()}

    def make(method):
        def wrapper(table, grid):
            out = method(table, grid)
            g = model.mar.config.grid
            words = "the table as it is" if tuple(grid) == (g, g) else f"buffers as they are, image part resized bilinearly, {g}×{g} -> {grid[0]}×{grid[1]}"
            record(names[id(table)], out, words, lines_of(method))
            return out
        return wrapper
    return make


def wrap_sampler(record, stack, head):
    """The head's sampler: a place for each diffusion step; the network's inner layers in the first of them only."""
    state = SimpleNamespace(step=0)

    def sample(method):
        def wrapper(*args, **options):
            state.step = 0
            with record.silence(not (record.place or "").endswith("step1/")):       # the first generation step tells all
                out = method(*args, **options)
            record("drawn", out, "new tokens: x after the last diffusion step", lines_of(method))
            return out
        return wrapper

    def denoise(method):
        def wrapper(x, y):
            if not sampling():
                return method(x, y)
            timesteps, C = head.sampling_process.timesteps.tolist(), head.token_dim
            state.place = f"t{timesteps[-1 - state.step]}"
            half = slice(0, sampling()["M"])
            with record.at(state.place):
                record("x", x[half], "the noisy tokens, conditional rows", call_site())
                with record.silence(state.step > 0):
                    out = method(x, y)
                record("eps", out[:, :C], "predicted noise ε; with guidance conditional rows, then unconditional", lines_of(method))
                record("v", out[:, C:], "variance mix v, the same rows", lines_of(method))
            state.step += 1
            return out
        return wrapper

    def mix(function):
        def wrapper(v, log_beta, log_variance):
            out = function(v, log_beta, log_variance)
            local = sampling()
            with record.at(state.place if local else None):
                if local:
                    record("eps_guided", local["eps"], "ε_u + w (ε_c - ε_u)", call_site())
                    record("x0", local["x0"], "predicted x_0 = x / √ᾱ - √(1/ᾱ - 1) · ε, clamped to ± x0_clip where there is one", call_site())
                    record("mean", local["x"], "mean of the step: mean_from_x0 · x_0 + mean_from_xt · x", call_site())
                record("logvar", out, "f · log β + (1 - f) · log β̃, f = (v + 1) / 2", lines_of(function))
            return out
        return wrapper

    def sampling():
        """The local variables of DiffusionHead.sample, if that is what called the wrapped function."""
        frame = inspect.currentframe().f_back.f_back
        return frame.f_locals if frame.f_code is diffusion_head.DiffusionHead.sample.__wrapped__.__code__ else None

    stack.enter_context(replaced(head, "sample", sample))
    stack.enter_context(replaced(head.net, "denoise", denoise))
    stack.enter_context(replaced(diffusion_head, "mix", mix))


def wrap_bound(record, what, operation):
    def make(function):
        def wrapper(*args):
            out = function(*args)
            t = inspect.currentframe().f_back.f_locals["t"]                     # of DiffusionHead.loss; the likelihood counts at t = 0 only
            record(what, out[t == 0] if what == "nll" else out, operation, lines_of(function))
            return out
        return wrapper
    return make


@contextmanager
def watching(model, record, llm_places=()):
    """Inside the block, everything the model computes is recorded."""
    inside = []
    with ExitStack() as stack:
        for name, module in model.named_modules():                              # before the hooks that record, so that `inside` is known to them
            if isinstance(module, (mar.Attention, llm.Attention, vae.AttnBlock)):
                stack.callback(module.register_forward_pre_hook(lambda m, args, name=name: inside.append((name, m))).remove)
                stack.callback(module.register_forward_hook(lambda m, args, out: inside.pop() and None).remove)
        hook(stack, record, model)
        for owner, name, make in (
                *((module, "attention", wrap_attention(record, inside)) for module in (vae, llm, mar)),
                (llm, "rotary", wrap_rotary(record)),
                (model.llm, "forward", wrap_llm(record, llm_places)),
                (model.llm, "logits", wrap_logits(record)),
                (model.mar, "position_embedding", wrap_position_embedding(record, model)),
                (model, "encode", wrap_method(record, "latents", "the posterior's mean, channels last, times vae_scale")),
                (model, "visual_features", wrap_method(record, ("x_enc", "z_enc"), {
                    "x_enc": "what the MAR encoder gives, buffers first", "z_enc": "proj_in(x_enc) with the buffers moved behind the image tokens"})),
                (model, "embed", wrap_method(record, "embeds", "rows of embed_tokens, z_enc where ids are -200")),
                (model, "back_to_mar", wrap_method(record, "back_to_mar", "x_enc + proj_out(z_llm) with the buffers moved back to the front")),
                (model.mar, "decode", wrap_method(record, "z", "decoder_norm without the buffers, plus diffusion_pos_embed_learned")),
                (model, "decode", wrap_method(record, "decoded", "the VAE's decoder of latents / vae_scale")),
                (diffusion_head, "gaussian_kl", wrap_bound(record, "kl", "KL between the true and the predicted posterior, nats")),
                (diffusion_head, "discretized_nll", wrap_bound(record, "nll", "-log p(x_0 ± 1/255) in nats, rows of t = 0"))):
            stack.enter_context(replaced(owner, name, make))
        wrap_sampler(record, stack, model.mar.diffloss)
        yield


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
           lines_of(llm.Qwen2.generate))
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
    record("masked", torch.tensor(masked), "how many tokens stay masked after each step", lines_of(harmon.masking_schedule))
    step = iter(noise)
    draws = itertools.chain.from_iterable(noise.values())
    base = record.place

    def begin(method):                                                          # a step begins with the encoder and ends with on_step
        def wrapper(latents, mask, visible):
            record.place = f"{base}step{next(step)}/"
            record("hidden", mask, "which tokens are masked: the first m of orders", call_site())
            return method(latents, mask, visible)
        return wrapper

    def end(k, tokens, hidden):
        record("tokens", tokens, "the canvas after this step: latents, 0 where masked", call_site())
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
            record("loss", loss, "mean over masked tokens of the ε error and the variational bound in bits", lines_of(Harmon.text2image_loss))
            loss.backward()

    rows = [conversation(model, [turn], N + model.config.mar.buffer_size) for turn in ((question, answer), (question, f"{answer} {answer}"))]
    ids, real = model.pad([row for row, _ in rows])
    labels = torch.tensor([said + [harmon.IGNORE_INDEX] * (ids.shape[1] - len(said)) for _, said in rows])
    batch = {k: x.to(model.device) for k, x in dict(input_ids=ids, attention_mask=real, latents=latents.clone(), labels=labels).items()}
    with record.at("image2text"):
        record.inputs(**batch)
        with watching(model, record), gradients(model, record):
            loss = model.image2text_loss(None, batch["input_ids"], batch["attention_mask"], batch["labels"], latents=batch["latents"])
            record("loss", loss, "mean cross-entropy of the labelled tokens", lines_of(Harmon.image2text_loss))
            loss.backward()


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
            record(f"gradient/{name}", norm, "Euclidean norm of the gradient", class_of(modules[owner]), kind="gradient")
        handles.append(p.register_post_accumulate_grad_hook(see))
    yield
    record("gradient", torch.tensor(square ** 0.5), "Euclidean norm of all gradients together", lines_of(Harmon.text2image_loss), kind="gradient")
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
    record, rng = Recorder(), np.random.default_rng(seed)
    with record.at("understand"):
        if "understand" in passes:
            understand(model, record, image, question, max_new_tokens)
    with record.at("generate"):
        if "generate" in passes:
            generate(model, record, prompt, rng, steps, cfg, temperature)
    with record.at("train"):
        if "train" in passes:
            train(model, record, image, question, answer, prompt, rng)
    with record.at("resize"), torch.no_grad():
        if "resize" in passes:
            with watching(model, record):
                for table in (model.mar.encoder_pos_embed_learned, model.mar.decoder_pos_embed_learned, model.mar.diffusion_pos_embed_learned):
                    model.mar.position_embedding(table, (g + 1, g + 3))
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
