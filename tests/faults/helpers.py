"""Run the command lines with planted faults, and say what must come of it.

A command runs in a fork of the test's process, which has imported torch already. So it has its own exit
status, stderr and caches, and starts at once. Where launchers or start-up are the subject, tests use `popen`.
"""
import contextlib
import fcntl
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch
import torch._dynamo  # noqa: F401  takes a second in each fork otherwise
from conftest import ROOT
from data_files import png

import sample
import train
from faults.same_bits import same
from harmonkit.data.__main__ import main as data_main

torch.set_num_threads(1)            # threads of the parent would be missing in a fork
ENTRIES = {"train.py": train.main, "sample.py": sample.main, "harmonkit.data": data_main}
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
LIMIT = 120                         # seconds; no command here takes longer
# Of the smallest run: two samples a step.
SMALL = ("--device", "cpu", "--scenes", "20", "--batch", "2", "--micro-batch", "2", "--bf16", "false",
         "--compile", "false", "--muon", "false", "--save-every", "1")


# ---- commands ----------------------------------------------------------------------------------------------

class Running:
    """A command in a process of its own. Its output stays in pipes, which no full disk ends."""

    def __init__(self, entry, arguments, cwd=ROOT, plant=None):
        self.entry = entry
        self.arguments = [str(argument) for argument in arguments]
        self.pipes = [os.pipe() for _ in range(2)]
        self.output = [b"", b""]
        for end, other in self.pipes:
            fcntl.fcntl(other, fcntl.F_SETPIPE_SZ, 2 ** 20)
            os.set_blocking(end, False)
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        self.status = None
        if self.pid == 0:
            try:
                self.run(cwd, plant)
            finally:
                os._exit(99)
        for _, other in self.pipes:
            os.close(other)

    def run(self, cwd, plant):
        status = 1
        try:
            os.setpgrp()
            for number, (_, end) in enumerate(self.pipes, start=1):
                os.dup2(end, number)
            sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
            sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            sys.argv = [self.entry, *self.arguments]
            os.chdir(cwd)
            if plant:
                plant()
            ENTRIES[self.entry]()
            status = 0
        except SystemExit as end:
            status = 0 if end.code is None else end.code
            if not isinstance(status, int):
                print(status, file=sys.stderr)
                status = 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def poll(self):
        """The exit status, minus the number of the signal that killed it; None while it runs."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status

    def kill(self, number=signal.SIGKILL):
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self, limit=LIMIT):
        """-> Done. Fails where the command hangs."""
        end = time.time() + limit
        while self.poll() is None:
            if time.time() > end:
                os.killpg(self.pid, signal.SIGKILL)
                raise AssertionError(f"{self.entry} {' '.join(self.arguments)}: still runs after {limit} s\n"
                                     f"{self.text(1)}")
            time.sleep(0.003)
        return Done(self.status, self.text(0), self.text(1), [self.entry, *self.arguments])

    def text(self, which):
        """The output so far: 0 of stdout, 1 of stderr."""
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(self.pipes[which][0], 2 ** 20):
                self.output[which] += piece
        return self.output[which].decode(errors="replace")

    def __del__(self):
        for end, _ in self.pipes:
            os.close(end)


class Done:
    """How a command ended."""

    def __init__(self, status, out, err, arguments):
        self.status, self.out, self.err, self.arguments = status, out, err, arguments

    def __repr__(self):
        return f"{' '.join(map(str, self.arguments))}\n  -> {self.status}\n{self.out}{self.err[-3000:]}"


def call(entry, *arguments, cwd=ROOT, plant=None, limit=LIMIT):
    """Run a command to its end. plant: called in its process before it begins."""
    return Running(entry, arguments, cwd, plant).wait(limit)


def shell(*arguments, processes=1):
    """The argument list of `python train.py …` or torchrun, for subprocess."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [sys.executable, *(launch if processes > 1 else []), *map(str, arguments)]


