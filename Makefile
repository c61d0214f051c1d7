# make demo   a real model: fetched, converted, inspected, verified, and generating
# make test   ruff, mypy --strict, pytest
# make fuzz   the long versions of the fuzzing tests
#
# Each target sets up .venv on its own; Python >= 3.10 and make are enough. CPU torch is enough: set TORCH_INDEX to a
# pip index of CPU wheels where PyPI's torch would bring CUDA along.

PYTHON ?= python3
TORCH_VERSION ?= 2.13.0
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check
TORCH_PIP := $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
MODEL := build/SmolLM2-135M-Instruct

.PHONY: demo test lint typecheck pytest fuzz clean

demo: $(VENV)/installed
	$(RUN) benchmarks/smollm2.py $(MODEL)
	$(RUN) cli.py convert $(MODEL) build/smollm2.salr --force --fresh
	$(RUN) cli.py inspect build/smollm2.salr
	$(RUN) cli.py verify build/smollm2.salr --against $(MODEL)
	$(RUN) cli.py generate build/smollm2.salr 'Why is the sky blue?' --max-tokens 60 --temperature 0
	@echo
	@echo 'Try next:'
	@echo '  $(RUN) cli.py inspect build/smollm2.salr --modules'
	@echo '  $(RUN) cli.py convert $(MODEL) build/small.salr --sparsity 0.6 --rank 16'
	@echo '  $(RUN) cli.py unpack build/smollm2.salr build/dense     # a directory that transformers loads'

test: lint typecheck pytest

lint: $(VENV)/installed
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .

# mypy sees the package as it is shipped: salr/converter, salr/formats, salr/cuda.
# What setuptools left from an earlier build would bring moved files back. Nothing has to be compiled for it.
typecheck: $(VENV)/installed
	@rm -rf build/mypy build/lib build/bdist.*
	CXX=none $(PIP) install --quiet --no-deps --no-build-isolation --target build/mypy .
	cd build/mypy && ../../$(RUN) -m mypy --config-file ../../pyproject.toml -p salr

# A file of tests is one process's: fixtures of a module are made once.
pytest: $(VENV)/installed
	$(RUN) -m pytest -q -n logical --maxprocesses 4 --dist loadfile

fuzz: $(VENV)/installed
	SALR_FUZZ=1 $(RUN) -m pytest -q -m fuzz

# torch goes first and alone, so that nothing else can choose another build of it.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	@echo "torch==$(TORCH_VERSION) from $(if $(TORCH_INDEX),$(TORCH_INDEX),the default index), chosen build:"
	@$(PIP) install --quiet --dry-run --no-deps --ignore-installed --report - $(TORCH_PIP) torch==$(TORCH_VERSION) \
	  | $(RUN) -c 'import json, sys; print(*["  " + i["download_info"]["url"].rsplit("/", 1)[-1] for i in json.load(sys.stdin)["install"]], sep="\n")'
	$(PIP) install --quiet $(TORCH_PIP) torch==$(TORCH_VERSION)
	$(PIP) install --quiet 'setuptools>=77' wheel
	$(PIP) install --quiet --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info
