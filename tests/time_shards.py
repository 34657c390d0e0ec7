"""Time shards: how long 10, 100 and 1,000 of them take to open, and their samples to read in random order.

    python -m tests.time_shards             # two minutes, in the project's root
    python tests/time_shards.py             # anywhere, if the project is installed

The first start scans the shards, the second finds their indexes. Each start is a process of its own. All
shards are links to one file of 500 samples, so the data lie in memory: what is timed is the search for them.
"""
import io
import multiprocessing
import os
import random
import tarfile
import tempfile
import time
from pathlib import Path

from PIL import Image

from harmonkit.data.sources import open_source

COUNTS = (10, 100, 1000)
SAMPLES = 500                       # a shard
READ = 2000                         # samples that are timed


def main():
    print("shards  start   opened in    words, ms a sample   image, ms a sample", flush=True)
    for count in COUNTS:
        with tempfile.TemporaryDirectory() as folder:
            write_shards(Path(folder), count)
            for start in ("first", "second"):
                print(f"{count:6}  {start:6}", end=" ", flush=True)
                process = multiprocessing.get_context("spawn").Process(target=measure, args=(folder,))
                process.start()
                process.join()


def write_shards(folder, count):
    """Shards of a small image and a caption a sample."""
    image = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(image, "PNG")
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for i in range(SAMPLES):
            for suffix, content in {"png": image.getvalue(), "txt": f"caption {i}".encode()}.items():
                member = tarfile.TarInfo(f"{i:06d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    for k in range(1, count):
        os.link(folder / "00000.tar", folder / f"{k:05d}.tar")


def measure(folder):
    start = time.perf_counter()
    source = open_source(folder)
    opened = time.perf_counter() - start
    chosen = random.Random(0).choices(range(len(source)), k=READ)
    words, images = [], []
    for _ in range(3):                                          # the quickest counts: other programs run too
        start = time.perf_counter()
        for i in chosen:
            assert source[i].caption(None) == f"caption {i % SAMPLES}"
        middle = time.perf_counter()
        for i in chosen:
            source[i].image()
        words.append(middle - start)
        images.append(time.perf_counter() - middle)
    print(f"{opened:9.2f} s {min(words) / READ * 1000:20.3f} {min(images) / READ * 1000:21.3f}", flush=True)


if __name__ == "__main__":
    main()
