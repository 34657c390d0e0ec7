"""What the NumPy port stands on: a checkpoint's names as a tree, and a trace of the tensors that pass through it."""
import functools
import json
from contextlib import contextmanager
from pathlib import Path

import numpy as np

TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "U8": "u1", "BOOL": "?"}


def read_safetensors(path):
    """{name: array}, half precision as float32. Raises ValueError for what is not such a file.

    The file is 8 bytes with the header's length (little endian), the header in JSON, and the tensors' bytes, row-major.
    """
    try:
        data = np.memmap(path, np.uint8, "r")
        start = 8 + int(data[:8].view("<u8")[0])
        tensors = {}
        for name, about in json.loads(bytes(data[8:start])).items():
            if name != "__metadata__":
                first, end = about["data_offsets"]
                x = data[start + first:start + end].view(TYPES[about["dtype"]]).reshape(about["shape"])
                x = (x.astype("<u4") << 16).view("<f4") if about["dtype"] == "BF16" else x          # bfloat16 is float32's upper half
                tensors[name] = np.array(x, np.float32 if about["dtype"] == "F16" else x.dtype)
        return tensors
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{path}: not a complete safetensors file ({error})") from None


class Part:
    """A place among the parameters: p.mar.encoder_blocks[0].attn.qkv.weight is an array, everything short of it is a Part again.

    config is the content of config.json, trace a Trace. `"bias" in p` tells whether there is such a parameter, or a part with parameters.
    """

    def __init__(self, weights, config, trace, name=""):
        self.weights, self.config, self.trace, self.name = weights, config, trace, name

    def __getattr__(self, key):
        name = f"{self.name}.{key}" if self.name else str(key)
        return self.weights[name] if name in self.weights else Part(self.weights, self.config, self.trace, name)

    __getitem__ = __getattr__                                                   # p.layers[0]

    def __contains__(self, key):
        name = f"{self.name}.{key}"
        return name in self.weights or any(k.startswith(name + ".") for k in self.weights)

    def __iter__(self):                                                         # p.layers[0], p.layers[1], … as many as there are
        i = 0
        while i in self:
            yield self[i]
            i += 1

    def show(self, what, x):
        """x as it is, and to the trace under this part's name."""
        return self.trace.show(f"{self.name}.{what}" if self.name else what, x)


class Trace:
    """Keeps the tensors whose names are wanted. A name is the place in the computation, then the part: generate/step1/mar.z_proj.out."""

    def __init__(self, wanted=()):
        self.wanted, self.kept, self.place = frozenset(wanted), {}, ""

    def show(self, name, x):
        if self.place + name in self.wanted:
            self.kept[self.place + name] = np.array(x, order="C")
        return x

    @contextmanager
    def at(self, place):
        before, self.place = self.place, f"{self.place}{place}/"
        yield
        self.place = before


def shown(layer):
    """Decorates a function (part, x, …) so that it shows its input and its output."""
    @functools.wraps(layer)
    def showing(p, x, *rest, **options):
        p.show("in", x)
        return p.show("out", layer(p, x, *rest, **options))
    return showing


def load(folder):
    """A folder with config.json and model.safetensors, or shards of it -> the root Part. Raises FileNotFoundError or ValueError."""
    files = sorted(Path(folder).glob("model*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder}: no model.safetensors in it; convert.py makes such a folder of any weights")
    weights = {name: x for file in files for name, x in read_safetensors(file).items()}
    config = json.loads((Path(folder) / "config.json").read_text())
    if "vae_scale" not in config or "encoder_num_heads" not in config.get("mar", {}):
        raise ValueError(f"{folder}: config.json does not give every size; convert.py makes a folder whose does")
    return Part(weights, config, Trace())
