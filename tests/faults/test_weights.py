"""Weights that are not finite are never saved, exported or drawn with; compiled blocks are compiled."""
import json
import shutil

import pytest
import torch
from PIL import Image

from faults.helpers import (
    assert_same,
    call,
    checkpoints,
    copy,
    cut,
    fine,
    hole,
    is_finite,
    load,
    log,
    not_silent,
    refused,
    rewrite_checkpoint,
    run,
)
from harmon import Harmon

INF, NAN = float("inf"), float("nan")
DRAWN_WITH = (
    "llm.model.layers.0.mlp.up_proj.weight", "llm.model.norm.weight", "mar.decoder_blocks.0.attn.qkv.weight",
    "mar.diffloss.net.input_proj.weight", "mar.mask_token", "proj_in", "proj_out",
    "vae.decoder.conv_out.bias", "vae.decoder.conv_in.weight", "mar.encoder_blocks.0.mlp.fc1.bias")
ANSWERED_WITH = (
    "llm.model.layers.1.self_attn.v_proj.weight", "llm.model.norm.weight", "mar.z_proj.weight",
    "vae.encoder.conv_in.weight", "llm.model.embed_tokens.weight", "proj_out")


def spoilt(models, folder, name, value=NAN, whole=False):
    """A copy of a model with one number of the first weight of this name, or all of them, replaced."""
    model = Harmon.from_pretrained(models.one)
    found = next(full for full, _ in model.named_parameters() if full.startswith(name))
    parameter = dict(model.named_parameters())[found]
    with torch.no_grad():
        parameter.fill_(value) if whole else parameter.view(-1)[0].fill_(value)
    shutil.copytree(models.one, folder)
    from safetensors.torch import load_file, save_file
    tensors = load_file(folder / "model.safetensors")
    tensors[found] = parameter.detach().clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return found


DRAW = ("--num-images", 1, "--steps", 2, "--num-sampling-steps", 4, "--size", 64, "--device", "cpu")


def picture(tmp_path):
    Image.new("RGB", (64, 64), (200, 30, 90)).save(tmp_path / "a.png")
    return tmp_path / "a.png"


# ---- drawing and answering ---------------------------------------------------------------------------------

@pytest.mark.parametrize("name, value", [
    *((name, NAN) for name in DRAWN_WITH), *((name, INF) for name in DRAWN_WITH[::3]), (DRAWN_WITH[1], -INF)])
def test_no_picture_is_drawn_with_weights_that_are_not_finite(name, value, models, tmp_path):
    found = spoilt(models, tmp_path / "model", name, value)
    done = call("sample.py", "--model", tmp_path / "model", *DRAW, "--out", tmp_path / "out", "a red circle")
    refused(done, found.replace(".", r"\."), "finite|nan|inf")
    assert not list((tmp_path / "out").glob("*.png")), "a black picture"


@pytest.mark.parametrize("name", ANSWERED_WITH)
def test_no_answer_is_given_with_weights_that_are_not_finite(name, models, tmp_path):
    found = spoilt(models, tmp_path / "model", name, whole=name == "llm.model.embed_tokens.weight")
    done = call("sample.py", "--model", tmp_path / "model", "--image", picture(tmp_path), "--device", "cpu",
                "--size", 64, "--max-new-tokens", 4, "What color is it?")
    refused(done, found.replace(".", r"\."), "finite|nan|inf")
    assert done.out.strip() == "", done


def test_no_answer_is_given_without_a_picture(models, tmp_path):
    found = spoilt(models, tmp_path / "model", "llm.model.layers.0.self_attn.q_proj.weight")
    done = call("sample.py", "--model", tmp_path / "model", "--device", "cpu", "--max-new-tokens", 4,
                "--ask", "Why?")
    refused(done, found.replace(".", r"\."))


