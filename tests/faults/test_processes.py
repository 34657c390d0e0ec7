"""Processes that are killed, stopped or started twice: one line, the right status, and nothing lost."""
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from faults.helpers import (
    ONE_THREAD,
    Running,
    assert_same,
    cache,
    call,
    checkpoints,
    copy,
    fine,
    load,
    log,
    popen,
    refused,
    run,
    train_command,
    write_mixture,
    write_pictures,
)

ENDLESS = ("--steps", 100_000, "--save-every", 100_000)


def start(models, runs, *flags, **options):
    return Running("train.py", train_command(models.one, runs, *flags), **options)


def until(condition, process=None, limit=60):
    """Wait for a condition; fail where it does not come, or where the process ends before."""
    end = time.time() + limit
    while not condition():
        assert time.time() < end, "waited in vain"
        if process is not None and process.poll() is not None:
            raise AssertionError(process.wait() if isinstance(process, Running) else process.communicate())
        time.sleep(0.005)


def has_trained(runs, recipe="tiny-llm"):
    file = Path(runs) / recipe / "log.jsonl"
    return lambda: file.exists() and file.stat().st_size > 0


def alive(pid):
    """Whether a process runs; one that has ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def children(pid):
    """The ids of a process's children and of theirs."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found += [int(stat.parent.name), *children(int(stat.parent.name))]
        except (OSError, ValueError):
            pass
    return found


# ---- data readers ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_reader_is_one_line(number, models, tmp_path):
    process = start(models, tmp_path, *ENDLESS, "--workers", 2)
    until(has_trained(tmp_path), process)
    readers = children(process.pid)
    assert len(readers) >= 2
    os.kill(readers[0], number)
    refused(process.wait(60), "worker|read", "kill|signal|memory|ended|died")
    until(lambda: not any(map(alive, readers)), limit=10)


def test_a_run_goes_on_after_a_killed_reader(models, text_run, half):
    def plant():
        from harmonkit.data.mixture import MixtureDataset
        read = MixtureDataset.__getitem__

        def killed(self, number):
            os.kill(os.getpid(), signal.SIGKILL)
            return read(self, number)
        MixtureDataset.__getitem__ = killed
    refused(run(models.one, half, "--workers", 1, plant=plant), "worker|read")
    fine(run(models.one, half, "--workers", 1))
    assert_same(load(text_run / "tiny-llm"), load(half / "tiny-llm"))


def test_readers_do_not_outlive_a_killed_run(models, tmp_path):
    process = start(models, tmp_path, *ENDLESS, "--workers", 2)
    until(has_trained(tmp_path), process)
    readers = children(process.pid)
    process.kill()
    process.wait()
    until(lambda: not any(map(alive, readers)), limit=20)


# ---- two runs ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("how", ["resume", "export"])
def test_a_second_run_in_a_folder_is_refused(how, models, tmp_path):
    first = start(models, tmp_path / "runs", *ENDLESS)
    until(has_trained(tmp_path / "runs"), first)
    if how == "resume":
        second = call("train.py", "resume", tmp_path / "runs" / "tiny-llm")
    else:
        second = run(models.one, tmp_path / "runs", *ENDLESS, "--export", tmp_path / "out")
    refused(second, str(first.pid), socket.gethostname(), "tiny-llm")
    assert first.poll() is None, "the first goes on"
    first.kill(signal.SIGTERM)
    done = first.wait()
    assert done.status == 130, done
    assert checkpoints(tmp_path / "runs" / "tiny-llm")


@pytest.mark.parametrize("workers", [0, 2])
def test_the_lock_of_a_killed_run_does_not_block(workers, models, tmp_path):
    first = start(models, tmp_path, "--save-every", 1, "--steps", 100_000, "--workers", workers)
    until(lambda: len(checkpoints(tmp_path / "tiny-llm")) > 1, first)
    first.kill()
    first.wait()
    step = int(checkpoints(tmp_path / "tiny-llm")[-1].stem[5:])
    second = start(models, tmp_path, "--save-every", 1, "--steps", 100_000, "--workers", workers)
    until(lambda: int(checkpoints(tmp_path / "tiny-llm")[-1].stem[5:]) > step, second, limit=30)
    second.kill()
    second.wait()


