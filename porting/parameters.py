"""Parameters of the NumPy port: read from files or made from names; a tree of them, which shows tensors."""
import functools
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

BUNDLED = Path(__file__).resolve().parent.parent / "checkpoints"
TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "U8": "u1",
         "BOOL": "?"}


def read_safetensors(path):
    """{name: array}, half precision as float32. Raises ValueError for an incomplete or another file.

    The file is 8 bytes with the header's length (little endian), the header in JSON, and the tensors' bytes.
    """
    try:
        data = np.memmap(path, np.uint8, "r")
        start = 8 + int(data[:8].view("<u8")[0])
        header = json.loads(bytes(data[8:start]))
        header.pop("__metadata__", None)
        tensors = {}
        for name, about in header.items():
            first, end = about["data_offsets"]
            x = data[start + first:start + end].view(TYPES[about["dtype"]]).reshape(about["shape"])
            if about["dtype"] == "BF16":                    # the upper half of a float32
                x = (x.astype("<u4") << 16).view("<f4")
            tensors[name] = np.array(x, np.float32 if about["dtype"] == "F16" else x.dtype)
        return tensors
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{path}: not a complete safetensors file ({error})") from None


def load(model, by_class=False):
    """A bundled model, or a folder with config.json and model*.safetensors -> the root Part, the folder.

    by_class: a MAR that draws by class. A Harmon folder holds it in the folder mar, without a VAE of its own.
    """
    folder = BUNDLED / model if (BUNDLED / model).is_dir() else Path(model)
    if by_class and (folder / "mar" / "config.json").is_file():
        whole, (own, _) = load(folder)[0], load(folder / "mar")
        return Part(whole.weights | own.weights, own.config), folder
    files = sorted(folder.glob("model*.safetensors"))
    how = "python -m harmonkit.scripts.convert writes a complete folder from any weights"
    if not files:
        raise FileNotFoundError(f"{folder}: no model.safetensors in it; {how}")
    config = json.loads((folder / "config.json").read_text())
    if "vae_scale" not in config or "encoder_num_heads" not in config.get("mar", {}):
        raise ValueError(f"{folder}: its config.json lacks sizes; {how}")
    return Part({name: x for file in files for name, x in read_safetensors(file).items()}, config), folder


def uniform(name, count):
    """`count` float32 values in [-1, 1): upper 24 bits of the splitmix64 stream that crc32(name) seeds."""
    gamma, mix1, mix2 = np.array([0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB], np.uint64)
    z = np.arange(1, count + 1, dtype=np.uint64) * gamma + np.uint64(zlib.crc32(name.encode()))
    z = (z ^ z >> np.uint64(30)) * mix1
    z = (z ^ z >> np.uint64(27)) * mix2
    z ^= z >> np.uint64(31)
    return (z >> np.uint64(40)).astype(np.float32) * np.float32(2 ** -23) - np.float32(1)


def random_weight(name, shape):
    """A float32 array that depends only on its name in the checkpoint and its shape."""
    offset, scale = 0, 1 / np.prod(shape[1:]) ** 0.5        # matrices and convolutions
    if name.endswith(("embed_tokens.weight", "_pos_embed_learned", "fake_latent", "mask_token")):
        scale = 0.02                                        # the norms after these show a wrong eps
    elif name.endswith(("adaLN_modulation.1.weight", "final_layer.linear.weight")):
        scale = 0.3 / np.prod(shape[1:]) ** 0.5
    elif len(shape) == 1:                                   # norms, biases
        offset, scale = (1, 0.1) if name.endswith(".weight") else (0, 0.05)
    w = uniform(name, np.prod(shape)) * np.float32(3 ** 0.5 * scale)
    w = w.reshape(shape) + np.float32(offset)
    if name.endswith("final_layer.linear.weight"):
        # The noise prediction of a head that sees white noise, so that sampled latents stay of order 1.
        C, W = shape[0] // 2, shape[1]
        input_proj = random_weight(name.replace("final_layer.linear", "input_proj"), (W, C))
        w[:C] += np.float32(C / W) * input_proj.T
    return w


def not_recorded(name, x, function):
    return x


@dataclass(frozen=True)
class Part:
    """A place among the parameters: p.mar.z_proj.weight is an array, p.mar.z_proj a Part.

    trace(name, x, function) -> x gets each tensor that the port shows. A name is the place in the
    computation, then the module: generate/step1/mar.z_proj.out.
    """
    weights: dict
    config: dict                                            # the content of config.json
    trace: Callable = not_recorded
    name: str = ""
    place: str = ""
    function: str = ""                                      # of the port, that is running

    def __getattr__(self, key):
        name = f"{self.name}.{key}".lstrip(".")
        return self.weights[name] if name in self.weights else replace(self, name=name)

    __getitem__ = __getattr__                               # p.layers[0]

    def __contains__(self, key):                            # "bias" in p.q_proj
        name = f"{self.name}.{key}"
        return name in self.weights or any(other.startswith(name + ".") for other in self.weights)

    def __iter__(self):                                     # p.layers[0], p.layers[1], … as many as there are
        i = 0
        while i in self:
            yield self[i]
            i += 1

    def at(self, place):
        return replace(self, place=f"{self.place}{place}/")

    def show(self, what, x):
        name = f"{self.name}.{what}".lstrip(".")
        return self.trace(self.place + name, x, self.function)


def shown(result=None, argument=None):
    """Decorates a function (part, x, …) of the port: shows x and the result, where they are given names."""
    def decorate(function):
        @functools.wraps(function)
        def showing(p, *args, **options):
            if argument is not None:
                p.show(argument, args[0])
            inside = replace(p, function=function.__name__)
            out = function(inside, *args, **options)
            return out if result is None else inside.show(result, out)
        return showing
    return decorate


layer = shown("out", argument="in")
