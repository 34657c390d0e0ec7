import signal

import pytest
import torch
from conftest import SMALL, shake
from training_helpers import (  # noqa: F401
    ALL,
    SHORT,
    SMALL_64,
    equal,
    options,
    run,
    small_world,
    uninterrupted,
)

import train
from harmon import Harmon
from harmonkit import checkpoints, mar_files
from harmonkit.shapes_world.tokenizer import train_tokenizer
from harmonkit.shapes_world.world import class_names
from harmonkit.tokenizer import load_tokenizer
from harmonkit.training import runs
from harmonkit.training.recipes import RECIPES, change
from harmonkit.training.runs import EMA, checkpoints_of, first_model, model_from_checkpoint

pytestmark = pytest.mark.usefixtures("small_world")
TEXT = change(SHORT, ratio={"text": 1}, lr={"llm": 1e-3}, batch=2, steps=4)        # the quickest


# ---- checkpoints -------------------------------------------------------------------------------------------

def test_a_broken_checkpoint_falls_back_to_the_one_before(uninterrupted, tmp_path, capsys):  # noqa: F811
    run(SHORT, tmp_path)
    last = checkpoints_of(tmp_path / "test")[-1]
    last.write_bytes(last.read_bytes()[:5000])
    again = run(SHORT, tmp_path)
    assert "step-000006.pt cannot be read, going back" in capsys.readouterr().err
    assert equal(uninterrupted["model"], again["model"])


def test_the_newest_two_are_kept(tmp_path):
    run(TEXT, tmp_path, save_every=1)
    assert [path.name for path in checkpoints_of(tmp_path / "test")] == ["step-000003.pt", "step-000004.pt"]


def test_a_full_disk_ends_the_run_and_loses_nothing_saved(uninterrupted, tmp_path, monkeypatch):  # noqa: F811
    write, written = torch.save, []

    def nearly_full(content, path):
        write(content, path)
        written.append(path)
        if len(written) > 1:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 712960 vs 712848")
    monkeypatch.setattr(torch, "save", nearly_full)                         # torch's message of a full disk
    message = "the checkpoint of step 4 could not be written .*is the disk full.* last one is .*step-000002"
    with pytest.raises(OSError, match=message):
        run(SHORT, tmp_path, save_every=2)
    monkeypatch.undo()
    left = [path.name for path in (tmp_path / "test").glob("*step*")]
    assert left == ["step-000002.pt"], "nothing half-written"
    assert equal(uninterrupted["model"], run(SHORT, tmp_path, save_every=2)["model"])


@pytest.mark.parametrize("content", [{"step": 3}, {"step": 3, "format": runs.FORMAT + 1}])
def test_a_checkpoint_of_another_format_is_refused(tmp_path, content):
    (tmp_path / "test").mkdir()
    torch.save(content, tmp_path / "test" / "step-000003.pt")
    message = "step-000003.pt: its format is (None|2), this train.py reads 1.* head .*--export .*--init "
    with pytest.raises(ValueError, match=message):
        run(SHORT, tmp_path)
    with pytest.raises(ValueError, match=message):
        train.train("next", change(SHORT, after="test"), options(tmp_path))


def test_changed_settings_are_named(tmp_path, capsys):
    run(TEXT, tmp_path, stop_at=1)
    run(TEXT, tmp_path, stop_at=2, batch=4, lr={"llm": 2e-3})
    err = capsys.readouterr().err
    assert "batch 2 -> 4" in err and "lr {" in err and "the data come in another order" in err
    content = run(TEXT, tmp_path, stop_at=3, batch=4, lr={"llm": 2e-3}, clip=2.0)
    err = capsys.readouterr().err
    assert "clip 1.0 -> 2.0" in err and "batch" not in err and "another order" not in err
    assert content["optimizer"]["param_groups"][0]["peak"] == 2e-3, "a changed rate is used"
    run(TEXT, tmp_path, batch=4, lr={"llm": 2e-3}, kl=3.0)
    assert "kl 0.01 -> 3.0" in capsys.readouterr().err
    run(TEXT, tmp_path)
    assert "finished, 4 steps; another --runs trains anew" in capsys.readouterr().err
    with pytest.raises(ValueError, match="has trained llm so far; another choice needs another --runs"):
        run(TEXT, tmp_path, lr=ALL, steps=8)


def test_ema():
    p = torch.nn.Parameter(torch.tensor([0.0]))
    ema = EMA({"p": p}, decay=0.15)
    with torch.no_grad():
        p.fill_(1.0)
    ema.update(step=0)
    assert ema.weights["p"].item() == pytest.approx(0.9), "decay 1 / 10"
    with torch.no_grad():
        p.fill_(2.0)
    ema.update(step=1)
    assert ema.weights["p"].item() == pytest.approx(0.15 * 0.9 + 0.85 * 2), "2 / 11 is more than the decay"
    ema.swap()
    assert (p.item(), ema.weights["p"].item()) == pytest.approx((1.835, 2))