def test_a_finished_run_leaves_no_lock(models, text_run, tmp_path):
    runs = copy(text_run, tmp_path / "runs")
    fine(run(models.one, runs, "--steps", 4))
    fine(run(models.one, runs, "--steps", 5))


def test_two_recipes_beside_each_other_share_their_latents(models, tmp_path):
    """Both begin by caching the same scenes into the same folder."""
    flags = ("--scenes", 300)
    both = [Running("train.py", train_command(models.one, tmp_path, *flags, recipe=recipe))
            for recipe in ("tiny-mar", "tiny-joint")]
    for process in both:
        fine(process.wait())


def test_two_caches_beside_each_other(models, tmp_path):
    mixture = write_mixture(tmp_path / "mixture.json", (write_pictures(tmp_path / "data", 60), "text2image"))
    flags = ("cache", mixture, "--model", models.one, "--size", 64, "--out", tmp_path / "latents",
             "--device", "cpu")
    both = [Running("harmonkit.data", flags) for _ in range(2)]
    ends = [process.wait() for process in both]
    assert any(done.status == 0 for done in ends), ends
    assert all(done.status in (0, 2) and "Traceback" not in done.err for done in ends), ends
    fine(cache(models.one, mixture, tmp_path / "latents"))


# ---- stops -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stop_saves_and_goes_on(number, workers, models, tmp_path):
    process = start(models, tmp_path / "a", *ENDLESS, "--workers", workers)
    until(has_trained(tmp_path / "a"), process)
    os.killpg(process.pid, number)                                          # to all, as a terminal does
    done = process.wait()
    assert done.status == 130 and "Traceback" not in done.err, done
    step = load(tmp_path / "a" / "tiny-llm")["step"]
    assert f"step {step}" in done.err and step >= 25


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["model", "tokenizer", "first step"])
def test_a_stop_before_the_first_step_is_one_line(number, moment, models, tmp_path):
    def plant():
        import train
        from harmon import Harmon
        from harmonkit.training import runs

        def stopping(function):
            def stopped(*args, **options):
                os.kill(os.getpid(), number)
                return function(*args, **options)
            return stopped
        if moment == "model":
            Harmon.from_pretrained = stopping(Harmon.from_pretrained)
        elif moment == "tokenizer":
            runs.load_tokenizer = stopping(runs.load_tokenizer)
        else:
            train.Losses.forward = stopping(train.Losses.forward)
    done = run(models.one, tmp_path, *ENDLESS, plant=plant)
    assert "Traceback" not in done.err and done.status in (130, -number), done
    assert done.status == 130 or number == signal.SIGTERM, "Ctrl-C has one status"
    fine(run(models.one, tmp_path))


def shapes_mixture(folder, count=3000):
    lines = [{"path": "shapes", "task": "text2image", "count": count}]
    return write_mixture(folder / "mixture.json", *lines)


def cache_command(models, tmp_path, *flags):
    return ("cache", shapes_mixture(tmp_path), "--model", models.one, "--size", 64, "--out",
            tmp_path / "latents",
            "--device", "cpu", *flags)


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 130)])
def test_a_stop_in_caching_is_one_line(number, status, models, tmp_path):
    process = Running("harmonkit.data", cache_command(models, tmp_path))
    until(lambda: (tmp_path / "latents" / "0" / "about.json").exists(), process)
    time.sleep(0.3)
    process.kill(number)
    done = process.wait()
    assert done.status in (status, 143), done
    assert "Traceback" not in done.err and len(done.err.strip().splitlines()) == 1, done
    assert not list((tmp_path / "latents" / "0").glob(".*")), "half-written files stay"


@pytest.mark.parametrize("wait", [0.05, 0.6, 1.5, 3.0])
def test_ctrl_c_in_the_data_command_at_any_moment(wait, models, tmp_path):
    """While modules are imported, while the model loads, while it caches."""
    command = [sys.executable, "-m", "harmonkit.data", *map(str, cache_command(models, tmp_path))]
    process = subprocess.Popen(command, cwd=ROOT, env=ONE_THREAD, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, start_new_session=True)
    time.sleep(wait)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert "Traceback" not in err, err
    assert process.returncode == 130 or wait < 0.3, (process.returncode, err)


def test_ctrl_c_in_inspect_is_one_line(models, tmp_path):
    process = Running("harmonkit.data", ("inspect", shapes_mixture(tmp_path), "--size", 64, "--json"))
    time.sleep(0.4)
    process.kill(signal.SIGINT)
    done = process.wait()
    assert "Traceback" not in done.err and done.status in (130, 0), done


