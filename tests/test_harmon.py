import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL

from harmon import Harmon, Sampling
from harmonkit.chat_template import (
    END,
    IGNORE_INDEX,
    IMAGE_TOKEN_ID,
    UNCONDITIONAL,
    pad,
    prompt_ids,
    training_ids,
)
from llm import KVCache
from mar import Randomness, mask_schedule

PROMPTS = ["a red circle", "three blue stars and a green cross"]
N, n = 16, 4                                    # image and buffer tokens of SMALL


def prompt(model, texts):
    return pad(model.tokenizer, [prompt_ids(model.tokenizer, text) for text in texts])


@pytest.fixture
def latents():
    """(2, 4, 4, C)."""
    return torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def mask():
    """11 of 16 tokens hidden, other ones in each row."""
    return torch.rand(2, N, generator=torch.Generator().manual_seed(0)).argsort(dim=1) < 11


@pytest.fixture
def dialog(small):
    """input_ids, attention_mask and labels of two questions about an image, with answers of two lengths."""
    rows = [training_ids(small.tokenizer, [turn], num_image_tokens=N + n)
            for turn in (("What?", "a red circle"), ("How many are there?", "two"))]
    ids, real = pad(small.tokenizer, [ids for ids, _ in rows])
    labels = torch.full_like(ids, IGNORE_INDEX)
    for i, (_, row) in enumerate(rows):
        labels[i, :len(row)] = torch.tensor(row)
    return ids, real, labels


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="stride 8 and 4 channels, the MAR expects 16 and 4"):
        Harmon(replace(SMALL, mar=replace(SMALL.mar, vae_stride=16)))
    with pytest.raises(ValueError, match="stride 8 and 4 channels, the MAR expects 8 and 3"):
        Harmon(replace(SMALL, mar=replace(SMALL.mar, token_dim=3)))


# ---- pixels and latents ----------------------------------------------------------------------------------

@torch.no_grad()
def test_latents_are_the_scaled_means(small):
    pixels = torch.rand(2, 3, 16, 24, generator=generator()) * 2 - 1
    latents = small.encode(pixels)
    mean = small.vae.encode(pixels).mean                                    # (2, C, 2, 3)
    assert latents.shape == (2, 2, 3, 4)
    assert torch.equal(latents[1, 0, 2], 0.5 * mean[1, :, 0, 2])
    assert torch.allclose(small.decode(latents), small.vae.decode(mean), atol=1e-5)


def test_images_are_decoded_one_at_a_time(small, monkeypatch):
    sizes = []

    def decode(z):
        sizes.append(len(z))
        return z[:, :3]
    monkeypatch.setattr(small.vae, "decode", decode)
    latents = torch.arange(9.0)[:, None, None, None].expand(9, 64, 64, 4)  # 512 pixels square
    assert small.decode(latents)[:, 0, 0, 0].tolist() == [2 * i for i in range(9)]
    assert sizes == 9 * [1]


# ---- see, think, draw ------------------------------------------------------------------------------------

@torch.no_grad()
def test_see_puts_the_buffers_last_for_the_llm(small, latents, mask):
    x_enc, z_enc = small.see(latents.flatten(1, 2), mask, (4, 4))
    assert x_enc.shape == (2, n + 5, 32) and z_enc.shape == (2, 5 + n, 32)
    assert torch.equal(x_enc, small.mar.encode(latents.flatten(1, 2), mask, (4, 4)))
    assert torch.allclose(z_enc[:, -n:], small.proj_in(x_enc[:, :n]), atol=1e-6)
    assert torch.allclose(z_enc[:, :-n], small.proj_in(x_enc[:, n:]), atol=1e-6)


@torch.no_grad()
def test_the_residual_returns_each_vector_to_its_place(small, latents, mask):
    x_enc, z_enc = small.see(latents.flatten(1, 2), mask, (4, 4))
    out = small.add_residual(x_enc, z_enc)
    assert torch.allclose(out[:, :n], x_enc[:, :n] + small.proj_out(z_enc[:, -n:]), atol=1e-6)
    assert torch.allclose(out[:, n:], x_enc[:, n:] + small.proj_out(z_enc[:, :-n]), atol=1e-6)


