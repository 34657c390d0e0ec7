"""Commands around the model: python -m harmonkit.scripts.convert, benchmark, recaption, demo, ablate."""
import argparse


def argument_parser(description):
    as_written = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=description, formatter_class=as_written)
