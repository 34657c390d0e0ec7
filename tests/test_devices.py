import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from harmonkit.devices import any_rank, barrier, choose_device, choose_dtype, rank_and_world_size

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_the_processes_of_torchrun(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert rank_and_world_size() == (0, 1)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert rank_and_world_size() == (2, 3)


def test_without_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device() == choose_device("cpu") == CPU
    with pytest.raises(ValueError, match="--device cuda: torch finds no CUDA device here"):
        choose_device("cuda")
    with pytest.raises(ValueError, match="--device nowhere: "):
        choose_device("nowhere")


def test_each_process_gets_its_own_gpu(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert choose_device() == CUDA
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert choose_device("cuda") == torch.device("cuda", 3)
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    assert choose_device("cpu") == CPU
    assert chosen == [CUDA, torch.device("cuda", 3), torch.device("cuda", 1)]


@pytest.mark.parametrize("multiplies, dtype", [(True, torch.bfloat16), (False, torch.float32)])
def test_the_dtype_of_auto(tmp_path, monkeypatch, multiplies, dtype):
    """float32 for a small model on a CPU; for a large one if the CPU has no products of bfloat16."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: multiplies)
    assert choose_dtype("harmon-tiny", CPU) == torch.float32
    assert choose_dtype("harmon-tiny", CUDA) == torch.bfloat16
    for name, size in (("large.pth", 2 * 10 ** 9), ("small.pth", 10 ** 8)):
        with open(tmp_path / name, "wb") as file:
            file.truncate(size)                                             # sparse
    assert choose_dtype(tmp_path / "small.pth", CPU) == torch.float32
    assert choose_dtype(tmp_path / "large.pth", CPU) == dtype
    for shard in ("model-1.safetensors", "model-2.safetensors"):
        with open(tmp_path / shard, "wb") as file:
            file.truncate(6 * 10 ** 8)
    assert choose_dtype(tmp_path, CPU) == dtype, "a folder counts with all its shards"


def test_the_dtype_of_auto_finds_every_form_of_path(tmp_path, monkeypatch):
    """With ~, with a slash behind, and folders of pytorch_model.bin."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "folder").mkdir()
    with open(tmp_path / "folder" / "pytorch_model.bin", "wb") as file:
        file.truncate(2 * 10 ** 9)                                          # sparse
    for path in ("~/folder", "~/folder/", f"{tmp_path}/folder/", tmp_path / "folder"):
        assert choose_dtype(path, CPU) == torch.bfloat16
    with pytest.raises(FileNotFoundError, match="~/none: no such file or folder"):
        choose_dtype("~/none", CPU)


def test_a_torch_without_onednn_computes_in_float32(tmp_path, monkeypatch):
    """Such a build has no function to ask for products of bfloat16."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    with open(tmp_path / "large.pth", "wb") as file:
        file.truncate(2 * 10 ** 9)                                          # sparse
    assert choose_dtype(tmp_path / "large.pth", CPU) == torch.float32


def test_one_process_needs_no_group():
    barrier()
    assert any_rank(True, CPU) is True and any_rank(False, CPU) is False


def test_a_flag_of_one_process_is_seen_by_all(tmp_path):
    code = f"""
import os, sys, time
import torch
import torch.distributed as dist
from harmonkit.devices import any_rank, barrier

rank = 1 if os.fork() == 0 else 0
dist.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=rank, world_size=2)
flags = [any_rank(flag, torch.device("cpu")) for flag in (rank == 0, rank == 1, True, False)]
if rank == 0:
    time.sleep(0.5)
    open("{tmp_path}/late", "w").close()
barrier()
flags.append(os.path.exists("{tmp_path}/late"))
os.write(1, f"{{flags}}\\n".encode())
dist.destroy_process_group()
if rank == 0:
    os.wait()
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.stdout.splitlines() == ["[True, True, True, False, True]"] * 2, run.stderr
