"""The executor of the notebooks, on small ones made here; and what a reader of the committed ones relies on. Their cells run with `make notebooks`."""
import sys

import nbformat
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "notebooks"))
import run  # noqa: E402

COMMITTED = sorted((ROOT / "notebooks").glob("*.ipynb"))


def notebook(*sources, text=None):
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    if text is not None:
        made.cells[0].outputs = [nbformat.v4.new_output("stream", name="stdout", text=text)]
    return made


def test_key_numbers_are_read_from_outputs():
    numbers = run.key_numbers(notebook("", text="PSNR is fine\nkey: psnr = 30.8\nkey: loss of drawing = 0.83 ± 25%\n  key: not = 1\n"))
    assert numbers == {"psnr": (30.8, 0.02), "loss of drawing": (0.83, 0.25)}
    with pytest.raises(ValueError, match="'a' is printed twice"):
        run.key_numbers(notebook("", text="key: a = 1\nkey: a = 1\n"))


@pytest.mark.parametrize("fresh, wrong", [
    ({"a": (10.1, 0.02), "b": (1.2, 0.25)}, []),
    ({"a": (10.3, 0.02), "b": (1.2, 0.25)}, ["key number 'a' is 10.3; committed is 10, and 2% is allowed"]),
    ({"a": (float("nan"), 0.02), "b": (1.5, 0.25)}, ["key number 'a' is nan; committed is 10, and 2% is allowed",
                                                     "key number 'b' is 1.5; committed is 1, and 25% is allowed"]),
    ({"a": (10, 0.02)}, ["key number 'b' is missing; committed is 1"]),
    ({"a": (10, 0.02), "b": (1, 0.25), "c": (1, 0.02)}, ["key number 'c' is new; write the outputs anew"])])
def test_differences_are_named(fresh, wrong):
    assert run.differences({"a": (10, 0.02), "b": (1, 0.25)}, fresh) == wrong


def test_a_notebook_is_executed_written_and_checked(tmp_path):
    path = tmp_path / "1_small.ipynb"
    nbformat.write(notebook("x = 2", "import show\nshow.key('x', x)"), path)
    assert run.run(path, write=True) == ([], 1)
    assert "key: x = 2" in run.printed(nbformat.read(path, as_version=4))
    assert run.run(path, write=False) == ([], 1)

    changed = nbformat.read(path, as_version=4)
    changed.cells[0].source = "x = 3"
    nbformat.write(changed, path)
    wrong, _ = run.run(path, write=False)
    assert len(wrong) == 2 and "not those of the committed cells" in wrong[0] and "'x' is 3; committed is 2" in wrong[1]

    changed.cells[0].source = "x = 2\nassert x == 3, 'x is two'"
    nbformat.write(changed, path)
    before = path.read_bytes()
    wrong, _ = run.run(path, write=True)
    assert len(wrong) == 1 and wrong[0].startswith("cell 0 failed, AssertionError: x is two") and path.read_bytes() == before


def test_there_are_seven():
    assert [path.stem for path in COMMITTED] == ["1_vae", "2_mar", "3_diffusion_head", "4_llm", "5_generate", "6_understand", "7_train"]


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_notebooks_are_fit_to_read(path):
    assert path.stat().st_size < 400_000
    made = nbformat.read(path, as_version=4)
    nbformat.validate(made)
    code = [cell for cell in made.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "not executed from top to bottom"
    assert made.metadata.outputs_of == run.fingerprint(made), "the outputs are not of these cells"
    assert made.metadata.kernelspec.name == "python3"
    assert len(run.key_numbers(made)) >= 3 and any("assert " in cell.source for cell in code)
    outputs = [output for cell in code for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 4
    assert not [cell for cell in code if len(cell.source.splitlines()) > 50], "a cell is long"
