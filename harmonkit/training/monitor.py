"""What people watch while a model trains: a progress bar, log.jsonl, TensorBoard where it is installed, samples, a plot of the losses.

Every line of log.jsonl is a dictionary: step, loss by task, lr (the factor on each part's rate), norm of the gradient, samples and tokens a second,
wait (share of the time spent waiting for data), memory (peak, GB), skipped (steps without a finite gradient), unusable (samples), seconds.
"""
import contextlib
import json
import resource
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

PROMPTS = ("a red circle", "three blue stars", "a green square to the left of a yellow triangle", "two purple crosses")
QUESTION = "Describe the image."


def peak_memory(device):
    """Bytes: what torch has had on a CUDA device at most, or the largest resident set of this process, mapped files included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Monitor:
    """Collects what each micro-batch and step gives; every `every` steps rank 0 writes a line, averaged over all processes."""

    def __init__(self, folder, name, tasks, step, last, rank=0, ranks=1, every=25):
        self.folder, self.tasks, self.rank, self.ranks, self.every, self.last = Path(folder), list(tasks), rank, ranks, every, last
        self.folder.mkdir(parents=True, exist_ok=True)
        self.bar = tqdm(initial=step, total=last, desc=name, disable=None if rank == 0 else True)
        self.log = open(self.folder / "log.jsonl", "a") if rank == 0 else None
        self.board = board(self.folder) if rank == 0 else None
        self.began, self.skipped = time.time(), 0
        self.forget()

    def forget(self):
        self.since, self.waited, self.samples_seen, self.tokens_seen, self.steps = time.time(), 0.0, 0, 0, 0
        self.sums = {task: [0.0, 0] for task in self.tasks}

    @contextlib.contextmanager
    def waiting(self):
        began = time.time()
        yield
        self.waited += time.time() - began

    def saw(self, task, arguments, loss):
        """A micro-batch: its task, what its loss was given, and the loss."""
        self.sums[task][0] += loss.detach().float()
        self.sums[task][1] += 1
        self.samples_seen += len(next(iter(arguments.values())))
        self.tokens_seen += sum(arguments[k].shape[:-1].numel() if k == "latents" else arguments[k].numel() for k in ("latents", "input_ids") if k in arguments)

    def step(self, step, norm, lr, finite, unusable):
        self.skipped += not finite
        self.steps += 1
        self.bar.update()
        if step % self.every and step != self.last:
            return
        totals = torch.tensor([v for task in self.tasks for v in map(float, self.sums[task])], dtype=torch.float64)
        if self.ranks > 1:
            totals = totals.to(norm.device)
            dist.all_reduce(totals)
            totals = totals.cpu()
        means = {task: round(float(total / count), 6) for task, (total, count) in zip(self.tasks, totals.view(-1, 2)) if count}
        if self.rank == 0:
            seconds = time.time() - self.since
            line = {"step": step, "loss": means, "lr": float(f"{lr:.4g}"), "norm": round(float(norm), 4), "samples_per_s": round(self.ranks * self.samples_seen / seconds, 2),
                    "tokens_per_s": round(self.ranks * self.tokens_seen / seconds), "wait": round(self.waited / seconds, 3), "memory": round(peak_memory(norm.device) / 1e9, 2),
                    "skipped": self.skipped, "unusable": unusable, "seconds": round(time.time() - self.began, 1)}
            self.log.write(json.dumps(line) + "\n")
            self.log.flush()
            self.bar.set_postfix({**{k: f"{v:.3f}" for k, v in means.items()}, "lr": f"{lr:.2g}", "samples/s": f"{line['samples_per_s']:.1f}",
                                  "tokens/s": line["tokens_per_s"], "wait": f"{line['wait']:.0%}", "GB": line["memory"]} | ({"unusable": unusable} if unusable else {}))
            if self.board:
                for key in ("lr", "norm", "samples_per_s", "tokens_per_s", "wait", "memory"):
                    self.board.add_scalar(key, line[key], step)
                for task, loss in means.items():
                    self.board.add_scalar(f"loss/{task}", loss, step)
        self.forget()

    def say(self, text):
        if self.rank == 0 or self.bar.disable:
            tqdm.write(text, file=sys.stderr)

    @torch.no_grad()
    def samples(self, step, model, averaged, size):
        """Draw the fixed prompts with raw and averaged weights, and answer the fixed question about the first picture, to samples/."""
        trained, raw = dict(model.named_parameters()), {}
        rng = torch.get_rng_state()
        model.eval()
        rows, answers = [], {}
        for kind in ("raw", "averaged"):
            if kind == "averaged":
                raw = {n: trained[n].detach().clone() for n in averaged}
                for n, p in averaged.items():
                    trained[n].copy_(p)
            images = model.generate_image(list(PROMPTS), size=size, num_iter=16)
            rows.append(images)
            answers[kind] = "".join(model.chat(QUESTION, images[0], max_new_tokens=32, size=size))
        for n, p in raw.items():
            trained[n].copy_(p)
        model.train()
        torch.set_rng_state(rng)
        page = Image.new("RGB", (len(PROMPTS) * size, 2 * size))
        for y, images in enumerate(rows):
            for x, image in enumerate(images):
                page.paste(image, (x * size, y * size))
        (self.folder / "samples").mkdir(exist_ok=True)
        page.save(self.folder / "samples" / f"{step:06d}.png")
        with open(self.folder / "samples" / "answers.jsonl", "a") as file:
            file.write(json.dumps({"step": step, "prompts": PROMPTS, "question": QUESTION, **answers}) + "\n")

    def close(self):
        self.bar.close()
        if self.log:
            self.log.close()
        if self.board:
            self.board.close()


def board(folder):
    try:
        from torch.utils.tensorboard import SummaryWriter  # where tensorboard is installed
    except ImportError:
        return None
    return SummaryWriter(folder)


def read_log(folder):
    """The lines of a run's log; after a resume the newer of two lines of one step counts."""
    file = Path(folder) / "log.jsonl"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; has the run begun?")
    lines = {}
    for text in file.read_text().splitlines():
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            lines[line["step"]] = line
    return [lines[step] for step in sorted(lines)]


def plot(folder):
    """Draw a run's losses by task to loss.png in its folder; returns the path. Raises ValueError without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = read_log(folder)
    tasks = sorted({task for line in lines for task in line["loss"]})
    figure, axes = plt.subplots(1, len(tasks), figsize=(5 * len(tasks), 3.5), squeeze=False, layout="constrained")
    for axis, task in zip(axes[0], tasks):
        points = [(line["step"], line["loss"][task]) for line in lines if task in line["loss"]]
        axis.plot(*zip(*points), linewidth=1)
        axis.set(title=task, xlabel="step", ylabel="loss", yscale="log")
        axis.grid(alpha=0.3, which="both")
    figure.savefig(Path(folder) / "loss.png", dpi=120)
    plt.close(figure)
    return Path(folder) / "loss.png"
