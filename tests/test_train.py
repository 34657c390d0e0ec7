"""The training loop: exact, the same on many processes, and hard to kill."""
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, shake
from training_helpers import (  # noqa: F401
    SHORT,
    SMALL_64,
    equal,
    log,
    options,
    run,
    small_world,
    uninterrupted,
)

import train
from harmon import Harmon
from harmonkit.data.mixture import MixtureDataset, loss_arguments
from harmonkit.training.checkpoint_files import checkpoints_of, last_checkpoint
from harmonkit.training.losses import Losses
from harmonkit.training.monitor import Monitor
from harmonkit.training.recipes import RECIPES, change
from harmonkit.training.runs import shapes_source, with_latents

pytestmark = pytest.mark.usefixtures("small_world")

# Clipping is active in some steps only: with all gradients clipped, their scale would not matter.
PLAIN = change(SHORT, ratio={"text2image": 1, "image2text": 1}, steps=3, batch=4, bf16=False, warmup=0.6,
               clip=5.0, ema=0.2, grad_scale=0.3)


@pytest.fixture(scope="module")
def model_folder(tokenizer, tmp_path_factory):
    """A model with random weights everywhere: nothing that starts at zero hides a mistake."""
    model = shake(Harmon(SMALL_64))
    model.tokenizer = tokenizer
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder


# ---- the loop against plain lines --------------------------------------------------------------------------

def plain_loop(model, recipe, args):
    """Three steps of two micro-batches -> the EMA of the model's weights and the norms of the gradients."""
    model.train()
    model.grad_scale = 0.3
    sources = with_latents(model, [shapes_source(task, recipe) for task in recipe.ratio], recipe, args)
    dataset = MixtureDataset(sources, recipe.ratio, 2, 64, 0)
    weights = {n: p.requires_grad_(not n.startswith("vae.")) for n, p in model.named_parameters()}
    weights = {n: p for n, p in weights.items() if p.requires_grad}
    ema = {n: p.detach().clone() for n, p in weights.items()}
    decayed = [p for n, p in weights.items() if p.ndim > 1 and ".diffloss." not in n]
    others = [p for n, p in weights.items() if p.ndim <= 1 or ".diffloss." in n]
    groups = [{"params": decayed, "weight_decay": 0.02}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    norms = []
    for step in range(3):
        for i in (2 * step, 2 * step + 1):
            batch = dataset[i]
            inputs = loss_arguments(model, batch)
            torch.manual_seed(train.seed_of(0, i))
            loss = Losses(model, recipe)(batch["task"], inputs)
            (loss / 2).backward()
        gradients = [p.grad for p in weights.values() if p.grad is not None]
        norms.append(sum(g.square().sum() for g in gradients).sqrt().item())
        for g in gradients:
            g.mul_(min(1.0, 5.0 / norms[-1]))
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 1.8) * 0.5 * (1 + math.cos(math.pi * step / 3))
        optimizer.step()
        optimizer.zero_grad()
        decay = min(0.2, (step + 1) / (step + 10))
        for n, p in weights.items():
            ema[n] = decay * ema[n] + (1 - decay) * p.detach()
    return ema, norms


def close(a, b, atol):
    """Whether two state dicts agree."""
    for name, tensor in a.items():
        # A bias of all keys changes no attention. Its gradient is rounding error, of which Adam makes a step.
        if not name.endswith(("qkv.bias", "k_proj.bias")):
            assert torch.allclose(tensor, b[name], rtol=0, atol=atol), name


def test_three_steps_equal_a_plain_loop(model_folder, tmp_path):
    content = run(PLAIN, tmp_path, "--init", model_folder)
    model = Harmon.from_pretrained(model_folder)
    ema, norms = plain_loop(model, PLAIN, options(tmp_path))
    assert min(norms) < PLAIN.clip < max(norms)
    assert log(tmp_path)[-1]["norm"] == pytest.approx(norms[-1], abs=1e-3)
    close(model.state_dict(), content["model"], atol=1e-6)
    close(ema, content["model_ema"], atol=1e-6)


def test_autocast_changes_a_loss_by_a_rounding_of_bfloat16(model_folder, tmp_path):
    losses = []
    for bf16 in (False, True):
        runs = tmp_path / str(bf16)
        run(PLAIN, runs, "--init", model_folder, bf16=bf16, stop_at=1)
        losses.append(log(runs)[-1]["loss"])
    for task, loss in losses[0].items():                                    # measured: 9e-4 and 1.5e-4
        assert 3e-5 < abs(losses[1][task] / loss - 1) < 3e-3, task