@torch.no_grad()
def test_see_think_draw_give_what_masked_features_gives(small):
    """A cached prompt and one pass over everything are the same, for padded prompts and a wide grid."""
    ids, real = prompt(small, PROMPTS)
    latents = torch.randn(2, 3, 5, 4, generator=generator())
    mask = torch.rand(2, 15, generator=generator()).argsort(dim=1) < 6
    cache = KVCache()
    small.llm(ids, attention_mask=real, cache=cache)
    x_enc, z_enc = small.see(latents.flatten(1, 2), mask, (3, 5))
    for _ in range(2):                          # the second time on the cache that the first leaves
        z_llm = small.think(z_enc, real, cache)
        assert cache.length == ids.shape[1]
        z = small.draw(x_enc, z_llm, mask, (3, 5))
        expected = small.mar.decode(small.masked_features(latents, mask, ids, real), mask, (3, 5))
        assert z.shape == (2, 15, 32) and torch.allclose(z, expected, atol=1e-5)


@torch.no_grad()
def test_a_prompt_may_show_the_whole_image(small, latents, mask, dialog):
    """Reconstruction alignment: hidden tokens reach the result through the prompt's image."""
    ids, real, _ = dialog
    cache = KVCache()
    small.llm(inputs_embeds=small.embed(ids, small.look(latents)), attention_mask=real, cache=cache)
    x_enc, z_enc = small.see(latents.flatten(1, 2), mask, (4, 4))
    expected = small.add_residual(x_enc, small.think(z_enc, real, cache))
    features = small.masked_features(latents, mask, ids, real)
    assert torch.allclose(features, expected, atol=1e-5)
    changed = torch.where(mask.view(2, 4, 4, 1), latents + 1, latents)
    assert not torch.allclose(small.masked_features(changed, mask, ids, real), features, atol=1e-2)


@torch.no_grad()
def test_embed_puts_image_features_where_the_ids_say(small):
    ids = torch.tensor([[5, IMAGE_TOKEN_ID, IMAGE_TOKEN_ID, 6], [IMAGE_TOKEN_ID, 7, 8, IMAGE_TOKEN_ID]])
    z_enc = torch.randn(2, 2, 32)
    embeds, table = small.embed(ids, z_enc), small.llm.model.embed_tokens.weight
    expected = torch.stack([table[5], z_enc[0, 0], z_enc[0, 1], table[6],
                            z_enc[1, 0], table[7], table[8], z_enc[1, 1]])
    assert torch.equal(embeds.flatten(0, 1), expected)
    with pytest.raises(ValueError, match="input_ids hold 4 image positions, the images give 6"):
        small.embed(ids, torch.zeros(2, 3, 32))
    with pytest.raises(ValueError, match="hold 4 image positions, the images give 0"):
        small.embed(ids)


# ---- generation ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("num_iter, cfg", [(1, 1.0), (5, 3.0), (16, 1.0), (30, 3.0)])
def test_sample_is_its_steps(small, num_iter, cfg):
    """sample_steps yields K times, also when K > N; its last tokens, decoded, are what sample returns."""
    ids, real = prompt(small, PROMPTS)
    B = 2 if cfg == 1 else 1
    canvas = torch.zeros(B, N, 4), torch.ones(B, N, dtype=torch.bool)
    steps = list(small.sample_steps(
        ids, real, Sampling(num_iter, cfg), Randomness(generator()), canvas, (4, 4)))
    assert len(steps) == num_iter
    assert [int(mask[0].sum()) for _, mask in steps] == mask_schedule(N, num_iter)[1:]
    seen = []
    pixels = small.sample(ids, real, num_iter=num_iter, cfg=cfg, generator=generator(),
                          on_step=lambda *step: seen.append(step))
    assert torch.equal(pixels, small.decode(steps[-1][0].view(B, 4, 4, 4)).detach())
    assert [k for k, _, _ in seen] == list(range(1, num_iter + 1))
    for (tokens, mask), (_, seen_tokens, seen_mask) in zip(steps, seen, strict=True):
        assert torch.equal(tokens, seen_tokens.flatten(1, 2)) and torch.equal(mask, seen_mask)