def popen(*arguments, processes=1, **options):
    return subprocess.Popen(shell(*arguments, processes=processes), cwd=ROOT, env=ONE_THREAD, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


# ---- what must come of it ----------------------------------------------------------------------------------

def fine(done, *words):
    """The command ended well and told these words (regular expressions) on stderr."""
    assert done.status == 0, done
    assert "Traceback" not in done.err, done
    return told(done, *words)


def told(done, *words):
    for word in words:
        assert re.search(word, done.err, re.IGNORECASE), f"not told: {word}\n{done}"
    return done


def refused(done, *words, status=2):
    """The command ended with status 2 and one line on stderr that holds these words."""
    assert done.status == status, done
    assert "Traceback" not in done.err, done
    lines = [line for line in done.err.splitlines() if line.startswith(done.arguments[0])]
    assert len(lines) == 1 and lines == done.err.splitlines()[-1:], f"not one line at the end\n{done}"
    assert len(lines[0]) < 1200, f"too long\n{done}"
    for word in words:
        assert re.search(word, lines[0], re.IGNORECASE), f"not named: {word}\n{done}"
    return done


def not_silent(done, *words):
    """The command was refused, or went on and told."""
    return told(done, *words) if done.status == 0 else refused(done, *words)


# ---- runs --------------------------------------------------------------------------------------------------

def train_command(model, runs, *flags, recipe="tiny-llm", steps=3):
    """The arguments of a small run. flags: pairs; they replace the pairs of SMALL and one another."""
    start = ("--init", model) if model else ()
    words = [*start, "--runs", runs, *SMALL, "--steps", steps, *flags]
    return [recipe, *(word for pair in dict(zip(words[::2], words[1::2])).items() for word in pair)]


def run(model, runs, *flags, recipe="tiny-llm", steps=3, **options):
    return call("train.py", *train_command(model, runs, *flags, recipe=recipe, steps=steps), **options)


def checkpoints(folder):
    """The paths of a run's checkpoints by their steps."""
    files = [path for path in Path(folder).glob("step-*.pt") if path.stem[5:].isdigit()]
    return sorted(files, key=lambda path: int(path.stem[5:]))


def load(path):
    """The content of a checkpoint, or of a run's newest."""
    path = Path(path)
    return torch.load(checkpoints(path)[-1] if path.is_dir() else path, weights_only=True)


def back_to(folder, step):
    """Remove a run's checkpoints after a step, as if it had been killed there."""
    for path in checkpoints(folder):
        if int(path.stem[5:]) > step:
            path.unlink()
    assert checkpoints(folder), f"{folder} has no checkpoint of step {step} or before"


def copy(folder, to):
    """A copy of a run's folder; times of files stay."""
    return Path(shutil.copytree(folder, to))


def differs(a, b, key="model"):
    """The names of tensors with other bits in two checkpoints."""
    assert a[key].keys() == b[key].keys()
    return [name for name, tensor in a[key].items() if not torch.equal(tensor, b[key][name])]


def assert_same(a, b):
    """Two checkpoints agree in step, weights, averages and optimizer state to the bit."""
    assert a["step"] == b["step"]
    assert not differs(a, b) and not differs(a, b, "model_ema")
    assert same(a["optimizer"], b["optimizer"]), "the optimizers' states differ"


def is_finite(state):
    return all(tensor.isfinite().all() for tensor in state.values() if torch.is_tensor(tensor))


def log(folder):
    return [json.loads(line) for line in open(Path(folder) / "log.jsonl")]


# ---- data --------------------------------------------------------------------------------------------------

def write_pictures(folder, count=6, name="pairs.jsonl", caption="caption {}"):
    """A folder of pictures 0.png, 1.png, … and a file of rows with their captions; returns its path."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / "images" / f"{i}.png").write_bytes(png(i))
    return write_rows(folder, range(count), name, caption)


def write_rows(folder, numbers, name="pairs.jsonl", caption="caption {}"):
    rows = [{"image": f"images/{i}.png", "caption": caption.replace("{}", str(i))} for i in numbers]
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


def write_mixture(file, *lines):
    """A mixture of lines (path, task) or dictionaries; returns its path."""
    lines = [line if isinstance(line, dict) else {"path": str(line[0]), "task": line[1]} for line in lines]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(lines))
    return file


def draw(model, runs, mixture, *flags, **options):
    """Train on a mixture of pictures for text2image."""
    return run(model, runs, "--mixture", mixture, "--ratio", "text2image=1", *flags, recipe="tiny-joint",
               **options)


def cache(model, mixture, out, *flags, size=64, **options):
    """Run `python -m harmonkit.data cache`."""
    return call("harmonkit.data", "cache", mixture, "--model", model, "--size", size, "--out", out,
                "--device", "cpu", *flags, **options)


def inspect(mixture, *flags, **options):
    """Run `python -m harmonkit.data inspect --json` -> Done, the objects of the sources."""
    done = call("harmonkit.data", "inspect", mixture, "--size", 64, "--json", *flags, **options)
    return done, [json.loads(line) for line in done.out.splitlines() if line.startswith("{")]


# ---- faults ------------------------------------------------------------------------------------------------

def hole(path, share=0.5, size=4096):
    """Zeros in a file, as a power cut leaves them; its time stays."""
    state = os.stat(path)
    start = int(state.st_size * share)
    with open(path, "r+b") as file:
        file.seek(start)
        before = file.read(size)
        file.seek(start)
        file.write(bytes(len(before)))
    assert before.strip(b"\0"), f"{path}: there were zeros already"
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def flip(path, share=0.5):
    """Another bit in a file."""
    with open(path, "r+b") as file:
        file.seek(int(os.path.getsize(path) * share))
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 16]))


def cut(path, share=0.5):
    """Only the first part of a file."""
    os.truncate(path, int(os.path.getsize(path) * share))


def full_disk(size):
    """Returns a `plant`: no file grows beyond this size, in bytes."""
    def plant():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    return plant


def rewrite_checkpoint(path, change, to=None):
    """Load a checkpoint, change its content in place, and write it."""
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, to or path)
