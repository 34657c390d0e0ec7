"""Files of rows: JSON, JSON lines, CSV, TSV, and lists of images. A row is an image with words, or a chat.

    {"image": "a.jpg", "conversations": [{"from": "human", "value": …}, {"from": "gpt", "value": …}]}
    {"image": "a.jpg", "caption": …}
    {"messages": [{"role": "user", "content": …}, {"role": "assistant", "content": …}]}

The words of a row are read by words.py, its image by records.py.
"""
import zlib
from functools import cached_property, partial
from pathlib import Path

from harmonkit.data.formats import Format, folder_of
from harmonkit.data.labels import LABEL_FIELDS, label_names, read_label
from harmonkit.data.lines import Lines, TabRows, open_table
from harmonkit.data.records import (
    IMAGE_FIELDS,
    IMAGE_SUFFIXES,
    LINK_FIELDS,
    ImageAt,
    fields_of_files,
    image_of,
    origin_of_file,
    read_image,
    sample_of,
    skip_errors,
)
from harmonkit.data.words import CAPTIONS, decode, parse_json

CHATS = ("conversations", "messages", "question", "instruction", "query")           # columns of tables
LISTS = ("data", "train", "annotations", "images")              # names of a list of rows, in this order


class RowFile(Format):
    """A file of rows. `open`, of each form, gives the entries of a path; `row` makes a record of an entry.

    images: the folder of relative image paths, otherwise the file's own. text: the field with the words.
    """

    def __init__(self, path, images=None, text=None):
        self.path = path
        self.folders = [folder_of(path, images), Path(path).parent]
        self.text = text
        self.entries = self.open(path)

    def row(self, entry) -> dict:
        """The record of an entry. Raises ValueError."""
        return entry

    @cached_property
    def class_names(self) -> dict:
        names, _ = label_names(self.path, [], len(self))
        return names

    def parts(self):
        return [self.crc if isinstance(self.entries, list) else self.entries.crc]

    def sample(self, name, entry):
        fields = self.row(entry)
        image = image_of(name, fields, *self.folders)
        label, class_name = -1, None
        labels = [fields[field] for field in LABEL_FIELDS if isinstance(fields.get(field), (int, str))]
        if labels and labels[0] != "":
            label, class_name = read_label(labels[0], self.class_names)
        sample = sample_of(name, fields, image, text=self.text, label=label)
        if class_name and not (sample.caption or sample.turns):
            sample = sample_of(name, {"caption": class_name}, image, label=label)
        return sample


class JSONLines(RowFile):
    """A JSON object on each line."""
    kind = "JSON lines"
    suffixes = (".jsonl", ".ndjson", ".jsonlines")

    def open(self, path):
        return Lines(path)

    def row(self, entry):
        return parse_json(entry)


class JSONList(RowFile):
    """A JSON list of objects, or an object that holds one. A file of JSON lines may have this suffix too."""
    kind = "JSON list"
    suffixes = (".json",)

    def open(self, path):
        data = Path(path).read_bytes()
        self.crc = zlib.crc32(data)
        text = decode(data)
        try:
            content = parse_json(text)
        except ValueError as error:
            if "Extra data" in str(error) and text.lstrip().startswith("{"):
                self.kind = JSONLines.kind
                return Lines(path)
            raise ValueError(f"{path}: not JSON ({error})") from None
        if is_coco(content):
            self.kind = "COCO captions"
        return rows_in(path, content)

    def row(self, entry):
        row = parse_json(entry) if isinstance(entry, bytes) else entry
        if isinstance(row, dict) and isinstance(row.get("sentences"), list):
            return karpathy_row(row)
        return row


class Table(RowFile):
    """CSV or TSV, whatever the suffix. The first line names the columns.

    Without names, two columns are an image and a caption.
    """
    kind = "table"
    suffixes = (".csv", ".tsv")

    @classmethod
    def lies_at(cls, path):
        return super().lies_at(path) or (path.lower().endswith(".txt") and names_columns(path))

    def open(self, path):
        rows = open_table(path)
        self.kind = "TSV" if isinstance(rows, TabRows) else "CSV"
        if not len(rows):
            return rows
        try:
            self.columns = rows[0]
        except ValueError as error:
            raise ValueError(f"{path}: its first line is {error}") from None
        head = [column.lower() for column in self.columns]
        links = [column for column in head if column in LINK_FIELDS or column.startswith("http")]
        if links and not set(head) & {*IMAGE_FIELDS, *CHATS}:
            raise ValueError(f"{path}: its images are on the web (column {links[0]!r}); download them first, "
                             "with img2dataset for example")
        if set(head) & {*IMAGE_FIELDS, *CAPTIONS, *CHATS}:
            rows.drop_first()
        elif len(head) == 2 and any(cell.endswith(IMAGE_SUFFIXES) for cell in head):
            self.columns = ["image", "caption"]
            if head[1].endswith(IMAGE_SUFFIXES):
                self.columns.reverse()
        else:
            raise ValueError(f"{path}: the first line is expected to name the columns, such as image and "
                             f"caption; here: {', '.join(rows[0])}"[:300])
        if {"filepath", "title"} <= set(head) and not set(head) & set(CAPTIONS):    # OpenCLIP's names
            self.columns[head.index("title")] = "caption"
        return rows

    def parts(self):
        return [self.columns, *super().parts()]

    def row(self, entry):
        while len(entry) > len(self.columns) and not entry[-1]:
            entry.pop()
        if len(entry) != len(self.columns):
            raise ValueError(f"{len(entry)} cells, but {len(self.columns)} columns")
        return dict(zip(self.columns, entry, strict=True))