def test_every_token_is_drawn_once_in_the_given_order(small):
    ids, real = prompt(small, ["a red circle", UNCONDITIONAL])
    orders, steps = torch.randperm(N, generator=generator())[None], []
    small.sample(ids, real, num_iter=6, orders=orders, generator=generator(),
                 on_step=lambda k, tokens, mask: steps.append((tokens.flatten(1, 2), mask)))
    for (tokens, mask), m in zip(steps, mask_schedule(N, 6)[1:], strict=True):
        assert mask[0].nonzero().flatten().tolist() == sorted(orders[0, :m].tolist())
        assert torch.equal(tokens.any(dim=2), ~mask), "hidden tokens are 0"
    for (before, mask), (after, _) in zip(steps, steps[1:]):
        assert torch.equal(before[~mask], after[~mask]), "a drawn token stays"


def test_the_head_gets_what_masked_features_gives(small, monkeypatch):
    """In the first step, through the cached prompt."""
    ids, real = prompt(small, PROMPTS)
    decode, given = small.mar.decode, []

    def record(x, *others):
        given.append(x)
        return decode(x, *others)
    monkeypatch.setattr(small.mar, "decode", record)
    small.sample(ids, real, num_iter=2, cfg=1.0, generator=generator())
    with torch.no_grad():
        mask = torch.ones(2, N, dtype=torch.bool)
        expected = small.masked_features(torch.zeros(2, 4, 4, 4), mask, ids, real)
    assert torch.allclose(given[0], expected, atol=1e-5)


def test_guidance_by_the_same_prompt_changes_nothing(small):
    ids, real = prompt(small, PROMPTS[:1])
    plain = small.sample(ids, real, num_iter=4, cfg=1.0, generator=generator())
    both = ids.repeat(2, 1), real.repeat(2, 1)
    assert torch.allclose(small.sample(*both, num_iter=4, cfg=3.0, generator=generator()), plain, atol=1e-3)
    other = prompt(small, [PROMPTS[0], UNCONDITIONAL])
    guided = small.sample(*other, num_iter=4, cfg=3.0, generator=generator())
    assert not torch.allclose(guided, plain, atol=0.1)


def test_a_step_without_guidance_draws_the_conditional_rows(small):
    """Of one masked token the linear schedule's only weight is 1, while the prompts come in pairs."""
    ids, real = prompt(small, [PROMPTS[0], UNCONDITIONAL])
    canvas = torch.zeros(1, 4, 4, 4), torch.arange(N)[None] == 5
    settings = dict(num_iter=1, canvas=canvas)
    guided = small.sample(ids, real, cfg=3.0, cfg_schedule="linear", generator=generator(), **settings)
    plain = small.sample(ids[:1], real[:1], cfg=1.0, generator=generator(), **settings)
    assert torch.allclose(guided, plain, atol=1e-4)


def test_known_tokens_of_a_canvas_stay(small, latents):
    """Eight tokens are known; those that are not start at 0, whatever the canvas holds there."""
    ids, real = prompt(small, PROMPTS)
    mask = torch.arange(N).expand(2, -1) % 2 == 0
    original, steps = latents.clone(), []
    settings = dict(num_iter=3, cfg=1.0)
    pixels = small.sample(ids, real, canvas=(latents, mask), generator=generator(), **settings,
                          on_step=lambda k, tokens, mask: steps.append((tokens.flatten(1, 2), mask)))
    assert torch.equal(latents, original), "the canvas itself is not written to"
    known = latents.flatten(1, 2)[~mask]
    assert [int(hidden.sum()) for _, hidden in steps] == [2 * m for m in mask_schedule(8, 3)[1:]]
    for tokens, hidden in steps:
        assert torch.equal(tokens[~mask], known) and not hidden[~mask].any()
        assert not tokens[hidden].any()
    assert not torch.equal(steps[-1][0][mask], latents.flatten(1, 2)[mask])
    spoiled = torch.where(mask.view(2, 4, 4, 1), math.inf, latents).nan_to_num(posinf=1e3)
    again = small.sample(ids, real, canvas=(spoiled, mask), generator=generator(), **settings)
    assert torch.equal(again, pixels)
    changed = torch.where(mask.view(2, 4, 4, 1), latents, latents + 1)
    other = small.sample(ids, real, canvas=(changed, mask), generator=generator(), **settings)
    assert not torch.allclose(other, pixels, atol=0.1), "the known tokens are seen"


