"""The rules of docs/architecture.md: imports point down, few packages, narrow lines, seven root files."""
import ast
import json
import re
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = ("harmon", "mar", "llm", "vae", "diffusion_head", "sample", "train")
PACKAGES = {"torch", "numpy", "safetensors", "tokenizers", "PIL", "tqdm"}       # as they are imported
CORE = ("chat_template", "config", "tokenizer", "weight_files", "checkpoints", "pipeline", "images", "colors",
        "inpainting", "reconstruction", "devices", "fast", "repeatable", "prompts", "outputs", "drawing",
        "terminal", "interrupts", "mar_files")

# Rooms from the bottom up. A module belongs to the longest name here that is its own or a package around it.
LEVELS = (
    ("diffusion_head", "vae", "llm"),
    ("mar",),
    tuple(f"harmonkit.{module}" for module in CORE),
    ("harmon", "harmonkit.shapes_world"),
    ("harmonkit.data", "harmonkit.evals"),
    ("harmonkit.training", "harmonkit.by_class"),
    ("sample", "train"),
    ("harmonkit.scripts",),                                     # ablate runs train.py
)
LEVEL_OF = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
LAZY = {                                        # packages that a function may import, by module
    "harmonkit.weight_files": {"huggingface_hub"},
    "harmonkit.fast": {"flash_attn"},
    "harmonkit.images": {"pillow_heif"},
    "harmonkit.data.parquet": {"pyarrow"},
    "harmonkit.data.mixture": {"tomllib"},      # of the standard library from Python 3.11 on
    "harmonkit.training.monitor": {"matplotlib"},
    "harmonkit.scripts.ablate": {"matplotlib"},
    "harmonkit.scripts.benchmark": {"transformers"},
    "harmonkit.evals.fid": {"cleanfid"},
    "harmonkit.evals.detector": {"transformers", "scipy"},
    "harmonkit.evals.mmmu": {"pyarrow"},
}


def read_sources() -> dict:
    """{dotted module name: source} of the seven files and of harmonkit."""
    sources = {}
    for path in [*ROOT.glob("*.py"), *ROOT.glob("harmonkit/**/*.py")]:
        parts = path.relative_to(ROOT).with_suffix("").parts
        sources[".".join(parts).removesuffix(".__init__")] = path.read_text()
    return sources


