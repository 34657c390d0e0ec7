"""Which device and number format a command runs on, and the processes of torchrun."""
import os

import torch
import torch.distributed as dist

from harmonkit.checkpoints import find_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def rank_and_world_size() -> tuple:
    """This process's number and how many there are, from torchrun's environment; (0, 1) without torchrun."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def choose_device(name=None) -> torch.device:
    """The device of a `--device` flag; default: CUDA if there is one. Under torchrun each process gets its
    own GPU.

    Raises ValueError for an unknown device, or for CUDA where there is none.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"--device {name}: torch finds no CUDA device here")
        index = int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    return device


def choose_dtype(path, device) -> torch.dtype:
    """The dtype of `--dtype auto`: bfloat16; float32 on CPUs for models below 1 GB or without AVX-512."""
    if device.type != "cpu":
        return torch.bfloat16
    path = find_model(path)
    files = path.glob("*.safetensors") if path.is_dir() else [path]
    is_small = sum(file.stat().st_size for file in files) < 10 ** 9
    has_bfloat16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if has_bfloat16 and not is_small else torch.float32


def barrier():
    """Wait for all processes; nothing to wait for without torchrun."""
    if dist.is_initialized():
        dist.barrier()


def any_rank(flag: bool, device) -> bool:
    """Whether the flag is set in any process."""
    if not dist.is_initialized():
        return flag
    flag = torch.tensor(float(flag), device=device)
    dist.all_reduce(flag)
    return flag.item() > 0
