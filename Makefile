PYTHON ?= python3
JOBS ?= 2
VENV := .venv
INSTALLED := $(VENV)/.installed
REQUIREMENTS := requirements.txt requirements-test.txt requirements-peers.txt tools/pyproject.toml tools/setup.py
FUZZ_SUMMARY ?= out/fuzz.json
UBIQUITIN := tools/src/esmfold2_trimul_tools/data/ubiquitin.fasta

.DEFAULT_GOAL := help
.PHONY: help env fold test test-all test-isa fuzz build lint clean

help:
	@echo "make fold      fold ubiquitin with the kernel and without it; the results go to out/"
	@echo "make test      run the test suite, but for the tests marked slow"
	@echo "make test-all  run every test, and hold the settings to the newest Triton too"
	@echo "make test-isa  numeric tests with other instruction sets, threads and seeds: 90 minutes"
	@echo "make fuzz      10,000 random calls; CASES=500 SEED=7 says how many and which"
	@echo "make env       set up $(VENV) alone; fold, test, build and lint do it when needed"
	@echo "make build     write build/torch-universal and docs/api.md from torch-ext"
	@echo "make lint      check the Python code with ruff"
	@echo "make clean     remove what fold, test and lint leave; $(VENV) stays"
	@echo
	@echo "PYTHON=python3.12 picks the Python of $(VENV), JOBS=4 the test processes."

env: $(INSTALLED)

# One call installs everything, so that every pin is weighed together and torch is fetched once.
# setuptools is among the pins: the editable install needs no second, isolated download of it.
# The peers of the tests stay out of site-packages, for they bring packages named "tests" and the
# like, and come without what they depend on, which would be another torch among other things.
$(INSTALLED): $(REQUIREMENTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed; '$(PYTHON)' is not. Try make PYTHON=python3.12"; exit 1; }
	@echo "Setting up $(VENV); the first time takes some minutes."
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install -qq --disable-pip-version-check \
		-r requirements.txt -r requirements-test.txt
	@$(VENV)/bin/python -m pip install -qq --disable-pip-version-check \
		--no-deps --no-build-isolation -e tools
	@$(VENV)/bin/python -m pip install -qq --disable-pip-version-check \
		--no-deps --upgrade --target $(VENV)/peers -r requirements-peers.txt
	@touch $@

fold: env
	$(VENV)/bin/esmfold2-trimul fold --fasta $(UBIQUITIN) --random-weights --compare --out out --force

test: env
	$(VENV)/bin/python -m pytest -n $(JOBS) --dist worksteal -m "not slow"

# Of the newest Triton the tests only compile with, so it needs nothing beside it.
test-all: env
	$(VENV)/bin/python -m pip install -qq --disable-pip-version-check \
		--no-deps --upgrade --target $(VENV)/newest-triton triton
	$(VENV)/bin/python -m pytest -n $(JOBS) --dist worksteal

test-isa: env
	JOBS=$(JOBS) $(VENV)/bin/python tests/isa.py

fuzz: CASES ?= 10000
fuzz: SEED := $(or $(SEED),$(shell od -An -N3 -tu4 /dev/urandom | tr -d ' '))
fuzz: env
	@echo "$(CASES) random calls with SEED=$(SEED); what came of them goes to $(FUZZ_SUMMARY)"
	@mkdir -p $(dir $(FUZZ_SUMMARY))
	FUZZ_CASES=$(CASES) FUZZ_SEED=$(SEED) FUZZ_SUMMARY=$(FUZZ_SUMMARY) \
		$(VENV)/bin/python -m pytest tests/test_fuzz.py

build: env
	$(VENV)/bin/esmfold2-trimul build
	$(VENV)/bin/python -m esmfold2_trimul_tools.api_page > docs/api.md

lint: env
	$(VENV)/bin/ruff check .

clean:
	rm -rf out .pytest_cache .ruff_cache tools/build tools/LICENSE
	find torch-ext build tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
