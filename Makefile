# The two commands: `make demo` shows it at work, `make test` runs all tests.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN = $(VENV)/bin

.PHONY: help demo test lint clean

help:
	@echo 'make demo   a worker, work for it, and what arrived; about 20 seconds, nothing to install'
	@echo '            INFLUX=udp://host:8089/database or http://host:8086/database: a real InfluxDB'
	@echo '            BROKER=redis://host: a real broker          ARGS="--seconds 5": shorter'
	@echo 'make test   all tests, with real servers where they may be installed'
	@echo '            ARGS="-k relay": some of them'
	@echo 'make lint   ruff and mypy'
	@echo 'make clean  remove what these made'
	@echo 'PYTHON=python3.12 chooses the interpreter of the virtual environment $(VENV)'

demo: $(VENV)/.demo $(if $(findstring redis,$(BROKER)),$(VENV)/.redis)
	@$(BIN)/python -m example_project $(ARGS)

test: $(VENV)/.test
	@sh scripts/install-servers.sh || true # it says which tests are skipped then
	$(BIN)/python -m pytest -n 5 $(ARGS)

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info example_project/.data \
		.pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo 'Python 3.10 or newer is needed; choose it: make PYTHON=python3.12 ...'; exit 1; }
	@echo 'Making the virtual environment $(VENV)'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo 'No virtual environment could be made; on Debian and Ubuntu: apt install python3-venv'; \
		exit 1; }

# A stamp for each set of packages; made again when the package's metadata change.
$(VENV)/.demo: packages = -e .
$(VENV)/.redis: packages = 'celery[redis]'
$(VENV)/.test: packages = -e '.[test]'
$(VENV)/.lint: packages = -e '.[lint]'
$(VENV)/.demo $(VENV)/.redis $(VENV)/.test $(VENV)/.lint: $(BIN)/python pyproject.toml
	@echo 'Installing $(packages)'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(packages)
	@touch $@
