import copy
import math

import numpy as np
import pytest
import torch
from conftest import SMALL, shake
from PIL import Image

import harmon
from harmonkit.data.mixture import conversation
from harmon import END, GENERATE, IMAGE_TOKEN_ID, UNCONDITIONAL, Harmon, HarmonConfig, mask_schedule, pad_to_square, pixels_to_images


@pytest.mark.parametrize("N, K", [(256, 64), (16, 1), (16, 16), (16, 50), (1, 3), (30, 7)])
def test_mask_schedule(N, K):
    m = mask_schedule(N, K)
    assert len(m) == K + 1 and m[0] == N and m[-1] == 0 and all(a >= b for a, b in zip(m, m[1:]))
    assert all(v >= 1 for v in m[:-1])
    if (N, K) == (256, 64):
        assert m[1:5] == [255, 254, 253, 252] and m[32] == math.floor(256 * math.cos(math.pi / 4))


def test_drawn_masks(small):
    torch.manual_seed(0)
    counts = []
    for _ in range(300):
        mask = small.draw_mask(3, 16)
        assert mask.shape == (3, 16) and len(set(mask.sum(1).tolist())) == 1
        counts.append(int(mask[0].sum()))
    assert set(counts) == {12, 13, 14, 15, 16}      # ceil(ratio · 16), ratio in [0.7, 1]
    # P(ratio > 15/16) for a normal (1, 0.25) cut to [0.7, 1] is 0.1975 / 0.7699 · … = 0.257
    assert abs(counts.count(16) / 300 - 0.257) < 0.08


def prompt(model, texts):
    return model.pad([model.prompt_ids(t) for t in texts])


def images_of(model, prompts, seeds, **kwargs):
    pictures = []
    model.generate_image(prompts, seed=seeds, on_step=lambda k, tokens, hidden: pictures.append(tokens.clone()), **{"num_iter": 5, **kwargs})
    return pictures[-1]


def test_an_image_does_not_depend_on_its_batch(small):
    prompts = ["a red circle", "three blue stars to the left of a very long and winding caption", "a star"]
    together = images_of(small, prompts, [5, 6, 7])
    for i in range(3):
        alone = images_of(small, prompts[i:i + 1], [5 + i])
        assert torch.allclose(together[i], alone[0], atol=1e-4), f"image {i} changed with its batch"
    assert not torch.allclose(images_of(small, ["a red circle"], [8])[0], together[0], atol=1e-2)


