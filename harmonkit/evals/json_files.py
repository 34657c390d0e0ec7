"""JSON lines that benchmarks and their scorers exchange."""
import json

from harmonkit.checkpoints import write_text
from harmonkit.prompts import json_lines, read_text


def read_objects(path) -> list:
    """[(place, object), …] of a file of JSON lines; place is "line 3". Blank lines are skipped.

    Raises FileNotFoundError or ValueError, naming file and line, for lines that are no objects and for none.
    """
    lines = [(number, line) for number, line in enumerate(read_text(path).split("\n"), start=1)
             if line.strip()]
    entries = [(entry.place, entry.content) for entry in json_lines(path, lines)]
    for place, content in entries:
        if not isinstance(content, dict):
            raise ValueError(f"{path}, {place}: a {type(content).__name__} where a JSON object is expected")
    if not entries:
        raise ValueError(f"{path}: an empty file")
    return entries


def write_objects(path, rows):
    """Write JSON lines atomically."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def several(values, most=5) -> str:
    """The first few of a list of values, for a message: "3, 5, 8 and 7 more"."""
    shown = ", ".join(map(str, values[:most]))
    return f"{shown} and {len(values) - most} more" if len(values) > most else shown
