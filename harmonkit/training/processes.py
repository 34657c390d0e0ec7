"""A run and other processes: one trainer a folder, signals, a launcher that has died, dead data readers."""
import contextlib
import os
import signal
import socket
import sys
import time
from datetime import datetime

import torch.distributed as dist

try:
    import fcntl
except ImportError:                                                         # Windows
    fcntl = None

PATIENCE = 10                     # seconds to wait for a lock; a killed run may still be ending
DEAD_READER = "DataLoader worker"          # how torch's messages of one begin


def lock(folder):
    """Lock a run's folder for this process. The lock lasts until the returned file is closed or the process
    ends, in whatever way.

    Raises ValueError that names the process and host which train there.
    """
    file = open(folder / "lock", "a+")
    for second in range(PATIENCE + 1):
        try:
            if fcntl:
                # Of a process, not of an open file: data readers do not inherit it.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except (BlockingIOError, PermissionError):
            file.seek(0)
            owner = file.read().strip() or "another process"
            if second == PATIENCE:
                raise ValueError(f"{folder}: {owner}, trains in this folder; stop it, or give another "
                                 "--runs") from None
            if second == 0:
                print(f"waiting for {owner}, to leave {folder}", file=sys.stderr)
            time.sleep(1)
        except OSError as error:
            print(f"warning: {folder}: this disk has no locks ({error.strerror}); two runs in one folder "
                  "would spoil each other", file=sys.stderr)
            break
    file.seek(0)
    file.truncate()
    file.write(f"process {os.getpid()} on host {socket.gethostname()}, since {datetime.now():%F %T}\n")
    file.flush()
    return file


class Stop:
    """True once SIGINT or SIGTERM has come, or the launcher of torchrun has died."""

    def __init__(self):
        self.received = []
        self.launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    def __bool__(self):
        return bool(self.received) or self.launcher not in (None, os.getppid())


@contextlib.contextmanager
def collect_signals():
    """In this block SIGINT and SIGTERM do not end the process. They make true the Stop that it gets."""
    stop = Stop()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in before:
            signal.signal(number, lambda number, _: stop.received.append(number))
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_signals(_):
    """For processes that read data: a signal goes to the whole group, and the run still ends its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.setpgrp()


@contextlib.contextmanager
def orderly_end(command):
    """Turn the block's errors that users can mend into a line on stderr and status 2, and Ctrl-C into 130.

    In the end the processes part. Other errors keep their traceback.
    """
    try:
        yield
    except KeyboardInterrupt:
        print(f"{command}: interrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, RuntimeError) as error:
        reason = str(error)
        if isinstance(error, RuntimeError):
            if not reason.startswith(DEAD_READER):
                raise
            reason = ("a process that reads data was killed; is the memory full? Fewer --workers need less; "
                      f"the same command goes on from the last checkpoint ({reason})")
        print(f"{command}: {reason}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
