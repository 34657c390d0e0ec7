"""The benchmark counts what is computed, times what is run, and leaves the model as it was."""
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL
from torch.nn.attention import SDPBackend, sdpa_kernel

from harmonkit.fast import accelerate
from harmonkit.scripts import benchmark

PARTS = ["encoder", "LLM", "decoder", "head", "VAE decoder"]


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch):
    monkeypatch.setattr(benchmark, "find_config", lambda model: SMALL)


def settings(**changes):
    values = dict(model="small", size=None, steps=3, images=2, repeat=1, count=False, mode="eager",
                  dtype="float32", device=torch.device("cpu"), variants=["plain"])
    return SimpleNamespace(**values | changes)


# ---- counting ----------------------------------------------------------------------------------------

def linear(rows, *widths):
    """FLOP of linear layers between these widths."""
    return sum(2 * rows * a * b for a, b in zip(widths, widths[1:]))


def attention(rows, L, S, width):
    return 2 * 2 * rows * L * S * width


def vit_block(rows, L, D):
    projections = linear(rows * L, D, 3 * D) + linear(rows * L, D, D)
    return projections + attention(rows, L, L, D) + linear(rows * L, D, 4 * D, D)


def test_the_arithmetic_by_hand():
    """Two images of 16 tokens in 3 steps: 16, 13 and 8 are masked before them, so 0, 3 and 8 are visible."""
    rows = dict(benchmark.draw_rows(settings(count=True)))
    assert list(rows) == ["text to image", *PARTS]
    counted = {name: round(row["GFLOP"] * 1e9) for name, row in rows.items()}
    mar, llm = SMALL.mar, SMALL.llm
    D, H, C, W, n = mar.embed_dim, llm.hidden_size, mar.token_dim, mar.head_width, mar.buffer_size
    visible = (0, 3, 8)

    assert counted["encoder"] == sum(
        linear(2 * 16, C, D) + mar.encoder_depth * vit_block(2, n + V, D) for V in visible)
    assert counted["decoder"] == sum(
        linear(4 * (n + V), D, D) + mar.decoder_depth * vit_block(4, n + 16, D) for V in visible)

    def layer(L, S):
        kv = llm.num_key_value_heads * H // llm.num_attention_heads
        projections = linear(4 * L, H, H) + 2 * linear(4 * L, H, kv) + linear(4 * L, H, H)
        return projections + attention(4, L, S, H) + 3 * linear(4 * L, H, llm.intermediate_size)
    assert counted["LLM"] == llm.num_hidden_layers * (
        layer(16, 16) + sum(layer(V + n, 16 + V + n) for V in visible))     # prompts of 16 tokens, once

    # Each of 2 · 16 tokens is drawn once, with guidance. Time and condition are embedded once a step.
    block = linear(1, W, 3 * W) + linear(1, W, W, W)
    once = linear(1, D, W)
    each_step = linear(1, C, W) + mar.head_depth * block + linear(1, W, 2 * W) + linear(1, W, 2 * C)
    S = mar.diffusion_steps
    assert counted["head"] == 4 * 16 * (once + S * each_step) + 3 * S * linear(1, 256, W, W)
    assert counted["text to image"] == sum(counted[part] for part in PARTS)


def test_the_meta_device_counts_what_the_cpu_computes(small):
    args = settings(images=1, steps=2)

    def counted(model):
        return benchmark.by_part(benchmark.count, model, lambda: benchmark.draw(model, args))
    on_meta = counted(benchmark.make_model(args, "meta"))
    with sdpa_kernel(SDPBackend.MATH):                      # whose products FlopCounterMode counts
        assert counted(small) == on_meta


# ---- timing ------------------------------------------------------------------------------------------

def test_parts_are_timed_and_released(small):
    whole, seconds = benchmark.clock(
        lambda: benchmark.by_part(benchmark.clock, small, lambda: benchmark.draw(small, settings())))
    assert list(seconds) == PARTS and all(number > 0 for number in seconds.values())
    assert sum(seconds.values()) < whole
    for owner in (small.mar, small.llm, small.mar.diffloss, small.vae):
        assert not {"encode", "forward", "decode", "sample"} & set(vars(owner))


def test_calls_of_a_part_add_up(monkeypatch, small):
    """With a clock that says 1 the sums are the numbers of calls: K, for the LLM one more, the prompt, and
    for the VAE one for each image.
    """
    calls = benchmark.by_part(lambda run: (1, run()), small, lambda: benchmark.draw(small, settings()))
    assert calls == {"encoder": 3, "LLM": 4, "decoder": 3, "head": 3, "VAE decoder": settings().images}


def test_the_median_leaves_out_the_warm_up(monkeypatch):
    times = iter([0, 50, 50, 51, 51, 54])                   # runs of 50, 1 and 3 seconds after the warm-up
    monkeypatch.setattr(benchmark, "timer", lambda: next(times))
    runs = []
    assert benchmark.seconds(lambda: runs.append(1), 3) == 3 and len(runs) == 4


def test_drawing_is_timed_in_the_mode(monkeypatch):
    modes = []

    def spy(model, mode):
        modes.append(mode)
        return accelerate(model, mode)
    monkeypatch.setattr(benchmark.fast, "accelerate", spy)
    rows = dict(benchmark.draw_rows(settings(dtype="bfloat16", mode="packed")))
    assert modes == ["packed"] and all(row["seconds"] > 0 for row in rows.values())
    assert rows["text to image"]["seconds"] > max(rows[part]["seconds"] for part in PARTS)


