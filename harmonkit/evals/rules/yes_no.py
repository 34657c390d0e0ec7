"""Yes/no answers as VLMEvalKit reads them, for POPE and MME.

Source: open-compass/VLMEvalKit:vlmeval/dataset/utils/yorn.py, vlmeval/smp/misc.py.
"""
import re

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
COMMA_IN_NUMBER = re.compile(r"\d,\d")
LONE_PERIOD = re.compile(r"(?<!\d)\.(?!\d)")
# The VQA evaluation code, where this comes from, passes a flag of value 32 in the place of the count.
# That VLMEvalKit's copy does so too is not verified.
MOST_PERIODS = 32


def read_vlmevalkit(answer):
    """A text -> "Yes", "No" or "Unknown": the one of the words "yes" and "no" that it holds, in any case."""
    words = without_punctuation(require_text(answer).lower()).split()
    yes, no = "yes" in words, "no" in words
    if yes == no:
        return "Unknown"
    return "Yes" if yes else "No"


def without_punctuation(text):
    """Delete each mark that stands beside a space anywhere in `text`; replace the others by a space.

    A comma between two digits, anywhere, has all marks deleted.
    """
    delete_all = COMMA_IN_NUMBER.search(text) is not None
    cleaned = text
    for mark in PUNCTUATION:
        beside_space = mark + " " in text or " " + mark in text
        cleaned = cleaned.replace(mark, "" if beside_space or delete_all else " ")
    return LONE_PERIOD.sub("", cleaned, count=MOST_PERIODS)


def require_text(answer):
    """`answer`, which must be a string; ValueError otherwise: no rule reads a missing answer."""
    if not isinstance(answer, str):
        raise ValueError(f"an answer must be a text, but one is {answer!r}")
    return answer
