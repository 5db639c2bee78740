# `make run` and `make test` need Python 3.11 or newer and make, and set up all else in .venv.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

# Both names: older pips pin what builds need by the first, newer ones by the second.
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
INSTALL := $(BIN)/python -m pip install --quiet
# Compiles the engines, which are kept, so that the first run does not have to.
COMPILE := $(BIN)/python -c "from batchsim.iteration import dynamic_engine, engine; engine.load(); dynamic_engine.load()"

.PHONY: run test check format bench schema clean

run: $(VENV)/installed
	$(BIN)/batchsim run scenarios/async_8b_h200.yaml --out results/async_8b_h200

test: check browser
	$(BIN)/python -m pytest -n $(WORKERS)

check: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/installed-test
	$(BIN)/python -m pytest -o python_files='bench_*.py' tests/benchmarks

schema: $(VENV)/installed
	$(BIN)/batchsim schema > scenarios/scenario.schema.json

clean:
	rm -rf $(VENV)

$(BIN)/python:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=/path/to/python3")'
	"$(PYTHON)" -m venv $(VENV)

$(VENV)/installed: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) --editable .
	$(COMPILE)
	touch $@

# The CPU build of torch is a tenth of the CUDA one, which only a machine with a GPU has a use for. Where it is not
# to be had, the package index's own build will do.
$(VENV)/installed-test: pyproject.toml constraints.txt | $(BIN)/python
	command -v nvidia-smi > /dev/null || $(INSTALL) --no-deps --retries 1 --timeout 15 --index-url $(TORCH_INDEX) torch || true
	$(INSTALL) --editable '.[test]'
	$(COMPILE)
	touch $(VENV)/installed $@

# The report's test opens it in Chromium; without one it is skipped. Only a container's root installs it.
.PHONY: browser
browser:
	@command -v chromium chromium-browser google-chrome > /dev/null || [ "$$(id -u)" != 0 ] || ! command -v apt-get > /dev/null \
		|| { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; } > /dev/null 2>&1 \
		|| echo "chromium could not be installed; its test will be skipped"