def test_a_token_is_the_difference_of_two_answers(monkeypatch):
    """Each run takes as many seconds as it generates tokens, and 10 more for what comes before them."""
    def seconds(run, repeat):
        answer = run()
        return 10 + (len(answer) if isinstance(answer, list) else answer.shape[1])
    monkeypatch.setattr(benchmark, "seconds", seconds)
    rows = dict(benchmark.answer_rows(settings()))
    assert list(rows) == ["image to text: prefill", "image to text: a token", "a token in transformers"]
    assert [row["seconds"] for row in rows.values()] == [11, 1, 1]
    weights = sum(p.numel() for p in benchmark.make_model(settings(), "cpu").llm.parameters()) * 4
    assert rows["image to text: a token"]["GB"] == rows["a token in transformers"]["GB"] == weights / 1e9


def test_transformers_has_the_same_sizes(small):
    ours = {name: p.shape for name, p in small.llm.named_parameters()}
    theirs = benchmark.transformers_llm(small)
    assert {name: p.shape for name, p in theirs.named_parameters()} == ours and theirs.dtype == small.dtype


# ---- training ----------------------------------------------------------------------------------------

def test_training_steps_change_the_weights(monkeypatch):
    """Every variant takes real steps on latents or pixels, with the recipe's micro-batch of 4."""
    models, tasks = [], []

    def spy(args, device):
        models.append(make_model(args, device))
        return models[-1]
    make_model = benchmark.make_model
    monkeypatch.setattr(benchmark, "make_model", spy)
    loss_of = benchmark.losses.Losses.forward
    monkeypatch.setattr(benchmark.losses.Losses, "forward", lambda self, task, inputs: (
        tasks.append((task, *inputs)) or loss_of(self, task, inputs)))
    variants = ["pixels", "checkpointing"]
    torch.manual_seed(0)
    rows = dict(benchmark.train_rows(settings(size=32, variants=variants)))
    assert list(rows) == [f"training step, {variant}" for variant in variants]
    for row in rows.values():
        assert row["samples/s"] == pytest.approx(4 / row["seconds"]) and row["peak GB"] > 0.1
    inputs = {task[-1] for task in tasks}
    assert {task[0] for task in tasks} == {"text2image"} and len(tasks) == 4
    assert inputs == {"latents", "pixels"}
    torch.manual_seed(0)
    before = make_model(settings(), "cpu")
    trained = models[0]
    assert not torch.equal(before.mar.z_proj.weight, trained.mar.z_proj.weight)
    assert torch.equal(before.vae.encoder.conv_in.weight, trained.vae.encoder.conv_in.weight)
    is_wrapped = ["forward" in vars(model.mar.encoder_blocks[0]) for model in models]
    assert is_wrapped == [False, True]


# ---- the command -------------------------------------------------------------------------------------

def test_the_table(monkeypatch, tmp_path, capsys):
    """A machine of 2 GFLOP/s and 4 GB/s: the floor of 3 GFLOP is 1.5 s, that of 1 GB 0.25 s."""
    monkeypatch.setattr(benchmark, "machine_rates", lambda *_: {"GFLOP/s": 2.0, "GB/s": 4.0})
    monkeypatch.setattr(benchmark, "draw_rows", lambda args: [("a", {"GFLOP": 3.0, "seconds": 6.0})])
    monkeypatch.setattr(benchmark, "answer_rows", lambda args: [("b", {"GB": 1.0, "seconds": 0.5})])
    monkeypatch.setattr(benchmark, "train_rows", lambda args: [("c", {"seconds": 2.0, "samples/s": 2.0})])
    benchmark.main(["--what", "draw", "answer", "train", "--out", str(tmp_path / "rows.json")])
    content = json.loads((tmp_path / "rows.json").read_text())
    assert content["rows"] == {
        "a": {"GFLOP": 3.0, "seconds": 6.0, "floor": 1.5, "times the floor": 4.0},
        "b": {"GB": 1.0, "seconds": 0.5, "floor": 0.25, "times the floor": 2.0},
        "c": {"seconds": 2.0, "samples/s": 2.0}}
    assert content["about"]["GFLOP/s"] == 2.0 and content["about"]["torch"] == torch.__version__
    assert "a: GFLOP 3, seconds 6, floor 1.5, times the floor 4\n" in capsys.readouterr().out


def test_rates_are_work_over_time(monkeypatch):
    """If every run takes 2 seconds: 2 · 4096³ FLOP and 2³⁰ bytes in 2 seconds."""
    monkeypatch.setattr(benchmark, "seconds", lambda run, repeat: 2.0)
    rates = benchmark.machine_rates(torch.device("cpu"), torch.float32, 1)
    assert rates["GFLOP/s"] == 68.7 and rates["GB/s"] == 0.5


def test_count_computes_nothing(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "machine_rates", None)
    monkeypatch.setattr(benchmark.fast, "accelerate", None)
    benchmark.main(["--count", "--what", "answer", "--steps", "1"])
    rows = [line.split(": ") for line in capsys.readouterr().out.splitlines()[1:-1]]
    assert [name for name, _ in rows] == ["text to image", *PARTS]
    assert all(numbers.startswith("GFLOP ") and "," not in numbers for _, numbers in rows)


@pytest.mark.parametrize("flags, message", [
    (("--steps", "0"), "must be at least 1"), (("--device", "nowhere"), "--device nowhere"),
    (("--count", "--size", "33"), "size 33x33 is not possible")])
def test_wrong_flags(flags, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        benchmark.main([*flags])
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
