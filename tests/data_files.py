"""Files in every data format, for the tests of harmonkit.data."""
import io
import json
import tarfile

from PIL import Image

from harmonkit.data.mixture import open_mixture
from harmonkit.data.sources import open_source

CONVERSATION = [
    {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "a color"},
    {"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "yes"},
]
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "a color"}]},
    {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "yes"},
]
TURNS = [("What is it?", "a color"), ("Sure?", "yes")]             # of both
LINES = (                           # of a mixture with a source of each format that `write_sources` writes
    {"path": "data_info.json", "task": "text2image", "images": "images", "captions": "captions"},
    {"path": "{00000..00001}.tar", "task": "text2image", "weight": 3},
    {"path": "classes", "task": "text2image"},
    {"path": "llava.jsonl", "task": "image2text", "images": "images"},
    {"path": "text.json", "task": "text"},
    {"path": "shapes", "task": "image2text", "count": 20},
)
RATIO = {"text": 1, "image2text": 3, "text2image": 8}


def color(i):
    return (i * 37 % 256, i * 91 % 256, i * 53 % 256)


def png(i):
    """An image of one color, 96 × 120 pixels."""
    file = io.BytesIO()
    Image.new("RGB", (96, 120), color(i)).save(file, "PNG")
    return file.getvalue()


def write_tar(path, files):
    """A tar file of {name: bytes}."""
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return str(path)


def write_shard(path, numbers, corrupt=(), words=None):
    """A tar file of images and captions. words(i): {suffix: bytes, None = no file} instead of a caption."""
    members = {}
    for i in numbers:
        files = words(i) if words else {"txt": f"caption {i}".encode()}
        for suffix, content in {"png": b"not an image" if i in corrupt else png(i), **files}.items():
            if content is not None:
                members[f"{i:06d}.{suffix}"] = content
    return write_tar(path, members)


def write_sources(folder):
    (folder / "images").mkdir()
    (folder / "captions").mkdir()
    for i in range(6):
        (folder / "images" / f"{i}.png").write_bytes(png(i))
        (folder / "captions" / f"{i}.json").write_text(json.dumps({"caption": f"caption {i}"}))
    pairs = [{"image": f"{i}.png", "annotation": f"{i}.json"} for i in range(6)]
    (folder / "data_info.json").write_text(json.dumps(pairs))
    llava = [json.dumps({"image": f"{i}.png", "conversations": CONVERSATION}) for i in range(6)]
    (folder / "llava.jsonl").write_text("\n".join(llava) + "\n")
    text = []
    for i in range(6):
        turns = [{"from": "human", "value": f"Is it {i}?"}, {"from": "gpt", "value": f"yes, {i}"}]
        text.append({"conversations": turns})
    (folder / "text.json").write_text(json.dumps(text))
    for name in ("tree_frog", "owl"):
        (folder / "classes" / name).mkdir(parents=True)
        (folder / "classes" / name / "a.png").write_bytes(png(3))
    write_shard(folder / "00000.tar", range(5))
    write_shard(folder / "00001.tar", range(5, 10))
    return folder


def open_lines(folder, *lines):
    """The sources of a mixture with these lines."""
    (folder / "mixture.json").write_text(json.dumps(lines))
    return open_mixture(folder / "mixture.json")


def write_rows(folder, name, content):
    """The path of a file with this content: bytes, text, or what is written as JSON or JSON lines."""
    if name.endswith(".jsonl") and isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    if not isinstance(content, (str, bytes)):
        content = json.dumps(content)
    data = content.encode() if isinstance(content, str) else content
    (folder / name).write_bytes(data)
    return str(folder / name)


def first_row(folder, row, **options):
    """The sample of a row in a JSON list."""
    return open_source(write_rows(folder, "a.json", [row]), **options)[0]


def captions(source):
    return [source[i].caption(None) for i in range(len(source))]


def captions_and_labels(source):
    samples = [source[i] for i in range(len(source))]
    return [(sample.caption and sample.caption(None), sample.label) for sample in samples]


def pixel(sample):
    return sample.image().getpixel((5, 5))