@pytest.mark.parametrize("name, value", [("num_iter", 0), ("cfg", math.nan), ("solver", "euler")])
def test_settings_out_of_range_are_named(small, name, value):
    with pytest.raises(ValueError, match=f"^{name} is "):
        small.sample(*prompt(small, PROMPTS), **{name: value})


def test_settings_may_be_numbers_of_numpy(small):
    settings = dict(num_iter=2, cfg=2.5, temperature=0.5, num_sampling_steps=4, cfg_schedule="linear")
    kinds = dict(num_iter=np.int64, cfg=np.float32, temperature=np.float64, num_sampling_steps=np.int32)
    of_numpy = settings | {name: kind(settings[name]) for name, kind in kinds.items()}
    plain, other = (small.sample(*prompt(small, PROMPTS), generator=generator(), **each)
                    for each in (settings, of_numpy))
    assert torch.equal(plain, other)


def test_guidance_needs_pairs_of_prompts(small):
    with pytest.raises(ValueError, match=r"\[conditional; unconditional\]; 3 rows are odd"):
        small.sample(*prompt(small, PROMPTS + PROMPTS[:1]))
    with pytest.raises(TypeError, match="cgf"):
        small.sample(*prompt(small, PROMPTS), cgf=3.0)


# ---- losses ----------------------------------------------------------------------------------------------

def test_looking_passes_a_tenth_of_the_gradient(small, latents):
    z_enc = small.look(latents)
    _, expected = small.visual_features(latents)
    assert torch.equal(z_enc, expected), "the value stays as it is, to the bit"
    weight = small.proj_in[0].weight
    tenth, = torch.autograd.grad(z_enc.square().sum(), weight)
    full, = torch.autograd.grad(expected.square().sum(), weight)
    assert torch.allclose(tenth, 0.1 * full, rtol=1e-4, atol=1e-6 * full.abs().max().item())


def test_understanding_trains_the_encoder_with_a_tenth(small, latents, dialog):
    def gradients(grad_scale):
        model = copy.deepcopy(small)
        model.grad_scale = grad_scale
        ids, real, labels = dialog
        model.image2text_loss(None, ids, real, labels, latents=latents).backward()
        return model.mar.z_proj.weight.grad, model.llm.model.norm.weight.grad
    tenth, full = gradients(0.1), gradients(1.0)
    assert small.grad_scale == 0.1
    assert torch.allclose(10 * tenth[0], full[0], rtol=1e-3, atol=1e-6) and torch.equal(tenth[1], full[1])


def test_reconstruction_alignment_passes_a_tenth_through_the_prompt(small, latents, dialog):
    """With every token hidden, the latents reach the features through the prompt alone."""
    ids, real, _ = dialog
    mask = torch.ones(2, N, dtype=torch.bool)

    def gradient(grad_scale):
        model, x = copy.deepcopy(small), latents.clone().requires_grad_()
        model.grad_scale = grad_scale
        model.masked_features(x, mask, ids, real).square().sum().backward()
        return x.grad
    tenth, full = gradient(0.1), gradient(1.0)
    assert full.any() and torch.allclose(10 * tenth, full, rtol=1e-3, atol=1e-5 * full.abs().max().item())


def test_losses_of_pixels_are_those_of_their_latents(small, dialog):
    pixels = torch.rand(2, 3, 32, 32, generator=generator()) * 2 - 1
    latents = small.encode(pixels).detach()
    losses = []
    for given in (dict(pixels=pixels), dict(pixels=None, latents=latents)):
        torch.manual_seed(1)
        drawing = small.text2image_loss(**given, input_ids=dialog[0], attention_mask=dialog[1])
        ids, real, labels = dialog
        answering = small.image2text_loss(**given, input_ids=ids, attention_mask=real, labels=labels)
        losses.append((drawing.item(), answering.item()))
    assert losses[0] == losses[1]


def test_the_vae_is_not_trained(small, dialog):
    model = copy.deepcopy(small)
    ids, real, labels = dialog
    pixels = torch.rand(2, 3, 32, 32)
    (model.text2image_loss(pixels, *prompt(small, PROMPTS))
     + model.image2text_loss(pixels, ids, real, labels)).backward()
    assert all(p.grad is None for p in model.vae.parameters())
    assert all(p.grad.any() for p in (*model.proj_in.parameters(), *model.proj_out.parameters()))


