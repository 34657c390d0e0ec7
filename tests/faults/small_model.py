"""A model of the tests' smallest configuration in a folder: `python -m faults.small_model FOLDER`."""
import sys

from conftest import shake
from training_helpers import SMALL_64

from harmon import Harmon
from harmonkit.shapes_world.tokenizer import train_tokenizer


def write_small_model(folder, seed=0):
    """Write it. Weights and tokenizer differ from seed to seed."""
    model = shake(Harmon(SMALL_64), seed)
    model.tokenizer = train_tokenizer(512 - 12 * seed)
    model.save_pretrained(folder)


if __name__ == "__main__":
    write_small_model(sys.argv[1])
