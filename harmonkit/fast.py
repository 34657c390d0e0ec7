"""Fast paths, put on a model from outside; the plain files know nothing of them. Each is tested equal to the
plain path.

packed: oneDNN reorders a weight into the layout of the processor's vector or matrix instructions at every
product. For few rows that takes longer than the product, so here it is done once. x86 only.

modulations: shift, scale and gate of the diffusion head do not depend on the noisy token. The sampler
computes those of many diffusion steps in one large product: 60% of the head's arithmetic.

attention: FlashAttention on CUDA where it is installed; on the CPU a quicker backward pass in half precision.
"""
import math
import platform
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import llm
import mar
from diffusion_head import ResBlock, modulate

HAS_ONEDNN = (torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64")
              and hasattr(torch.ops.mkldnn, "_reorder_linear_weight"))
MODES = ("auto", "eager", "packed", "compiled")


def accelerate(model, mode: str):
    """Put a mode's fast paths on a Harmon or a MAR with its VAE, in place, for inference. Results change by
    rounding. Returns it.

    All but eager batch the modulations; auto also packs the weights where that measured faster, packing time
    included. Raises ValueError for an unknown mode, or for packed where weights cannot be packed.
    """
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}; known: {', '.join(MODES)}")
    if mode != "eager":
        batch_modulations(model.mar.diffloss)
    if mode == "auto" and packable(model.device, model.dtype):
        # Products of a narrow float32 model take less time than the call to oneDNN.
        llm_config = getattr(model.config, "llm", None)
        width = llm_config.hidden_size if llm_config else model.config.mar.embed_dim
        pays = model.dtype == torch.bfloat16 or width >= 512
        mode = "packed" if pays else mode
    if mode != "eager" and model.device.type == "cuda":
        patch_attention(model.device)
    if mode == "packed":
        pack(model)
    if mode == "compiled":
        layers = model.llm.model.layers if hasattr(model, "llm") else []
        # Each layer of the cache counts as one recompilation.
        torch._dynamo.config.recompile_limit = max(8, 4 * len(layers))
        for block in (*model.mar.encoder_blocks, *model.mar.decoder_blocks, *layers):
            block.compile(dynamic=True)                                     # lengths change from step to step
        compiled = torch.compile(modulated_net, dynamic=True)
        batch_modulations(model.mar.diffloss, compiled)
    return model


# ---- packed weights ------------------------------------------------------------------------------

class PackedLinear(nn.Linear):
    """A linear layer whose weight is in oneDNN's layout. No gradients.

    activation ("none", "gelu", "swish") is applied to the result, and `times` is multiplied with it, while
    the result is in the cache. Copies, pickles, state_dict and `.to()` see the plain weight and pack it
    again. On another device or in another dtype the layer computes like any linear layer.
    """

    def pack(self):
        """Pack the plain weight, if it lies where that is possible."""
        self.packed = None
        if packable(self.weight.device, self.weight.dtype):
            rows = 64                           # a hint; the layout serves any number of rows
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), rows)
            # The packed weight replaces the plain one, so that no weight lies in memory twice. Token
            # embeddings are read row by row too and stay plain.
            if not self.shares_weight:
                self.weight = nn.Parameter(self.packed, requires_grad=False)

    def plain_weight(self):
        """The weight as a Parameter of the usual layout."""
        is_packed = self.weight.is_mkldnn
        return nn.Parameter(self.weight.to_dense(), requires_grad=False) if is_packed else self.weight

    def forward(self, x, activation="none", times=None):
        if self.packed is None:
            y = F.linear(x, self.weight, self.bias)
            y = ACTIVATIONS[activation](y)
            return y if times is None else y * times
        if times is not None:
            return torch.ops.mkldnn._linear_pointwise.binary(x, times, self.packed, self.bias, "mul")
        algorithm = "none" if activation == "gelu" else ""                  # "none": the exact GELU
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, activation, [], algorithm)

    def __getstate__(self):
        state = self.__dict__ | {"packed": None}
        state["_parameters"] = self._parameters | {"weight": self.plain_weight()}
        return state

    def __setstate__(self, state):
        super().__setstate__(state)
        self.pack()

    def _apply(self, function, recurse=True):
        self.weight = self.plain_weight()
        super()._apply(function, recurse)
        self.pack()
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = destination[prefix + "weight"].to_dense()

    def _load_from_state_dict(self, *arguments):
        self.weight = self.plain_weight()
        super()._load_from_state_dict(*arguments)
        self.pack()


ACTIVATIONS = {"none": lambda y: y, "gelu": F.gelu, "swish": F.silu}


class PackedSwiGLU(llm.MLP):
    def forward(self, x):
        gate = self.gate_proj.forward(x, "swish")
        return self.down_proj.forward(self.up_proj.forward(x, times=gate))


class PackedMLP(mar.MLP):
    def forward(self, x):
        return self.fc2.forward(self.fc1.forward(x, "gelu"))


class PackedHeadMLP(nn.Sequential):
    def forward(self, x):
        first, _, second = self._modules.values()
        return second.forward(first.forward(x, "swish"))


def packable(device, dtype) -> bool:
    return HAS_ONEDNN and device.type == "cpu" and dtype in (torch.float32, torch.bfloat16)


