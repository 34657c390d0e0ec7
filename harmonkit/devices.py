"""Which device and number format a command runs on, and the processes of torchrun."""
import os
import sys
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from harmonkit.weight_files import find_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

LONGEST_WAIT = timedelta(days=1)                    # of one process for the others, that may draw for hours

SHORT_NAMES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32"}


def as_dtype(dtype) -> torch.dtype:
    """torch.bfloat16, its name, "bf16", np.float32, … -> a torch.dtype. Raises ValueError."""
    name = getattr(dtype, "__name__", str(dtype)).removeprefix("torch.")
    found = getattr(torch, SHORT_NAMES.get(name, name), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point or found.itemsize < 2:
        raise ValueError(f"dtype is {dtype!r}; known: {', '.join(DTYPES)}")
    return found


def as_device(device) -> torch.device:
    """A name like "cuda:1", a GPU's index, … -> a torch.device. Raises ValueError for others."""
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device {device}: {str(error).splitlines()[0]}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device}: torch finds no CUDA device here")
    return device


def rank_and_world_size() -> tuple:
    """This process's number and how many there are, from torchrun's environment; (0, 1) without torchrun."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def choose_device(name=None) -> torch.device:
    """The device of a `--device` flag; default: CUDA if there is one. Under torchrun each process gets its
    own GPU.

    Raises ValueError for an unknown device, or for CUDA where there is none.
    """
    try:
        device = as_device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except ValueError as error:
        raise ValueError(f"--{error}") from None
    if device.type == "cuda":
        index = int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    return device


def choose_dtype(path, device, num_bytes=None) -> torch.dtype:
    """The dtype of `--dtype auto`: bfloat16; float32 on CPUs for models below 1 GB or without AVX-512.

    num_bytes: of the weights; default the size of the files, which may hold more than the weights.
    """
    if device.type != "cpu":
        return torch.bfloat16
    if num_bytes is None:
        path = find_model(path)
        files = [*path.glob("*.safetensors"), *path.glob("pytorch_model*.bin")] if path.is_dir() else [path]
        num_bytes = sum(file.stat().st_size for file in files)
    is_small = num_bytes < 10 ** 9
    has_bfloat16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if has_bfloat16 and not is_small else torch.float32


def barrier():
    """Wait for all processes; nothing to wait for without torchrun."""
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def connected():
    """In this block the processes of torchrun can talk to each other. It changes nothing where they already
    can, or where there is one process, or no address.
    """
    alone = rank_and_world_size()[1] == 1 or "MASTER_ADDR" not in os.environ
    if alone or dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", timeout=LONGEST_WAIT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def from_first_process(compute):
    """compute() of process 0, in all processes of torchrun. If it raises ValueError, the others exit with
    status 2, so that one of them says why.

    None where several processes have no address to reach each other, as without torchrun.
    """
    rank, world_size = rank_and_world_size()
    if world_size == 1:
        return compute()
    if "MASTER_ADDR" not in os.environ:
        return None
    answer, error = None, None
    if rank == 0:
        try:
            answer = compute()
        except ValueError as raised:
            error = raised
    box = [answer, error is not None]
    with connected():
        dist.broadcast_object_list(box)
    if error is not None:
        raise error
    answer, has_failed = box
    if has_failed:
        sys.exit(2)
    return answer


def any_rank(flag: bool, device) -> bool:
    """Whether the flag is set in any process."""
    if not dist.is_initialized():
        return flag
    flag = torch.tensor(float(flag), device=device)
    dist.all_reduce(flag)
    return flag.item() > 0
