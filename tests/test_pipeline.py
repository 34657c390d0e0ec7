import copy

import numpy as np
import pytest
import torch
from PIL import Image

from harmonkit.chat_template import END, prompt_ids
from harmonkit.images import image_to_pixels, pad_to_square, pixels_to_images
from harmonkit.pipeline import fit_history, generate_batch, generation_prompts, history_pairs, token_grid


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


def test_sizes_are_whole_numbers_of_any_type(small):
    assert token_grid(small, np.int64(48)) == (6, 6) and token_grid(small, [np.int32(16), 56]) == (2, 7)
    for size in ("64", 64.0, (64,), (64, 64, 64), (64, "64")):
        with pytest.raises(ValueError, match=r"a number of pixels or \(height, width\) is expected"):
            token_grid(small, size)


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


@pytest.mark.parametrize("seed", [
    np.int64(5), np.array(5), torch.tensor(5), [5], (np.int32(5),), np.array([5]), torch.tensor([5])])
def test_a_seed_is_a_whole_number_of_any_type(small, seed):
    assert torch.equal(latents_of(small, "a star", seed), latents_of(small, "a star", 5))


@pytest.mark.parametrize("seed, message", [
    (1.5, "seed is 1.5; a whole number"), ("5", "seed is '5'"), (None, "seed is None"),
    (True, "seed is True"), (2 ** 70, "seed is 1180591620717411303424"), ([[5]], "1 prompts, but 1 seeds")])
def test_other_seeds_are_refused(small, seed, message):
    with pytest.raises(ValueError, match=message):
        small.generate_image("a star", seed=seed)


def test_numbers_of_numpy_are_settings(small):
    numpy_numbers = {"num_iter": np.int64(3), "cfg": np.float32(2), "temperature": np.float64(0.5),
                     "num_sampling_steps": np.int32(4)}
    plain = {"num_iter": 3, "cfg": 2.0, "temperature": 0.5, "num_sampling_steps": 4}
    assert torch.equal(latents_of(small, "a", 1, **numpy_numbers), latents_of(small, "a", 1, **plain))


@pytest.mark.parametrize("settings", [{}, {"solver": "ddim"}, {"solver": "dpm++"}, {"cfg": 1.0}])
def test_the_default_dtype_of_torch_changes_nothing(small, settings):
    expected, = small.generate_image("a star", num_iter=3, **settings)
    question = "What is it?", Image.new("RGB", (50, 31), "red")
    answer = "".join(small.chat(*question, max_new_tokens=8))
    torch.set_default_dtype(torch.float64)
    try:
        image, = small.generate_image("a star", num_iter=3, **settings)
        assert "".join(small.chat(*question, max_new_tokens=8)) == answer
    finally:
        torch.set_default_dtype(torch.float32)
    assert image.tobytes() == expected.tobytes()


@pytest.fixture
def in_training(small):
    """A model in training mode, except its language model."""
    model = copy.deepcopy(small).train()
    model.llm.eval()
    return model


def test_drawing_and_answering_go_without_dropout_and_leave_the_mode_as_it_was(small, in_training):
    modes = [module.training for module in in_training.modules()]
    expected, = small.generate_image("a star", num_iter=3)
    image, = in_training.generate_image("a star", num_iter=3)
    assert image.tobytes() == expected.tobytes()
    ids, real = generation_prompts(small, ["a star"], cfg=3.0)
    pixels = [model.sample(ids, real, num_iter=3, generator=torch.Generator().manual_seed(0))
              for model in (small, in_training)]
    assert torch.equal(*pixels)
    picture = Image.new("RGB", (32, 32), "red")
    answers = ["".join(model.chat("What?", picture, max_new_tokens=8)) for model in (small, in_training)]
    assert answers[0] == answers[1]
    with pytest.raises(ValueError, match="a prompt is empty"):
        in_training.generate_image("")
    assert [module.training for module in in_training.modules()] == modes and True in modes and False in modes


@pytest.mark.parametrize("part", ["llm", "mar", "vae", "proj_in", "proj_out"])
def test_weights_that_are_not_finite_give_no_picture_and_no_answer(small, part):
    model = copy.deepcopy(small)
    with torch.no_grad():
        for parameter in getattr(model, part).parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite: the weights hold NaN"):
        model.generate_image("a star", num_iter=2)
    if part == "proj_out":                                      # answers do without it
        return
    with pytest.raises(ValueError, match="not finite: the weights hold NaN"):
        list(model.chat("What?", Image.new("RGB", (32, 32)), max_new_tokens=2))
    if part == "llm":
        embeds, real = torch.zeros(1, 3, 32), torch.ones(1, 3, dtype=torch.bool)
        with pytest.raises(ValueError, match="not finite"):
            generate_batch(model.llm, embeds, real, max_new_tokens=2, eos_token_id=0)


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
    ({"cfg": float("nan")}, "cfg is nan"),
    ({"temperature": float("nan")}, "temperature is nan"),
    ({"cfg": "3"}, "cfg is '3'"),
])
def test_bad_settings_are_named(small, wrong, message):
    with pytest.raises(ValueError, match=message):
        small.generate_image(["a star"], **wrong)


