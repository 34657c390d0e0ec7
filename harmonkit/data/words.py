"""The words of a record: captions and conversations, in the forms in which data sets have them.

A record is a dictionary {field: value}: an object of a JSON file, a row of a table, or the files of one stem.
A caption is a text or a list of texts. A conversation is a list of turns:

    [{"from": "human", "value": …}, {"from": "gpt", "value": …}]                         # LLaVA, ShareGPT
    [{"role": "user", "content": …}, {"role": "assistant", "content": …}]                # text, or parts
    [{"user": …, "assistant": …}]                                                        # the_cauldron
"""
import ast
import json
import re
from collections import Counter
from dataclasses import dataclass

CAPTIONS = ("caption", "captions", "text", "prompt", ".caption", ".txt", "txt", "texts")    # in this order
CONVERSATIONS = ("conversations", "conversation", "messages", "texts")
QUESTION_AND_ANSWER = (             # fields of one turn pair, in a record or in a conversation
    ("user", "assistant"), ("human", "gpt"), ("question", "multiple_choice_answer"), ("question", "answer"),
    ("question", "answers"), ("instruction", "output"), ("query", "response"), ("prompt", "completion"),
    ("prompt", "response"),
)
SPEAKER_FIELDS = ("from", "role", "speaker")
SPEAKERS = {                        # names of roles, in lower case
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "model": "assistant",
    "chatgpt": "assistant", "system": "system", "developer": "system",
}
IMAGE_MARK = re.compile(r"<image>|<\|image\|>|<image_1>|<\|image_1\|>|<ImageHere>")
NOT_UNICODE = "its text is not valid Unicode, in UTF-8"
SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Words:
    """What a record says: captions, one of which is drawn, and turns [(question, answer), …]."""
    captions: tuple = ()
    turns: tuple = ()
    dropped_system: int = 0         # system turns that were left out


def words_of(fields, text=None) -> Words:
    """The words of a record, empty if it has none. Raises ValueError.

    text: a field's name, or a list of names of which the first that is not empty counts. Default: a
    conversation, and the first caption of CAPTIONS.
    """
    fields = normalized(fields)
    if text is not None:
        return chosen_words(fields, [text] if isinstance(text, str) else text)
    captions = next(filter(None, (captions_of(fields.get(name)) for name in CAPTIONS)), ())
    for name in CONVERSATIONS:
        if is_conversation(fields.get(name)):
            turns, dropped_system = turns_of(fields[name])
            dropped_system += not is_missing(fields.get("system"))      # LLaMA-Factory has it in a field
            return Words(captions, turns, dropped_system)
        if name != "texts" and not is_missing(fields.get(name)):
            raise ValueError(f"its {name} are not a list of turns")
    turns = tuple(question_and_answer(fields))
    return Words(captions, (turns,) if all(turns) and turns else ())


def chosen_words(fields, names) -> Words:
    """The words in the first of these fields that is not empty. Raises ValueError if all are."""
    values = [fields.get(name.lower(), fields.get(f".{name.lower()}")) for name in names]
    for value in values:
        if is_conversation(value):
            turns, dropped_system = turns_of(value)
            return Words((), turns, dropped_system)
        captions = captions_of(value)
        if captions:
            return Words(captions)
    chosen = " or ".join(map(repr, names))
    raise ValueError(f"no {chosen} in it, or it is empty; its fields are {', '.join(list(fields)[:12])}")


# ---- values --------------------------------------------------------------------------------------------

def is_missing(value) -> bool:
    """Whether a field says nothing: None, NaN (an empty cell of pandas), or empty."""
    return value is None or value != value or value in ("", [], {})


def normalized(fields) -> dict:
    """A record with names in lower case, and with lists in place of texts that are lists."""
    return {str(name).strip().lower(): unpack(value) for name, value in fields.items()}


