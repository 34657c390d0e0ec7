"""Prompt files: what to draw, and the name of each picture.

    .json            a list of prompts; an object that holds such a list; or an object {id: prompt}
    .jsonl, .ndjson  a prompt a line
    .txt             a line of text a prompt
    .csv, .tsv       a row a prompt, under a header
    a folder         of .txt files, a prompt a file, as DPG-Bench has them

A prompt is a string, or an object with a text in TEXT_FIELDS and perhaps an id in NAME_FIELDS.
"""
import codecs
import csv
import hashlib
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path

TEXT_FIELDS = ("prompt", "text", "caption", "prompts")             # the first that is there and not empty
NAME_FIELDS = ("id", "item_id", "prompt_id", "name", "key", "file_name")
LIST_FIELDS = ("prompts", "data", "annotations", "items", "rows", "samples", "captions")
SUFFIXES = (".json", ".jsonl", ".ndjson", ".txt", ".csv", ".tsv")
DELIMITERS = {".csv": ",;\t", ".tsv": "\t,;"}                       # in this order
MAX_NAME_BYTES = 120            # a file system allows 143 to 255, with numbers and suffixes added
RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))}


@dataclass(frozen=True)
class Prompt:
    text: str
    name: str                   # of its picture's file, without .png


@dataclass(frozen=True)
class Entry:
    """A prompt as the file has it: its place ("line 3"), a string or an object, an id from outside of it."""
    place: str
    content: object
    name: str = ""


def read_prompts(path) -> list:
    """The Prompts of a file or folder. A prompt without an id is named by its number and its words.

    Raises FileNotFoundError or ValueError in one line that names the file and the place in it.
    """
    path = Path(path)
    entries = folder_entries(path) if path.is_dir() else file_entries(path)
    prompts, place_of = [], {}
    for entry in entries:
        text, name = text_and_name(path, entry)
        name = name or f"{len(prompts):05d}-{slug(text)}"
        if name in place_of:
            raise ValueError(f"{path}: {place_of[name]} and {entry.place} both have the id {name!r}; "
                             "each picture needs a name of its own")
        place_of[name] = entry.place
        prompts.append(Prompt(text, name))
    if not prompts:
        raise ValueError(f"{path}: there is no prompt in it")
    return prompts


def text_and_name(path, entry) -> tuple:
    """The text of an entry, and its id as a file name or ""."""
    content, name = entry.content, entry.name
    if isinstance(content, dict):
        fields = {str(key).strip().lower(): value for key, value in content.items()}
        texts = [fields[field] for field in TEXT_FIELDS if field in fields]
        if not texts:
            known = shorten(", ".join(map(str, content)) or "none")
            raise ValueError(f"{path}, {entry.place}: no field prompt, text or caption; there is: {known}")
        content = next((text for text in texts if not is_blank(text)), "")
        ids = [fields[field] for field in NAME_FIELDS if not is_blank(fields.get(field))]
        if ids and not isinstance(ids[0], (str, int, float)):
            kind = type(ids[0]).__name__
            raise ValueError(f"{path}, {entry.place}: the id is a {kind}; a text or a number is expected")
        name = name or str(ids[0] if ids else "")
    if not isinstance(content, str):
        kind = type(content).__name__
        raise ValueError(f"{path}, {entry.place}: a {kind} where the prompt's text is expected")
    content = content.strip()
    if not content:
        raise ValueError(f"{path}, {entry.place}: the prompt is empty")
    check_text(content, f"{path}, {entry.place}: the prompt")
    check_text(name, f"{path}, {entry.place}: the id")
    return content, safe_name(name) if name else ""