@pytest.mark.parametrize("value", [INF, -INF, 3e38])
def test_pictures_clipped_to_black_or_white_are_no_pictures(value, models, tmp_path):
    """An infinite pixel becomes 0 or 255 in 8 bits, and no NaN tells of it."""
    found = spoilt(models, tmp_path / "model", "vae.decoder.conv_out.bias", value, whole=True)
    done = call("sample.py", "--model", tmp_path / "model", *DRAW, "--out", tmp_path / "out", "a red circle")
    if value == 3e38:                                                       # finite, and a white picture
        assert "Traceback" not in done.err
        return
    refused(done, found)


def in_python(models, tmp_path, name, use):
    """ValueError that names the weight, of a use of the model in Python."""
    found = spoilt(models, tmp_path / "model", name)
    try:
        model = Harmon.from_pretrained(tmp_path / "model")
    except ValueError as error:
        assert found in str(error)
        return
    with pytest.raises(ValueError, match=found.replace(".", r"\.")):
        use(model)


@pytest.mark.parametrize("name, use", [
    ("mar.decoder_blocks.0", lambda model: model.generate_image(["a"], seed=0, num_iter=2, size=64)),
    ("llm.model.layers.0.mlp", lambda model: "".join(model.chat("Why?", max_new_tokens=3))),
    ("vae.encoder", lambda model: "".join(model.chat("What?", Image.new("RGB", (64, 64)), size=64))),
    ("vae.decoder", lambda model: model.generate_image(["a"], seed=0, num_iter=2, size=64)),
    ("mar.diffloss", lambda model: model.generate_image(["a"], seed=0, num_iter=2, size=64)),
    ("vae.decoder.conv_in", lambda model: model.decode(torch.zeros(1, 8, 8, 4))),
])
def test_uses_in_python_name_the_weight(name, use, models, tmp_path):
    in_python(models, tmp_path, name, use)


def test_finite_weights_draw_as_before(models, tmp_path):
    fine(call("sample.py", "--model", models.one, *DRAW, "--out", tmp_path / "out", "a red circle"))
    assert len(list((tmp_path / "out").glob("*.png"))) == 1


# ---- saving ------------------------------------------------------------------------------------------------

def assert_all_finite(folder):
    for path in checkpoints(folder):
        content = load(path)
        assert is_finite(content["model"]) and is_finite(content["model_ema"]), path.name


@pytest.mark.parametrize("rate", [1e38, 1e36, 3e37])
def test_weights_that_overflow_are_not_saved(rate, models, tmp_path):
    """Every gradient on the way is finite; the step itself is what overflows."""
    done = run(models.one, tmp_path / "runs", "--lr", f"llm={rate}", "--weight-decay", 100, "--warmup", 0,
               "--export", tmp_path / "out")
    assert done.status == 2 and "Traceback" not in done.err, done
    assert_all_finite(tmp_path / "runs" / "tiny-llm")
    assert not (tmp_path / "out").exists()


def spoil_in_step(step, what="model", value=NAN):
    """Returns a `plant`: a weight or an average is not finite after this step."""
    def plant():
        from harmonkit.training import runs
        update = runs.EMA.update

        def spoiling(self, number):
            update(self, number)
            if number + 1 == step:
                name, parameter = next(iter(self.trainable.items()))
                place = parameter if what == "model" else self.weights[name]
                with torch.no_grad():
                    place.view(-1)[0] = value
        runs.EMA.update = spoiling
    return plant


@pytest.mark.parametrize("what", ["model", "average"])
@pytest.mark.parametrize("value", [NAN, INF])
def test_good_checkpoints_are_not_replaced(what, value, models, text_run, tmp_path):
    plant = spoil_in_step(3, what, value)
    done = run(models.one, tmp_path / "runs", "--export", tmp_path / "out", plant=plant)
    refused(done, "llm|model", "finite|nan|inf", "step")
    kept = [path.name for path in checkpoints(tmp_path / "runs" / "tiny-llm")]
    assert kept == ["step-000001.pt", "step-000002.pt"]
    assert_all_finite(tmp_path / "runs" / "tiny-llm")
    assert not (tmp_path / "out").exists()
    fine(run(models.one, tmp_path / "runs"))
    assert_same(load(text_run / "tiny-llm"), load(tmp_path / "runs" / "tiny-llm"))


