"""A mixture with a source of each form in which data are brought, for tests of what reads a mixture."""
import json

from data_files import png, write_tar

SYSTEM = {"role": "system", "content": "Be short."}
QUESTION = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}


def write_every_form(folder, count=12, with_parquet=True) -> list:
    """Write `count` samples in each form -> [(line of a mixture, format, words of sample 0), …]."""
    forms = Forms(folder, count)
    forms.folders()
    forms.rows()
    forms.shards()
    if with_parquet:
        forms.parquet()
    return forms.written


class Forms:
    """Sample i of every source has image `png(i)`, and the caption "caption i" if the form has captions."""

    def __init__(self, folder, count):
        self.folder = folder
        self.numbers = range(count)
        self.written = []

    def add(self, format, path, words="caption 0", task="text2image", **options):
        self.written.append(({"path": path, "task": task, **options}, format, words))

    def write(self, path, content):
        """A file of text or bytes; returns its path."""
        path = self.folder / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def images(self, folder, suffix="png"):
        for i in self.numbers:
            self.write(f"{folder}/{i:03d}.{suffix}", png(i))

    def folders(self):
        for i in self.numbers:
            self.write(f"flat/{i:03d}.txt", f"caption {i}\n")
            self.write(f"nested/{i % 2}/{i:03d}.PNG", png(i))
            self.write(f"nested/{i % 2}/{i:03d}.caption", f"caption {i}")
            self.write(f"prompts/{i:03d}.json", json.dumps({"caption": None, "prompt": f"caption {i}"}))
            self.write(f"imagenet/train/{('n01440764', 'n02099601')[i % 2]}/{i}.JPEG", png(i))
            self.write(f"named/c{i % 2}/{i}.png", png(i))
            self.write(f"classes/{('tree_frog', 'owl')[i % 2]}/{i}.png", png(i))
        self.write("named/classes.json", json.dumps({"c0": "a cat", "c1": "a dog"}))
        for folder in ("flat", "prompts", "jsonl", "csv", "plain"):
            self.images(folder)
        rows = [{"file_name": f"{i:03d}.png", "text": f"caption {i}"} for i in self.numbers]
        self.write("jsonl/metadata.jsonl", "\n".join(map(json.dumps, rows)))
        table = "".join(f"{i:03d}.png,caption {i}\n" for i in self.numbers)
        self.write("csv/metadata.csv", f"file_name,text\n{table}")
        self.write("flat/._000.png", "AppleDouble")
        self.add("folder of images with captions", "flat")
        self.add("folder of images with captions", "nested")
        self.add("folder of images with captions", "prompts", text=["long", "prompt"])
        self.add("folder of images with metadata", "jsonl")
        self.add("folder of images with metadata", "csv")
        self.add("class folders, named by ImageNet-1k", "imagenet/train", "tench")
        self.add("class folders, named by classes.json", "named", "a cat")
        self.add("class folders, named by the folders", "classes", "owl")
        self.add("folder of images", "plain", None, task="reca")

    def rows(self):
        self.images("pictures")
        for i in self.numbers:
            self.write(f"words/{i}.json", json.dumps({"caption": f"caption {i}"}))
        pairs = [{"image": f"{i:03d}.png", "annotation": f"{i}.json"} for i in self.numbers]
        captions = [{"image": f"{i:03d}.png", "caption": f"caption {i}"} for i in self.numbers]
        lines = [{"image": f"{i:03d}.png", "caption": f"caption {i}\u2028\u0085x"} for i in self.numbers]
        llava = [{"image": [f"{i:03d}.png"], "conversations": [
            {"from": "system", "value": "Be short."}, {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": f"caption {i}"}, {"from": "human", "value": "Sure?"},
        ]} for i in self.numbers]
        chats = [{"image": f"pictures/{i:03d}.png", "messages": [
            SYSTEM, QUESTION, {"role": "assistant", "content": f"caption {i}"}]} for i in self.numbers]
        texts = [{"messages": chat["messages"]} for chat in chats]
        self.write("pairs.json", json.dumps(pairs))
        self.write("list.json", "\ufeff" + json.dumps(captions))
        lines = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
        self.write("lines.jsonl", f"\ufeff{lines}")
        self.write("llava.json", json.dumps(llava))
        self.write("chats.jsonl", "\n".join(map(json.dumps, chats)))
        self.write("texts.jsonl", "\n".join(map(json.dumps, texts)))
        for name, comma in {"a.csv": ",", "a.tsv": "\t"}.items():
            self.write(name, f"image{comma}caption\n" + "".join(
                f"{i:03d}.png{comma}caption {i}\n" for i in self.numbers))
        self.add("pairs of image and annotation", "pairs.json", images="pictures", captions="words")
        self.add("JSON list", "list.json", images="pictures")
        self.add("JSON lines", "lines.jsonl", "caption 0\u2028\u0085x", images="pictures")
        self.add("CSV", "a.csv", images="pictures")
        self.add("TSV", "a.tsv", images="pictures")
        self.add("JSON list", "llava.json", task="image2text", images="pictures")
        self.add("JSON lines", "chats.jsonl", task="image2text")
        self.add("JSON lines", "texts.jsonl", task="text")

    def shards(self):
        chat = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "caption 0"}]
        words = {                   # name of a shard: {suffix: content} beside its image
            "txt": lambda i: {"txt": f"caption {i}"}, "caption": lambda i: {"caption": f"caption {i}"},
            "prompt": lambda i: {"json": json.dumps({"prompt": f"caption {i}"})},
            "null": lambda i: {"json": json.dumps({"caption": None, "status": ""}), "txt": f"caption {i}"},
            "img2dataset": lambda i: {"json": json.dumps({"url": "https://a.b"}), "txt": f"caption {i}"},
            "chat": lambda i: {"json": json.dumps({"conversations": chat})},
            "cls": lambda i: {"cls": f"{207 * (i % 2)}\n"},
        }
        for name, words_of in words.items():
            self.shard(f"{name}.tar", words_of, self.numbers)
        for k in range(2):
            self.shard(f"shards/{k:05d}.tar", words["txt"], self.numbers[k::2])
        for path in ("txt.tar", "caption.tar", "prompt.tar", "null.tar", "img2dataset.tar", "shards",
                     "shards/{00000..00001}.tar", "shards/*.tar"):
            self.add("WebDataset", path)
        self.add("WebDataset", "chat.tar", task="image2text")
        self.add("WebDataset, labels named by ImageNet-1k", "cls.tar", "tench")

    def shard(self, path, words_of, numbers):
        files = {"__MACOSX/._0.png": b"", "._000000.png": b""}
        for i in numbers:
            files[f"{i:06d}.png"] = png(i)
            files |= {f"{i:06d}.{suffix}": content.encode() for suffix, content in words_of(i).items()}
        write_tar(self.write(path, ""), files)

    def parquet(self):
        import pyarrow
        import pyarrow.parquet

        image = [{"bytes": png(i), "path": f"{i}.png"} for i in self.numbers]
        caption = [f"caption {i}" for i in self.numbers]
        chats = [[SYSTEM, {"role": "user", "content": "What?"}, {"role": "assistant", "content": text}]
                 for text in caption]
        llava = [[{"from": "human", "value": "What?"}, {"from": "gpt", "value": text}] for text in caption]
        columns = {
            "caption/data/train-00000-of-00001": {"image": image, "caption": caption},
            "conversations": {"image": [png(i) for i in self.numbers], "conversations": llava},
            "messages": {"images": [[entry] for entry in image], "messages": chats},
            "texts": {"images": [[entry] for entry in image],
                      "texts": [[{"user": "What?", "assistant": text, "source": "x"}] for text in caption]},
            "table/metadata": {"file_name": [f"{i:03d}.png" for i in self.numbers], "prompt": caption},
        }
        saved = pyarrow.table({"image": image, "text": caption})
        path = self.write("saved/data-00000-of-00001.arrow", "")
        with pyarrow.ipc.new_stream(str(path), saved.schema) as file:
            file.write_table(saved, max_chunksize=5)
        self.images("table")
        for name, content in columns.items():
            path = self.write(f"{name}.parquet", "")
            pyarrow.parquet.write_table(pyarrow.table(content), path, row_group_size=5)
        self.add("parquet", "caption")
        self.add("arrow", "saved")
        self.add("parquet", "conversations.parquet", task="image2text")
        self.add("parquet", "messages.parquet", task="image2text")
        self.add("parquet", "texts.parquet", task="image2text")
        self.add("folder of images with metadata", "table")
