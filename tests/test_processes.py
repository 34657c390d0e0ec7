"""A run and other processes: the lock of its folder, signals, a dead launcher, dead data readers."""
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from harmonkit.training import processes
from harmonkit.training.processes import Stop, collect_signals, lock, orderly_end


def python(code, **flags):
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], text=True, stdout=subprocess.PIPE,
                            **flags)


HOLD = """
    import sys, os
    from pathlib import Path
    from harmonkit.training.processes import lock
    held = lock(Path({folder!r}))
    if os.fork():                           # the other is as a data reader is
        print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_folder_has_one_trainer(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(processes, "PATIENCE", 1)
    with python(HOLD.format(folder=str(tmp_path)), stdin=subprocess.PIPE) as other:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match=rf"process {other.pid} on host \S+, since .*, trains in this"):
            lock(tmp_path)
        assert f"waiting for process {other.pid}" in capsys.readouterr().err
        other.kill()                                                        # its reader lives on
        other.wait()
        lock(tmp_path).close()
        other.stdin.close()


def test_a_disk_without_locks(tmp_path, monkeypatch, capsys):
    def none(*_):
        raise OSError(95, "Operation not supported")
    monkeypatch.setattr(processes.fcntl, "lockf", none)
    lock(tmp_path).close()
    assert "this disk has no locks (Operation not supported)" in capsys.readouterr().err


def test_signals_are_collected_and_the_handlers_restored():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(OSError), collect_signals() as stop:
        assert not stop
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert stop and stop.received == [signal.SIGINT, signal.SIGTERM]
        raise OSError
    assert signal.getsignal(signal.SIGINT) is before


def test_a_dead_launcher_stops_its_processes(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    stop = Stop()
    assert not stop
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert stop
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert not Stop(), "without torchrun a shell may end before the run does"


@pytest.mark.parametrize("error, status, line", [
    (ValueError("--lr"), 2, "train.py: --lr"),
    (OSError("disk"), 2, "train.py: disk"),
    (KeyboardInterrupt(), 130, "train.py: interrupted"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), 2, "reads data was killed; is"),
])
def test_errors_end_in_one_line(capsys, error, status, line):
    with pytest.raises(SystemExit, match=str(status)), orderly_end("train.py"):
        raise error
    err = capsys.readouterr().err
    assert line in err and err.count("\n") == 1


def test_other_errors_keep_their_traceback():
    with pytest.raises(RuntimeError, match="shapes"), orderly_end("train.py"):
        raise RuntimeError("shapes")
