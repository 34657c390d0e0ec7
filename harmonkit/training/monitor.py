"""Watching a run: progress bar, log.jsonl, TensorBoard where it is installed, samples, a plot of the losses.

A line of log.jsonl is a dictionary: step; loss by task; lr, the schedule's factor; norm of the gradient;
samples_per_s, tokens_per_s; wait, the share of the time spent waiting for data; memory, the peak in GB;
skipped, the steps without a finite gradient; unusable, the skipped samples, and cut, those that lost tokens
to --max-length, both of all processes since the start or resume; seconds since then.
"""
import contextlib
import io
import json
import os
import resource
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

from harmonkit.chat_template import IGNORE_INDEX
from harmonkit.data.mixture import DESCRIBE
from mar import Sampling

EVERY = 25                        # steps from one line of the log to the next
SHOWN = ("lr", "norm", "samples_per_s", "tokens_per_s", "wait", "memory", "unusable", "cut")
PROMPTS = ["a red circle", "three blue stars", "a green square to the left of a yellow triangle",
           "two purple crosses"]
QUESTION = DESCRIBE
SAMPLING = Sampling(num_iter=16)


def peak_memory(device):
    """Bytes: torch's peak on a CUDA device, else the process's largest resident set with mapped files."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def open_to_append(path):
    """A text file to which lines are appended, after the end of a line that a kill cut off."""
    file = open(path, "a+b")
    if file.tell():
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")
    return io.TextIOWrapper(file, encoding="utf-8")


class Monitor:
    """Collects losses and times of micro-batches and steps. Rank 0 writes the means over all processes."""

    def __init__(self, folder, name, tasks, step, last_step, rank=0, world_size=1):
        self.folder = Path(folder)
        self.tasks = list(tasks)
        self.last_step = last_step
        self.world_size = world_size
        self.start = time.time()
        self.skipped = 0
        self.skipped_in_a_row = 0
        self.bar = tqdm(initial=step, total=last_step, desc=name, disable=None if rank == 0 else True)
        self.log = self.board = None
        if rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.log = open_to_append(self.folder / "log.jsonl")
            with contextlib.suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter
                self.board = SummaryWriter(self.folder)
        self.reset()

    def reset(self):
        self.since = time.time()
        self.waited = 0.0
        self.num_samples = 0
        self.num_tokens = 0
        self.losses = {task: [] for task in self.tasks}

    @contextlib.contextmanager
    def waiting(self):
        """The time in this block counts as waiting for data."""
        began = time.time()
        yield
        self.waited += time.time() - began

    def micro_batch(self, task, inputs, loss):
        """inputs: the arguments of the loss."""
        # A loss of 0 because no token has a label is none. Tensors: no wait for the device here.
        labels = inputs.get("labels")
        is_text = labels is not None and labels.ndim == 2                   # else a class for each image
        counts = (labels[:, 1:] != IGNORE_INDEX).any() if is_text else torch.tensor(True)
        self.losses[task].append((loss.detach(), counts))
        self.num_samples += len(next(iter(inputs.values())))
        if "latents" in inputs:
            self.num_tokens += inputs["latents"].shape[:-1].numel()
        if "input_ids" in inputs:
            self.num_tokens += inputs["input_ids"].numel()

    def step(self, step, norm, lr, finite, counts):
        """After `step` steps. norm: the gradient's. lr: the schedule's factor. counts: of this process's
        samples, {"unusable": number, "cut": number}; see `SampleCounts.totals`.

        Raises ValueError after ten steps in a row without a finite gradient.
        """
        self.bar.update()
        self.skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if not finite:
            self.say(f"step {step}: the gradient is not finite, step skipped "
                     f"({self.skipped_in_a_row} in a row)")
        if self.skipped_in_a_row == 10:
            raise ValueError(f"step {step}: ten steps in a row without a finite gradient; the same command "
                             "goes on from the last checkpoint")
        if step % EVERY and step != self.last_step:
            return
        loss, counts = self.over_all_processes(counts, norm.device)
        seconds = time.time() - self.since
        line = {
            "step": step, "loss": loss, "lr": float(f"{lr:.4g}"), "norm": round(float(norm), 4),
            "samples_per_s": round(self.world_size * self.num_samples / seconds, 2),
            "tokens_per_s": round(self.world_size * self.num_tokens / seconds),
            "wait": round(self.waited / seconds, 3), "memory": round(peak_memory(norm.device) / 1e9, 2),
            "skipped": self.skipped, **counts, "seconds": round(time.time() - self.start, 1),
        }
        shown = {f"loss/{task}": mean for task, mean in loss.items()} | {key: line[key] for key in SHOWN}
        self.bar.set_postfix(shown)
        if self.log:
            self.log.write(json.dumps(line) + "\n")
            self.log.flush()
        if self.board:
            for key, value in shown.items():
                self.board.add_scalar(key, value, step)
        self.reset()

    def over_all_processes(self, counts, device) -> tuple:
        """({task: mean loss of the micro-batches with a label}, where there were any; the sums of counts)"""
        rows = [list(counts.values())]
        for pairs in self.losses.values():
            labelled = [float(loss) for loss, has_labels in pairs if has_labels]
            rows.append([sum(labelled), len(labelled)])
        rows = torch.tensor(rows, dtype=torch.float64)                      # (1 + tasks, 2)
        if self.world_size > 1:
            rows = rows.to(device)
            dist.all_reduce(rows)
        totals, *of_tasks = rows.tolist()
        means = {task: round(total / count, 6) for task, (total, count) in zip(self.tasks, of_tasks) if count}
        return means, dict(zip(counts, map(int, totals)))

    def say(self, text):
        tqdm.write(text, file=sys.stderr)

    def samples(self, step, model, ema, size):
        """Draw PROMPTS and answer QUESTION, with raw weights (upper row) and with the EMA, into samples/."""
        folder = self.folder / "samples"
        folder.mkdir(exist_ok=True)
        page = Image.new("RGB", (len(PROMPTS) * size, 2 * size))
        line = {"step": step, "prompts": PROMPTS, "question": QUESTION}
        model.eval()
        for row, kind in enumerate(("raw", "ema")):
            try:
                images = model.generate_image(PROMPTS, size=size, **asdict(SAMPLING))
                line[kind] = "".join(model.chat(QUESTION, images[0], max_new_tokens=32, size=size))
                for column, image in enumerate(images):
                    page.paste(image, (column * size, row * size))
            except ValueError as error:                                     # an output that is not finite
                line[kind] = None
                self.say(f"step {step}: no samples of the {kind} weights ({error})")
            ema.swap()                                                      # the second time back
        model.train()
        page.save(folder / f"{step:06d}.png")
        with open_to_append(folder / "answers.jsonl") as file:
            file.write(json.dumps(line) + "\n")

    def close(self):
        for output in (self.bar, self.log, self.board):
            if output is not None:
                output.close()


def read_log(folder) -> list:
    """The lines of a run's log by step. Where a resume repeated a step, its newer line counts."""
    file = Path(folder) / "log.jsonl"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; has the run begun?")
    lines = {}
    for text in file.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError):                               # a kill may cut a line off
            line = json.loads(text)
            if isinstance(line, dict) and {"step", "loss"} <= line.keys():
                lines[line["step"]] = line
    return [lines[step] for step in sorted(lines)]


def plot(folder) -> Path:
    """Draw a run's losses by task to loss.png in its folder. Raises ValueError without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = read_log(folder)
    tasks = sorted({task for line in lines for task in line["loss"]})
    size = (5 * len(tasks), 3.5)
    figure, axes = plt.subplots(1, len(tasks), figsize=size, squeeze=False, layout="constrained")
    for axis, task in zip(axes[0], tasks, strict=True):
        of_task = [line for line in lines if task in line["loss"]]
        axis.plot([line["step"] for line in of_task], [line["loss"][task] for line in of_task], linewidth=1)
        axis.set(title=task, xlabel="step", ylabel="loss", yscale="log")
        axis.grid(alpha=0.3, which="both")
    path = Path(folder) / "loss.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
