"""Execute the notebooks, and hold their key numbers against the committed ones or write their outputs anew.

    python notebooks/run.py                     # check: what CI does; nothing is written
    python notebooks/run.py --write             # execute, and keep the outputs
    python notebooks/run.py 1_vae 4_llm         # some of them

A key number is a line `key: name = value` of a notebook's output (show.key); it may differ by 2%, or by what the line says behind ±, since machines
round differently and training multiplies that. A check fails where a cell fails (an assertion, most of the time), where a key number is missing, new
or another, and where the committed outputs were made by other cells than the committed ones.
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

FOLDER = Path(__file__).resolve().parent
KEY = re.compile(r"^key: (.+?) = (\S+)(?: ± (\d+)%)?$", re.MULTILINE)
COLOR_CODES = re.compile(r"\x1b\[[0-9;]*m")


def printed(notebook):
    """What the code cells of a notebook printed, as one text."""
    return "\n".join(output.text for cell in notebook.cells for output in cell.get("outputs", []) if output.output_type == "stream" and output.name == "stdout")


def key_numbers(notebook):
    """{name: (value, relative tolerance)} of a notebook's outputs. Raises ValueError where a name comes twice."""
    numbers = {}
    for name, value, percent in KEY.findall(printed(notebook)):
        if name in numbers:
            raise ValueError(f"the key number {name!r} is printed twice")
        numbers[name] = float(value), float(percent or 2) / 100
    return numbers


def differences(committed, fresh):
    """What is wrong with fresh key numbers, as sentences."""
    wrong = [f"key number {name!r} is missing; committed is {committed[name][0]:g}" for name in committed if name not in fresh]
    wrong += [f"key number {name!r} is new; write the outputs anew" for name in fresh if name not in committed]
    for name in committed.keys() & fresh.keys():
        (was, _), (now, tolerance) = committed[name], fresh[name]
        if not abs(now - was) <= tolerance * max(abs(was), abs(now)):
            wrong.append(f"key number {name!r} is {now:g}; committed is {was:g}, and {tolerance:.0%} is allowed")
    return sorted(wrong)


def fingerprint(notebook):
    """Of the code cells: outputs carry that of the cells that made them."""
    return hashlib.sha256("\0".join(cell.source for cell in notebook.cells if cell.cell_type == "code").encode()).hexdigest()[:16]


def failure(notebook, error):
    """A failed execution in a few lines: which cell, what it raised, where."""
    cell = next((i for i, cell in enumerate(notebook.cells) for output in cell.get("outputs", []) if output.output_type == "error"), None)
    if cell is None:
        return f"{type(error).__name__}: {error}"
    output = next(o for o in notebook.cells[cell].outputs if o.output_type == "error")
    trace = COLOR_CODES.sub("", "\n".join(output.traceback)).splitlines()
    return "\n".join([f"cell {cell} failed, {output.ename}: {output.evalue}", *(f"    {line}" for line in trace[-12:])])


def execute(notebook, timeout=600):
    """Run all cells in a fresh kernel of this very Python, the notebook holding the outputs; returns a list of what went wrong."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    client = NotebookClient(notebook, timeout=timeout, kernel_name="python3", record_timing=False, coalesce_streams=True, extra_arguments=["--log-level=ERROR"],
                            resources={"metadata": {"path": str(FOLDER)}})
    try:
        client.execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        return [failure(notebook, error)]
    return []


def compact(notebook):
    """Reduce the pictures in the outputs to 256 colors each, a quarter of the bytes."""
    for output in [o for cell in notebook.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]:
        small, image = io.BytesIO(), Image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))).convert("RGB")
        image.quantize(256, method=Image.Quantize.MAXCOVERAGE, kmeans=4, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
        output.data["image/png"] = base64.b64encode(small.getvalue()).decode()


def run(path, write):
    """Execute one notebook; returns (a list of what went wrong, the number of key numbers)."""
    notebook = nbformat.read(path, as_version=4)
    committed, made_by = key_numbers(notebook), notebook.metadata.get("outputs_of")
    wrong, fresh = execute(notebook), {}
    if not wrong:
        try:
            fresh = key_numbers(notebook)
        except ValueError as error:
            wrong.append(str(error))
    if write and not wrong:
        compact(notebook)
        notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}, "language_info": {"name": "python"},
                             "outputs_of": fingerprint(notebook)}
        nbformat.write(notebook, path)
    elif not wrong:
        if made_by != fingerprint(notebook):
            wrong.append("the committed outputs are not those of the committed cells; write them anew")
        wrong += differences(committed, fresh)
    return wrong, len(fresh)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="notebooks, with or without .ipynb; default: all")
    parser.add_argument("--write", action="store_true", help="keep the outputs instead of comparing the key numbers")
    args = parser.parse_args()
    paths = [FOLDER / f"{Path(name).stem}.ipynb" for name in args.names] or sorted(FOLDER.glob("[0-9]*.ipynb"))
    missing = [path.name for path in paths if not path.is_file()]
    if missing or not paths:
        print(f"run.py: no such notebook in {FOLDER.name}/: {', '.join(missing) or 'none at all'}", file=sys.stderr)
        return 2
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"      # pictures go into the notebook, whatever the caller's backend
    failed, start = 0, time.time()
    for path in paths:
        began = time.time()
        wrong, count = run(path, args.write)
        verdict = "FAILED" if wrong else f"ok, {count} key numbers {'written' if args.write else 'as committed'}"
        print(f"{path.stem:18} {time.time() - began:5.0f} s   {verdict}", flush=True)
        for text in wrong:
            print("  " + text.replace("\n", "\n  "), flush=True)
        failed += bool(wrong)
    print(f"{len(paths) - failed} of {len(paths)} notebooks passed in {time.time() - start:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
