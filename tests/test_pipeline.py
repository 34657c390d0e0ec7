import copy

import numpy as np
import pytest
import torch
from PIL import Image

from harmonkit.chat_template import END, prompt_ids
from harmonkit.images import image_to_pixels, pad_to_square, pixels_to_images
from harmonkit.pipeline import generate_batch, generation_prompts, inpainting_canvas, token_grid


def levels(image):
    """Grey levels (H, W, 3) of a PIL image as integers."""
    return np.asarray(image).astype(int)


def latents_of(model, prompts, seeds, **settings):
    """The latents (B, h, w, C) that generate_image decodes."""
    steps, settings = [], {"num_iter": 5} | settings
    model.generate_image(
        prompts, seed=seeds, on_step=lambda k, tokens, mask: steps.append(tokens), **settings)
    return steps[-1]


# ---- text -> images --------------------------------------------------------------------------------------

def test_token_grids(small):
    assert token_grid(small) == (4, 4)
    assert token_grid(small, 48) == (6, 6) and token_grid(small, (16, 56)) == (2, 7)


@pytest.mark.parametrize("size", [0, -8, 30, (32, 30), (4, 32)])
def test_impossible_sizes_are_refused(small, size):
    with pytest.raises(ValueError, match="height and width must be positive multiples of 8"):
        token_grid(small, size)


def test_unconditional_prompts_follow_the_others(small):
    ids, real = generation_prompts(small, [" a red circle\n", "a"], cfg=3.0)
    rows = [row[mask].tolist() for row, mask in zip(ids, real)]
    texts = [small.tokenizer.decode(row, skip_special_tokens=False) for row in rows]
    question = "<|im_start|>user\nGenerate an image{}<|im_end|>\n<|im_start|>assistant\n"
    assert texts == [question.format(rest) for rest in (": a red circle", ": a", ".", ".")]
    assert len(generation_prompts(small, ["a"], cfg=1.0)[0]) == 1


def test_an_image_depends_on_its_prompt_and_seed_not_on_its_batch(small):
    prompts = ["a red circle", "three blue stars to the left of a very long and winding caption", "a star"]
    together = latents_of(small, prompts, 5)
    for i in range(3):
        alone = latents_of(small, prompts[i], 5 + i)
        assert torch.allclose(together[i], alone[0], atol=1e-4), i
    assert torch.equal(latents_of(small, prompts, [5, 6, 7]), together)
    assert not torch.allclose(latents_of(small, prompts[0], 8)[0], together[0], atol=0.1)
    assert not torch.allclose(latents_of(small, prompts[1], 5)[0], together[0], atol=0.1)


@pytest.mark.parametrize("settings", [
    {"cfg": 1.0}, {"cfg_schedule": "linear"}, {"num_iter": 1}, {"num_iter": 40}, {"temperature": 0.0},
    {"solver": "ddim"}, {"solver": "dpm++", "num_sampling_steps": 4}, {"num_sampling_steps": 20},
])
def test_every_setting_matters(small, settings):
    plain, other = latents_of(small, "a red circle", 1), latents_of(small, "a red circle", 1, **settings)
    assert other.isfinite().all() and not torch.allclose(other, plain, atol=0.01)


def test_images_of_another_size(small):
    image, = small.generate_image("a red circle", size=(24, 56), num_iter=3)
    assert image.size == (56, 24) and latents_of(small, "a", 1, size=(24, 56)).shape == (1, 3, 7, 4)


def test_images_are_the_decoded_latents(small):
    latents = latents_of(small, ["a star", "a"], 3)
    images = small.generate_image(["a star", "a"], seed=3, num_iter=5)
    with torch.no_grad():
        expected = pixels_to_images(small.decode(latents))
    assert [image.tobytes() for image in images] == [image.tobytes() for image in expected]


@pytest.mark.parametrize("prompts", ["", "  ", [], ["a star", ""], ["a star", None]])
def test_empty_prompts_are_refused(small, prompts):
    with pytest.raises(ValueError, match="a prompt is empty; say what to draw"):
        small.generate_image(prompts)


@pytest.mark.parametrize("wrong, message", [
    ({"num_iter": 0}, "num_iter is 0"),
    ({"cfg": -1.0}, "cfg is -1.0"),
    ({"temperature": -1}, "temperature is -1"),
    ({"cfg_schedule": "cosine"}, "cosine"),
    ({"solver": "euler"}, "euler"),
    ({"size": (32, 30)}, "multiples of 8"),
    ({"seed": [1, 2]}, "1 prompts, but 2 seeds"),
])
def test_bad_settings_are_named(small, wrong, message):
    with pytest.raises(ValueError, match=message):
        small.generate_image(["a star"], **wrong)


def test_unknown_settings_are_refused(small):
    with pytest.raises(TypeError, match="cgf"):
        small.generate_image(["a star"], cgf=3.0)


# ---- inpainting ------------------------------------------------------------------------------------------

@pytest.fixture
def photo():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))


def test_inpainting_redraws_what_the_mask_marks(small, photo):
    """The mask covers 2 × 2 tokens and one pixel of a fifth, which is drawn whole and shown at that pixel."""
    mask = Image.new("L", (32, 32))
    mask.paste(255, (8, 0, 24, 16))
    mask.putpixel((31, 31), 255)
    redrawn = torch.zeros(4, 4, dtype=torch.bool)
    redrawn[:2, 1:3] = True
    redrawn[3, 3] = True
    known = small.encode(image_to_pixels(photo, (32, 32)))[0]
    steps = []
    results = small.generate_image(["a star", "a circle"], image=photo, mask=mask, num_iter=3,
                                   on_step=lambda k, tokens, mask: steps.append((tokens, mask)))
    for tokens, hidden in steps:
        for image in range(2):
            assert torch.equal(tokens[image][~redrawn], known[~redrawn])
            assert not hidden[image].view(4, 4)[~redrawn].any()
    assert (steps[-1][0] != known).any(dim=-1).tolist() == [redrawn.tolist()] * 2
    marked = np.asarray(mask) > 0
    for result in results:
        difference = np.abs(levels(result) - levels(photo)).max(axis=2)
        assert difference[~marked].max() <= 1 and (difference[marked] > 1).mean() > 0.9
    assert results[0].tobytes() != results[1].tobytes()