def is_blank(value) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def check_text(text, what):
    """Raise ValueError for lone surrogates: half characters, or bytes of a command that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{what} is not valid Unicode text; give it in UTF-8") from None


# ---- files ---------------------------------------------------------------------------------------

def folder_entries(path) -> list:
    """A prompt a .txt file, named as the file."""
    files = sorted(file for file in path.glob("*.txt") if not file.name.startswith("."))
    if not files:
        raise ValueError(f"{path}: a folder without .txt files; give a prompt file or a folder of .txt")
    return [Entry(file.name, read_text(file), file.stem) for file in files]


def file_entries(path) -> list:
    text = read_text(path)
    suffix = path.suffix.lower()
    if suffix and suffix not in SUFFIXES:
        raise ValueError(f"{path}: not a prompt file; known are {' '.join(SUFFIXES)}")
    if suffix in DELIMITERS:
        return table_entries(path, text, DELIMITERS[suffix])
    start = text.lstrip()[:1]
    is_json = suffix == ".json" or start == "[" or (suffix == "" and start == "{")
    if is_json and suffix != ".txt":
        return json_entries(path, text)
    # Split at \n alone: str.splitlines would also split at U+2028 or U+0085 inside a text.
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), start=1)]
    lines = [(number, line) for number, line in lines if line]
    if suffix in (".jsonl", ".ndjson"):
        return json_lines(path, lines)
    return [Entry(f"line {number}", line) for number, line in lines]


def read_text(path) -> str:
    """The text of a file in UTF-8, or in UTF-16 with a byte order mark."""
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ValueError(f"{path}: a folder; a file is expected") from None
    is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: not text in UTF-8; save the file as UTF-8") from None


def parse_json(path, text, first_line=1):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise ValueError(f"{path}, line {line}: not JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:           # numbers of 5000 digits, 5000 nested lists
        raise ValueError(f"{path}, line {first_line}: not JSON ({shorten(error)})") from None


def json_lines(path, lines) -> list:
    return [Entry(f"line {number}", parse_json(path, line, number)) for number, line in lines]


def json_entries(path, text) -> list:
    """The prompts of one JSON document; of JSON lines too, which some tools call .json."""
    try:
        content = parse_json(path, text)
        lines = entry_lines(text) if isinstance(content, list) else ()
        return listed(path, content, lines)
    except ValueError:
        lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), start=1)]
        lines = [(number, line) for number, line in lines if line]
        if len(lines) > 1 and is_object(lines[0][1]):
            return json_lines(path, lines)
        raise


def is_object(line) -> bool:
    try:
        return isinstance(json.loads(line), (dict, str))
    except (ValueError, RecursionError):
        return False


def entry_lines(text) -> list:
    """The line on which each entry of a JSON list begins."""
    decoder, lines, line = json.JSONDecoder(), [], 1
    position = text.index("[") + 1
    counted = 0                                             # characters whose line breaks are in `line`
    while True:
        position = re.compile(r"[\s,]*").match(text, position).end()
        if text[position] == "]":
            return lines
        line += text.count("\n", counted, position)
        counted = position
        lines.append(line)
        _, position = decoder.raw_decode(text, position)


def listed(path, content, lines=()) -> list:
    """The entries of a list, of an object that holds one, or of {id: prompt}. lines: of a list's entries."""
    if isinstance(content, list):
        places = [f"entry {number}" for number in range(1, len(content) + 1)]
        if lines:
            places = [f"{place} (line {line})" for place, line in zip(places, lines)]
        return [Entry(place, row) for place, row in zip(places, content)]
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON list of prompts, but it holds a {type(content).__name__}")
    if any(isinstance(content.get(field), str) for field in TEXT_FIELDS):
        return [Entry("entry 1", content)]                                  # one prompt
    lists = [key for key, value in content.items() if isinstance(value, list)]
    known = [field for field in LIST_FIELDS if isinstance(content.get(field), list)]
    if known or len(lists) == 1:
        return listed(path, content[known[0] if known else lists[0]])
    if len(content) == 1 and isinstance(content.get(next(iter(content))), dict):
        inner = next(iter(content.values()))
        is_prompt = any(isinstance(inner.get(field), str) for field in TEXT_FIELDS)
        if not is_prompt:
            return listed(path, inner)
    if lists:
        raise ValueError(f"{path}: several lists ({shorten(', '.join(lists))}); call the prompts' one "
                         "'prompts' or 'data'")
    return [Entry(f"entry {key!r}", value, str(key)) for key, value in content.items()]


def table_entries(path, text, delimiters) -> list:
    """The rows of a CSV or TSV under a header. The delimiter is the first for which a column is known."""
    for delimiter in delimiters:
        rows = table_rows(path, text, delimiter)
        header = [cell.strip().lower() for cell in rows[0][1]] if rows else []
        if set(header) & set(TEXT_FIELDS):
            break
    else:
        columns = shorten(", ".join(table_rows(path, text, delimiters[0])[0][1]) if rows else "none")
        raise ValueError(f"{path}, line 1: no column prompt, text or caption; the columns are: {columns}")
    entries, seen = [], set()
    for line, cells in rows[1:]:
        if len(cells) > len(header):
            raise ValueError(f"{path}, line {line}: {len(cells)} cells under {len(header)} columns; a text "
                             "that holds a delimiter must stand in quotes")
        row = dict(zip(header, cells))
        # DPG-Bench's table has a row for each of a prompt's questions.
        if "proposition_id" in header:
            key = (row.get("item_id"), row.get("text"))
            if key in seen:
                continue
            seen.add(key)
        entries.append(Entry(f"line {line}", row))
    return entries


def table_rows(path, text, delimiter, quoting=csv.QUOTE_MINIMAL) -> list:
    """[(number of the first line, cells), …] of the rows that are not blank."""
    rows, line = [], 1
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                rows.append((line, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        # Tab-separated files often hold quotes that quote nothing.
        if path.suffix.lower() == ".tsv" and quoting != csv.QUOTE_NONE:
            return table_rows(path, text, delimiter, csv.QUOTE_NONE)
        raise ValueError(f"{path}, line {line}: not a table ({error})") from None
    return rows


# ---- names ---------------------------------------------------------------------------------------

def slug(text) -> str:
    """The first words of a prompt as a file name."""
    words = cut(re.sub(r"\W+", "-", text.lower()).strip("-")[:60], 100).strip("-")
    return safe_name(words or "image")


def safe_name(name) -> str:
    """An id as a file name of at most MAX_NAME_BYTES: slashes, and characters that some systems forbid,
    become "-"; an image's suffix goes. Long ids end in a digest, so that different ones stay different.
    """
    stem = re.sub(r"\.(png|jpe?g|webp)$", "", name.strip(), flags=re.IGNORECASE)
    parts = [part for part in re.split(r"[/\\]+", stem) if part.strip(". ")]
    safe = re.sub(r'[\x00-\x1f\x7f:*?"<>|]+', "-", "-".join(parts)).strip(". ") or "image"
    if safe.split(".")[0].lower() in RESERVED:                              # on Windows
        safe = f"_{safe}"
    if len(safe.encode()) > MAX_NAME_BYTES:
        digest = hashlib.sha256(name.encode()).hexdigest()[:8]
        safe = f"{cut(safe, MAX_NAME_BYTES - 9)}-{digest}"
    return safe


def cut(text, num_bytes) -> str:
    """The longest beginning of at most so many bytes in UTF-8."""
    return text.encode(errors="replace")[:num_bytes].decode(errors="ignore")


def shorten(text, most=80) -> str:
    """One line of at most `most` characters, for messages."""
    text = " ".join(str(text).split())
    return text if len(text) <= most else f"{text[:most - 1]}…"