@torch.no_grad()
def test_the_drawing_loss_repeats_all_tokens(small, latents, mask):
    """t and noise hold the batch's B·N tokens diffusion_batch_mul times over."""
    ids, real = prompt(small, PROMPTS)
    t = torch.randint(1000, (4, 2 * N), generator=generator())
    noise = torch.randn(4, 2 * N, 4, generator=generator())
    draws = dict(mask=mask, t=t.flatten(), noise=noise.flatten(0, 1))
    loss = small.text2image_loss(None, ids, real, latents=latents, **draws)
    z = small.mar.decode(small.masked_features(latents, mask, ids, real), mask, (4, 4))
    rows = z.flatten(0, 1), latents.view(-1, 4), mask.flatten()
    each = [small.mar.diffloss.loss(*rows, t=t[i], noise=noise[i]) for i in range(4)]
    assert torch.allclose(loss, torch.stack(each).mean(), rtol=1e-5)


@torch.no_grad()
def test_the_answering_loss_is_the_mean_over_labelled_tokens(small, latents, dialog):
    ids, real, labels = dialog
    loss = small.image2text_loss(None, ids, real, labels, latents=latents)
    embeds = small.embed(ids, small.look(latents))
    scores = small.llm.logits(small.llm(inputs_embeds=embeds, attention_mask=real)).log_softmax(dim=-1)
    terms = [-scores[b, i - 1, labels[b, i]] for b, i in (labels != IGNORE_INDEX).nonzero().tolist()]
    answers = [small.tokenizer.encode(text + END).ids for text in ("a red circle", "two")]
    assert len(terms) == sum(map(len, answers))
    assert torch.allclose(loss, torch.stack(terms).mean(), atol=1e-5)


def test_a_loss_of_text_alone(small):
    rows = training_ids(small.tokenizer, [("What comes after one?", "two")])
    ids, labels = (torch.tensor([row]) for row in rows)
    real = torch.ones_like(ids, dtype=torch.bool)
    expected = F.cross_entropy(small.llm.logits(small.llm(ids))[0, :-1], labels[0, 1:])
    assert torch.allclose(small.image2text_loss(None, ids, real, labels), expected, atol=1e-5)
    nothing = small.image2text_loss(None, ids, real, torch.full_like(labels, IGNORE_INDEX))
    assert nothing.item() == 0 and nothing.requires_grad, "no labels, no loss"


# ---- half precision --------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def half(small):
    model = copy.deepcopy(small).bfloat16()
    model.tokenizer = small.tokenizer
    return model


@torch.no_grad()
def outputs(model, latents, mask):
    """What each part of a pass gives, from the same float32 inputs."""
    ids, real = prompt(model, PROMPTS)
    x_enc, z_enc = model.see(latents.flatten(1, 2), mask, (4, 4))
    features = model.masked_features(latents, mask, ids, real)
    z = model.mar.decode(features, mask, (4, 4)).flatten(0, 1)
    hidden_states = model.llm(ids, attention_mask=real)
    t = torch.arange(32) * 31
    return {
        "latents": model.encode(torch.rand(2, 3, 32, 32, generator=generator())),
        "pixels": model.decode(latents),
        "x_enc": x_enc,
        "z_enc": z_enc,
        "hidden_states": hidden_states[real],
        "logits": model.llm.logits(hidden_states[real]),
        "features": features,
        "z": z,
        "head": model.mar.diffloss.net(latents.view(-1, 4), t, z),
    }


@pytest.mark.parametrize("name, bound", [      # measured:
    ("latents", 0.05),                          # 0.022
    ("pixels", 0.04),                           # 0.016
    ("x_enc", 0.015),                           # 0.006
    ("z_enc", 0.015),                           # 0.006
    ("hidden_states", 0.025),                   # 0.010
    ("logits", 0.025),                          # 0.011
    ("features", 0.02),                         # 0.008
    ("z", 0.02),                                # 0.008
    ("head", 0.03),                             # 0.012
])
def test_bfloat16_is_near_float32(small, half, latents, mask, name, bound):
    exact, out = outputs(small, latents, mask)[name], outputs(half, latents, mask)[name]
    assert out.dtype == torch.bfloat16 and out.shape == exact.shape
    assert (out - exact).norm() < bound * exact.norm()
