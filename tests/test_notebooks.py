"""The notebooks' executor on small notebooks made here, and the form of the committed ones.

`make notebooks` executes the committed ones.
"""
import re
import sys

import nbformat
import pytest
import run
from conftest import ROOT

COMMITTED = sorted((ROOT / "notebooks").glob("*.ipynb"))
SOURCE = re.compile(r"^([\w/]+\.py):\d+\n((?:.+\n?)*)", re.MULTILINE)       # show.source: file, line, code


def notebook(*sources, text=None):
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    if text is not None:
        made.cells[0].outputs = [nbformat.v4.new_output("stream", name="stdout", text=text)]
    return made


def test_key_numbers_are_read_from_outputs():
    text = "PSNR is fine\nkey: psnr = 30.8\nkey: loss of drawing = 0.83 ± 25%\n  key: not = 1\n"
    assert run.key_numbers(notebook("", text=text)) == {"psnr": (30.8, 0.02), "loss of drawing": (0.83, 0.25)}


@pytest.mark.parametrize("fresh, wrong", [
    ({"a": (10.1, 0.02), "b": (1.2, 0.25)}, []),
    ({"a": (10.3, 0.02), "b": (1.2, 0.25)}, ["key number 'a' is 10.3; committed is 10, 2% is allowed"]),
    ({"a": (float("nan"), 0.02), "b": (1, 0.25)}, ["key number 'a' is nan; committed is 10, 2% is allowed"]),
    ({"a": (10, 0.02), "b": (1.5, 0.25)}, ["key number 'b' is 1.5; committed is 1, 25% is allowed"]),
    ({"a": (10, 0.02)}, ["key number 'b' is new or missing"]),
    ({"a": (10, 0.02), "b": (1, 0.25), "c": (1, 0.02)}, ["key number 'c' is new or missing"])])
def test_differences_are_named(fresh, wrong):
    assert run.differences({"a": (10, 0.02), "b": (1, 0.25)}, fresh) == wrong


def test_a_notebook_is_executed_written_and_checked(tmp_path):
    path = tmp_path / "1_small.ipynb"
    nbformat.write(notebook("x = 2", "import show\nshow.key('x', x)"), path)
    assert run.run(path, write=True) == []
    assert run.key_numbers(nbformat.read(path, as_version=4)) == {"x": (2, 0.02)}
    assert run.run(path, write=False) == []

    changed = nbformat.read(path, as_version=4)
    changed.cells[0].source = "x = 3"
    nbformat.write(changed, path)
    assert run.run(path, write=False) == ["the committed outputs are of other cells",
                                          "key number 'x' is 3; committed is 2, 2% is allowed"]

    changed.cells[0].source = "x = 2\nassert x == 3, 'x is two'"
    nbformat.write(changed, path)
    before = path.read_bytes()
    wrong, = run.run(path, write=True)
    assert "AssertionError: x is two" in wrong and path.read_bytes() == before


def test_solutions_are_executed_but_not_kept(tmp_path):
    path = tmp_path / "1_small.ipynb"
    made = notebook("x = 2")
    solution = "Reach 4.\n<details>\n\n```python\nassert x * x == 4\n```\n</details>"
    made.cells.append(nbformat.v4.new_markdown_cell(solution))
    nbformat.write(made, path)
    assert run.run(path, write=True) == []
    assert len(nbformat.read(path, as_version=4).cells) == 2
    made.cells[1].source = made.cells[1].source.replace("== 4", "== 5")
    nbformat.write(made, path)
    wrong, = run.run(path, write=True)
    assert "assert x * x == 5" in wrong


def test_a_missing_notebook_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", "8_none"])
    with pytest.raises(SystemExit) as stopped:
        run.main()
    assert stopped.value.code == 2 and "8_none.ipynb does not exist" in capsys.readouterr().err


def test_there_are_seven():
    names = ["1_vae", "2_mar", "3_diffusion_head", "4_llm", "5_generate", "6_understand", "7_train"]
    assert [path.stem for path in COMMITTED] == names


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
class TestCommitted:
    @pytest.fixture
    def made(self, path):
        return nbformat.read(path, as_version=4)

    @pytest.fixture
    def code(self, made):
        return [cell for cell in made.cells if cell.cell_type == "code"]

    def test_outputs_are_whole(self, path, made, code):
        nbformat.validate(made)
        assert path.stat().st_size < 450_000
        assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
        outputs = run.outputs(made)
        assert not [output for output in outputs if output.output_type == "error"]
        assert not [output for output in outputs if output.get("name") == "stderr"]
        assert sum("image/png" in output.get("data", {}) for output in outputs) >= 4
        assert len(run.key_numbers(made)) >= 3

    def test_it_opens_with_the_data_path_and_the_settings(self, made, code):
        assert "`make lab`" in made.cells[0].source
        assert code[0].source.startswith("import show\n\nshow.path(")
        assert any("image/svg+xml" in output.data for output in code[0].outputs)
        lines = code[1].source.splitlines()
        settings = [re.fullmatch(r"([A-Z_]+) = (\S+|\"[^\"]*\") +# .+", line) for line in lines]
        assert all(settings), code[1].source
        rest = "\n".join(cell.source for cell in code[2:])
        for name in (setting[1] for setting in settings):
            assert re.search(rf"\b{name}\b", rest), f"{name} has no effect"

    def test_exercises_have_a_number_and_a_solution(self, made, code):
        solutions = run.SOLUTION.findall(run.sources(made, "markdown"))
        assert len(solutions) == 3 and run.sources(made, "markdown").count("<details>") == 3
        assert all("assert show.target(" in solution for solution in solutions)
        exercises = [cell for cell in code if "show.target(" in cell.source]
        assert len(exercises) == 3
        for cell in exercises:
            assert "not yet" in cell.outputs[0].text, "the number is reached without a solution"

    def test_cells_are_narrow_and_short(self, made, code):
        for source in (*(cell.source for cell in code), *run.SOLUTION.findall(run.sources(made, "markdown"))):
            lines = source.splitlines()
            assert len(lines) <= 50, f"a cell has {len(lines)} lines: {lines[0]}"
            assert not [line for line in lines if len(line) > 90]
        assert "sys.path" not in run.sources(made, "code")
        assert len([cell for cell in code if "assert " in cell.source]) >= 4

    def test_printed_sources_exist(self, made):
        texts = [output.text for output in run.outputs(made) if output.get("name") == "stdout"]
        printed = [found for text in texts for found in SOURCE.findall(text)]
        assert printed, "no cell shows the project's code"
        for file, code in printed:
            head = re.search(r"^ *(?:def|class) .*$", code, re.MULTILINE)[0].strip()
            text = (ROOT / file).read_text(encoding="utf-8")
            assert head in text, f"{file} has no {head!r} any more; write the outputs anew"
