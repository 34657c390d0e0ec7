"""Benchmarks by name: python -m harmonkit.evals shapes [options, or --help]

A benchmark is a module with `add_arguments(parser)` and `run(args)`; its docstring is its help.
"""
import argparse
import sys

from harmonkit.evals import classes, reconstruction, shapes

BENCHMARKS = {"shapes": shapes, "classes": classes, "reconstruction": reconstruction}


def main(argv=None):
    plain = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(prog="harmonkit.evals", description=__doc__, **plain)
    commands = parser.add_subparsers(dest="benchmark", required=True)
    for name, benchmark in BENCHMARKS.items():
        benchmark.add_arguments(commands.add_parser(name, description=benchmark.__doc__, **plain))
    args = parser.parse_args(argv)
    try:
        BENCHMARKS[args.benchmark].run(args)
    except (ValueError, OSError) as error:
        print(f"harmonkit.evals: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
