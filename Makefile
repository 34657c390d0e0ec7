# make demo: a virtual environment, the requirements, then a picture and an answer.   make test: the same set-up and the tests.
# make notebooks: all of them anew, their key numbers held against the committed ones; make notebooks NOTEBOOKS=--write keeps the new outputs.
# pip fetches torch's CUDA build on Linux. Without a GPU, torch's CPU build spares gigabytes: pass its index as PIP_FLAGS="--index-url …",
# as the install selector on pytorch.org shows it.
PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=
NOTEBOOKS ?=
BIN = $(VENV)/bin

.PHONY: demo test notebooks clean

demo: $(VENV)/run.stamp
	$(BIN)/python demo.py

test: $(VENV)/test.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 tests

notebooks: $(VENV)/test.stamp
	$(BIN)/python notebooks/run.py $(NOTEBOOKS)

$(VENV)/%.stamp: requirements.txt requirements-test.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_FLAGS) -r $(if $(filter test,$*),requirements-test.txt,requirements.txt)
	touch $@

clean:
	rm -rf $(VENV) out
