"""Fast paths against the plain ones."""
import copy
import io
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, shake

import llm
import mar
from harmon import Harmon
from harmonkit import fast
from harmonkit.fast import (
    HAS_ONEDNN,
    PackedLinear,
    accelerate,
    batch_modulations,
    chunk_next_token_loss,
    cpu_attention,
    flash_attention,
    patch_attention,
)

needs_onednn = pytest.mark.skipif(not HAS_ONEDNN, reason="weights are packed on x86 only")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed))


def levels(images):
    """The bytes of PIL images, (B, 3·H·W)."""
    return torch.tensor([list(image.tobytes()) for image in images]).float()


def parts(model):
    """One layer of each kind."""
    return {
        "linear": model.proj_in[0],
        "llm": model.llm.model.layers[0].mlp,
        "mar": model.mar.encoder_blocks[0].mlp,
        "head": model.mar.diffloss.net.res_blocks[0].mlp,
    }


# ---- modulations -----------------------------------------------------------------------------------------

@pytest.fixture(scope="module", params=["batched", pytest.param("packed", marks=needs_onednn)])
def fast_head(small, request):
    if request.param == "packed":
        return accelerate(copy.deepcopy(small), "packed").mar.diffloss
    head = copy.deepcopy(small.mar.diffloss)
    batch_modulations(head)
    return head


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 8, 11, 300, 2000])
def test_the_denoiser_gives_the_networks_output_at_every_step(small, fast_head, rows):
    z, timesteps = randn(rows, 32), torch.arange(0, 1000, 111)
    plain, batched = (head.denoiser(z, timesteps) for head in (small.mar.diffloss, fast_head))
    for i in reversed(range(len(timesteps))):
        x = randn(rows, 4, seed=i)
        assert torch.allclose(batched(x, i), plain(x, i), rtol=1e-5, atol=1e-5), i      # 3e-6


@pytest.mark.parametrize("rows", [1, 8, 11])
@pytest.mark.parametrize("options", [
    {}, {"cfg": 3.0}, {"cfg": 2.0, "temperature": 0.7}, {"num_sampling_steps": 30},
    {"cfg": 3.0, "solver": "ddim", "num_sampling_steps": 5},
    {"cfg": 3.0, "solver": "dpm++", "num_sampling_steps": 4},
])
def test_batched_modulations_change_no_sample(small, fast_head, rows, options):
    z = randn(rows * (2 if "cfg" in options else 1), 32)

    def sample(head):
        draws = generator(1)
        return head.sample(z, noise_fn=lambda shape: torch.randn(shape, generator=draws), **options)
    expected, out = sample(small.mar.diffloss), sample(fast_head)
    assert out.shape == (rows, 4) and torch.allclose(out, expected, atol=3e-5)          # 5e-6


@pytest.mark.parametrize("rows, products", [(11, 1), (128, 1), (300, 3), (2000, 8)])
def test_modulations_are_computed_in_few_products(small, rows, products):
    """Of 8 diffusion steps, as many at once as keep a product below 1,024 rows."""
    head, calls = copy.deepcopy(small.mar.diffloss), []
    batch_modulations(head)
    layer = head.net.res_blocks[0].adaLN_modulation[1]
    layer.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    head.sample(randn(rows, 32))
    assert len(calls) == products and sum(calls) == 8


# ---- packed weights --------------------------------------------------------------------------------------

@needs_onednn
def test_packed_float32_differs_by_rounding_alone(small):
    packed = accelerate(copy.deepcopy(small), "packed")
    x = randn(300, 32)
    with torch.no_grad():
        for name, part in parts(small).items():
            assert torch.allclose(parts(packed)[name](x), part(x), rtol=1e-4, atol=1e-6), name
    prompt = randn(1, 5, 32)
    answer = list(small.llm.generate(prompt, max_new_tokens=8))
    assert list(packed.llm.generate(prompt, max_new_tokens=8)) == answer
    a, b = (levels(model.generate_image("a red circle", seed=3, num_iter=2)) for model in (small, packed))
    assert (a - b).abs().max() <= 1


@needs_onednn
def test_packed_weights_replace_the_plain_ones_and_are_saved_plain(small, tmp_path):
    plain = copy.deepcopy(small).bfloat16()
    packed = accelerate(copy.deepcopy(plain), "packed")
    assert packed.proj_in[0].weight.is_mkldnn, "no weight lies in memory twice"
    assert not packed.llm.model.embed_tokens.weight.is_mkldnn, "token embeddings are read row by row"
    state = packed.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in plain.state_dict().items())
    for folder, model in (("plain", plain), ("packed", packed)):
        model.save_pretrained(tmp_path / folder)
    files = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("plain", "packed")]
    assert files[0] == files[1]


