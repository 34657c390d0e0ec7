"""Kill a run again and again and compare its end with that of a run that nobody stopped.

    python tests/faults/kills.py --kills 30                     # one process
    python tests/faults/kills.py --kills 20 --processes 2       # torchrun

The run saves every step, and caches its latents in many small shards. kill -9 comes at random moments, often
while a checkpoint or a shard of latents is written: to the run, to its launcher, to one of its workers, or to
a data reader. The same command then goes on. A line for each kill says whom and where it hit. In the end
weights, averages and optimizer state must be the same to the bit, and the caches to the byte. Exit status 1
otherwise.
"""
import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import torch
from same_bits import same

ROOT = Path(__file__).resolve().parents[2]
SCENES = 128
SHARD = 16                          # samples in a shard of latents: 8 shards
STEPS = 120
# Small shards, in a process of its own as train.py is.
CODE = ("import runpy, sys; import harmonkit.data.latents as latents; latents.SHARD = {shard}; "
        "sys.argv[0] = 'train.py'; runpy.run_path('train.py', run_name='__main__')")


class Command:
    """The command that is killed and started again."""

    def __init__(self, model, runs, processes):
        self.folder = Path(runs) / "tiny-joint"
        self.latents = Path(runs)
        self.processes = processes
        self.latents.mkdir(parents=True)
        script = self.latents.parent / "train_small_shards.py"
        script.write_text(CODE.format(shard=SHARD))
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        self.words = [sys.executable, *(launch if processes > 1 else []), str(script), "tiny-joint",
                      "--device", "cpu", "--init", str(model), "--runs", str(runs), "--scenes", str(SCENES),
                      "--batch", "4", "--micro-batch", "2", "--bf16", "false", "--compile", "false",
                      "--steps", str(STEPS), "--save-every", "1", "--workers", "1"]

    def start(self, errors):
        self.left = {*self.folder.glob(".*"), *self.latents.glob("latents-*/.*")}
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(self.words, cwd=ROOT, env=environment, start_new_session=True,
                                stdout=subprocess.DEVNULL, stderr=errors)

    def saved(self):
        """The newest step that is saved, 0 if none is."""
        return max((int(path.stem[5:]) for path in self.folder.glob("step-*.pt")), default=0)

    def shards(self):
        return sum(1 for _ in self.latents.glob("latents-*/[0-9]*.safetensors"))

    def being_written(self):
        """The names of half-written files, but for those that earlier kills left."""
        hidden = [*self.folder.glob(".*"), *self.latents.glob("latents-*/.*")]
        return [path.name for path in hidden if path not in self.left]