def test_unknown_settings_are_refused(small):
    with pytest.raises(TypeError, match="cgf"):
        small.generate_image(["a star"], cgf=3.0)


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


@pytest.mark.parametrize("question", [" ", "", None])
def test_an_empty_question_is_refused(small, question):
    with pytest.raises(ValueError, match="the question is empty"):
        next(small.chat(question))


def test_chat_takes_pictures_as_open_image_does(small, tmp_path):
    """An image, its file, its array; lying on its side with an orientation; transparent on white."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 50, 3), dtype=np.uint8))
    picture.save(tmp_path / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    clear = Image.new("RGBA", (50, 20), (255, 0, 0, 0))

    def answer(image):
        return "".join(small.chat("What is it?", image, max_new_tokens=12))
    expected = answer(picture)
    for given in (tmp_path / "a.png", str(tmp_path / "a.png"), np.asarray(picture), tmp_path / "turned.png",
                  Image.open(tmp_path / "turned.png"), picture.convert("RGBA")):
        assert answer(given) == expected
    assert answer(clear) == answer(Image.new("RGB", (50, 20), "white")) != expected
    with pytest.raises(FileNotFoundError, match="b.png: no such file"):
        answer(tmp_path / "b.png")
    with pytest.raises(ValueError, match="a picture is given as int"):
        answer(3)


# ---- the history of a conversation -----------------------------------------------------------------------

PAIRS = [("Hello", "Hi"), ("How are you?", "Fine")]
MESSAGES = [
    {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": [{"type": "text", "text": "How are"}, {"type": "text", "text": " you?"}]},
    {"role": "assistant", "content": "Fine"}]


def test_a_history_is_pairs_or_messages(small):
    assert history_pairs(PAIRS) == history_pairs(MESSAGES) == history_pairs(map(list, PAIRS)) == PAIRS
    assert history_pairs(()) == history_pairs(MESSAGES[:1]) == []

    def answer(history):
        return "".join(small.chat("Why?", history=history, max_new_tokens=8))
    assert answer(PAIRS) == answer(MESSAGES) != answer(())


@pytest.mark.parametrize("history, message", [
    (["Hello"], "a turn of the history is 'Hello'"), ([("Hello",)], r"\(question, answer\) is expected"),
    ([("Hello", None)], "dicts with role and content"), ([MESSAGES[1], PAIRS[0]], "a turn of the history is"),
    (MESSAGES[:2], r"roles are \['user'\]"), (MESSAGES[2:], "must alternate"), ([{"x": 1}], "roles are"),
    ([MESSAGES[1], {"role": "assistant", "content": None}], "the content of a turn is 'None'"),
    ([{"role": "user", "content": [{"type": "image"}]}, MESSAGES[2]], "a text is expected")])
def test_other_histories_are_refused(history, message):
    with pytest.raises(ValueError, match=message):
        history_pairs(history)


def test_the_oldest_turns_of_a_long_history_are_left_out(small):
    history = [(f"question {i}", f"answer {i}") for i in range(20)]

    def length(pairs):
        return len(prompt_ids(small.tokenizer, "Why?", num_image_tokens=20, history=pairs))
    for kept in (0, 1, 7, 20):
        room = length(history[20 - kept:])
        fitted = fit_history(small, "Why?", history, num_image_tokens=20, room=room)
        assert fitted == history[20 - kept:]
        fitted = fit_history(small, "Why?", history, num_image_tokens=20, room=room + 1)
        assert fitted == history[20 - kept:]
    with pytest.raises(ValueError, match=f"the question has {length([])} tokens, but there is room for 25 "):
        fit_history(small, "Why?", history, num_image_tokens=20, room=25)


def test_prompt_and_answer_fit_the_length_of_the_model(small):
    history = [(f"question {i}", f"answer {i}") for i in range(20)]
    two_turns = len(prompt_ids(small.tokenizer, "Why?", history=history[-2:]))
    asked = {"max_new_tokens": 8, "max_length": two_turns + 8}
    answer = "".join(small.chat("Why?", history=history, **asked))
    assert answer == "".join(small.chat("Why?", history=history[-2:], max_new_tokens=8))
    assert answer != "".join(small.chat("Why?", history=history[-3:], max_new_tokens=8))
    with pytest.raises(ValueError, match="shorten it, or lower max_new_tokens"):
        next(small.chat("Why?", history=history, max_new_tokens=two_turns, max_length=two_turns))


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
