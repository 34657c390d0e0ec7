"""Shared by the tests of training: a very small model and a short recipe of the shapes world."""
import json
from dataclasses import replace

import pytest
import torch
from conftest import SMALL

import train
from harmon import HarmonConfig
from harmonkit.shapes_world.world import LABELS
from harmonkit.training import runs
from harmonkit.training.recipes import Recipe, TinyRecipe, change

ALL = {"mar-decoder": 1e-3, "mar-encoder": 1e-3, "llm": 1e-3}
SHORT = Recipe(
    ratio={"text2image": 2, "image2text": 1, "text": 1}, lr=ALL, steps=6, batch=8, micro_batch=2, size=64,
    save_every=3, sample_every=0, warmup=0.3, checkpointing=False, ema=0.9, from_scratch="harmon-tiny",
    tiny=TinyRecipe(scenes=20))
SMALL_64 = replace(SMALL, mar=replace(SMALL.mar, img_size=64, dropout=0.1, class_num=LABELS))


@pytest.fixture(scope="module")
def small_world(tokenizer):
    """harmon-tiny is SMALL_64, and its tokenizer is trained once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HarmonConfig, "from_name", classmethod(lambda cls, name: SMALL_64))
        patch.setattr(runs, "train_tokenizer", lambda vocab_size: tokenizer)
        yield


@pytest.fixture(scope="module")
def uninterrupted(small_world, tmp_path_factory):
    """The last checkpoint of SHORT, run without a stop."""
    return run(SHORT, tmp_path_factory.mktemp("uninterrupted"))


def options(runs, *flags):
    return train.arguments(["tiny-joint", "--device", "cpu", "--runs", str(runs), *map(str, flags)])


def run(recipe, runs, *flags, name="test", stop_at=None, **changes):
    """Train `recipe`, with changes, in runs/name; returns the content of the last checkpoint."""
    path = train.train(name, change(recipe, **changes), options(runs, *flags), stop_at)
    return torch.load(path, weights_only=True)


def equal(a, b):
    """Whether two state dicts hold the same bits."""
    return all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def log(runs, name="test"):
    """The lines of a run's log."""
    return [json.loads(line) for line in open(runs / name / "log.jsonl")]