@needs_onednn
def test_packed_bfloat16_is_as_near_to_float32_as_plain_bfloat16(small):
    exact = copy.deepcopy(small).bfloat16().float()
    plain = copy.deepcopy(small).bfloat16()
    packed = accelerate(copy.deepcopy(plain), "packed")
    x = randn(300, 32).bfloat16()
    with torch.no_grad():
        for name in parts(plain):
            expected = parts(exact)[name](x.float())
            outputs = [parts(model)[name](x) for model in (plain, packed)]
            plain_error, packed_error = ((output - expected).abs().mean() for output in outputs)
            # An activation joins the product before it: one rounding less.
            assert packed_error < 1.05 * plain_error < 0.02 * expected.abs().mean(), name
    prompts = ["a red circle"] * 8
    drawn = [model.generate_image(prompts, seed=3, num_iter=2) for model in (exact, plain, packed)]
    expected, *images = map(levels, drawn)
    plain_error, packed_error = ((image - expected).abs().mean(dim=1).median() for image in images)
    assert packed_error < 1.5 * plain_error < 10, "in grey levels"
    for shape in ((1, 1, 32), (2, 7, 32), (300, 32)):
        assert packed.proj_in[0](randn(*shape).bfloat16()).shape == shape


def outputs(model):
    """An answer and, in grey levels, a picture."""
    answer = list(model.llm.generate(randn(1, 5, 32).to(model.dtype), max_new_tokens=8))
    return answer, levels(model.generate_image("a red circle", seed=3, num_iter=2))


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def loaded(model):
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()})
    return model


def packed_again(model):
    return accelerate(accelerate(model, "packed"), "auto")


@needs_onednn
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("change", [copy.deepcopy, pickled, loaded, packed_again,
                                    lambda model: model.to("cpu"), lambda model: model.float(),
                                    lambda model: model.bfloat16()])
def test_a_packed_model_is_copied_pickled_loaded_and_packed_again(small, change):
    """The result draws and answers the same, is packed, and depends no longer on what it was made of."""
    dtype = change(copy.deepcopy(small)).dtype
    plain = copy.deepcopy(small).to(dtype)
    packed = accelerate(copy.deepcopy(small), "packed")
    changed = change(packed)
    assert changed.proj_in[0].weight.is_mkldnn and is_packed(changed)
    assert changed.llm.lm_head.weight is changed.llm.model.embed_tokens.weight, "still tied"
    state = changed.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in plain.state_dict().items())
    expected = outputs(accelerate(copy.deepcopy(plain), "packed"))
    if changed is not packed:
        packed.mar.load_state_dict({name: tensor * 0 for name, tensor in packed.mar.state_dict().items()})
    answer, picture = outputs(changed)
    assert answer == expected[0] and torch.equal(picture, expected[1])


@needs_onednn
def test_a_packed_model_goes_where_nothing_is_packed(small):
    """In float16 and float64 it computes as a plain model does, and back in float32 it is packed again."""
    packed = accelerate(copy.deepcopy(small), "packed")
    for dtype in (torch.float16, torch.float64):
        plain = copy.deepcopy(small).to(dtype)
        packed.load_state_dict(small.state_dict())
        packed.to(dtype)
        assert packed.dtype == dtype and not packed.proj_in[0].weight.is_mkldnn
        x = randn(3, 32).to(dtype)
        with torch.no_grad():
            for name, part in parts(plain).items():
                assert torch.allclose(parts(packed)[name](x), part(x), rtol=1e-3, atol=1e-3), name
        packed.float()
        assert packed.proj_in[0].weight.is_mkldnn
    assert packed.to("meta").proj_in[0].weight.device.type == "meta"


@needs_onednn
def test_packed_weights_of_another_model_are_loaded(small):
    packed, other = accelerate(copy.deepcopy(small), "packed"), shake(copy.deepcopy(small), seed=5)
    packed.load_state_dict(other.state_dict())
    answer, picture = outputs(packed)
    expected = outputs(other)
    assert answer == expected[0] and (picture - expected[1]).abs().max() <= 1


