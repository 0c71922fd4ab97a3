# Two commands on a fresh machine: `make demo` and `make test`. Each sets up what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# pip compiles nothing here, which takes a minute: each module is compiled when it is first imported,
# and must be kept then, or every process that starts would do it all again.
unexport PYTHONDONTWRITEBYTECODE
SOURCES := $(shell find src graph security dht peer client -name '*.py' -not -path '*/__pycache__/*')
LOCKED := $(BIN)/pip install -q --no-compile --require-hashes --no-deps --no-build-isolation

.PHONY: demo test lock soak lint types contracts quick unit attacks conformance sim swarm bench clean

# Only files whose hash stands in requirements.lock are installed. setuptools goes first: some
# packages come as source, and an isolated build fetches what builds it without a check. Then a CPU
# build of torch, if pip knows a folder with one (find-links): of the two it would take the index's,
# which comes with a hash that pip can compare before it has the file.
$(VENV)/.deps: requirements.lock
	@echo "glasshive: making $(VENV); then pip installs torch and the rest: some minutes, only this once"
	$(PYTHON) -m venv $(VENV)
	awk '/^[^ ]/ {on = /^setuptools==/} on' $< > $(VENV)/setuptools.lock
	awk '/^[^ ]/ {on = /^torch==/} on' $< > $(VENV)/torch.lock
	$(LOCKED) -r $(VENV)/setuptools.lock
	$(LOCKED) --no-index -r $(VENV)/torch.lock 2> $(VENV)/torch.log \
		|| echo "glasshive: no build of torch on this disk (see $(VENV)/torch.log): the index has one"
	$(LOCKED) -r $<
# Where torch is a CUDA build this fetches the libraries of NVIDIA that it asks for: without hashes,
# within the bounds that torch, which was checked, names. Anywhere else it finds all there.
	$(BIN)/pip install -q --no-compile --only-binary :all: torch
	touch $@

# The package is installed as a wheel, as users get it; tests run against that, not the checkout.
$(VENV)/.installed: $(VENV)/.deps $(SOURCES) pyproject.toml
	@echo "glasshive: installing the package: less than a minute"
	rm -rf build
	$(BIN)/pip install -q --no-compile --no-build-isolation --no-deps --force-reinstall .
	touch $@

demo: $(VENV)/.installed
	$(BIN)/glasshive demo

# mypy has one thread: beside it there is room for tests.
test: lint contracts
	$(MAKE) -j2 types quick
	$(MAKE) swarm

# What stands in requirements.lock keeps its version and hashes: delete lines to have them looked
# up anew. The index has no CPU build of torch for Linux: with a new version, add the hash of one.
lock:
	$(PYTHON) -m venv build/lock
	build/lock/bin/pip install -q uv==0.13.9
	build/lock/bin/uv pip compile -q --universal --python-version 3.11 --extra demo --extra dev \
		--generate-hashes --no-annotate --custom-compile-command 'make lock' \
		-o requirements.lock pyproject.toml > /dev/null

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
QUICK := unit attacks conformance sim
SLOWEST := --durations=20 --durations-min=5
quick: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(QUICK:%=tests/%) -n 3 --dist worksteal $(SLOWEST)

$(QUICK): $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/$@ -n 3 --dist worksteal

# Its hosts are processes of their own, and tests of one file share a swarm.
swarm: $(VENV)/.installed
	$(BIN)/python -m pytest tests/$@ -n 2 --dist loadfile $(SLOWEST)

bench: $(VENV)/.installed
	for script in bench/*.py; do $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) build *.egg-info