@cache
def imports(source) -> list:
    """[(dotted name, whether a function holds the import), …]; of `from a import b` both a and a.b."""
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    inside = {id(node) for function in functions for node in ast.walk(function)}
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [(alias.name, id(node) in inside) for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            dotted = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            names += [(name, id(node) in inside) for name in dotted]
    return names


def import_graph(sources) -> dict:
    """{module: the modules of ours that its import runs}: the named ones, and the packages around them."""
    graph = {}
    for module, source in sources.items():
        names = {module, *(name for name, _ in imports(source))}
        around = {other for other in sources if any(name.startswith(f"{other}.") for name in names)}
        graph[module] = sorted((around | names) & sources.keys() - {module})
    return graph


def find_circle(graph):
    """A list of modules that import each other in turn, or None."""
    finished = set()

    def visit(module, path):
        if module in path:
            return path[path.index(module):]
        if module in finished:
            return None
        for other in graph[module]:
            circle = visit(other, [*path, module])
            if circle:
                return circle
        finished.add(module)
        return None
    return next(filter(None, (visit(module, []) for module in graph)), None)


def room_of(module):
    rooms = [room for room in LEVEL_OF if f"{module}.".startswith(f"{room}.")]
    assert rooms, f"{module} is in no room"
    return max(rooms, key=len)


def may_import(module, other) -> bool:
    """Down, or within a room, or within the core."""
    if module.startswith(f"{other}."):                          # the packages around a module
        return True
    room, other_room = room_of(module), room_of(other)
    is_below = LEVEL_OF[other_room] < LEVEL_OF[room]
    is_core = room in LEVELS[2] and other_room in LEVELS[2]
    return is_below or room == other_room or is_core


def find_upward(graph) -> list:
    """The imports that do not point down, as sentences."""
    wrong = []
    for module, others in graph.items():
        for other in others:
            around_another = any(name.startswith(f"{other}.") for name in others)
            if not around_another and not may_import(module, other):
                wrong.append(f"{module} imports {other}")
    return wrong


def find_foreign(sources) -> list:
    """The imports of packages beyond PACKAGES and LAZY, as sentences."""
    wrong = set()
    known = PACKAGES | sys.stdlib_module_names | {module.split(".")[0] for module in sources}
    for module, source in sources.items():
        for name, is_lazy in imports(source):
            package = name.split(".")[0]
            if package not in known and not (is_lazy and package in LAZY.get(module, ())):
                wrong.add(f"{module} imports {package}")
    return sorted(wrong)


def test_there_is_no_import_circle_and_no_import_points_up():
    graph = import_graph(read_sources())
    assert {"harmonkit.config", "harmonkit.pipeline", "mar", "vae"} <= set(graph["harmon"])
    assert find_circle(graph) is None
    assert find_upward(graph) == []


def test_the_model_imports_nothing_of_ours_and_the_core_does_not_import_harmon():
    graph = import_graph(read_sources())
    below = {module: graph[module] for module in ("diffusion_head", "vae", "llm", "mar")}
    assert below == {"diffusion_head": [], "vae": [], "llm": [], "mar": ["diffusion_head"]}
    assert not [module for module in CORE if "harmon" in graph[f"harmonkit.{module}"]]
    of_harmon = {module for module in CORE if f"harmonkit.{module}" in graph["harmon"]}
    assert of_harmon == {"chat_template", "config", "checkpoints", "pipeline", "images"}


PLANTED = {
    "llm imports mar": ("llm", "from mar import MLP"),
    "llm imports harmonkit.config": ("llm", "import harmonkit.config"),
    "harmonkit.config imports harmon": ("harmonkit.config", "def late():\n    from harmon import Harmon"),
    "harmonkit.data.sources imports harmonkit.training.runs":
        ("harmonkit.data.sources", "from harmonkit.training import runs"),
    "harmonkit.evals.shapes imports sample": ("harmonkit.evals.shapes", "import sample"),
    "harmonkit.training.optim imports train": ("harmonkit.training.optim", "from train import train"),
    "train imports sample": ("train", "import sample"),
    "train imports harmonkit.scripts.ablate": ("train", "from harmonkit.scripts import ablate"),
}


@pytest.mark.parametrize("sentence", PLANTED)
def test_a_planted_upward_import_is_found(sentence):
    module, line = PLANTED[sentence]
    sources = read_sources()
    sources[module] += f"\n{line}\n"
    assert sentence in find_upward(import_graph(sources))


def test_a_planted_circle_is_found():
    sources = read_sources()
    sources["harmonkit.checkpoints"] += "\nfrom harmonkit import images\n"
    circle = find_circle(import_graph(sources))
    assert set(circle) == {"harmonkit.checkpoints", "harmonkit.images"}


def test_runtime_code_imports_six_packages():
    sources = read_sources()
    assert find_foreign(sources) == []
    for line in ("import einops", "import matplotlib", "from transformers import Qwen2ForCausalLM"):
        planted = dict(sources, **{"harmonkit.training.monitor": line})
        assert find_foreign(planted) == [f"harmonkit.training.monitor imports {line.split()[1]}"]
    planted = dict(sources, **{"harmonkit.training.monitor": "def plot():\n    import matplotlib.pyplot"})
    assert find_foreign(planted) == []


def test_requirements_are_the_six_packages():
    lines = (ROOT / "requirements.txt").read_text().split()
    names = {re.split("[=<>]", line)[0] for line in lines}
    assert names == {name.replace("PIL", "pillow") for name in PACKAGES}


def test_the_root_holds_seven_python_files():
    assert {path.stem for path in ROOT.glob("*.py")} == set(FILES)


def python_files():
    paths = list(ROOT.glob("*.py"))
    for folder in ("harmonkit", "porting", "notebooks", "tests"):
        paths += ROOT.glob(f"{folder}/**/*.py")
    return paths


def test_no_file_patches_the_search_path():
    pattern = re.compile(r"(?<![\"'\w])sys\.path\b")             # a string "sys.path" patches nothing
    notebooks = sorted(ROOT.glob("notebooks/*.ipynb"))
    texts = {path.name: path.read_text() for path in python_files()}
    for path in notebooks:
        cells = json.loads(path.read_text())["cells"]
        texts[path.name] = "".join("".join(cell["source"]) for cell in cells)
    assert len(notebooks) == 7
    assert pattern.search("sys" + ".path.insert(0, '..')")
    assert [name for name, text in texts.items() if pattern.search(text)] == []


def test_lines_have_at_most_110_columns():
    paths = python_files()
    assert len(paths) > 50
    too_long = []
    for path in paths:
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if len(line) > 110 and "https://" not in line:
                too_long.append(f"{path.relative_to(ROOT)}:{number}")
    assert too_long == []
