import copy
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SMALL

from harmonkit.scripts import benchmark
import train
from harmonkit.fast import accelerate


def test_the_parts_are_counted_where_they_run(small):
    rows = benchmark.drawing(small, SimpleNamespace(size=None, steps=3, images=2, repeat=1, count=False, mode="eager"))
    by_name = {row["what"].strip(): row for row in rows}
    assert list(by_name) == ["text to image", "encoder", "LLM", "decoder", "head", "VAE decoder", "the rest"]
    assert all(row["seconds"] > 0 for row in rows)
    m = SMALL.mar
    W, C, S = m.head_width, m.token_dim, m.diffusion_steps
    tokens = 2 * 2 * 16                                              # two images, guidance, each of 16 tokens drawn once
    once = 2 * m.embed_dim * W
    each_step = 2 * C * W + m.head_depth * (2 * 2 * W * W + 2 * W * 3 * W) + 2 * W * 2 * W + 2 * W * 2 * C
    times = 3 * S * (2 * 256 * W + 2 * W * W)
    assert by_name["head"]["flops"] == tokens * (once + S * each_step) + times
    assert by_name["text to image"]["flops"] == sum(row["flops"] for row in rows[1:])
    only_counted = benchmark.drawing(small, SimpleNamespace(size=None, steps=3, images=2, repeat=0, count=True, mode="eager"))
    assert [(row["flops"], row["bytes"]) for row in only_counted] == [(row["flops"], row["bytes"]) for row in rows[:-1]]
    size = lambda module: sum(p.numel() * 4 for p in module.parameters())  # noqa: E731
    net = small.mar.diffloss.net
    looping = size(net.input_proj) + size(net.final_layer.linear) + sum(size(block.in_ln) + size(block.mlp) for block in net.res_blocks)
    assert by_name["head"]["bytes"] == 3 * (size(net) + (S - 1) * looping), "modulations of all steps at once, for so few rows"
    assert not {"encode", "decode"} & set(vars(small.mar)), "the wrappers are taken off again"


def test_attention_is_counted_on_the_cpu_too():
    q = torch.randn(2, 4, 10, 8)
    assert benchmark.flops_of(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q)) == 2 * 2 * (2 * 4 * 10 * 10 * 8)


def test_packed_layers_are_counted_alike(small):
    model, args = copy.deepcopy(small).bfloat16(), SimpleNamespace(size=None, steps=2, images=1, repeat=1, count=False, mode="packed")
    plain = benchmark.drawing(model, args)
    packed = benchmark.drawing(accelerate(model, "packed"), args)
    assert [row["flops"] for row in packed] == [row["flops"] for row in plain]


def test_answers(small):
    args = SimpleNamespace(size=None, repeat=1, tokens=4)
    rows = benchmark.answering(small, args)
    assert [row["what"][:14] for row in rows] == ["image to text:", "image to text:", "  the same LLM"]
    assert rows[1]["bytes"] == sum(p.numel() * 4 for p in small.llm.parameters())


def test_training_steps_are_timed_and_the_model_is_left_bare(small):
    model = copy.deepcopy(small)
    before = [p.clone() for p in model.parameters()]
    args = SimpleNamespace(size=None, repeat=1, batch=2, variants=["plain", "pixels", "checkpointing"])
    plain, pixels, checkpointing = benchmark.training(model, args)
    assert plain["flops"] == checkpointing["flops"] < pixels["flops"], "cached latents save the VAE, and recomputation is not the model's arithmetic"
    assert all(row["samples/s"] == pytest.approx(40 / row["seconds"]) for row in (plain, pixels, checkpointing)), "1 + 3 + 16 micro-batches"
    assert any(not torch.equal(p, q) for p, q in zip(before, model.parameters())), "these are real steps"
    assert not any("forward" in vars(block) for block in train.blocks_of(model))


@pytest.mark.parametrize("flags, message", [(("--steps", "0"), "at least 1"), (("--dtype", "int8"), "--dtype must be one of")])
def test_wrong_flags(flags, message):
    done = subprocess.run([sys.executable, "benchmark.py", *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_from_the_command_line(tmp_path):
    done = subprocess.run([sys.executable, "benchmark.py", "--model", "harmon-tiny", "--steps", "2", "--repeat", "1", "--what", "draw", "train", "--batch", "1", "--variants", "plain",
                           "--out", tmp_path / "rows.json"], cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "2"})
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "rows.json").read_text())
    assert content["about"]["model"] == "harmon-tiny" and content["about"]["GFLOP/s"] > 1
    assert len(content["rows"]) == 8 and all(row["seconds"] > row["floor"] for row in content["rows"][:1])
