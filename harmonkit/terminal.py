"""What commands share at the terminal: flags, questions, errors in one line. Imports no torch."""
import argparse
import os
import sys
from contextlib import contextmanager
from pathlib import Path

from harmonkit.prompts import shorten


class Once(argparse.Action):
    """Store a flag's value. A flag that is given twice is an error; argparse would drop the first value."""

    was_given = False

    def __call__(self, parser, namespace, value, flag=None):
        if flag is not None and self.was_given:
            earlier = getattr(namespace, self.dest)
            raise argparse.ArgumentError(self, f"given twice, as {earlier} and {value}; one is expected")
        self.was_given = flag is not None
        setattr(namespace, self.dest, value)


class Parser(argparse.ArgumentParser):
    """Takes each flag once, and ends with one line on stderr and status 2 for wrong flags."""

    def __init__(self, prog, description):
        super().__init__(prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.register("action", None, Once)

    def error(self, message):
        self.exit(2, f"{self.prog}: {shorten(message, 300)} (--help lists the flags)\n")


def file_path(text) -> Path:
    """A path flag: ~ is the home folder."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    try:
        return Path(text).expanduser()
    except RuntimeError:                                                    # ~somebody who is not known
        return Path(text)


@contextmanager
def errors_in_one_line(command):
    """Turn the block's errors into a line on stderr and status 2, Ctrl-C into 130, a closed pipe into 141."""
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):                                  # not in tests and notebooks
            stream.reconfigure(errors="replace" if stream is sys.stdin else "backslashreplace")
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:                                                 # | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())      # for the flush at exit
        sys.exit(141)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        print(f"{command}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{command}: interrupted", file=sys.stderr)
        sys.exit(130)


def next_line() -> str:
    """The next line of stdin, at a terminal with line editing; "" at its end."""
    if not sys.stdin.isatty():
        return sys.stdin.readline().strip()
    try:
        import readline  # noqa: F401  line editing of input(); not on Windows
    except ImportError:
        pass
    try:
        if sys.stdout.isatty():
            return input("> ").strip()
        print("> ", end="", file=sys.stderr, flush=True)            # the answers go to a file
        return sys.stdin.readline().strip()
    except EOFError:
        print()
        return ""