class PathList(RowFile):
    """A text file with the path of an image on each line, and perhaps its caption after a tab."""
    kind = "list of images"
    suffixes = (".txt",)

    def open(self, path):
        return Lines(path)

    def row(self, entry):
        image, _, caption = decode(entry).strip().partition("\t")
        return {"image": image, "caption": caption}


class Pairs(Format):
    """Harmon's own format: a JSON list of {image, annotation}, and a {"caption": …} file for each image."""
    kind = "pairs of image and annotation"

    @classmethod
    def lies_at(cls, path):
        if not path.lower().endswith(".json"):
            return False
        with open(path, "rb") as file:                          # may be long; its first entry is enough
            first_entry, _, _ = file.read(2 ** 16).partition(b"}")
        return b'"annotation"' in first_entry

    def __init__(self, path, images=None, captions=None, text=None):
        self.path = path
        self.rows = JSONList(path)
        self.entries = self.rows.entries
        self.images = folder_of(path, images)
        self.captions = folder_of(path, captions)
        self.text = text

    def parts(self):
        return self.rows.parts()

    def sample(self, name, entry):
        entry = self.rows.row(entry)
        path = self.images / entry["image"]
        image = ImageAt(partial(read_image, name, path), partial(origin_of_file, entry["image"], path))
        file = self.captions / entry["annotation"]
        with skip_errors(f"{name}: {file}"):
            fields = fields_of_files({file.suffix.lower(): file.read_bytes})
        return sample_of(name, fields, image, text=self.text)


# ---- the rows in a JSON file ---------------------------------------------------------------------------

def rows_in(path, content) -> list:
    """The list of rows in the content of a JSON file. Raises ValueError if there is none."""
    if isinstance(content, dict):
        if is_coco(content):
            return coco_rows(path, content["images"], content["annotations"])
        if content and all(key.lower().endswith(IMAGE_SUFFIXES) for key in content):
            return [row_of_image(image, value) for image, value in content.items()]
        if content and all(isinstance(value, dict) for value in content.values()):
            return list(content.values())                       # {id: row}
        lists = {name: value for name, value in content.items() if isinstance(value, list) and value}
        known = [name for name in LISTS if name in lists] or list(lists)
        if not known:
            raise ValueError(f"{path}: a list of samples is expected; here: {', '.join(list(content)[:12])}")
        content = lists[known[0]]
    if not isinstance(content, list):
        raise ValueError(f"{path}: a list of samples is expected, not {type(content).__name__}")
    return content


def is_coco(content) -> bool:
    if not isinstance(content, dict):
        return False
    return all(isinstance(content.get(name), list) for name in ("images", "annotations"))


def coco_rows(path, images, annotations) -> list:
    """COCO's captions: images [{id, file_name}] and annotations [{image_id, caption}], several an image."""
    captions = {}
    for annotation in annotations:
        if isinstance(annotation, dict) and "caption" in annotation:
            captions.setdefault(str(annotation.get("image_id")), []).append(annotation["caption"])
    if not captions:
        raise ValueError(f"{path}: COCO annotations without captions; captions_*.json is expected")
    rows = []
    for image in images:
        if isinstance(image, dict):
            fields = {key: image[key] for key in ("file_name", "coco_url") if key in image}
            image = fields | {"captions": captions.get(str(image.get("id")), [])}
        rows.append(image)
    return rows


def karpathy_row(row) -> dict:
    """Karpathy's splits of COCO and Flickr: {filepath?, filename, sentences: [{raw}]}."""
    image = Path(row.get("filepath", ""), row.get("filename", ""))
    return {"image": str(image), "captions": [sentence["raw"] for sentence in row["sentences"]]}


def row_of_image(image, value) -> dict:
    """A row of {image: caption} or {image: {"caption": …}}."""
    return {**value, "image": image} if isinstance(value, dict) else {"image": image, "caption": value}


# ---- tables --------------------------------------------------------------------------------------------

def names_columns(path) -> bool:
    """Whether the first line of a text file names an image and a caption column."""
    with open(path, "rb") as file:
        head = decode(file.readline(2 ** 12)).strip().lower()
    cells = head.split("\t") if "\t" in head else head.split(",")
    return bool({*cells} & {*IMAGE_FIELDS}) and bool({*cells} & {*CAPTIONS})