def test_a_stop_does_not_save_them_either(models, tmp_path):
    def plant():
        import os
        import signal
        spoil_in_step(3)()
        from harmonkit.training.monitor import Monitor
        step = Monitor.step

        def stopping(self, number, *rest):
            step(self, number, *rest)
            if number == 3:
                os.kill(os.getpid(), signal.SIGTERM)
        Monitor.step = stopping
    done = run(models.one, tmp_path, "--save-every", 2, steps=20, plant=plant)
    assert done.status == 2 and "Traceback" not in done.err, done
    assert [path.name for path in checkpoints(tmp_path / "tiny-llm")] == ["step-000002.pt"]
    assert_all_finite(tmp_path / "tiny-llm")


@pytest.mark.parametrize("key", ["model", "model_ema"])
def test_a_checkpoint_with_such_weights_is_not_exported(key, models, text_run, tmp_path):
    runs = copy(text_run, tmp_path / "runs")
    rewrite_checkpoint(runs / "tiny-llm" / "step-000003.pt",
                       lambda content: content[key]["llm.model.norm.weight"].view(-1)[0].fill_(NAN))
    done = run(models.one, runs, "--export", tmp_path / "out")
    if key == "model_ema":
        refused(done, r"llm\.model\.norm\.weight")
        assert not (tmp_path / "out").exists()
    elif done.status == 0:
        assert is_finite(Harmon.from_pretrained(tmp_path / "out").state_dict())


def test_numbers_beyond_half_precision_are_not_exported(models, text_run, tmp_path):
    """The export is float16, whose largest number is 65504."""
    runs = copy(text_run, tmp_path / "runs")
    rewrite_checkpoint(runs / "tiny-llm" / "step-000003.pt",
                       lambda content: content["model_ema"]["llm.model.norm.weight"].view(-1)[0].fill_(1e6))
    done = run(models.one, runs, "--export", tmp_path / "out")
    refused(done, r"llm\.model\.norm\.weight")
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_the_next_recipe_does_not_start_from_them(models, text_run, tmp_path):
    runs = copy(text_run, tmp_path / "runs")
    for path in checkpoints(runs / "tiny-llm"):
        rewrite_checkpoint(path, lambda content: content["model_ema"]["llm.model.norm.weight"].fill_(NAN))
    done = run(None, runs, "--after", "tiny-llm", recipe="tiny-joint", steps=12)
    assert done.status == 2 and "Traceback" not in done.err, done


def test_training_from_such_weights_ends(models, tmp_path):
    spoilt(models, tmp_path / "model", "llm.model.norm.weight")
    done = run(tmp_path / "model", tmp_path / "runs", steps=12)
    refused(done)
    assert not checkpoints(tmp_path / "runs" / "tiny-llm")


def test_frozen_weights_that_are_not_finite_are_not_saved(models, tmp_path):
    """A weight that no loss of the run touches."""
    found = spoilt(models, tmp_path / "model", "vae.decoder.conv_out.bias")
    done = run(tmp_path / "model", tmp_path / "runs", "--export", tmp_path / "out")
    refused(done, found)
    assert not (tmp_path / "out").exists()


