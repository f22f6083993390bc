# Everything runs in .venv, which each target sets up by itself when needed.
PYTHON ?= $(shell for p in python3.12 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
INPUTS := pyproject.toml constraints.txt hatch_build.py $(wildcard proto/semipd/v1/*.proto)
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt

.PHONY: install serve test lint bench gpu-check kernels-on-jax conformance package clean

install: .venv/base            ## the engine and what it needs
.venv/base: $(INPUTS)
	@test -n "$(PYTHON)" || { echo "Python 3.12 or newer is needed"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[openai]'
	touch $@

.venv/dev: .venv/base
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

serve: .venv/base              ## the demo model, or: make serve ARGS="--model DIR"
	$(BIN)/python -m semipd_jax.serve $(ARGS)

test: .venv/dev                ## all tests, or: make test ARGS="tests/semipd_jax/scheduler"
	$(BIN)/pytest --numprocesses 2 --no-loadscope-reorder $(ARGS)

lint: .venv/dev                ## style, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

bench: .venv/dev               ## the control plane alone, then the demo model under load
	$(BIN)/python -m benchmarks.control_plane
	$(BIN)/python -m benchmarks.serve

gpu-check: .venv/base          ## acceptance on an NVIDIA GPU
	$(BIN)/python -m benchmarks.gpu_check

JAX ?= 0.12.*
kernels-on-jax:                ## the kernels on another release of jax: make kernels-on-jax JAX=0.12.0.1
	$(PYTHON) -m venv .venv/jax
	PIP_CONSTRAINT= .venv/jax/bin/pip install --quiet 'jax==$(JAX)' 'jax-cuda13-plugin==$(JAX)' \
		'jax-cuda13-pjrt==$(JAX)' nvidia-cuda-nvcc flax orbax-checkpoint safetensors msgspec jaxtyping \
		beartype hypothesis pytest pytest-timeout pytest-xdist
	PYTHONPATH=.:server .venv/jax/bin/python -m pytest tests/kernels_pallas tests/benchmarks/aot

conformance: .venv/dev         ## openai, smg, AIPerf and GuideLLM against the demo model
	PIP_CONSTRAINT= $(BIN)/python -m benchmarks.conformance $(ARGS)

package:                       ## wheel and sdist, installed and run in an empty environment
	rm -rf dist
	$(PYTHON) -m venv dist/build
	dist/build/bin/pip install --quiet build
	dist/build/bin/python -m build --outdir dist .
	$(PYTHON) -m venv dist/empty
	dist/empty/bin/pip install --quiet "$$(ls $(CURDIR)/dist/*.whl)[openai,smg]"
	cd dist && empty/bin/semipd-jax --version && empty/bin/semipd-jax serve --help >/dev/null
	cd dist && empty/bin/python -c 'from semipd_jax import Engine, demo; \
	    print(Engine(str(demo.MODEL_DIR)).generate("def main():", max_tokens=8).text)'

clean:
	rm -rf .venv dist
