"""The rules of docs/architecture.md: imports point down, few packages, narrow lines, seven files at the root."""
import ast
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = ("harmon", "mar", "llm", "vae", "diffusion_head", "sample", "train")
PACKAGES = {"torch", "numpy", "safetensors", "tokenizers", "PIL", "tqdm"}       # as they are imported
CORE = ("chat_template", "config", "checkpoints", "pipeline", "images", "devices", "fast")

# Rooms from the bottom up. A module belongs to the room with the longest name that its own begins with.
LEVELS = (
    ("diffusion_head", "vae", "llm"),
    ("mar",),
    tuple(f"harmonkit.{module}" for module in CORE),
    ("harmon", "harmonkit.shapes_world"),
    ("harmonkit.data", "harmonkit.evals"),
    ("harmonkit.training",),
    ("harmonkit.scripts",),
    ("sample", "train"),
    ("harmonkit.scripts.ablate",),              # it runs train.py
)
LAZY = {                                        # packages that a function may import, by module
    "harmonkit.checkpoints": {"huggingface_hub"},
    "harmonkit.fast": {"flash_attn"},
    "harmonkit.data.mixture": {"tomllib"},      # of the standard library from Python 3.11 on
    "harmonkit.training.monitor": {"matplotlib"},
    "harmonkit.scripts.ablate": {"matplotlib"},
    "harmonkit.scripts.benchmark": {"transformers"},
}


def read_sources() -> dict:
    """{dotted module name: source} of the seven files and of harmonkit."""
    sources = {}
    for path in [*ROOT.glob("*.py"), *ROOT.glob("harmonkit/**/*.py")]:
        parts = path.relative_to(ROOT).with_suffix("").parts
        sources[".".join(parts).removesuffix(".__init__")] = path.read_text()
    return sources


def imported(node) -> list:
    """The dotted names that an import statement asks for; of `from a import b` both a and a.b."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        return [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return []


def import_graph(sources) -> dict:
    """{module: the modules of ours that its import runs}: the named ones, and the packages around them."""
    graph = {}
    for module, source in sources.items():
        names = [module]
        for node in ast.walk(ast.parse(source)):
            names += imported(node)
        parts = [name.split(".") for name in names]
        prefixes = {".".join(p[:i + 1]) for p in parts for i in range(len(p))}
        graph[module] = sorted(prefixes & sources.keys() - {module})
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
    """(level, room) of a module; (-1, "harmonkit") for the package itself."""
    rooms = [(len(room), level, room) for level, rooms in enumerate(LEVELS) for room in rooms
             if f"{module}.".startswith(f"{room}.")]
    if module == "harmonkit":
        return -1, module
    assert rooms, f"{module} is in no room"
    return max(rooms)[1:]


def find_upward(graph) -> list:
    """The imports that do not point down, as sentences. Within a room and within the core any is allowed."""
    wrong = []
    core = LEVELS[2]
    for module, others in graph.items():
        level, room = room_of(module)
        for other in others:
            other_level, other_room = room_of(other)
            together = other_room == room or (room in core and other_room in core)
            package_around = module.startswith(f"{other}.")
            if other_level >= level and not together and not package_around:
                wrong.append(f"{module} imports {other}")
    return wrong


def find_foreign(sources) -> list:
    """The imports of packages beyond PACKAGES and LAZY, as sentences."""
    wrong = []
    for module, source in sources.items():
        tree = ast.parse(source)
        functions = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
        inside = {id(node) for function in functions for node in ast.walk(function)}
        for node in ast.walk(tree):
            allowed = PACKAGES | sys.stdlib_module_names | {name.split(".")[0] for name in sources}
            if id(node) in inside:
                allowed = allowed | LAZY.get(module, set())
            packages = {name.split(".")[0] for name in imported(node)}
            wrong += [f"{module} imports {package}" for package in sorted(packages - allowed)]
    return wrong


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
    core_of_harmon = {name.removeprefix("harmonkit.") for name in graph["harmon"] if name.startswith("harmonkit.")}
    assert core_of_harmon == {"chat_template", "config", "checkpoints", "pipeline", "images"}


PLANTED = {
    "mar imports llm": ("mar", "from llm import RMSNorm"),
    "llm imports harmonkit.config": ("llm", "import harmonkit.config"),
    "harmonkit.config imports harmon": ("harmonkit.config", "def late():\n    from harmon import Harmon"),
    "harmonkit.data.sources imports harmonkit.training.runs":
        ("harmonkit.data.sources", "from harmonkit.training import runs"),
    "harmonkit.evals.shapes imports sample": ("harmonkit.evals.shapes", "import sample"),
    "harmonkit.training.optim imports train": ("harmonkit.training.optim", "from train import train"),
    "train imports sample": ("train", "import sample"),
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
    folders = ("harmonkit", "porting", "notebooks", "tests")
    return [*ROOT.glob("*.py"), *(path for folder in folders for path in ROOT.glob(f"{folder}/**/*.py"))]


def test_no_file_patches_the_search_path():
    pattern = re.compile(r"\bsys" + r"\.path\b")
    notebooks = sorted(ROOT.glob("notebooks/*.ipynb"))
    texts = {path.name: path.read_text() for path in python_files()}
    for path in notebooks:
        cells = json.loads(path.read_text())["cells"]
        texts[path.name] = "".join("".join(cell["source"]) for cell in cells)
    assert len(notebooks) == 7
    assert pattern.search("import sys; sys" + ".path.insert(0, '..')")
    assert [name for name, text in texts.items() if pattern.search(text)] == []


def test_lines_have_at_most_110_columns():
    paths = python_files()
    assert len(paths) > 50
    too_long = [f"{path.relative_to(ROOT)}:{number}" for path in paths
                for number, line in enumerate(path.read_text().splitlines(), start=1)
                if len(line) > 110 and "https://" not in line]
    assert too_long == []
