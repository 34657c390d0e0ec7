"""docs/faults.md names a test for each fault, and the tests are there."""
import re
from pathlib import Path

from conftest import ROOT

TABLE = (ROOT / "docs" / "faults.md").read_text()
NAMED = re.findall(r"`(test_\w+\.py)::(test_\w+)`", TABLE)


def test_each_row_names_a_test():
    rows = [line for line in TABLE.splitlines() if line.startswith("| ") and not line.startswith("| fault")]
    assert len(rows) > 40
    for row in rows:
        cells = row.strip("|").split(" | ")
        assert len(cells) == 3 and re.search(r"`test_\w+\.py::test_\w+`", cells[2]), row


def test_the_tests_are_there():
    for file, test in NAMED:
        text = (Path(__file__).parent / file).read_text()
        assert f"\ndef {test}(" in text, f"{file}::{test}"