@pytest.mark.parametrize("settings", [dict(cfg=1.0), dict(cfg_schedule="linear"), dict(num_iter=1), dict(num_iter=40), dict(size=(24, 56)), dict(temperature=0.0)])
def test_settings_work_and_matter(small, settings):
    a = images_of(small, ["a red circle"], [1])
    b = images_of(small, ["a red circle"], [1], **settings)
    h, w = [n // 8 for n in settings.get("size", (32, 32))]
    assert b.shape == (1, h, w, 4) and b.isfinite().all()
    assert a.shape != b.shape or not torch.equal(a, b)


def test_every_token_is_drawn_once_in_the_given_order(small):
    ids, real = prompt(small, ["a red circle", UNCONDITIONAL])
    orders, seen = torch.randperm(16)[None], []
    small.sample(ids, real, num_iter=6, orders=orders, generator=torch.Generator().manual_seed(0), on_step=lambda k, tokens, hidden: seen.append((tokens.clone(), hidden)))
    masked = [m for m in mask_schedule(16, 6)[1:]]
    for (tokens, hidden), m in zip(seen, masked):
        assert sorted(hidden[0].nonzero()[:, 0].tolist()) == sorted(orders[0, :m].tolist())
        assert (tokens.flatten(1, 2)[0].abs().sum(1) > 0).tolist() == (~hidden[0]).tolist()
    for (before, hidden), (after, _) in zip(seen, seen[1:]):
        assert torch.equal(before.flatten(1, 2)[~hidden], after.flatten(1, 2)[~hidden])


def test_the_cached_prompt_gives_what_a_full_pass_gives(small):
    """z of the first step through `sample`'s cache against masked_features, which has none."""
    ids, real = prompt(small, ["a red circle", "three blue stars and a green cross"])
    captured = []
    original, small.mar.decode = small.mar.decode, lambda x, *args: captured.append(x) or original(x, *args)
    try:
        small.sample(ids, real, num_iter=2, cfg=1.0, generator=torch.Generator().manual_seed(0))
    finally:
        del small.mar.decode
    with torch.no_grad():
        expected = small.masked_features(torch.zeros(2, 4, 4, 4), torch.ones(2, 16).bool(), ids, real)
    assert torch.allclose(captured[0], expected, atol=1e-5)


def test_inpainting_keeps_what_is_not_masked(small):
    torch.manual_seed(0)
    image = Image.fromarray((torch.rand(32, 32, 3) * 255).byte().numpy())
    mask = Image.new("L", (32, 32))
    mask.paste(255, (8, 0, 24, 16))                                 # 2 × 2 tokens
    history = []
    result = small.generate_image(["a star"], image=image, mask=mask, num_iter=3, on_step=lambda k, t, hidden: history.append((t.clone(), hidden)))[0]
    known = small.encode(harmon.image_to_pixels(image, (32, 32)))
    keep = torch.ones(4, 4).bool()
    keep[:2, 1:3] = False
    for tokens, hidden in history:
        assert torch.equal(tokens[0][keep], known[0][keep]) and not hidden.view(4, 4)[keep].any()
    assert not torch.equal(history[-1][0][0][~keep], known[0][~keep])
    a, b = (torch.from_numpy(np.asarray(x).astype(int)) for x in (image, result))
    outside = torch.ones(32, 32).bool()
    outside[0:16, 8:24] = False
    assert (a - b)[outside].abs().max() <= 1 and not torch.equal(a[~outside], b[~outside])
    with pytest.raises(ValueError, match="black everywhere"):
        small.generate_image(["a star"], image=image, mask=Image.new("L", (32, 32)))


@pytest.mark.parametrize("wrong, message", [
    (dict(num_iter=0), "num_iter"), (dict(cfg=-1.0), "cfg"), (dict(cfg_schedule="cosine"), "cosine"), (dict(size=(32, 30)), "multiples of 8"),
    (dict(size=0), "multiples"), (dict(seed=[1, 2]), "2 seeds"), (dict(temperature=-1), "temperature")])
def test_bad_settings_are_named(small, wrong, message):
    with pytest.raises(ValueError, match=message):
        small.generate_image(["a star"], **wrong)


def test_empty_prompts_are_refused(small):
    for prompts in ("", "  ", [], ["a star", ""]):
        with pytest.raises(ValueError, match="empty"):
            small.generate_image(prompts)
    with pytest.raises(ValueError, match="empty"):
        next(small.chat(" "))


def test_unknown_sampling_options_are_refused(small):
    with pytest.raises(TypeError):
        small.generate_image(["a star"], cgf=3.0)


# ---- prompts and chat ------------------------------------------------------------------------------------------------

def test_prompt_template(small):
    text = small.tokenizer.decode(small.prompt_ids(GENERATE.format(caption="a star")), skip_special_tokens=False)
    assert text == "<|im_start|>user\nGenerate an image: a star<|im_end|>\n<|im_start|>assistant\n"
    ids = small.prompt_ids("What is it?", image_tokens=20, history=[("Hi", "Hello"), ("So", "what")])
    assert ids.count(IMAGE_TOKEN_ID) == 20
    first = ids.index(IMAGE_TOKEN_ID)
    decode = lambda x: small.tokenizer.decode(x, skip_special_tokens=False)  # noqa: E731
    assert decode(ids[:first]) == "<|im_start|>user\n"
    assert decode(ids[first + 20:]) == ("\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nSo<|im_end|>\n<|im_start|>assistant\n"
                                        "what<|im_end|>\n<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n")


def test_training_sees_the_very_tokens_that_chat_feeds(small):
    turns = [("What color is the star?", "red"), ("How many?", "two")]
    ids, labels = conversation(small, turns, image_tokens=20)
    assert ids[:len(small.prompt_ids("What color is the star?", image_tokens=20))] == small.prompt_ids("What color is the star?", image_tokens=20)
    before_last = small.prompt_ids("How many?", image_tokens=20, history=turns[:1])
    assert ids[:len(before_last)] == before_last
    said = [i for i, label in zip(ids, labels) if label != -100]
    assert all(label in (-100, i) for i, label in zip(ids, labels))
    assert small.tokenizer.decode(said, skip_special_tokens=False) == f"red{END}two{END}"


def test_chat_streams_what_greedy_decoding_gives(small):
    image = Image.new("RGB", (50, 31), "red")
    pieces = list(small.chat("What is it?", image, max_new_tokens=12))
    with torch.no_grad():
        pixels = harmon.image_to_pixels(pad_to_square(image), (32, 32))
        _, z = small.visual_features(small.encode(pixels))
        embeds = small.embed(torch.tensor([small.prompt_ids("What is it?", image_tokens=20)]), z)
    ids = list(small.llm.generate(embeds, max_new_tokens=12, eos_token_id=small.tokenizer.token_to_id(END)))
    assert "".join(pieces) == small.tokenizer.decode(ids).rstrip("\ufffd")
    assert "".join(small.chat("What is it?", max_new_tokens=12)) != "".join(pieces)     # the image matters


def test_image_places_must_match_the_image(small):
    with pytest.raises(ValueError, match="19 image positions, the images give 20"):
        small.embed(torch.tensor([[IMAGE_TOKEN_ID] * 19 + [5]]), torch.zeros(1, 20, 32))


def test_pictures_are_padded_with_grey_and_rounded():
    square = pad_to_square(Image.new("RGB", (10, 4), "white"))
    assert square.size == (10, 10) and square.getpixel((0, 0)) == (127, 127, 127) and square.getpixel((5, 5)) == (255, 255, 255)
    pixels = torch.tensor([-2.0, -1.0, 0.0, 0.5, 1.0, 2.0]).view(1, 1, 1, 6).expand(1, 3, 1, 6)
    assert np.asarray(pixels_to_images(pixels)[0])[0, :, 0].tolist() == [0, 0, 128, 191, 255, 255]


# ---- losses ----------------------------------------------------------------------------------------------------------

def test_understanding_gradient_into_the_image_is_a_tenth(small, monkeypatch):
    def gradient():
        model = shake(Harmon(SMALL))
        ids, labels = conversation(small, [("What?", "red")], image_tokens=20)
        model.image2text_loss(None, torch.tensor([ids]), torch.ones(1, len(ids)).bool(), torch.tensor([labels]), latents=torch.ones(1, 4, 4, 4)).backward()
        return model.mar.z_proj.weight.grad, model.llm.model.norm.weight.grad
    tenth = gradient()
    monkeypatch.setattr(harmon, "GRADIENT_INTO_IMAGE", 1.0)
    full = gradient()
    assert torch.allclose(10 * tenth[0], full[0], rtol=1e-3, atol=1e-7) and torch.allclose(tenth[1], full[1])


def test_losses_from_pixels_and_from_latents_agree(small):
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ids, real = prompt(small, ["a red circle", "a star"])
    with torch.no_grad():
        latents = small.encode(pixels)
        results = []
        for given in (dict(), dict(latents=latents)):
            torch.manual_seed(1)
            results.append(small.text2image_loss(None if given else pixels, ids, real, **given))
    assert torch.equal(*results)


def test_a_loss_over_text_alone(small):
    rows = [conversation(small, [("What comes after one?", "two")])]
    ids, real = small.pad([r[0] for r in rows])
    loss = small.image2text_loss(None, ids, real, torch.tensor([rows[0][1]]))
    logits = small.llm.logits(small.llm(ids))[0].log_softmax(-1)
    expected = -torch.stack([logits[i - 1, label] for i, label in enumerate(rows[0][1]) if label != -100]).mean()
    assert torch.allclose(loss, expected, atol=1e-5)


def test_a_long_loss_over_text_in_parts(small):
    """Of more than 1,024 labelled positions: the same loss and gradients, computed in parts."""
    model = copy.deepcopy(small)
    ids = torch.randint(5, 500, (3, 500), generator=torch.Generator().manual_seed(0))
    real = torch.ones_like(ids, dtype=torch.bool)
    model.image2text_loss(None, ids, real, ids).backward()
    found = {name: p.grad.clone() for name, p in model.llm.named_parameters()}
    model.zero_grad()
    logits = model.llm.logits(model.llm(ids, attention_mask=real))[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    assert all(torch.allclose(p.grad, found[name], atol=1e-6) for name, p in model.llm.named_parameters())


def test_an_image_wants_a_mask(small):
    for given in ({"image": Image.new("RGB", (32, 32))}, {"mask": Image.new("RGB", (32, 32))}):
        with pytest.raises(ValueError, match="image and mask go together"):
            small.generate_image("a star", **given)


def test_mismatched_parts_are_refused():
    from dataclasses import replace
    with pytest.raises(ValueError, match="stride"):
        Harmon(replace(SMALL, mar=replace(SMALL.mar, vae_stride=16)))
    with pytest.raises(ValueError, match="harmon-9b"):
        HarmonConfig.from_name("harmon-9b")


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_other_dtypes_run(tokenizer, dtype):
    model = shake(Harmon(SMALL)).to(dtype)
    model.tokenizer = tokenizer
    assert model.generate_image(["a star"], num_iter=3)[0].size == (32, 32)
    assert isinstance("".join(model.chat("What?", Image.new("RGB", (40, 20)), max_new_tokens=4)), str)
