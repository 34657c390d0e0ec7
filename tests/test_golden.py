"""Against recorded outputs of the original implementation."""
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from harmon import Harmon, HarmonConfig


def test_every_component_equals_the_original():
    run = subprocess.run([sys.executable, "tests/golden/check.py", "tests/golden/tiny.safetensors"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("ok  ") == 25 and "0 failed" in run.stdout


@pytest.mark.parametrize("name", ["harmon-0.5b", "harmon-1.5b"])
def test_parameter_names_and_shapes_are_the_official_ones(name):
    with torch.device("meta"):
        model = Harmon(HarmonConfig.from_name(name))
    official = json.loads((ROOT / f"tests/golden/keys-{name}.json").read_text())
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == official