def clean(value) -> str:
    """A value as text without blanks around it; "" if it is missing. Raises ValueError."""
    if is_missing(value):
        return ""
    if isinstance(value, bytes):
        value = decode(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise ValueError(f"a text is expected, not {type(value).__name__}")
    if SURROGATE.search(value):
        raise ValueError(NOT_UNICODE)
    return value.strip()


def decode(data) -> str:
    """Bytes of UTF-8, or of UTF-16 with its mark, as text. Bytes that are neither become surrogates, which
    `clean` refuses; so one broken sample does not cost its file.
    """
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", "surrogatepass")
    return data.decode("utf-8-sig", "surrogateescape")


def parse_json(data):
    """The content of JSON in bytes or text; tabs and line breaks inside strings are let pass.

    Raises ValueError.
    """
    try:
        return json.loads(decode(data) if isinstance(data, bytes) else data, strict=False)
    except RecursionError:
        raise ValueError("JSON with too many brackets inside each other") from None


def unpack(value):
    """The list in a text that is one, as tables hold lists; any other value as it is."""
    if not isinstance(value, str) or not re.match(r"""\s*\[\s*["'{]""", value):
        return value
    for read in (parse_json, ast.literal_eval):
        try:
            unpacked = read(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        if isinstance(unpacked, list):
            return unpacked
    return value


def captions_of(value) -> tuple:
    """The captions in a text or a list of texts, without empty ones. Raises ValueError."""
    if is_conversation(value):
        return ()
    values = value if isinstance(value, (list, tuple)) else [value]
    return tuple(filter(None, map(clean, values)))


# ---- conversations -------------------------------------------------------------------------------------

def is_conversation(value) -> bool:
    """Whether a value is a list of turns. Lists of other objects, such as boxes, are none."""
    if not isinstance(value, list) or not value or not all(isinstance(turn, dict) for turn in value):
        return False
    has_speaker = any(field in value[0] for field in SPEAKER_FIELDS)
    return has_speaker or any(set(pair) <= set(value[0]) for pair in QUESTION_AND_ANSWER)


def turns_of(conversation) -> tuple:
    """A conversation -> ((question, answer), …), and the number of system turns, which are dropped.

    Marks like `<image>` are dropped: the image always opens the first turn. A last question without an answer
    is cut. Raises ValueError unless questions and answers alternate, each with a text.
    """
    spoken = [part for turn in conversation for part in speech(turn)]
    turns = [(role, text) for role, text in spoken if role != "system"]
    dropped_system = len(spoken) - len(turns)
    if turns[:1] == [("user", "")] and turns[1:2] and turns[1][0] == "user":
        del turns[0]                                            # a message of its own shows the image
    if turns and turns[-1] == ("assistant", ""):
        turns.pop()
    if turns and turns[-1][0] == "user":
        turns.pop()
    roles = [role for role, _ in turns]
    texts = [text for _, text in turns]
    if roles != ["user", "assistant"] * (len(turns) // 2):
        raise ValueError("questions and answers do not alternate")
    if not turns:
        raise ValueError("no answered question in it")
    if not all(texts):
        raise ValueError("a turn without text")
    return tuple(zip(texts[::2], texts[1::2], strict=True)), dropped_system


def speech(turn) -> list:
    """[(role, text)] of a turn, or two of them if it holds both question and answer."""
    pair = question_and_answer(turn)
    if pair:
        return [("user", pair[0]), ("assistant", pair[1])]
    role = next((turn[key] for key in SPEAKER_FIELDS if turn.get(key)), None)
    if str(role).lower() not in SPEAKERS:
        raise ValueError(f"unknown speaker {str(role)[:20]!r}")
    content = next((turn[key] for key in ("value", "content", "text") if turn.get(key) is not None), "")
    return [(SPEAKERS[role.lower()], text_of(content))]


def text_of(content) -> str:
    """The text of a turn: a string, or parts [{"type": "text", "text": …}, {"type": "image"}, …]."""
    parts = content if isinstance(content, list) else [content]
    texts = []
    for part in parts:
        if isinstance(part, dict):
            kind = part_kind(part)
            if "image" not in kind and "text" not in kind:
                raise ValueError(f"a part of type {kind[:20]!r}")
            part = part.get("text")
        texts.append(IMAGE_MARK.sub("", clean(part)).strip())
    return "\n".join(filter(None, texts))


def part_kind(part) -> str:
    """The type of a part of a turn; parts without one say {"text": …} or {"image": …}."""
    return str(part.get("type") or ("image" if part.get("image") else "text"))


def image_parts(fields) -> list:
    """The images that the parts of a record's conversation name: paths, or what stands for them."""
    found = []
    for turn in next(filter(is_conversation, map(fields.get, CONVERSATIONS)), []):
        content = turn.get("content", turn.get("value"))
        parts = content if isinstance(content, list) else []
        for part in parts:
            if isinstance(part, dict) and "image" in part_kind(part):
                named = (part.get(key) for key in ("image", "image_url", "url", "path"))
                image = next(filter(None, named), None)
                if isinstance(image, dict):                     # OpenAI's {"image_url": {"url": …}}
                    image = image.get("url", image)
                found.append(image)
    return [image for image in found if image]


def question_and_answer(fields) -> list:
    """[question, answer] of a record or turn like {"question": …, "answer": …}; [] if it is none.

    Of several answers the most frequent one counts, the first of equally frequent ones.
    """
    pairs = [pair for pair in QUESTION_AND_ANSWER if set(pair) <= set(fields)]
    if not pairs:
        return []
    question_field, answer_field = pairs[0]
    question = text_of(fields[question_field])
    if question_field == "instruction" and clean(fields.get("input")):
        question = f"{question}\n{clean(fields['input'])}"
    answers = fields[answer_field]
    answers = answers if isinstance(answers, list) else [answers]
    answers = [answer.get("answer") if isinstance(answer, dict) else answer for answer in answers]
    counts = Counter(filter(None, map(text_of, answers)))
    return [question, counts.most_common(1)[0][0] if counts else ""]
