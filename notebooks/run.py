"""Execute the notebooks and compare their key numbers with the committed ones, or write their outputs anew.

    python notebooks/run.py [--write] [1_vae 4_llm …]

A key number is a printed line `key: name = value` (show.key). It may differ by 2%, or by the ± of its line,
because machines round differently. The solutions of the exercises run after the last cell, unseen.
"""
import argparse
import base64
import hashlib
import io
import os
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from PIL import Image

from harmonkit.images import open_image

FOLDER = Path(__file__).resolve().parent
KEY = re.compile(r"^key: (.+?) = (\S+)(?: ± (\d+)%)?$", re.MULTILINE)
SOLUTION = re.compile(r"<details>.*?```python\n(.*?)```", re.DOTALL)


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def sources(notebook, cell_type):
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == cell_type)


def key_numbers(notebook):
    """{name: (value, relative tolerance)} of a notebook's outputs."""
    printed = "\n".join(output.text for output in outputs(notebook) if output.get("name") == "stdout")
    return {name: (float(value), float(percent or 2) / 100) for name, value, percent in KEY.findall(printed)}


def differences(committed, fresh):
    """What is wrong with fresh key numbers, as sentences."""
    wrong = [f"key number {name!r} is new or missing" for name in committed.keys() ^ fresh.keys()]
    for name in committed.keys() & fresh.keys():
        (was, _), (now, tolerance) = committed[name], fresh[name]
        if not abs(now - was) <= tolerance * max(abs(was), abs(now)):
            wrong.append(f"key number {name!r} is {now:g}; committed is {was:g}, {tolerance:.0%} is allowed")
    return sorted(wrong)


def compact(output):
    """Reduce the picture of an output, if it has one, to 256 colors: a quarter of the bytes."""
    if "image/png" in output.get("data", {}):
        image = open_image(base64.b64decode(output.data["image/png"]))
        file = io.BytesIO()
        image = image.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=4)
        image.save(file, "PNG", optimize=True)
        output.data["image/png"] = base64.b64encode(file.getvalue()).decode()


def run(path, write):
    """Execute one notebook in a fresh kernel of this Python; returns what went wrong, as sentences."""
    notebook = nbformat.read(path, as_version=4)
    committed, committed_code = key_numbers(notebook), notebook.metadata.get("outputs_of")
    code = hashlib.sha256(sources(notebook, "code").encode()).hexdigest()[:16]
    cells = list(notebook.cells)
    notebook.cells += map(nbformat.v4.new_code_cell, SOLUTION.findall(sources(notebook, "markdown")))
    try:
        NotebookClient(notebook, timeout=600, kernel_name="python3", record_timing=False,
                       coalesce_streams=True, extra_arguments=["--log-level=ERROR"],
                       resources={"metadata": {"path": str(FOLDER)}}).execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        return [re.sub(r"\x1b\[[0-9;]*m", "", str(error))]                      # without color codes
    notebook.cells = cells
    if not write:
        stale = ["the committed outputs are of other cells"] * (code != committed_code)
        return stale + differences(committed, key_numbers(notebook))
    for output in outputs(notebook):
        compact(output)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}, "outputs_of": code}
    nbformat.write(notebook, path)
    return []


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="notebooks, with or without .ipynb; default: all")
    parser.add_argument("--write", action="store_true", help="keep the outputs")
    args = parser.parse_args()
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"      # pictures into the notebook
    failed = False
    for name in args.names or sorted(path.name for path in FOLDER.glob("*.ipynb")):
        path = FOLDER / f"{Path(name).stem}.ipynb"
        if not path.is_file():
            parser.error(f"{path} does not exist")
        start = time.time()
        wrong = run(path, args.write)
        print(f"{path.stem:18}{time.time() - start:4.0f} s   {'FAILED' if wrong else 'ok'}", flush=True)
        print(*wrong, sep="\n", end="\n" * bool(wrong))
        failed = failed or bool(wrong)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
