# Everything a checkout can do. `make` alone lists it. Needs Python 3.11 or newer; the rest is installed into .venv.

PYTHON_IN_VENV := .venv/bin/python
DEMO := sae_weights/demo
INSTALL_INPUTS := pyproject.toml constraints.txt overrides.txt scripts/install.sh
SOURCES := $(wildcard steerserve plugins demo benchmarks)
# An import of vLLM compiles five thousand files, each time, where Python may not write down what it compiled.
unexport PYTHONDONTWRITEBYTECODE
# One process has the engines and servers, one after the other; the other one the units (tests/conftest.py).
PYTEST_ON_TWO_CORES = $(PYTHON_IN_VENV) $(MEASURED) -m pytest -n 2

.DEFAULT_GOAL := help
.PHONY: help install demo serve test test-rest test-all check coverage bench demo-assets clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

install: .venv/.installed ## create .venv with the CPU build of vLLM and steerserve in it

demo: .venv/.installed ## serve the demo model, steer it, show the replies side by side, stop
	@$(PYTHON_IN_VENV) -m demo.show

serve: .venv/.installed ## serve the demo model and its SAE until interrupted
	@VLLM_CPU_KVCACHE_SPACE=$${VLLM_CPU_KVCACHE_SPACE:-1} \
	  .venv/bin/steerserve serve $(DEMO)/model --sae demo=$(DEMO)/sae --max-interventions 64 --host 127.0.0.1 --max-model-len 1024

test: .venv/.installed-dev ## test every kind of thing once: units, an engine a runner, servers, the demo
	@$(PYTEST_ON_TWO_CORES) -m "not slow"

test-rest: .venv/.installed-dev ## run the tests and the random examples that `make test` leaves out
	@STEERSERVE_TESTS=rest $(PYTEST_ON_TWO_CORES) -m "slow or scaled"

test-all: ## run everything
	@$(MAKE) --no-print-directory test
	@$(MAKE) --no-print-directory test-rest

coverage: .venv/.installed-dev ## run everything, and say which lines of the product no test reaches
	@$(PYTHON_IN_VENV) -m coverage erase
	@$(MAKE) --no-print-directory test-all MEASURED="-m coverage run"
	@$(PYTHON_IN_VENV) -m coverage combine --quiet
	@$(PYTHON_IN_VENV) -m coverage report --show-missing --skip-covered

check: .venv/.installed-dev ## lint, format, types, the fast tests of what runs on a CPU
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	$(PYTHON_IN_VENV) -m mypy --strict $(SOURCES)
	$(PYTEST_ON_TWO_CORES) -q -m "not engine and not server and not slow and not scaled and not interpreted"

bench: .venv/.installed ## measure serving: stock vLLM against the plugin idle, with one plan, 64 plans, 16 layers
	@$(PYTHON_IN_VENV) -m benchmarks.serving

demo-assets: .venv/.installed ## train the demo model and its SAE again, from a fixed seed
	@$(PYTHON_IN_VENV) -m demo.build

clean: ## remove caches and build products (.venv stays)
	rm -rf build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache .schemathesis
	find steerserve plugins demo tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

.venv/.installed: $(INSTALL_INPUTS)
	@scripts/install.sh cpu,train
	@touch $@

# The larger install holds the smaller one.
.venv/.installed-dev: $(INSTALL_INPUTS)
	@scripts/install.sh cpu,train,dev
	@touch .venv/.installed $@
