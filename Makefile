# Two commands do everything: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Tests start hundreds of processes; without byte code on disk each would compile the project anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo published-report test pytest test-slow test-floors boundscheck lint format bench \
	pages docs notebooks clean

demo: $(STAMP)
	$(BIN)/loraq-sim sweep --hw aie2 --layer-dump examples/tiny_pixart.pt --out runs/demo
	@$(BIN)/python reports/show.py

# Draw, sweep and write the published report anew: minutes on two cores.
published-report: $(STAMP)
	$(BIN)/python reports/publish.py pixart_sigma_on_aie2

# The linters run beside the tests: types take a minute on one core.
test: $(STAMP)
	$(MAKE) --no-print-directory -j 2 lint pytest

pytest: $(STAMP)
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup -m "not slow"

test-slow: $(STAMP)
	$(BIN)/python -m pytest -q -m slow

# The lowest versions that pyproject.toml declares, in an environment of their own (runs/floors).
test-floors: $(STAMP)
	$(PYTHON) tests/floors/lowest_versions.py

# Compiled loops check every index; caches apart, since the check is not in Numba's key.
boundscheck: $(STAMP)
	NUMBA_BOUNDSCHECK=1 NUMBA_CACHE_DIR=runs/boundscheck $(BIN)/python -m pytest -q -n 2 \
		tests/loraq_sim/emulator tests/loraq_sim/kernels

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)
	$(BIN)/python benchmarks/sweep_time.py

# The committed pages, with what the program prints today; `make docs` builds the site of them.
pages: $(STAMP)
	$(BIN)/python docs/extensions/fill_pages.py

docs: $(STAMP)
	$(BIN)/python -m sphinx -n -W --keep-going -b html docs runs/docs
	@echo "read runs/docs/index.html"

# Runs what changed; `make notebooks ALL=--all` runs every one, `ONLY=name` one of them.
notebooks: $(STAMP)
	$(BIN)/python docs/extensions/executed_notebooks.py $(ALL) $(ONLY)

clean:
	rm -rf $(VENV) runs

# The stamp makes a second `make` start at once; it is renewed when the pins or the metadata change.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "loraq-sim needs Python 3.11 or newer; set PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
