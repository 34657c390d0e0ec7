"""answers.jsonl, and the parts of it that the processes of a run append to.

Each process of each run has a part of its own, answers-part-RANK-NUMBER.jsonl, so that no process of a killed
run that still lives writes into another's. A last line without its end does not count: a killed process was
writing it.
"""
import itertools
import json
from dataclasses import dataclass

from harmonkit.checkpoints import write_text
from harmonkit.prompts import shorten

NAME, PARTS = "answers.jsonl", "answers-part-*.jsonl"


@dataclass(frozen=True)
class Answer:
    text: str | None            # None: the question failed
    why: str = ""               # it failed

    def line(self, key) -> str:
        outcome = {"failed": self.why} if self.text is None else {"answer": self.text}
        return json.dumps({"key": key} | outcome, ensure_ascii=False) + "\n"


def read(out, questions) -> dict:
    """{key: Answer} of all that answers.jsonl and its parts hold, answered or failed.

    Raises ValueError for a line that is broken or of another question, or for two answers to one question.
    """
    keys, found = {question.key for question in questions}, {}
    for path in paths(out):
        for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
            place = f"{path}, line {number}"
            key, now = parse(place, line)
            if key not in keys:
                raise ValueError(f"{place}: {key!r} is no question of the data; give another --out")
            before = found.get(key)
            if before is None or before.text is None:
                found[key] = now
            elif now.text not in (None, before.text):
                raise ValueError(f"{place}: another answer to {key!r} than before; --overwrite answers anew")
    return found


def parse(place, line) -> tuple:
    """(key, Answer) of a line. Raises ValueError."""
    try:
        row = json.loads(line)
        known = Answer(None, row["failed"]) if "failed" in row else Answer(row["answer"])
        if not all(isinstance(text, str) for text in (row["key"], known.text or "", known.why)):
            raise TypeError
        return row["key"], known
    except (ValueError, KeyError, TypeError):
        text = shorten(line.decode(errors="replace"))
        raise ValueError(f"{place}: not an answer: {text}; --overwrite answers anew") from None


def paths(out) -> list:
    return [path for path in (out / NAME, *sorted(out.glob(PARTS))) if path.exists()]


def remove(out):
    for path in paths(out):
        path.unlink()


def open_part(out, rank):
    """A new part of process `rank`, open for writing bytes."""
    for number in itertools.count():
        try:
            return open(out / PARTS.replace("*", f"{rank:04}-{number:04}"), "xb")
        except FileExistsError:
            continue


def merge(out, questions, found):
    """Write answers.jsonl in the questions' order, and remove the parts."""
    write_text(out / NAME, "".join(found[question.key].line(question.key) for question in questions))
    for part in out.glob(PARTS):
        part.unlink()
