"""Fast paths, put on a model from outside: packed weights on the CPU; CUDA graphs or torch.compile for GPUs.

packed: a matrix product reorders its weight to the layout of the processor's vector or matrix instructions each time it runs, which for few rows takes longer than
the product. Here oneDNN does it once.

graphs: eager sampling on a GPU spends most of its time launching small kernels: K steps × 100 diffusion steps × a small MLP. A CUDA graph replays all of them at the
price of one launch, but wants fixed shapes and addresses. So rows of the head are padded to a power of two, and answers are decoded into a cache of fixed length.
On other devices the same functions run uncaptured: slower than the plain ones, but so the tests compare them.
"""
import contextlib
import platform
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from diffusion_head import ResBlock
from llm import MLP as GatedMLP
from llm import KVCache, rotary
from mar import MLP

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight") and platform.machine() in ("x86_64", "AMD64")
MODES = ("auto", "eager", "packed", "graphs", "compiled")


def accelerate(model, mode):
    """Put a mode's fast paths on a Harmon, in place; results stay the same up to rounding. Returns it."""
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}; known: {', '.join(MODES)}")
    if mode == "auto":                                                          # what is measured to win from the first image on
        pays = model.dtype == torch.bfloat16 or model.config.llm.hidden_size >= 512     # small products in float32 are over before oneDNN's have begun
        mode = "packed" if pays and packable(model.device, model.dtype) else "eager"
    if mode == "packed":
        pack(model)
    if mode == "graphs":
        model.mar.diffloss.solve = padded(model.mar.diffloss.solve)
        model.llm.generate = StaticDecoder(model.llm)
    if mode == "compiled":
        torch._dynamo.config.recompile_limit = 4 * len(model.llm.model.layers)  # each layer of the cache is a case of its own
        for block in [*model.mar.encoder_blocks, *model.mar.decoder_blocks, *model.llm.model.layers]:
            block.compile(dynamic=True)                                         # lengths change from step to step
        model.mar.diffloss.net.denoise = torch.compile(model.mar.diffloss.net.denoise, dynamic=True)
    return model


# ---- packed weights --------------------------------------------------------------------------------------------------

class Packed:
    """The forward of a linear layer with its weight in oneDNN's layout. While it has a result at hand it can also apply an activation, or multiply by another tensor."""

    def __init__(self, layer):
        rows = 64                                                               # a hint only: the layout serves from 1 to many
        self.weight, self.bias = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), rows), layer.bias

    def __call__(self, x, activation="none", times=None):
        if times is not None:
            return torch.ops.mkldnn._linear_pointwise.binary(x, times, self.weight, self.bias, "mul")
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, activation, [], "none" if activation == "gelu" else "")


def packable(device, dtype):
    return ONEDNN and device.type == "cpu" and dtype in (torch.float32, torch.bfloat16)


def pack(model):
    """Put the weights of a model's linear layers into oneDNN's layout, with forwards that take them so. No gradients."""
    if not packable(model.device, model.dtype):
        raise ValueError(f"weights are packed in float32 and bfloat16 on x86 processors; these are {model.dtype} on {model.device}")
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.forward = Packed(layer)
            if layer.weight is not model.llm.model.embed_tokens.weight:         # which is read row by row too
                layer.weight = nn.Parameter(layer.forward.weight, requires_grad=False)      # in place of the plain one: no weight lies in memory twice
                layer.register_state_dict_post_hook(unpacked)
    for module in model.modules():                                              # activations join the product before them
        if isinstance(module, GatedMLP):
            module.forward = partial(gated, module.gate_proj.forward, module.up_proj.forward, module.down_proj.forward)
        elif isinstance(module, MLP):
            module.forward = partial(activated, "gelu", module.fc1.forward, module.fc2.forward)
        elif isinstance(module, ResBlock):
            module.mlp.forward = partial(activated, "swish", module.mlp[0].forward, module.mlp[2].forward)


def gated(gate, up, down, x):
    return down(up(x, times=gate(x, "swish")))


def activated(activation, first, second, x):
    return second(first(x, activation))


def unpacked(layer, state, prefix, _):
    """A state_dict holds plain tensors: whoever saves or copies a packed model need not know that it is."""
    state[prefix + "weight"] = state[prefix + "weight"].to_dense()


# ---- CUDA graphs -----------------------------------------------------------------------------------------------------