# ---- modes -----------------------------------------------------------------------------------------------

def is_packed(model):
    return isinstance(model.llm.lm_head, PackedLinear)


def test_auto_packs_where_it_pays(small):
    wide = replace(SMALL.llm, hidden_size=512, num_hidden_layers=1)
    for model, pays in ((copy.deepcopy(small), False), (copy.deepcopy(small).bfloat16(), True),
                        (copy.deepcopy(small).half(), False), (Harmon(replace(SMALL, llm=wide)), True)):
        assert accelerate(model, "auto") is model
        assert is_packed(model) == (pays and HAS_ONEDNN)
        assert "denoiser" in vars(model.mar.diffloss), "modulations are batched for all"


def test_eager_changes_nothing(small):
    model = copy.deepcopy(small)
    accelerate(model, "eager")
    assert not is_packed(model) and "denoiser" not in vars(model.mar.diffloss)


def test_impossible_modes_are_refused(small):
    with pytest.raises(ValueError, match="unknown mode 'warp'; known: auto, eager, packed, compiled"):
        accelerate(small, "warp")
    with pytest.raises(ValueError, match="packed in float32 and bfloat16 .* these are torch.float16"):
        accelerate(copy.deepcopy(small).half(), "packed")


def test_compiled_gives_the_same(monkeypatch):
    """One layer of each kind, because compilation takes half a minute. Every graph is compiled whole."""
    one_layer = replace(SMALL.llm, num_hidden_layers=1)
    one_block = replace(SMALL.mar, encoder_depth=1, decoder_depth=1, head_depth=1)
    model = shake(Harmon(replace(SMALL, llm=one_layer, mar=one_block)))
    ids, real = torch.arange(5, 25).view(2, 10), torch.ones(2, 10, dtype=torch.bool)
    expected = model.sample(ids, real, num_iter=2, generator=generator())
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    torch._dynamo.utils.counters.clear()
    accelerate(model, "compiled")
    assert torch.allclose(model.sample(ids, real, num_iter=2, generator=generator()), expected, atol=2e-4)
    frames = torch._dynamo.utils.counters["frames"]
    assert 4 <= frames["ok"] == frames["total"] <= 8
    torch._dynamo.reset()


# ---- attention -------------------------------------------------------------------------------------------

def inputs():
    """q, k, v (2, 6, L, 8) with L of 5 and S of 9, and a mask (2, 1, 5, 9) with one key at least a row."""
    mask = torch.rand(2, 1, 5, 9, generator=generator()) > 0.3
    mask[..., 0] = True
    return [randn(2, 6, 5, 8), randn(2, 6, 9, 8, seed=1), randn(2, 6, 9, 8, seed=2)], mask


def values_and_gradients(attention, qkv, mask, dtype=torch.float32, autocast=False):
    x = [tensor.to(dtype).detach().requires_grad_() for tensor in qkv]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = attention(*x, attn_mask=mask)
    out.float().sin().sum().backward()
    return [out.detach().float()] + [tensor.grad.float() for tensor in x]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_cpu_attention_is_attention(masked, autocast):
    """In bfloat16, and in float32 under autocast: as near to the float32 result as torch is."""
    qkv, mask = inputs()
    mask = mask if masked else None
    dtype = torch.float32 if autocast else torch.bfloat16
    exact = values_and_gradients(F.scaled_dot_product_attention, qkv, mask)
    torchs = values_and_gradients(F.scaled_dot_product_attention, qkv, mask, dtype, autocast)
    ours = values_and_gradients(cpu_attention, qkv, mask, dtype, autocast)
    for expected, theirs, own in zip(exact, torchs, ours, strict=True):
        assert (own - expected).norm() < 2 * (theirs - expected).norm() < 0.02 * expected.norm()


def test_cpu_attention_is_torchs_in_float32_and_without_gradients():
    qkv, mask = inputs()
    for attn_mask in (None, mask):
        expected = F.scaled_dot_product_attention(*qkv, attn_mask=attn_mask)
        assert torch.equal(cpu_attention(*qkv, attn_mask=attn_mask), expected)
    half = [tensor.bfloat16() for tensor in qkv]
    with torch.no_grad():
        assert torch.equal(cpu_attention(*half), F.scaled_dot_product_attention(*half))


