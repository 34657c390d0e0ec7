"""The NumPy port against torch: the torch model is compared with the port's vectors like another port."""
import itertools
import json
from dataclasses import replace

import compare
import export
import numpy as np
import numpy_harmon as port
import pytest
import torch
from conftest import SMALL
from parameters import load, read_safetensors
from PIL import Image
from tokenizers import Tokenizer

from harmon import Harmon
from harmonkit.chat_template import prompt_ids
from harmonkit.images import image_to_pixels, open_image, pad_to_square, pixels_to_images
from harmonkit.pipeline import generation_prompts
from harmonkit.shapes_world import world
from mar import mask_schedule

# Widths that differ, a head width that is no power of two, more than two key heads, an lm_head, no clamp.
ODD = replace(
    SMALL, vae=replace(SMALL.vae, ch_mult=(1, 2, 1, 2)), mar=replace(SMALL.mar, num_heads=2, x0_clip=None),
    llm=replace(SMALL.llm, hidden_size=60, num_attention_heads=6, num_key_value_heads=3,
                tie_word_embeddings=False))


class Watch:
    """Tensors of the torch model under the vectors' names, by hooks on its modules and by `keep`."""

    def __init__(self, model):
        self.tensors = {}
        self.place = ""
        for name, module in model.named_modules():
            if name not in ("", "vae", "llm", "mar", "mar.diffloss"):
                module.register_forward_hook(self.hook(name))

    def hook(self, name):
        def see(module, args, out):
            # In generation the steps of the diffusion head have places of their own.
            if not (name.startswith("mar.diffloss") and self.place.startswith(("generate", "class"))):
                self.keep(f"{name}.in", args[0])
                self.keep(f"{name}.out", out)
        return see

    def keep(self, name, x):
        self.tensors[self.place + name] = np.array(x.detach().numpy() if isinstance(x, torch.Tensor) else x)
        return x

    def kept(self, method, name):
        """The method, its results kept."""
        return lambda *args: self.keep(name, method(*args))

    def placed(self, method, places):
        """The method, each call in the next of the places."""
        def call(*args, **options):
            self.place = next(places)
            return method(*args, **options)
        return call


def understand(model, watch, settings):
    watch.place = "understand/"
    image = world.render(world.scene(0, 0))
    size = model.config.mar.img_size
    pixels = watch.keep("pixels", image_to_pixels(pad_to_square(image), (size, size)))
    latents = watch.keep("latents", model.encode(pixels))
    x_enc, z_enc = model.visual_features(latents)
    watch.keep("mar.x_enc", x_enc)
    watch.keep("z_enc", z_enc)
    ids = prompt_ids(model.tokenizer, settings["question"], num_image_tokens=z_enc.shape[1])
    input_ids = watch.keep("input_ids", torch.tensor([ids]))
    embeds = watch.keep("embeds", model.embed(input_ids, z_enc))
    forward = model.llm.forward
    model.llm.forward = watch.placed(forward, (f"understand/token{i}/" for i in itertools.count()))
    end = model.tokenizer.token_to_id(port.END)
    answer = list(model.llm.generate(embeds, max_new_tokens=settings["max_new_tokens"], eos_token_id=end))
    model.llm.forward = forward
    watch.place = "understand/"
    watch.keep("answer", answer)


def generate(model, watch, given, settings):
    """The orders are the vectors', and so is the noise, which torch asks for step by step."""
    K = settings["num_iter"]
    new_tokens = [given[f"generate/step{k}/new_tokens"][0] for k in range(1, K + 1)]
    noise = given["generate/noise"][0].transpose(0, 1)                      # (S, N, C)
    draws = itertools.chain.from_iterable(noise[:, tokens] for tokens in new_tokens)
    model.see = watch.placed(model.see, (f"generate/step{k}/" for k in itertools.count(1)))
    model.draw = watch.kept(model.draw, "mar.z")
    model.add_residual = watch.kept(model.add_residual, "x_dec")
    watch.place = "generate/"
    watch.keep("masked", mask_schedule(model.config.mar.grid ** 2, K))
    input_ids, attention_mask = generation_prompts(model, [settings["prompt"]], settings["cfg"])
    watch.keep("input_ids", input_ids)
    watch.place = "generate/prompt/"
    watch.keep("llm.attention_mask", attention_mask)
    pixels = model.sample(
        input_ids, attention_mask, num_iter=K, cfg=settings["cfg"], temperature=settings["temperature"],
        orders=given["generate/orders"], noise_fn=lambda shape: next(draws),
        on_step=lambda k, tokens, mask: watch.keep("tokens", tokens.flatten(1, 2)))
    del model.see, model.draw, model.add_residual
    watch.place = "generate/"
    watch.keep("decoded", pixels)
    watch.keep("picture", pixels_to_images(pixels)[0])


def draw_class(model, watch, given, settings):
    """MAR alone. Orders and noise are the vectors'."""
    K = settings["num_iter"]
    noise = given["class/noise"][0].transpose(0, 1)                         # (S, N, C)
    new_tokens = [given[f"class/step{k}/new_tokens"][0] for k in range(1, K + 1)]
    draws = itertools.chain.from_iterable(noise[:, tokens] for tokens in new_tokens)
    mar = model.mar
    places = (f"class/step{k}/" for k in range(1, K + 1))
    mar.encode = watch.placed(watch.kept(mar.encode, "mar.x_enc"), places)
    mar.decode = watch.kept(mar.decode, "mar.z")
    watch.place = "class/"
    labels = watch.keep("labels", torch.tensor([settings["label"]]))
    latents = mar.sample(
        labels, num_iter=K, cfg=settings["cfg"], temperature=settings["temperature"],
        orders=given["class/orders"], noise_fn=lambda shape: next(draws),
        on_step=lambda k, tokens, mask: watch.keep("tokens", tokens.flatten(1, 2)))
    del mar.encode, mar.decode
    watch.place = "class/"
    pixels = watch.keep("decoded", model.decode(latents))
    watch.keep("picture", pixels_to_images(pixels)[0])