# ---- resuming ----------------------------------------------------------------------------------------------

def test_resume_is_exact(uninterrupted, tmp_path):  # noqa: F811
    run(SHORT, tmp_path, stop_at=3)
    halves = run(SHORT, tmp_path)
    assert halves["step"] == uninterrupted["step"] == 6
    assert equal(uninterrupted["model"], halves["model"])
    assert equal(uninterrupted["model_ema"], halves["model_ema"])


def test_resume_is_exact_with_muon(tmp_path):
    short = change(SHORT, steps=4, batch=4)
    muon = change(short, muon=True)
    whole = run(muon, tmp_path / "a")
    run(muon, tmp_path / "b", stop_at=2)
    assert equal(whole["model"], run(muon, tmp_path / "b")["model"])
    assert not equal(whole["model"], run(short, tmp_path / "c")["model"])


def test_random_draws_depend_on_the_seed_and_the_number():
    seeds = {train.seed_of(seed, number) for seed in range(10) for number in range(100)}
    assert len(seeds) == 1000 and max(seeds) < 2 ** 63
    assert train.seed_of(3, 4) == train.seed_of(3, 4)


# ---- processes and signals ---------------------------------------------------------------------------------

def command(model_folder, runs, *flags, processes=1):
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*start, "train.py", "tiny-joint", "--device", "cpu", "--init", model_folder, "--runs", runs,
            "--scenes", "20", "--batch", "8", "--micro-batch", "2", "--bf16", "false", "--muon", "false",
            *flags]


ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
EIGHT_STEPS = ("--steps", "8", "--save-every", "1")


def in_shell(*args, **kwargs):
    done = subprocess.run(command(*args, **kwargs), cwd=ROOT, capture_output=True, text=True, env=ONE_THREAD)
    assert done.returncode == 0, done.stderr[-2000:]


def last_of(runs):
    return last_checkpoint(runs / "tiny-joint")[1]


@pytest.fixture(scope="module")
def one_process(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    in_shell(model_folder, folder, *EIGHT_STEPS)
    return folder


def test_two_processes_train_as_one_and_resume_exactly(model_folder, one_process, tmp_path):
    in_shell(model_folder, tmp_path, *EIGHT_STEPS, processes=2)
    one, two = last_of(one_process), last_of(tmp_path)
    close(one["model"], two["model"], atol=1e-5)
    for task, loss in log(one_process, "tiny-joint")[-1]["loss"].items():
        assert log(tmp_path, "tiny-joint")[-1]["loss"][task] == pytest.approx(loss, abs=1e-5)
    checkpoints_of(tmp_path / "tiny-joint")[-1].unlink()                    # back to step 7
    in_shell(model_folder, tmp_path, *EIGHT_STEPS, processes=2)
    assert equal(two["model"], last_of(tmp_path)["model"])


def test_killed_at_any_moment(model_folder, one_process, tmp_path):
    """kill -9, also while a checkpoint is written: checkpoints are whole and the weights the same."""
    folder = tmp_path / "tiny-joint"
    for saved in (2, 5):
        process = subprocess.Popen(command(model_folder, tmp_path, *EIGHT_STEPS), cwd=ROOT, env=ONE_THREAD,
                                   stderr=subprocess.DEVNULL)
        while process.poll() is None and not (folder / f"step-{saved:06d}.pt").exists():
            time.sleep(0.002)
        process.kill()
        process.wait()
    in_shell(model_folder, tmp_path, *EIGHT_STEPS)
    assert equal(last_of(one_process)["model"], last_of(tmp_path)["model"])
    assert equal(last_of(one_process)["model_ema"], last_of(tmp_path)["model_ema"])


def test_ctrl_c_saves(model_folder, tmp_path):
    flags = ("--steps", "100000", "--save-every", "100000", "--workers", "1")
    process = subprocess.Popen(command(model_folder, tmp_path, *flags), cwd=ROOT, env=ONE_THREAD, text=True,
                               stderr=subprocess.PIPE, start_new_session=True)
    file = tmp_path / "tiny-joint" / "log.jsonl"
    while not file.exists() or not file.stat().st_size:
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)                                   # to all, as a terminal does
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130, errors
    assert "stopped and saved at step" in errors and "Traceback" not in errors
    assert last_of(tmp_path)["step"] >= 25