def test_cpu_attention_drops_weights():
    ones = torch.ones(1, 1, 2000, 4, dtype=torch.bfloat16, requires_grad=True)
    torch.manual_seed(0)
    out = cpu_attention(ones, ones, ones, dropout_p=0.5)
    assert torch.allclose(cpu_attention(ones, ones, ones), ones, atol=0.02)
    assert out.float().mean().item() == pytest.approx(1, abs=0.01) and 0.005 < out.float().std() < 0.05


def test_flash_attention_is_called_with_its_own_layout(monkeypatch):
    """A stand-in computes what flash-attn documents, for (B, L, heads, d)."""
    calls = []

    def stand_in(q, k, v, dropout_p):
        calls.append(dropout_p)
        scores = torch.einsum("blhd,bshd->bhls", q, k) / q.shape[-1] ** 0.5
        return torch.einsum("bhls,bshd->blhd", scores.softmax(dim=-1), v)
    monkeypatch.setattr(fast, "flash_attn_func", lambda: stand_in)
    qkv, mask = inputs()
    half = [tensor.half() for tensor in qkv]
    out = flash_attention(*half, dropout_p=0.1)
    assert torch.allclose(out.float(), F.scaled_dot_product_attention(*qkv), atol=2e-3)
    assert calls == [0.1]
    # Not for masks, float32 and heads above 256.
    wide = torch.ones(1, 1, 2, 264).half()
    masked = flash_attention(*half, attn_mask=mask)
    assert torch.equal(masked, F.scaled_dot_product_attention(*half, attn_mask=mask))
    assert torch.equal(flash_attention(*qkv), F.scaled_dot_product_attention(*qkv))
    assert torch.equal(flash_attention(wide, wide, wide), wide)
    assert len(calls) == 1


@pytest.fixture
def unpatched(monkeypatch):
    """mar and llm begin with torch's attention; their functions return when the test ends."""
    for module in (mar, llm):
        monkeypatch.setattr(module, "scaled_dot_product_attention", F.scaled_dot_product_attention)
    return monkeypatch


@pytest.mark.parametrize("installed", [True, False])
def test_attention_is_patched_by_device(unpatched, installed):
    original = mar.scaled_dot_product_attention
    unpatched.setattr(fast, "flash_attn_func", lambda: print if installed else None)
    patch_attention(torch.device("cuda"))
    expected = flash_attention if installed else original
    assert mar.scaled_dot_product_attention is llm.scaled_dot_product_attention is expected
    patch_attention(torch.device("cpu"))
    assert mar.scaled_dot_product_attention is llm.scaled_dot_product_attention is cpu_attention


def test_patched_attention_trains_alike(small, unpatched):
    def gradients():
        model = shake(copy.deepcopy(small))
        ids = torch.arange(5, 25).view(2, 10)
        real = torch.arange(10) < torch.tensor([[10], [6]])
        mask = torch.arange(16).expand(2, -1) % 2 == 0
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.text2image_loss(None, ids, real, latents=randn(2, 4, 4, 4), mask=mask)
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    plain = gradients()
    patch_attention(torch.device("cpu"))
    patched = gradients()
    assert 0 < (patched - plain).norm() < 0.02 * plain.norm()               # 0.009


# ---- the loss of long texts ------------------------------------------------------------------------------

def test_the_chunked_loss_is_the_plain_one(small):
    """597 labelled positions, 150 at a time."""
    ids = torch.randint(5, 500, (3, 200), generator=generator())
    real = torch.ones_like(ids, dtype=torch.bool)
    plain, chunked, sizes = copy.deepcopy(small), copy.deepcopy(small), []
    chunk_next_token_loss(chunked, chunk=150)
    chunked.llm.lm_head.register_forward_hook(lambda *call: sizes.append(len(call[2])))
    losses = [model.image2text_loss(None, ids, real, ids) for model in (plain, chunked)]
    assert sizes == [150, 150, 150, 147]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-6)
    for loss in losses:
        loss.backward()
    assert len(sizes) == 8, "scores are computed again in the backward pass"
    for (name, p), q in zip(plain.llm.named_parameters(), chunked.llm.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-7), name


def test_short_texts_are_not_chunked(small):
    model, hidden_states, targets = copy.deepcopy(small), randn(7, 32), torch.arange(7)
    expected = small.next_token_loss(hidden_states, targets)
    chunk_next_token_loss(model, chunk=7)
    assert torch.equal(model.next_token_loss(hidden_states, targets), expected)
    assert torch.equal(model.next_token_loss(hidden_states[:0], targets[:0]), torch.zeros(()))
