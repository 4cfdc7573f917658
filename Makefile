# Every command does all of its own set-up in .venv; Python >= 3.10 and make are all it takes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# numba-cuda takes the place of Numba's own CUDA target, so the compiler has an environment to itself.
PTX := .venv-ptx
export MPLBACKEND := Agg

.PHONY: help demo test ptx bench bench-gpu lint clean

help:
	@echo "make demo    train LeNet on handwritten digits, with and without fastbn"
	@echo "make test    the whole test suite, GPU tests included (on the CUDA simulator where there is no GPU)"
	@echo "make ptx     every GPU kernel compiled and its machine code checked, for two compute capabilities; needs no GPU"
	@echo "make bench   the benchmark suites, then the report: README table, plots, bench/results"
	@echo "make bench-gpu  fastbn on a GPU against a device copy, CuPy and PyTorch: docs/gpu.md, bench/results/gpu.json"
	@echo "make lint    ruff and mypy"
	@echo "make clean   remove .venv, .venv-ptx, .venv-gpu and caches"

# One stamp an extra: reinstalled when pyproject.toml changes.
$(VENV)/.%: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$*]"
	@touch $@

demo: $(VENV)/.demo
	$(BIN)/python examples/lenet_digits.py

test: $(VENV)/.test
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal
	FASTBN_TEST_GPU=1 $(BIN)/python -m pytest tests/cuda --numprocesses auto --dist worksteal

$(PTX)/.ptx: pyproject.toml
	@test -x $(PTX)/bin/python || $(PYTHON) -m venv $(PTX)
	$(PTX)/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[ptx]"
	@touch $@

ptx: $(PTX)/.ptx
	FASTBN_PTX=1 $(PTX)/bin/python -m pytest tests/cuda/test_ptx.py --numprocesses auto --dist worksteal

bench: $(VENV)/.bench
	$(BIN)/python -m pytest bench
	$(BIN)/python bench/features.py --save bench/results
	$(BIN)/python bench/report.py

# numba-cuda, again: an environment to itself. CUDA=cuda12 for drivers of CUDA 12.
CUDA ?= cuda13
GPU := .venv-gpu
$(GPU)/.$(CUDA): pyproject.toml
	@test -x $(GPU)/bin/python || $(PYTHON) -m venv $(GPU)
	$(GPU)/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[bench,$(CUDA)]"
	@touch $@

bench-gpu: $(GPU)/.$(CUDA)
	$(GPU)/bin/python bench/gpu.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(PTX) $(GPU) .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