def test_sigterm_saves_after_the_step(uninterrupted, tmp_path, monkeypatch):  # noqa: F811
    step = Monitor.step

    def terminated(self, number, *args, **kwargs):
        step(self, number, *args, **kwargs)
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(Monitor, "step", terminated)
    with pytest.raises(SystemExit, match="130"):
        run(SHORT, tmp_path)
    assert [path.name for path in checkpoints_of(tmp_path / "test")] == ["step-000002.pt"]
    monkeypatch.undo()
    assert equal(uninterrupted["model"], run(SHORT, tmp_path)["model"])


# ---- trained parts, skipped steps --------------------------------------------------------------------------

def test_stage_1_leaves_the_llm_bit_identical(model_folder, tmp_path):
    stage1 = RECIPES["stage1"]
    content = run(SHORT, tmp_path, "--init", model_folder, ratio=stage1.ratio, lr=stage1.lr, steps=1, batch=6)
    before = Harmon.from_pretrained(model_folder).state_dict()
    after = content["model"]
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"mar", "proj_in", "proj_out"}


def test_steps_without_a_finite_gradient_are_skipped_and_ten_end_the_run(
        tmp_path, monkeypatch):
    forward, calls, bad = Losses.forward, [], {2, 3}

    def sometimes(self, task, inputs):
        calls.append(task)
        factor = float("nan") if len(calls) in bad else 1
        return forward(self, task, inputs) * factor
    monkeypatch.setattr(Losses, "forward", sometimes)
    recipe = change(SHORT, ratio={"text": 1}, batch=2, steps=8)
    content = run(recipe, tmp_path / "a")
    assert log(tmp_path / "a")[-1]["skipped"] == 2
    for kind in ("model", "model_ema"):
        assert all(tensor.isfinite().all() for tensor in content[kind].values())
    bad = range(1000)
    with pytest.raises(ValueError, match="step 10: ten steps in a row"):
        run(recipe, tmp_path / "b", steps=20)


# ---- the command line --------------------------------------------------------------------------------------

def main(monkeypatch, *flags):
    monkeypatch.setattr("sys.argv", ["train.py", *map(str, flags), "--device", "cpu"])
    train.main()


def test_the_chain_hands_on_its_weights_and_exports_the_last(tmp_path, monkeypatch, capsys):
    flags = ("tiny", "--runs", tmp_path, "--steps", 1, "--batch", 2, "--micro-batch", 1, "--scenes", 20,
             "--compile", "false", "--export", tmp_path / "model")
    main(monkeypatch, *flags)
    assert capsys.readouterr().out.strip() == str(tmp_path / "model")
    exported = Harmon.from_pretrained(tmp_path / "model")
    last = last_checkpoint(tmp_path / "tiny-reca")[1]
    for name, tensor in exported.state_dict().items():
        assert torch.equal(tensor, last["model_ema"][name].half().float()), name
    vae = last_checkpoint(tmp_path / "tiny-vae")[1]
    assert exported.config.vae_scale == vae["config"]["vae_scale"] != SMALL_64.vae_scale
    name = "vae.decoder.conv_in.weight"
    assert torch.equal(last["model"][name], vae["model_ema"][name])
    main(monkeypatch, *flags)
    assert capsys.readouterr().err.count("finished, 1 steps") == 6


@pytest.mark.parametrize("flags, message", [
    (("--checkpointing", "yes"), "neither true nor false"),
    (("--save-every", "0"), "--save-every is 0; expected a whole number"),
    (("--device", "tpu9"), "--device tpu9"),
    (("--plot",), "has the run begun"),
    (("--only", "vae"), "tiny-llm trains llm"),
])
def test_wrong_flags_are_named(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train.py", "tiny", "--runs", str(tmp_path), *flags])
    with pytest.raises(SystemExit, match="2"):
        train.main()
    assert message in capsys.readouterr().err


def test_a_dry_run_trains_nothing(tmp_path, monkeypatch, capsys):
    main(monkeypatch, "tiny-joint", "--runs", tmp_path, "--dry-run")
    assert "tiny-joint" in capsys.readouterr().out and not list(tmp_path.iterdir())