def children(pid):
    """{id: its parent's} of all processes under this one."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        found[int(stat.parent.name)] = parent
    under, more = {}, {pid}
    while more:
        more = {child for child, parent in found.items() if parent in more} - set(under)
        under |= {child: found[child] for child in more}
    return under


def targets(command, process, kind):
    """The ids to be killed: everything, the launcher alone, a worker alone, or a data reader."""
    under = children(process.pid)
    workers = [pid for pid, parent in under.items() if parent == process.pid]
    readers = [pid for pid, parent in under.items() if parent in workers]
    if command.processes == 1:
        workers, readers = [process.pid], workers
    if kind == "a reader" and readers:
        return "a reader", readers[:1]
    if kind == "the launcher" and command.processes > 1:
        return "the launcher", [process.pid]
    if kind == "a worker" and command.processes > 1 and workers:
        return "a worker", [random.choice(workers)]
    return "all", [process.pid, *under]


def wait_for_moment(command, process):
    """Wait for progress, then for a file being written or a moment. False if the run has ended before."""
    goal = random.choice([0, 1, 1, 2, 3, 4])                        # shards or steps
    reached = command.saved() + command.shards() + goal
    wait = 5 if goal == 0 else 300
    end = time.time() + random.random() * wait if goal == 0 else time.time() + wait
    while process.poll() is None and time.time() < end:
        if goal and command.saved() + command.shards() >= reached:
            break
        time.sleep(0.002)
    wants_file = random.random() < 0.6
    end = time.time() + (2 if wants_file else random.random() * 0.3)
    while process.poll() is None and time.time() < end:
        if wants_file and command.being_written():
            break
        time.sleep(0.0005)
    return process.poll() is None


def kill(pids):
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def one_kill(command, number, errors):
    """Start, kill, wait for all to end -> (what to print, whether something was lost). None at the end."""
    before = command.saved()
    process = command.start(errors)
    kind = random.choices(["all", "a reader", "the launcher", "a worker"], [3, 3, 3, 3])[0]
    if not wait_for_moment(command, process):
        if process.returncode:
            return f"kill {number:2}: the run ended of itself, with status {process.returncode}", True
        return None
    # What is there at this moment must be there afterwards.
    saved, shards, writing = command.saved(), command.shards(), command.being_written()
    whom, pids = targets(command, process, kind)
    everyone = [process.pid, *children(process.pid)]
    kill(pids)
    began = time.time()
    while any(map(alive, everyone)) and time.time() < began + 60:
        process.poll()
        time.sleep(0.01)
    seconds = time.time() - began
    hung = [pid for pid in everyone if alive(pid)]
    kill(hung)
    process.wait()
    went_back = command.saved() < max(saved, before) or command.shards() < shards
    lost = bool(hung) or went_back or not readable(command)
    where = f"step {saved}" if saved else f"{shards} shards of latents"
    if writing:
        where += f", writing {', '.join(writing)}"
    status = f"kill {number:2}: {whom}, {where}; all ended after {seconds:.1f} s"
    return status + (f"; hung: {hung}" if hung else "") + ("; LOST" if lost else ""), lost


def readable(command):
    """Whether the newest two checkpoints are whole."""
    for path in sorted(command.folder.glob("step-*.pt"))[-2:]:
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()                         # torch compares no checksums
            if damaged is None:
                torch.load(path, weights_only=True)
        except Exception as error:  # any means that it is not
            damaged = error
        if damaged is not None:
            print(f"{path.name}: {damaged}")
            return False
    return True


def difference(one, two):
    """What differs between two commands' ends, None if nothing does."""
    newest = [sorted(command.folder.glob("step-*.pt"))[-1] for command in (one, two)]
    contents = [torch.load(path, weights_only=True) for path in newest]
    for key in ("step", "model", "model_ema", "optimizer"):
        if not same(contents[0][key], contents[1][key]):
            return key
    files = [sorted(command.latents.glob("latents-*/*")) for command in (one, two)]
    if [path.name for path in files[0]] != [path.name for path in files[1]]:
        return f"the caches' files: {[path.name for path in files[1]]}"
    for a, b in zip(*files):
        if a.read_bytes() != b.read_bytes():
            return a.name
    left = [path.name for path in two.folder.glob(".step-*")]
    return f"left behind: {left}" if left else None


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--processes", type=int, default=1, help="of torchrun; 1: no torchrun")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    random.seed(args.seed)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        places = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        subprocess.run([sys.executable, "-m", "faults.small_model", folder / "model"], check=True,
                       env=os.environ | {"PYTHONPATH": places})
        whole, killed = (Command(folder / "model", folder / name, args.processes)
                         for name in ("whole", "killed"))
        sys.exit(compare(whole, killed, args.kills, open(folder / "errors", "w+")))


def compare(whole, killed, kills, errors):
    """Run one command whole and kill the other; returns the exit status."""
    if whole.start(errors).wait():
        return fail(errors)
    done = lost = 0
    while done < kills:
        result = one_kill(killed, done + 1, errors)
        if result is None:
            if killed.start(errors).wait() or difference(whole, killed):
                return fail(errors)
            print("the run has ended; it begins anew", flush=True)
            shutil.rmtree(killed.latents)
            killed.latents.mkdir()
            continue
        print(result[0], flush=True)
        done += 1
        lost += result[1]
    if killed.start(errors).wait():
        return fail(errors)
    differing = difference(whole, killed)
    print(f"{done} kills, {lost} lost, ends equal: {'no, ' + differing if differing else 'yes'}")
    return int(bool(lost or differing))


def fail(errors):
    """Show the last lines of stderr of a run that nobody killed and that did not end well."""
    errors.seek(0)
    print("".join(errors.readlines()[-15:]))
    return 1


if __name__ == "__main__":
    main()