def pack(model):
    """Replace the weights of all linear layers by packed ones. A packed model stays as it is. No gradients.

    Raises ValueError where weights cannot be packed.
    """
    if not packable(model.device, model.dtype):
        raise ValueError("weights are packed in float32 and bfloat16 on x86 processors; these are "
                         f"{model.dtype} on {model.device}")
    embedding = model.llm.model.embed_tokens.weight if hasattr(model, "llm") else None
    for module in list(model.modules()):
        if type(module) is nn.Linear:
            packed_linear(module, shares_weight=module.weight is embedding)
        elif type(module) is llm.MLP:
            module.__class__ = PackedSwiGLU
        elif type(module) is mar.MLP:
            module.__class__ = PackedMLP
        elif type(module) is ResBlock:
            module.mlp.__class__ = PackedHeadMLP


def packed_linear(layer, shares_weight=False):
    """Pack a linear layer in place; returns it. shares_weight: its plain weight stays for others to read."""
    layer.__class__ = PackedLinear
    layer.shares_weight = shares_weight
    layer.pack()
    return layer


# ---- the head's modulations, many diffusion steps at once ----------------------------------------

ROWS_AT_ONCE = 1024                             # of one product of modulations; more would leave the cache


def modulated_net(net, x, modulations):
    """SimpleMLPAdaLN for x (M, C), given the modulations of the blocks (M, 3W) and final layer (M, 2W)."""
    x = net.input_proj(x.to(net.input_proj.weight.dtype))                   # (M, W)
    for block, modulation in zip(net.res_blocks, modulations):
        shift, scale, gate = modulation.chunk(3, dim=1)
        x = x + gate * block.mlp(modulate(block.in_ln(x), shift, scale))
    shift, scale = modulations[-1].chunk(2, dim=1)
    final = net.final_layer
    return final.linear(modulate(final.norm(x), shift, scale))              # (M, 2C)


def batch_modulations(head, run=modulated_net):
    """Replace `DiffusionHead.denoiser` by `batched_denoiser`. run: modulated_net, or it compiled."""
    head.denoiser = partial(batched_denoiser, head.net, run)


def batched_denoiser(net, run, z, timesteps):
    """`DiffusionHead.denoiser` with the modulations of many diffusion steps in one product."""
    cond = net.cond_embed(z)                                                # (M, W)
    time = net.time_embed(timesteps)                                        # (S, W)
    layers = [layer.adaLN_modulation[1] for layer in (*net.res_blocks, net.final_layer)]
    steps_at_once = max(1, ROWS_AT_ONCE // len(z))
    ready = {}                                      # step -> modulations of all layers

    def denoise(x, i):
        if i not in ready:
            steps = range(max(0, i + 1 - steps_at_once), i + 1)
            y = F.silu(time[steps.start:steps.stop, None] + cond)           # (steps, M, W)
            ready.clear()
            ready.update(zip(steps, zip(*(layer(y) for layer in layers))))
        return run(net, x, ready[i])
    return denoise


# ---- attention -----------------------------------------------------------------------------------

def patch_attention(device):
    """Replace the attention function of mar.py and llm.py by a faster one, for this process."""
    if device.type == "cpu":
        function = cpu_attention
    elif flash_attn_func() is not None:
        function = flash_attention
    else:
        return
    mar.scaled_dot_product_attention = function
    llm.scaled_dot_product_attention = function


def flash_attn_func():
    """FlashAttention's function, or None where it is not installed."""
    try:
        from flash_attn import flash_attn_func
    except ImportError:
        return None
    return flash_attn_func


def flash_attention(q, k, v, attn_mask=None, dropout_p=0.0):
    """FlashAttention for CUDA half precision without a mask, else torch's function. Shapes are torch's."""
    if attn_mask is not None or q.dtype not in (torch.float16, torch.bfloat16) or q.shape[-1] > 256:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout_p)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)       # (B, L, heads, d)
    return flash_attn_func()(q, k, v, dropout_p=dropout_p).transpose(1, 2)


def cpu_attention(q, k, v, attn_mask=None, dropout_p=0.0):
    """Attention by its definition where a half-precision backward pass follows: five times faster."""
    is_half = q.dtype != torch.float32 or torch.is_autocast_enabled("cpu")
    if not (is_half and torch.is_grad_enabled()):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout_p)
    scores = q / math.sqrt(q.shape[-1]) @ k.transpose(2, 3)                 # (B, heads, L, S)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    return F.dropout(scores.softmax(dim=-1), dropout_p) @ v


# ---- memory of long texts ------------------------------------------------------------------------

def chunk_next_token_loss(model, chunk=1024):
    """Let `Harmon.next_token_loss` score the vocabulary for `chunk` positions at a time, again in the
    backward pass.

    Scores of 8,192 positions over 151,936 words take 5 GB in float32.
    """
    plain = model.next_token_loss

    def chunked(hidden_states, targets):
        if len(targets) <= chunk:
            return plain(hidden_states, targets)
        parts = zip(hidden_states.split(chunk), targets.split(chunk))
        return sum(checkpoint(plain, *part, use_reentrant=False) for part in parts)
    model.next_token_loss = chunked
