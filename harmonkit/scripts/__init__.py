"""Commands around the model: python -m harmonkit.scripts.convert, benchmark, recaption, demo, ablate."""
import argparse
import sys
from contextlib import contextmanager


def argument_parser(description):
    as_written = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=description, formatter_class=as_written)


@contextmanager
def errors_in_one_line(command):
    """Turn a ValueError or OSError of the block into one line on stderr and exit status 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        print(f"{command}: {error}", file=sys.stderr)
        sys.exit(2)