def test_the_canvas_of_another_size(small, photo):
    original = image_to_pixels(photo, (16, 24))
    redraw = torch.zeros(1, 1, 16, 24, dtype=torch.bool)
    redraw[..., 8:, :8] = True
    latents, mask = inpainting_canvas(small, original, redraw, 3)
    assert latents.shape == (3, 2, 3, 4) and torch.equal(latents[2], small.encode(original)[0])
    assert mask.tolist() == [[False, False, False, True, False, False]] * 3


def test_images_and_masks_that_do_not_go_together(small, photo):
    with pytest.raises(ValueError, match="the mask is black everywhere"):
        small.generate_image(["a star"], image=photo, mask=Image.new("L", (32, 32)))
    for given in ({"image": photo}, {"mask": photo}):
        with pytest.raises(ValueError, match="image and mask go together"):
            small.generate_image("a star", **given)


# ---- images -> text --------------------------------------------------------------------------------------

def answer_ids(model, question, image, count):
    """Greedy decoding of the prompt with the features of the padded image."""
    with torch.no_grad():
        _, z_enc = model.visual_features(model.encode(image_to_pixels(pad_to_square(image), (32, 32))))
        ids = prompt_ids(model.tokenizer, question, num_image_tokens=20)
        embeds = model.embed(torch.tensor([ids]), z_enc)
    end = model.tokenizer.token_to_id(END)
    return list(model.llm.generate(embeds, max_new_tokens=count, eos_token_id=end))


def test_chat_streams_what_greedy_decoding_gives(small):
    image = Image.new("RGB", (50, 31), "red")
    pieces = list(small.chat("What is it?", image, max_new_tokens=12))
    expected = small.tokenizer.decode(answer_ids(small, "What is it?", image, 12))
    assert "".join(pieces) == expected.rstrip("\ufffd") and len(pieces) > 1
    assert "".join(small.chat("What is it?", max_new_tokens=12)) != expected, "the image matters"
    history = [("Hello", "Hi")]
    assert "".join(small.chat("What is it?", image, history=history, max_new_tokens=12)) != expected
    assert "".join(small.chat("What is it?", image, size=64, max_new_tokens=12)) != expected


def test_chat_waits_for_whole_characters_and_ends_at_the_end(small, monkeypatch):
    ids = small.tokenizer.encode("a – b").ids
    monkeypatch.setattr(small.llm, "generate", lambda embeds, max_new_tokens, eos_token_id: iter(ids))
    pieces = list(small.chat("What?"))
    assert "".join(pieces) == "a – b" and all("\ufffd" not in piece for piece in pieces)
    asked = {}

    def generate(embeds, **options):
        asked.update(options)
        return iter(())
    monkeypatch.setattr(small.llm, "generate", generate)
    assert list(small.chat("What?", max_new_tokens=7)) == []
    assert asked == {"max_new_tokens": 7, "eos_token_id": small.tokenizer.token_to_id(END)}


def test_an_empty_question_is_refused(small):
    with pytest.raises(ValueError, match="the question is empty"):
        next(small.chat(" "))


@pytest.mark.parametrize("count", [1, 12])
def test_answers_in_a_batch_are_those_of_each_row_alone(small, count):
    lengths = [5, 2, 9, 1]
    rows = [torch.randn(1, length, 32, generator=torch.Generator().manual_seed(length)) for length in lengths]
    alone = [list(small.llm.generate(row, max_new_tokens=count)) for row in rows]
    embeds = torch.cat([torch.nn.functional.pad(row, (0, 0, 0, 9 - row.shape[1]), value=3.0) for row in rows])
    real = torch.arange(9) < torch.tensor(lengths)[:, None]
    assert generate_batch(small.llm, embeds, real, max_new_tokens=count, eos_token_id=-1) == alone
    end = alone[0][count // 2]
    ended = [row[:row.index(end)] if end in row else row for row in alone]
    assert generate_batch(small.llm, embeds, real, max_new_tokens=count, eos_token_id=end) == ended
    assert ended[0] != alone[0]


def test_a_batch_stops_when_every_row_has_ended(small, monkeypatch):
    embeds = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(0))
    first = next(small.llm.generate(embeds, max_new_tokens=1))
    logits, calls = small.llm.logits, []

    def count(hidden_states):
        calls.append(len(hidden_states))
        return logits(hidden_states)
    monkeypatch.setattr(small.llm, "logits", count)
    real = torch.ones(1, 4, dtype=torch.bool)
    assert generate_batch(small.llm, embeds, real, max_new_tokens=50, eos_token_id=first) == [[]]
    assert calls == [1]


def test_half_precision_draws_and_answers(small):
    model = copy.deepcopy(small).bfloat16()
    image, = model.generate_image("a star", num_iter=3)
    assert image.size == (32, 32)
    assert isinstance("".join(model.chat("What?", Image.new("RGB", (40, 20)), max_new_tokens=4)), str)
    mask = Image.new("L", (32, 32), 255)
    assert model.generate_image("a star", num_iter=2, image=image, mask=mask)[0].size == (32, 32)