def train_and_resize(model, watch, batches):
    for task, loss in (("text2image", model.text2image_loss), ("image2text", model.image2text_loss)):
        watch.place = f"train/{task}/"
        watch.keep("loss", loss(None, **batches[task]))
    watch.place = "resize/"
    g = model.config.mar.grid
    for name in ("encoder_pos_embed_learned", "decoder_pos_embed_learned", "diffusion_pos_embed_learned"):
        watch.keep(f"mar.{name}", model.mar.position_embedding(getattr(model.mar, name), (g + 1, g + 3)))


@pytest.mark.parametrize("config", [SMALL, ODD, None], ids=["small", "odd", "harmon-tiny"])
@torch.no_grad()
def test_torch_computes_what_the_port_does(config, tmp_path):
    if config is None:
        model = Harmon.from_pretrained("harmon-tiny")
    else:
        (tmp_path / "config.json").write_text(json.dumps(config.to_json()))
        model = export.random_model(tmp_path)
    passes = ("understand", "generate", "train", "resize", "class")
    export.export(model, tmp_path, origin="test", passes=passes)
    index = json.loads((tmp_path / "index.json").read_text())
    vectors = read_safetensors(tmp_path / "vectors.safetensors")
    settings = index["settings"]
    watch = Watch(model)
    understand(model, watch, settings)
    given = {name: torch.from_numpy(x) for name, x in vectors.items()}
    generate(model, watch, given, settings)
    draw_class(model, watch, given, settings)
    train_and_resize(model, watch, export.training_batches(model, world.render(world.scene(0, 0)), settings))

    results = compare.compare(index, vectors, watch.tensors)
    assert not [(r.about["name"], r.detail) for r in results if r.verdict in ("differs", "shape")]
    equal = {r.about["name"] for r in results if r.verdict == "equal"}
    joints = [f"understand/{name}" for name in ("latents", "mar.x_enc", "z_enc", "embeds", "answer")]
    joints += [f"generate/step{k}/{name}" for k in (1, 4) for name in ("x_dec", "mar.z", "tokens")]
    joints += [f"{place}/llm.model.norm.out" for place in ("understand/token1", "generate/step2")]
    joints += [f"generate/{name}" for name in ("input_ids", "masked", "decoded", "picture")]
    joints += [f"class/step{k}/{name}" for k in (1, 4) for name in ("mar.x_enc", "mar.z", "tokens")]
    joints += ["class/decoded", "class/picture"]
    joints += ["train/text2image/loss", "train/image2text/loss", "resize/mar.encoder_pos_embed_learned"]
    assert set(joints) <= equal, sorted(set(joints) - equal)
    assert len(equal) > 400


@pytest.mark.parametrize("text", ["What is it?", "\n two  lines", "a<|im_end|>\n<|im_start|>b", ""])
@pytest.mark.parametrize("num_image_tokens", [0, 3])
def test_the_port_tokenizes_alike(tokenizer, text, num_image_tokens):
    """Special tokens in a question are text here as there."""
    expected = prompt_ids(tokenizer, text, num_image_tokens=num_image_tokens)
    assert port.prompt_ids(Tokenizer.from_str(tokenizer.to_str()), text, num_image_tokens) == expected


def test_the_port_reads_the_checkpoint_and_gives_the_same_answer():
    model = Harmon.from_pretrained("harmon-tiny")
    p, _ = load("harmon-tiny")
    image = world.render(world.scene(0, 1)).crop((0, 4, 64, 60)).resize((80, 70))
    answer = "".join(model.chat("Describe the image.", image, max_new_tokens=30))
    assert answer
    assert port.chat(p, model.tokenizer, image, "Describe the image.", max_new_tokens=30) == answer


def test_the_port_opens_pictures_as_the_model_does(tmp_path):
    """Upright, and transparency on white."""
    picture = np.random.default_rng(0).integers(0, 256, (5, 8, 4), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture).save(tmp_path / "clear.png")
    Image.fromarray(picture[..., :3].copy()).save(tmp_path / "turned.png", exif=exif)
    for name, size in (("clear.png", (8, 5)), ("turned.png", (5, 8))):
        image = port.open_image(tmp_path / name)
        assert image.size == size and image.mode == "RGB"
        difference = np.asarray(image).astype(int) - np.asarray(open_image(tmp_path / name))
        assert np.abs(difference).max() <= 1


def test_the_command_line_draws_and_answers(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    port.main(["three blue stars", "--out", "x.png", "--seed", "0", "--steps", "2"])
    assert Image.open("x.png").size == (64, 64) and capsys.readouterr().out == "x.png\n"
    port.main(["--class", "3", "--out", "y.png", "--steps", "2"])
    assert Image.open("y.png").size == (64, 64) and capsys.readouterr().out == "y.png\n"
    port.main(["--image", "x.png", "--ask", "What color is the star?"])
    assert capsys.readouterr().out.strip()


def test_bad_input_is_said_in_one_line(tmp_path, capsys):
    cases = ((["--ask", "What?"], "--image"), (["--class", "150"], "there are 0 to 149"),
             (["a star", "--class", "1"], "give a prompt"),
             (["a star", "--model", str(tmp_path)], "no model.safetensors"))
    for argv, words in cases:
        with pytest.raises(SystemExit) as stop:
            port.main(argv)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and words in error and error.count("\n") == 1