def test_a_killed_cache_goes_on(models, tmp_path):
    """kill -9 in a shard: no half shard is taken for a whole one, and the end is the same to the byte."""
    mixture = shapes_mixture(tmp_path, 1200)
    process = Running("harmonkit.data", ("cache", mixture, "--model", models.one, "--size", 64, "--center",
                                         "--device", "cpu", "--out", tmp_path / "latents"))
    until(lambda: list((tmp_path / "latents").glob("0/*00000.safetensors")), process)
    process.kill()
    process.wait()
    fine(cache(models.one, mixture, tmp_path / "latents", "--center"))
    fine(cache(models.one, mixture, tmp_path / "whole", "--center"))
    for name in ("00000.safetensors", "00001.safetensors", "about.json"):
        one, two = (tmp_path / folder / "0" / name for folder in ("latents", "whole"))
        assert one.read_bytes() == two.read_bytes(), name


# ---- torchrun ----------------------------------------------------------------------------------------------

def torchrun(models, runs, *flags):
    command = train_command(models.one, runs, "--batch", 4, *flags)
    return popen("train.py", *command, processes=2, start_new_session=True)


def end_all(process):
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    for pid in children(process.pid):
        os.kill(pid, signal.SIGKILL)
    process.communicate()


def test_workers_of_a_killed_launcher_stop(models, tmp_path):
    process = torchrun(models, tmp_path, *ENDLESS)
    try:
        until(has_trained(tmp_path), process, limit=90)
        workers = children(process.pid)
        assert len(workers) >= 2
        process.kill()
        until(lambda: not any(map(alive, workers)), limit=6)
    finally:
        end_all(process)
    process = torchrun(models, tmp_path, "--steps", 100_000, "--save-every", 1)     # nobody holds the folder
    try:
        until(lambda: len(checkpoints(tmp_path / "tiny-llm")) > 1, process, limit=90)
    finally:
        end_all(process)


def test_a_killed_worker_ends_the_other(models, tmp_path):
    process = torchrun(models, tmp_path, *ENDLESS)
    try:
        until(has_trained(tmp_path), process, limit=90)
        workers = children(process.pid)
        os.kill(workers[-1], signal.SIGKILL)
        process.communicate(timeout=60)
        assert process.returncode not in (0, None)
        assert not any(map(alive, workers))
    finally:
        end_all(process)


def test_an_error_under_torchrun_is_told_once(models, tmp_path):
    process = torchrun(models, tmp_path, "--steps", 3, "--mixture", tmp_path / "nothing.json")
    _, err = process.communicate(timeout=90)
    assert process.returncode == 1                                          # torchrun's own
    lines = [line for line in err.splitlines() if line.startswith("train.py: ") and "nothing.json" in line]
    assert len(lines) in (1, 2), err
    assert 'train.py", line' not in err, "torchrun's own traceback only"


def test_what_one_process_refuses_ends_the_others(models, text_run, tmp_path):
    """Only the first process reads the checkpoints."""
    runs = copy(text_run, tmp_path / "runs")
    for path in checkpoints(runs / "tiny-llm"):
        path.write_bytes(b"broken")
    _, err = torchrun(models, runs, "--steps", 4).communicate(timeout=90)
    lines = [line for line in err.splitlines() if "step-000003.pt" in line and "train.py: " in line]
    assert len(lines) in (1, 2), err
    assert 'train.py", line' not in err, "a traceback of the other process"


def test_counts_are_summed_over_processes(models, tmp_path):
    """What each process cut is counted in the one log."""
    rows = [f'{{"conversations": [{{"from": "human", "value": "Is it {i}?"}}, '
            f'{{"from": "gpt", "value": "{"yes " * 100}"}}]}}\n' for i in range(12)]
    (tmp_path / "chats.jsonl").write_text("".join(rows))
    mixture = write_mixture(tmp_path / "mixture.json", (tmp_path / "chats.jsonl", "text"))
    process = torchrun(models, tmp_path / "runs", "--steps", 3, "--mixture", mixture, "--max-length", 40)
    _, err = process.communicate(timeout=90)
    assert process.returncode == 0, err
    assert log(tmp_path / "runs" / "tiny-llm")[-1]["cut"] == 12