def test_the_averaged_weights_are_handed_on(tmp_path):
    content = run(TEXT, tmp_path)
    name = "llm.model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(content["model"][name], content["model_ema"][name])
    args = options(tmp_path)
    for model in (model_from_checkpoint(content), first_model("next", change(SHORT, after="test"), args)):
        assert equal(model.state_dict(), content["model_ema"])
    assert equal(model_from_checkpoint(content, "model").state_dict(), content["model"])


# ---- the start of a new run --------------------------------------------------------------------------------

def test_the_recipe_before_must_have_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="tiny-mar: no checkpoint; tiny-align starts .*must run"):
        train.train("tiny-align", RECIPES["tiny-align"], options(tmp_path))


def test_stage_1_starts_from_three_files(small, tmp_path):
    """A Qwen2.5 folder; MAR's checkpoint with raw and averaged weights; a VAE."""
    small.save_pretrained(tmp_path / "model")
    llm = {key: tensor for key, tensor in small.llm.state_dict().items() if key != "lm_head.weight"}
    checkpoints.write(tmp_path / "qwen" / "model.safetensors", llm)
    average = small.mar.state_dict()
    raw = {key: 0 * tensor for key, tensor in average.items()}
    torch.save({"model_ema": average, "model": raw, "epoch": 799}, tmp_path / "mar.pth")
    torch.save({"model": small.vae.state_dict()}, tmp_path / "kl16.ckpt")
    args = options(tmp_path, "--config", tmp_path / "model", "--init-llm", tmp_path / "qwen",
                   "--init-mar", tmp_path / "mar.pth", "--vae", tmp_path / "kl16.ckpt")
    model = first_model("stage1", RECIPES["stage1"], args)
    assert model.llm.lm_head.weight is model.llm.model.embed_tokens.weight
    state = model.state_dict()
    for key, tensor in small.state_dict().items():
        assert key.startswith("proj") or torch.equal(tensor, state[key]), key
    torch.save(small.state_dict(), tmp_path / "mar.pth")
    with pytest.raises(ValueError, match="mar.pth: a Harmon model"):
        first_model("stage1", RECIPES["stage1"], args)
    with pytest.raises(ValueError, match="stage1 starts from trained weights"):
        first_model("stage1", RECIPES["stage1"], options(tmp_path))


def test_a_run_by_class_exports_its_mar_for_drawing_by_class(tmp_path):
    run(SHORT, tmp_path, name="mar", ratio={"mar": 1}, lr={"mar-decoder": 1e-3}, steps=2, batch=2)
    runs.export(tmp_path / "mar", tmp_path / "model")
    drawing = mar_files.load(tmp_path / "model", dtype="float16")
    harmon = Harmon.from_pretrained(tmp_path / "model", dtype="float16")
    assert equal(drawing.mar.state_dict(), harmon.mar.state_dict())
    assert equal(drawing.vae.state_dict(), harmon.vae.state_dict())
    assert drawing.config.class_names == tuple(class_names())
    run(TEXT, tmp_path, name="text", steps=1)
    runs.export(tmp_path / "text", tmp_path / "other")
    assert not (tmp_path / "other" / "mar").exists()


def test_a_run_keeps_its_own_tokenizer(tmp_path, tokenizer):
    other = shake(Harmon(SMALL_64))
    other.tokenizer = train_tokenizer(300)
    other.save_pretrained(tmp_path / "other")
    run(TEXT, tmp_path, name="first", steps=1)
    run(TEXT, tmp_path, "--init", tmp_path / "other", name="second", steps=1)
    run(TEXT, tmp_path, name="third", steps=1, after="second")
    given = tmp_path / "first" / "tokenizer.json"
    run(TEXT, tmp_path, "--tokenizer", given, name="fourth", steps=1, after="second")
    kept = {name: load_tokenizer(tmp_path / name).to_str() for name in ("first", "second", "third", "fourth")}
    assert kept["first"] == kept["fourth"] == tokenizer.to_str()
    assert kept["second"] == kept["third"] == other.tokenizer.to_str()


def test_latents_of_another_vae_are_refused(tmp_path):
    drawing = change(SHORT, ratio={"text2image": 1}, batch=2, steps=1)
    run(drawing, tmp_path)
    other = shake(Harmon(SMALL_64))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="these latents come from another VAE"):
        run(drawing, tmp_path, "--init", tmp_path / "other", name="second")


def test_the_latent_scale_is_measured_after_the_vaes_training(tmp_path):
    recipe = change(SHORT, ratio={"reconstruct": 1}, lr={"vae": 1e-3}, steps=2, batch=1, micro_batch=1)
    content = run(recipe, tmp_path)
    assert content["config"]["vae_scale"] != SMALL.vae_scale
    model = model_from_checkpoint(content)
    sources = runs.shapes_world(model, change(SHORT, ratio={"mar": 1}), options(tmp_path))
    latents = torch.stack([sources[0].latents.get(i) for i in range(20)])
    assert latents.float().std().item() == pytest.approx(1, abs=0.1)


# ---- signals -----------------------------------------------------------------------------------------------

def test_signals_are_collected_and_the_handlers_restored():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(OSError), runs.collect_signals() as received:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert received == [signal.SIGINT, signal.SIGTERM]
        raise OSError
    assert signal.getsignal(signal.SIGINT) is before
