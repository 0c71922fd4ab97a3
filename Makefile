# Two commands on a fresh machine: `make demo` and `make test`. Each sets up what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# pip compiles nothing here, which takes a minute: each module is compiled when it is first imported,
# and must be kept then, or every process that starts would do it all again.
unexport PYTHONDONTWRITEBYTECODE
SOURCES := $(shell find src graph security dht peer client -name '*.py' -not -path '*/__pycache__/*')

.PHONY: demo test soak lint types contracts quick unit attacks conformance swarm bench clean

# Exact versions that were tested together; the CPU build of torch serves every machine.
$(VENV)/.deps: pyproject.toml constraints.txt
	@echo "glasshive: making $(VENV); then pip installs torch and the rest: some minutes, only this once"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --no-compile -c constraints.txt torch==2.13.0
	$(BIN)/pip install -q --no-compile -c constraints.txt '.[demo,dev]'
	touch $@ && touch $(VENV)/.installed  # with them the package itself has come

# The package is installed as a wheel, as users get it; tests run against that, not the checkout.
$(VENV)/.installed: $(VENV)/.deps $(SOURCES) pyproject.toml
	@echo "glasshive: installing the package: less than a minute"
	rm -rf build
	$(BIN)/pip install -q --no-compile --no-deps --force-reinstall .
	touch $@

demo: $(VENV)/.installed
	$(BIN)/glasshive demo

# mypy has one thread: beside it there is room for tests.
test: lint contracts
	$(MAKE) -j2 types quick
	$(MAKE) swarm

soak: $(VENV)/.installed
	GLASSHIVE_SOAK=1 $(BIN)/python -m pytest tests --timeout 7200

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy
	$(BIN)/mypy examples

contracts: $(VENV)/.installed
	$(BIN)/lint-imports

# Processes of one thread each: a test is faster beside another than on two threads; and one more
# than cores, as some tests wait. All but the tests with processes of their own, in one go: starting
# pytest and what it imports takes long.
QUICK := unit attacks conformance
quick: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(QUICK:%=tests/%) -n 3 --dist worksteal

$(QUICK): $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/$@ -n 3 --dist worksteal

# Its hosts are processes of their own, and tests of one file share a swarm.
swarm: $(VENV)/.installed
	$(BIN)/python -m pytest tests/$@ -n 2 --dist loadfile

bench: $(VENV)/.installed
	for script in bench/*.py; do $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) build *.egg-info