class Graph:
    """A function of tensors, captured as a CUDA graph once for each set of shapes."""

    enabled = True

    def __init__(self, function):
        self.function, self.captured = function, {}

    def __call__(self, *inputs):
        if not (inputs[0].is_cuda and Graph.enabled):
            return self.function(*inputs)
        key = tuple((x.shape, x.dtype) for x in inputs)
        if key not in self.captured:
            self.captured[key] = self.capture([x.clone() for x in inputs])
        graph, static, output = self.captured[key]
        for buffer, x in zip(static, inputs):
            buffer.copy_(x)
        graph.replay()
        return output.clone()

    def capture(self, static):
        with torch.cuda.device(static[0].device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):                                       # warm-up: libraries choose kernels and allocate
                for _ in range(2):
                    self.function(*static)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                output = self.function(*static)
        return graph, static, output


@contextlib.contextmanager
def uncaptured():
    """Run graphs' functions as they are, so that their operations can be counted."""
    Graph.enabled = False
    yield
    Graph.enabled = True


def padded(solve):
    """DiffusionHead.solve for row counts padded to powers of two: one graph for each of a few."""
    graphs = {}

    def run(z, noise, time, cfg, temperature, solver, constants):
        M = noise.shape[1]
        rows = max(8, 1 << (M - 1).bit_length())
        z = F.pad(z.unflatten(0, (-1, M)), (0, 0, 0, rows - M)).flatten(0, 1)                    # each half by itself
        noise = F.pad(noise, (0, 0, 0, rows - M))
        cfg, temperature = (torch.full((), value, dtype=torch.float32, device=z.device) for value in (cfg, temperature))
        key = (solver, len(constants))
        if key not in graphs:
            graphs[key] = Graph(lambda *tensors: solve(*tensors, solver, constants))
        return graphs[key](z, noise, time, cfg, temperature)[:M]
    return run


class StaticCache:
    """Keys and values in buffers of fixed length, written at a position that is a tensor; see KVCache."""

    def __init__(self, config, length, like):
        shape = (1, config.num_key_value_heads, length, config.hidden_size // config.num_attention_heads)
        self.layers = [(like.new_zeros(shape), like.new_zeros(shape)) for _ in range(config.num_hidden_layers)]
        self.position = None                                                    # (1,) int64

    def append(self, layer, k, v):
        for buffer, new in zip(self.layers[layer], (k, v)):
            buffer.index_copy_(2, self.position, new)
        return self.layers[layer]


class StaticDecoder:
    """Qwen2.generate with the step from token to token as one graph; buffers and graphs are kept from answer to answer."""

    def __init__(self, llm, block=512):
        self.llm, self.block, self.kept = llm, block, {}

    @torch.no_grad()
    def __call__(self, inputs_embeds, *, max_new_tokens, eos_token_id=None):
        prompt = KVCache()
        token = self.llm.logits(self.llm(inputs_embeds=inputs_embeds, cache=prompt)[:, -1]).argmax(dim=-1)     # (1,)
        length = -(-(prompt.length + max_new_tokens) // self.block) * self.block
        if length not in self.kept:
            cache = StaticCache(self.llm.config, length, inputs_embeds)
            self.kept[length] = cache, Graph(lambda token, position: self.step(cache, token, position))
        cache, step = self.kept[length]
        for buffers, full in zip(cache.layers, prompt.layers):
            for buffer, x in zip(buffers, full):
                buffer[:, :, :prompt.length] = x[:, :, :prompt.length]
        position = torch.full((1,), prompt.length, device=token.device)
        for i in range(max_new_tokens):
            value = token.item()
            if value == eos_token_id:
                return
            yield value
            if i + 1 < max_new_tokens:
                token, position = step(token, position), position + 1

    def step(self, cache, token, position):
        """token (1,) at position (1,) -> the next token (1,)."""
        llm, cfg = self.llm, self.llm.config
        cache.position = position
        x = llm.model.embed_tokens(token)[None]                                 # (1, 1, H)
        seen = (torch.arange(cache.layers[0][0].shape[2], device=token.device) <= position)[None, None, None]   # (1, 1, 1, S)
        cos, sin = rotary(position[None], cfg.hidden_size // cfg.num_attention_heads, cfg.rope_theta, x.dtype)
        for i, layer in enumerate(llm.model.layers):
            x = layer(x, cos, sin, seen, cache, i)
        return llm.logits(llm.model.norm(x)[:, -1]).argmax(dim=-1)
