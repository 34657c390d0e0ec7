"""Where does a port differ first? Compare its tensors with those of export.py, in order of computation.

    python porting/compare.py vectors/ mine/

mine/ holds .safetensors files with tensors under the names in vectors/index.json; half precision is read as
float32. The relative error of a tensor is max |a - b| / max(max |a|, 1e-3), where a was exported. Inputs may
be left out, and gradients if there are none. Exit status: 0 all equal, 1 not so, 2 bad input.
"""
import argparse
import json
import re
import sys
from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
from parameters import read_safetensors

FLOOR = 1e-3                     # of max |a|: a tensor that is smaller everywhere is compared absolutely
TOLERANCE = {"float32": 1e-4, "uint8": 1e-2}    # of the relative error; other types: 0
ROUNDING = 15                    # times the error by rounding alone, if that is more than the tolerance
PITFALLS = Path(__file__).with_name("PITFALLS.md")


@dataclass
class Result:
    about: dict                  # the entry of the index
    verdict: str                 # "equal", "differs", "missing", "shape" or "left out"
    error: float = 0.0
    tolerance: float = 0.0
    detail: str = ""


def cause_of(name):
    """The cause in the first row of PITFALLS.md with a pattern that matches the tensor's name."""
    rows = re.findall(r"^\| `(.+)` \| (.+) \|$", PITFALLS.read_text(encoding="utf-8"), re.M)
    return next(cause for patterns, cause in rows if any(fnmatchcase(name, p) for p in patterns.split("` `")))


def relative_error(a, b, valid=True):
    """The largest relative error where `valid`, and its index. NaN is an infinite error."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    difference = np.where(valid, np.nan_to_num(np.abs(a - b), nan=np.inf), 0)
    worst = np.unravel_index(difference.argmax(), a.shape)
    return float(difference[worst] / max(np.abs(a).max(), FLOOR)), tuple(map(int, worst))


def tolerance_of(about):
    rounding = about.get("rounding", 0)
    if about["name"].endswith("mlp.fc2.in"):
        return max(2e-5, 4 * rounding)                                  # a tanh GELU is less than 1e-4 off
    return max(TOLERANCE.get(about["dtype"], 0), ROUNDING * rounding)


def compare(index, expected, mine):
    """A Result for each tensor of the index, in its order. expected, mine: {name: array}."""
    has_gradients = any("/gradient/" in name for name in mine)
    results = []
    for about in index["tensors"]:
        name = about["name"]
        if name not in mine:
            optional = about["kind"] == "input" or about["kind"] == "gradient" and not has_gradients
            results.append(Result(about, "left out" if optional else "missing"))
            continue
        a, b = expected[name], mine[name]
        if a.shape != b.shape or a.size == 0:
            verdict = "equal" if a.shape == b.shape else "shape"
            results.append(Result(about, verdict, detail=f"shape {b.shape}, expected {a.shape}"))
            continue
        valid = np.True_
        if "attention_mask" in about:                                   # padding means nothing
            mask, axis = about["attention_mask"]
            valid = expected[mask][:, -a.shape[axis]:]                  # (B, L)
            valid = valid.reshape([n if i in (0, axis) else 1 for i, n in enumerate(a.shape)])
        error, worst = relative_error(a, b, valid)
        tolerance = tolerance_of(about)
        verdict = "equal" if error <= tolerance else "differs"
        detail = f"relative error {error:.1e}, tolerance {tolerance:.0e}; "
        detail += f"at {list(worst)} {b[worst]:.6g}, expected {a[worst]:.6g}"
        results.append(Result(about, verdict, error, tolerance, detail))
    return results


def report(results, out=print):
    """Print the first tensor that differs with its usual cause, and the counts. Returns the exit status."""
    missing = [r.about["name"] for r in results if r.verdict == "missing"]
    for name in missing[:10]:
        out(f"missing: {name}")
    wrong = [r for r in results if r.verdict in ("differs", "shape")]
    if wrong:
        first = wrong[0]
        about = first.about
        out(f"\nthe first tensor that differs, number {results.index(first) + 1} of {len(results)}:")
        out(f"  {about['name']}  {about['dtype']} {about['shape']}")
        out(f"  {first.detail}")
        out(f"  computed by:  {about['source']}")
        out(f"  usual cause:  {cause_of(about['name'])}")
        out(f"  {len(wrong) - 1} later ones differ as well\n")
    count = Counter(r.verdict for r in results)
    out(f"{len(results)} tensors: {count['equal']} equal, {count['differs']} differ, "
        f"{count['shape']} of a wrong shape, {len(missing)} missing, {count['left out']} left out")
    equal = [r for r in results if r.verdict == "equal" and r.tolerance]
    if equal:
        worst = max(equal, key=lambda r: r.error / r.tolerance)
        out(f"nearest to its tolerance: {worst.error:.1e} of {worst.tolerance:.0e}, {worst.about['name']}")
    return 1 if wrong or missing else 0


def read(vectors, mine):
    """The index, its tensors and mine. Raises FileNotFoundError or ValueError."""
    if not (vectors / "index.json").is_file():
        raise FileNotFoundError(f"{vectors}: no index.json in it; the first folder is export.py's")
    files = sorted(mine.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{mine}: no .safetensors file in it; the second folder is the port's")
    index = json.loads((vectors / "index.json").read_text())
    expected = read_safetensors(vectors / "vectors.safetensors")
    return index, expected, {name: x for file in files for name, x in read_safetensors(file).items()}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("vectors", type=Path, help="the folder that export.py wrote")
    parser.add_argument("mine", type=Path, help="the folder that the port wrote")
    args = parser.parse_args(argv)
    try:
        return report(compare(*read(args.vectors, args.mine)))
    except (ValueError, OSError) as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
