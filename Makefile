# make demo        six prompts drawn to out/demo.png, and answers about the first picture
# make lab         JupyterLab in notebooks/
# make check       lint, and the fast tests: under a minute
# make test        all tests
# make faults      kill runs, damage their files, change their data and flags; print `N passed, N failed`
# make notebooks   run all notebooks and compare their key numbers; NOTEBOOKS=--write keeps the new outputs
# make mutants     plant mistakes one by one and name the tests that catch each
#
# Each target first makes a virtual environment in $(VENV) and installs the project there. On Linux pip fetches
# torch's CUDA build. For the CPU build pass the address that the install selector on pytorch.org shows:
#     make demo PIP_FLAGS="--extra-index-url …"
PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=
NOTEBOOKS ?=
BIN = $(VENV)/bin
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4
FAST = architecture chat_template config devices diffusion_head harmon images latents llm losses mar mixture \
       optim order pipeline recipes show sources vae world
FAST_TESTS = $(FAST:%=tests/test_%.py)

.PHONY: demo lab lint check test faults notebooks mutants clean

demo: $(VENV)/run.stamp
	$(BIN)/python -m harmonkit.scripts.demo

lab: $(VENV)/notebooks.stamp
	$(BIN)/python -m jupyterlab --notebook-dir notebooks

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .

check: lint
	$(PYTEST) $(FAST_TESTS)

test: $(VENV)/test.stamp
	$(PYTEST) tests

faults: $(VENV)/test.stamp
	$(PYTEST) tests/faults

notebooks: $(VENV)/test.stamp
	$(BIN)/python notebooks/run.py $(NOTEBOOKS)

mutants: $(VENV)/test.stamp
	$(BIN)/python tests/mutants.py

$(VENV)/run.stamp: EXTRAS =
$(VENV)/test.stamp: EXTRAS = [test]
$(VENV)/notebooks.stamp: EXTRAS = [notebooks]
$(VENV)/%.stamp: pyproject.toml requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_FLAGS) -e ".$(EXTRAS)"
	touch $@

clean:
	rm -rf $(VENV) out
