"""Pictures from pictures: the model looks at a whole picture and draws it anew."""
import copy
import hashlib
import json
import random
import shlex
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from harmon import IMAGE_TOKEN_ID, Harmon
from harmonkit import outputs
from harmonkit.chat_template import DESCRIBE, UNCONDITIONAL, prompt_ids
from harmonkit.data.mixture import loss_arguments, prepare
from harmonkit.data.records import Sample
from harmonkit.fast import accelerate
from harmonkit.images import image_to_pixels, training_squares
from harmonkit.pipeline import PROMPT_BLOCK, generation_prompts
from harmonkit.reconstruction import beside, features, middle, prompts_and_pictures
from harmonkit.repeatable import make_repeatable
from harmonkit.shapes_world import world

GRID, N, BUFFERS = (4, 4), 16, 4                                # of the small model


def noise(height, width, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def recorded(model, monkeypatch, *args, **options):
    """generate_image's decoder inputs (rows, n+V, D), and its tokens and masks, step by step."""
    inputs, steps = [], []
    decode = model.mar.decode

    def record(x, mask, grid):
        inputs.append(x)
        return decode(x, mask, grid)
    with monkeypatch.context() as patch:
        patch.setattr(model.mar, "decode", record)
        model.generate_image(*args, on_step=lambda k, *step: steps.append(step), **options)
    return inputs, steps


def tokens_of(model, *args, **options):
    """The tokens (B, h, w, C) that generate_image decodes."""
    steps = []
    model.generate_image(*args, on_step=lambda k, tokens, mask: steps.append(tokens),
                         **{"num_iter": 3} | options)
    return steps[-1]


# ---- what the model computes -----------------------------------------------------------------------------

def test_the_first_condition_is_that_of_training(small, monkeypatch):
    """Drawing begins where reconstruction alignment trains with all tokens hidden: the same decoder input."""
    photos = [noise(32, 32), noise(32, 32, seed=1)]
    inputs, _ = recorded(small, monkeypatch, like=photos, num_iter=2)
    # A square picture has one square only, so the random crop of training is the middle.
    rows = [prepare(Sample("photo", partial(copy.copy, photo)), "reca", 32, random.Random(0))
            for photo in photos]
    batch = {"task": "reca", "pixels": torch.cat([row["pixels"] for row in rows]),
             "turns": [row["turns"] for row in rows]}
    inputs_of_loss = loss_arguments(small, batch)
    with torch.no_grad():
        inputs_of_loss["latents"] = small.encode(inputs_of_loss.pop("pixels"))
        hidden = torch.ones(2, N, dtype=torch.bool)
        trained = small.masked_features(mask=hidden, **inputs_of_loss)
    assert torch.allclose(inputs[0][:2], trained, atol=1e-4)
    assert not torch.allclose(inputs[0][2:], trained, atol=1e-2), "the other half does not see the picture"


def plain_features(model, text, tokens, mask, photo=None):
    """The decoder's input for one row, without a cache, without padding, the prompt put together by hand."""
    embed = model.llm.model.embed_tokens
    ids = prompt_ids(model.tokenizer, text, num_image_tokens=N + BUFFERS if photo is not None else 0)
    prompt = embed(torch.tensor([ids]).clamp(min=0))                                    # (1, L, H)
    if photo is not None:
        _, z_enc = model.visual_features(model.encode(image_to_pixels(photo, (32, 32))))
        start = ids.index(IMAGE_TOKEN_ID)
        prompt = torch.cat([prompt[:, :start], z_enc, prompt[:, start + N + BUFFERS:]], dim=1)
    x_enc, z_enc = model.see(tokens, mask, GRID)
    z_llm = model.llm(inputs_embeds=torch.cat([prompt, z_enc], dim=1))[:, prompt.shape[1]:]
    return model.add_residual(x_enc, z_llm)


@pytest.mark.parametrize("prompts", [None, ["Make it red.", "What would it look like from behind? " * 3]])
def test_every_step_equals_a_plain_computation_without_cache_and_padding(small, monkeypatch, prompts):
    photos = [noise(32, 32), noise(32, 32, seed=1)]
    inputs, steps = recorded(small, monkeypatch, prompts, like=photos, num_iter=4, seed=3)
    canvas = torch.zeros(2, N, 4), torch.ones(2, N, dtype=torch.bool)
    before = [canvas] + [(tokens.flatten(1, 2), mask) for tokens, mask in steps[:-1]]
    assert len(inputs) == 4
    with torch.no_grad():
        for x, (tokens, mask) in zip(inputs, before):
            for i in range(2):
                one = tokens[i:i + 1], mask[i:i + 1]
                request = DESCRIBE if prompts is None else prompts[i].strip()
                looking = plain_features(small, request, *one, photos[i])
                assert torch.allclose(x[i], looking[0], atol=1e-4)
                blind = plain_features(small, UNCONDITIONAL, *one)
                assert torch.allclose(x[2 + i], blind[0], atol=1e-4)


def test_guidance_is_against_the_prompt_without_the_picture(small):
    ids, real = generation_prompts(small, [DESCRIBE, " Make it red.\n"], 3.0, PROMPT_BLOCK, N + BUFFERS)
    assert ids.shape == (4, 64) and (ids == IMAGE_TOKEN_ID).sum(1).tolist() == [20, 20, 0, 0]
    rows = [row[mask].tolist() for row, mask in zip(ids, real)]
    assert rows[:2] == [prompt_ids(small.tokenizer, text, num_image_tokens=20)
                        for text in (DESCRIBE, "Make it red.")]
    assert rows[2:] == [prompt_ids(small.tokenizer, UNCONDITIONAL)] * 2
    photo = noise(32, 32)
    plain, guided = tokens_of(small, like=photo, cfg=1.0), tokens_of(small, like=photo, cfg=3.0)
    assert plain.isfinite().all() and not torch.allclose(plain, guided, atol=0.01)


def test_the_picture_and_the_request_matter(small):
    photo, other = noise(32, 32), noise(32, 32, seed=1)
    drawn = tokens_of(small, like=photo)
    assert not torch.allclose(tokens_of(small, like=other), drawn, atol=0.01)
    assert not torch.allclose(tokens_of(small, "Make it red.", like=photo), drawn, atol=0.01)
    assert not torch.allclose(tokens_of(small, DESCRIBE), drawn, atol=0.01)
    assert torch.equal(tokens_of(small, DESCRIBE, like=photo), drawn)


def test_a_drawing_does_not_depend_on_its_batch(small):
    photos = [noise(32, 32), noise(48, 40, seed=1), noise(32, 32, seed=2)]
    requests = [DESCRIBE, "Draw it again, in the colors of the evening, with a border around it.", "Again."]
    together = tokens_of(small, requests, like=photos, seed=5)
    for i in range(3):
        alone = tokens_of(small, requests[i], like=photos[i], seed=5 + i)
        assert torch.allclose(together[i], alone[0], atol=1e-4), i


def test_bytes_do_not_depend_on_the_batch():
    """As prompts do: with the fast paths on, the picture given once or as many times as it is drawn."""
    model = make_repeatable(accelerate(Harmon.from_pretrained(device="cpu"), "auto"))
    photos = [world.render(world.scene("like", i, held_out=True)) for i in range(3)]
    settings = {"num_iter": 8, "num_sampling_steps": 8}
    together = [image.tobytes() for image in model.generate_image(like=photos, seed=7, **settings)]
    alone = [model.generate_image(like=photo, seed=7 + i, **settings)[0] for i, photo in enumerate(photos)]
    assert [image.tobytes() for image in alone] == together and len(set(together)) == 3
    draws = model.generate_image([DESCRIBE] * 3, like=photos[0], seed=7, **settings)
    assert draws[0].tobytes() == together[0]


def test_each_picture_is_seen_once_and_alone(small, monkeypatch):
    shapes = []
    encode = small.encode
    monkeypatch.setattr(small, "encode", lambda pixels: shapes.append(tuple(pixels.shape)) or encode(pixels))
    photo, other = noise(32, 32), noise(32, 32, seed=1)
    seen = features(small, [photo, other, photo], (2, 3))
    assert shapes == [(1, 3, 16, 24)] * 2 and seen.shape == (3, 6 + BUFFERS, 32)
    assert torch.equal(seen[0], seen[2]) and not torch.allclose(seen[0], seen[1])


def test_drawing_goes_without_dropout(small):
    in_training = copy.deepcopy(small).train()
    photo = noise(32, 32)
    assert torch.equal(tokens_of(in_training, like=photo), tokens_of(small, like=photo))
    assert in_training.mar.training


# ---- what is seen ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [(32, 32), (100, 70), (70, 101), (3, 500), (1, 1)])
def test_the_middle_is_that_of_training(size):
    photo = noise(*size)
    square, = training_squares(photo, "reca", 0, None)
    assert middle(photo, (64, 64)).tobytes() == square.tobytes()


def test_the_middle_of_other_proportions():
    photo = noise(30, 60)
    assert middle(photo, (16, 16)).size == (30, 30)
    assert middle(photo, (16, 32)).tobytes() == photo.tobytes()
    assert middle(photo, (16, 24)).tobytes() == photo.crop((8, 0, 53, 30)).tobytes()
    assert middle(photo, (32, 8)).size == (8, 30)
    assert middle(noise(1, 400), (512, 8)).size == (1, 1)


def test_what_lies_beside_the_middle_is_not_seen(small):
    photo = noise(32, 80)
    assert torch.equal(tokens_of(small, like=photo), tokens_of(small, like=photo.crop((24, 0, 56, 32))))
    changed = photo.copy()
    changed.paste("white", (0, 0, 20, 32))
    assert torch.equal(tokens_of(small, like=changed), tokens_of(small, like=photo))


def test_another_size_is_seen_and_drawn(small):
    image, = small.generate_image(like=noise(30, 60), size=(24, 56), num_iter=2)
    assert image.size == (56, 24)


def test_a_picture_comes_in_as_anything(small, tmp_path):
    photo = noise(32, 32)
    photo.save(tmp_path / "photo.png")
    expected = tokens_of(small, like=photo)
    for same in (tmp_path / "photo.png", str(tmp_path / "photo.png"), np.asarray(photo),
                 photo.convert("RGBA"), [photo]):
        assert torch.equal(tokens_of(small, like=same), expected)


def test_one_picture_serves_all_prompts_and_one_prompt_all_pictures():
    photo, other = noise(8, 8), noise(8, 8, seed=1)
    assert prompts_and_pictures(None, photo) == ([DESCRIBE], [photo])
    assert prompts_and_pictures(None, [photo, other]) == ([DESCRIBE] * 2, [photo, other])
    assert prompts_and_pictures("a", (photo, other)) == (["a", "a"], [photo, other])
    prompts, (first, second) = prompts_and_pictures(["a", "b"], np.asarray(photo))
    assert prompts == ["a", "b"] and first is second


@pytest.mark.parametrize("arguments, message", [
    ({"like": []}, "a prompt is empty"),
    ({"prompts": " ", "like": noise(8, 8)}, "a prompt is empty"),
    ({"prompts": ["a", "b", "c"], "like": [noise(8, 8)] * 2}, "3 prompts, but 2 pictures in like"),
    ({"like": "no.png"}, "no.png: no such file"),
    ({"like": 5}, "a picture is given as int"),
    ({"like": noise(8, 8), "image": noise(8, 8)}, "like goes with neither image nor mask"),
    ({"like": noise(8, 8), "mask": noise(8, 8)}, "like goes with neither image nor mask"),
    ({"like": noise(8, 8), "seed": [1, 2]}, "1 prompts, but 2 seeds"),
    ({"like": noise(8, 8), "size": 30}, "multiples of 8"),
    ({}, "a prompt is empty; say what to draw")])
def test_what_does_not_go_together_is_refused(small, arguments, message):
    error = FileNotFoundError if "no such file" in message else ValueError
    with pytest.raises(error, match=message):
        small.generate_image(**arguments)


def test_image_positions_and_features_are_as_many(small):
    ids, real = generation_prompts(small, [DESCRIBE], 3.0, 1, N + BUFFERS)
    with pytest.raises(ValueError, match="input_ids hold 20 image positions, the images give 0"):
        small.sample(ids, real)
    with pytest.raises(ValueError, match="input_ids hold 20 image positions, the images give 40"):
        small.sample(ids, real, z_enc=torch.zeros(2, 20, 32))


# ---- beside the original ---------------------------------------------------------------------------------

def test_the_original_stands_beside_the_drawings():
    photo = Image.new("RGB", (90, 40), "red")
    photo.paste("blue", (25, 0, 65, 40))                        # its middle square
    sheet = beside(photo, Image.new("RGB", (96, 64), "green"), (32, 32))
    assert sheet.size == (64 + 96, 64)
    assert {sheet.getpixel(place) for place in ((0, 0), (63, 63))} == {(0, 0, 255)}
    assert {sheet.getpixel(place) for place in ((64, 0), (159, 63))} == {(0, 128, 0)}
    wide = beside(photo, Image.new("RGB", (64, 16)), (16, 32))
    assert wide.size == (32 + 64, 16)


def test_a_sheet_is_finished_with_its_original(tmp_path):
    photo = Image.new("RGB", (32, 32), "red")
    sheet, = outputs.plan_single("x", 2, 0, {}, tmp_path, photo, overwrite=False, words="photo again")
    assert [file.path.name for file in sheet.files] == ["photo-again-0.png", "photo-again-1.png",
                                                        "photo-again.png"]
    for picture in sheet.pictures:
        Image.new("RGB", (16, 16), "blue").save(picture.path)
    with Image.open(sheet.finish()) as grid:
        assert grid.size == (16 + 32, 16) and grid.getpixel((0, 0)) == (255, 0, 0)


# ---- the command -----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folder(small, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    small.save_pretrained(path)
    return path


@pytest.fixture
def main(folder, tmp_path, capsys, monkeypatch):
    """Run sample.py in a folder with photo.png, 60×40: (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    noise(40, 60).save("photo.png")

    def run(line):
        status = 0
        try:
            sample.main(["--model", str(folder), "--steps", "2", *shlex.split(line)])
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()
    return run


SEEN = "looking at the middle of photo.png: 40×40 of 60×40 pixels\n"


def test_a_photo_is_drawn_anew_beside_itself(small, main):
    assert main("--image photo.png --reconstruct") == (0, "out/photo-reconstructed.png\n", SEEN)
    names = [f"photo-reconstructed-{i}.png" for i in range(4)]
    assert sorted(path.name for path in Path("out").iterdir()) == sorted([*names, "photo-reconstructed.png"])
    drawn = small.generate_image([DESCRIBE] * 4, like="photo.png", num_iter=2)
    for name, image in zip(names, drawn):
        with Image.open(Path("out", name)) as file:
            difference = np.abs(np.asarray(file).astype(int) - np.asarray(image).astype(int))
            assert difference.max() <= 1, "up to rounding"
            texts = file.text
    assert (texts["prompt"], texts["seed"]) == (DESCRIBE, "3")
    settings = json.loads(texts["settings"])
    assert (settings["reconstruct"], settings["image"], settings["size"]) == (True, "photo.png", [32, 32])
    assert settings["image_sha256"] == hashlib.sha256(Path("photo.png").read_bytes()).hexdigest()
    with Image.open("out/photo-reconstructed.png") as grid, Image.open(Path("out", names[1])) as second:
        assert grid.size == (64 + 64, 64)
        assert grid.crop((96, 0, 128, 32)).tobytes() == second.tobytes()
        original = middle(noise(40, 60), (32, 32)).resize((64, 64), Image.BICUBIC)
        assert grid.crop((0, 0, 64, 64)).tobytes() == original.tobytes()


def test_the_same_command_goes_on_and_another_picture_takes_another_name(main):
    command = "--image photo.png --reconstruct --num-images 3"
    main(command)
    files = {path: (path.stat().st_ino, path.read_bytes()) for path in Path("out").iterdir()}
    assert main(command)[2] == f"{SEEN}1 of 1 prompts are drawn already; --overwrite draws them anew\n"
    lost = Path("out/photo-reconstructed-1.png")
    lost.unlink()
    assert main(f"{command} --batch-size 2")[:2] == (0, "out/photo-reconstructed.png\n")
    assert {path: path.read_bytes() for path in Path("out").iterdir()} == {
        path: content for path, (_, content) in files.items()}
    assert all(path.stat().st_ino == inode for path, (inode, _) in files.items()
               if path not in (lost, Path("out/photo-reconstructed.png")))
    noise(40, 60, seed=1).save("photo.png")
    assert main(command)[1] == "out/photo-reconstructed_2.png\n", "another picture under the same name"
    assert main(f"{command} 'Make it red!'")[1] == "out/photo-make-it-red.png\n"


def test_a_single_drawing_has_no_grid_and_sees_what_size_says(main):
    assert main("--image photo.png --reconstruct --num-images 1 --size 32x48") == (
        0, "out/photo-reconstructed.png\n", "")
    with Image.open("out/photo-reconstructed.png") as image:
        assert image.size == (48, 32)


@pytest.mark.parametrize("line, message", [
    ("--reconstruct", "with an instruction or none; give it"),
    ("--reconstruct star", "with an instruction or none; give it"),
    ("--reconstruct --image photo.png --mask photo.png", "leave out --mask"),
    ("--reconstruct --image photo.png --chat", "leave out --chat"),
    ("--reconstruct --image photo.png --ask star", "leave out --ask"),
    ("--reconstruct --image photo.png --prompts photo.png", "leave out --prompts"),
    ("--reconstruct --image photo.png --classes 1", "leave out --classes"),
    ("--reconstruct --image photo.png ''", "the prompt is empty"),
    ("--reconstruct --image no.png", "no.png: no such file"),
    ("--reconstruct --image photo.png --size 30", "multiples of 8")])
def test_what_does_not_go_with_reconstruct_is_one_line(main, line, message):
    status, out, err = main(line)
    assert (status, out) == (2, "") and err.startswith("sample.py: ") and err.count("\n") == 1
    assert message in err and not Path("out").exists()