def test_saving_in_python_is_refused(models, tmp_path):
    model = Harmon.from_pretrained(models.one)
    with torch.no_grad():
        model.llm.model.norm.weight[0] = NAN
    with pytest.raises(ValueError, match=r"llm\.model\.norm\.weight"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_ten_steps_without_a_gradient_keep_what_was_saved(models, tmp_path):
    def plant():
        from harmonkit.training.losses import Losses
        forward, calls = Losses.forward, []

        def bad(self, task, inputs):
            calls.append(task)
            return forward(self, task, inputs) * (NAN if len(calls) > 2 else 1)
        Losses.forward = bad
    done = run(models.one, tmp_path, steps=30, plant=plant)
    refused(done, "step 12", "finite")
    assert_all_finite(tmp_path / "tiny-llm")


# ---- files of weights --------------------------------------------------------------------------------------

@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_hole_in_a_torch_file_is_found(share, models, tmp_path):
    """Mapped, torch compares no checksum."""
    torch.save(Harmon.from_pretrained(models.one).state_dict(), tmp_path / "a.pth")
    hole(tmp_path / "a.pth", share)
    done = call("sample.py", "--model", tmp_path / "a.pth", "--tokenizer", models.one, *DRAW, "--out",
                tmp_path, "x")
    refused(done, "a.pth", "damaged|checksum|CRC|broken")


@pytest.mark.parametrize("damage", ["hole in the header", "cut", "empty", "text"])
def test_a_damaged_safetensors_file_is_one_line(damage, models, tmp_path):
    shutil.copytree(models.one, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    if damage == "hole in the header":
        with open(file, "r+b") as opened:
            opened.seek(100)
            opened.write(bytes(200))
    elif damage == "text":
        file.write_text("<html>")
    else:
        cut(file, 0.5 if damage == "cut" else 0)
    for done in (call("sample.py", "--model", tmp_path / "model", *DRAW, "--out", tmp_path, "x"),
                 run(tmp_path / "model", tmp_path / "runs")):
        refused(done, "model.safetensors")


def test_a_runs_folder_as_init_is_read_or_told(models, text_run, tmp_path):
    done = run(text_run / "tiny-llm", tmp_path / "runs", steps=1)
    not_silent(done) if done.status == 0 else refused(done, "tiny-llm", "--export|run")


# ---- torch.compile -----------------------------------------------------------------------------------------

def compiled(models, runs, *flags, recipe):
    """Run with --compile true -> how many graphs were compiled. Needs no C++ compiler."""
    def plant():
        import torch._dynamo.utils

        from faults import helpers
        compile, main = torch.compile, helpers.ENTRIES["train.py"]

        def eager(*args, **options):
            return compile(*args, **options | {"backend": "eager"})

        def counting():
            main()
            print(json.dumps(dict(torch._dynamo.utils.counters["stats"])))
        torch.compile = eager
        helpers.ENTRIES["train.py"] = counting
    done = fine(run(models.one, runs, *flags, "--compile", "true", recipe=recipe, plant=plant, steps=1))
    return json.loads(done.out.splitlines()[-1]).get("unique_graphs", 0)


@pytest.mark.parametrize("recipe, ratio", [("tiny-llm", "text=1"), ("tiny-joint", "text2image=1")])
def test_compiling_compiles_with_checkpointing_too(recipe, ratio, models, tmp_path):
    def flags(checkpointing):
        return ("--ratio", ratio, "--checkpointing", checkpointing)
    plain = compiled(models, tmp_path / "plain", *flags("false"), recipe=recipe)
    both = compiled(models, tmp_path / "both", *flags("true"), recipe=recipe)
    assert both >= plain > 0
    fine(run(models.one, tmp_path / "none", *flags("false"), recipe=recipe, steps=1))
    loss = {name: log(tmp_path / name / recipe)[-1]["loss"] for name in ("none", "plain", "both")}
    assert loss["plain"] == pytest.approx(loss["none"], abs=1e-4)
    assert loss["both"] == pytest.approx(loss["none"], abs=1e-4)


def test_the_vae_is_compiled(models, tmp_path):
    flags = ("--batch", 1, "--micro-batch", 1)
    assert compiled(models, tmp_path / "a", *flags, recipe="tiny-vae") > 0
