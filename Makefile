# Everything is made below build/. `make help` lists the targets.

PYTHON ?= /usr/bin/python3
EXTRAS := daemon,cli,metrics,yara,dev
VENV := build/venv
BIN := $(VENV)/bin
# For pytest or the benchmarks: make test ARGS='-k policy -x'. When nothing is given, three processes run all tests, and
# coverage is measured.
ARGS ?=

# The environment must not lead the interpreter elsewhere, nor make it compile all sources at each of a thousand starts.
unexport PYTHONPATH PYTHONHOME PYTHONSTARTUP PYTHONDONTWRITEBYTECODE
export PYTHON

.DEFAULT_GOAL := help
.PHONY: help setup demo test coverage test-debian test-system races soak hostile fuzz lint format man completions docs dist deb bench \
	bench-scan constraints clean unknown-sources

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

setup: $(VENV)/.ready ## make build/venv with all that tests and checks need (done by the other targets as well)

$(VENV)/.ready: pyproject.toml constraints.txt scripts/setup
	@scripts/setup $(EXTRAS)
	@touch $@

$(VENV)/.ready-bench: $(VENV)/.ready
	@scripts/setup $(EXTRAS),bench
	@touch $@

$(VENV)/.ready-fuzz: $(VENV)/.ready
	@scripts/setup $(EXTRAS),fuzz
	@touch $@

$(VENV)/.ready-docs: $(VENV)/.ready
	@scripts/setup $(EXTRAS),docs
	@touch $@

# What the demonstration needs is a part of what the tests need, and is there much sooner.
$(VENV)/.ready-demo: pyproject.toml constraints.txt scripts/setup
	@test -e $(VENV)/.ready || scripts/setup daemon,cli
	@touch $@

demo: $(VENV)/.ready-demo ## show it: a broker, files of three users, a scanner that may open none of them (as root)
	@$(PYTHON) -I scripts/demo.py

test: $(VENV)/.ready ## run all tests with branch coverage (as root: none is skipped)
	@$(BIN)/python -m pytest -q $(or $(ARGS),--numprocesses=3 --dist=loadfile --no-loadscope-reorder --cov --cov-report= --ignore=tests/system)

coverage: $(VENV)/.ready ## write what the tests did not reach to build/coverage/, after `make test`
	@$(BIN)/python -m coverage html --fail-under=0

test-debian: ## run all tests on another release of Debian, by the last commit: SUITE=trixie (as root, on Debian)
	@scripts/on-debian $(or $(SUITE),trixie) make test ARGS='$(ARGS)'

test-system: $(VENV)/.ready ## run the tests that boot a systemd of their own (as root, with systemd installed)
	@$(BIN)/python -m pytest -q tests/system $(ARGS)

races: $(VENV)/.ready ## run the race tests for long
	@FDBROKER_RACES=long $(BIN)/python -m pytest -q -o faulthandler_timeout=0 tests/races $(ARGS)

soak: $(VENV)/.ready ## a million opens by every transport, and bystanders of floods (as root); COUNT= for another number
	@FDBROKER_SOAK=$(or $(COUNT),1000000) $(BIN)/python -m pytest -q -o faulthandler_timeout=0 tests/soak $(ARGS)

hostile: $(VENV)/.ready ## attack each promise in full: all that can fail does, and neighbours do what they like (as root)
	@FDBROKER_HOSTILE=1 $(BIN)/python -m pytest -q -o faulthandler_timeout=0 tests/hostile $(ARGS)

fuzz: $(VENV)/.ready-fuzz ## send it any bytes, guided by coverage, for DURATION= seconds (as root or not)
	@$(BIN)/python -m tests.fuzz.run $(or $(DURATION),60)

lint: $(VENV)/.ready ## style, format, types and who imports whom
	@failed=; \
	$(BIN)/python -m ruff check --quiet . || failed="$$failed style"; \
	$(BIN)/python -m ruff format --quiet --diff . || failed="$$failed format"; \
	$(BIN)/python -m mypy || failed="$$failed types"; \
	$(BIN)/lint-imports --no-logo --cache-dir build/import-linter || failed="$$failed imports"; \
	if [ -n "$$failed" ]; then echo "lint: not in order:$$failed" >&2; exit 1; fi

format: $(VENV)/.ready ## rewrite the sources in the format that lint asks for
	@$(BIN)/python -m ruff check --quiet --fix-only .
	@$(BIN)/python -m ruff format .

man: $(VENV)/.ready ## write the manual pages to build/man
	@rm -rf build/man
	@$(BIN)/python -m scripts.man_pages build/man

completions: $(VENV)/.ready ## write the completions of shells anew, after a change of commands or options
	@$(BIN)/python -m scripts.completions packaging/completions

docs: $(VENV)/.ready-docs ## build the documentation's site in build/site; a warning, as of a link that leads nowhere, is an error
	@rm -rf build/site
	@$(BIN)/python -m sphinx -q -j auto -W --keep-going -d build/site-doctrees -c docs/site . build/site
	@echo "docs: open build/site/index.html"

# What an sdist has. Where git does not say, be it that the checkout is somebody else's, it is made each time.
SOURCES := $(or $(wildcard $(shell git ls-files --cached --others --exclude-standard 2>/dev/null)),unknown-sources)

dist: dist/.made ## make the sdist and the wheel in dist/, reproducibly
	@ls dist/*.tar.gz dist/*.whl

dist/.made: $(VENV)/.ready $(SOURCES)
	@rm -rf dist
	@if epoch=$$(git log -1 --format=%ct 2>/dev/null); then export SOURCE_DATE_EPOCH=$$epoch; fi; \
	umask 022 && $(BIN)/python -I -m hatchling build -d dist >build/dist.log 2>&1 || { cat build/dist.log >&2; exit 1; }
	@touch $@

deb: build/deb/.made ## build Debian packages of the sdist in build/deb, and check them with lintian (on Debian)
	@echo "deb: apt-get install ./build/deb/*.deb installs them (docs/packages.md)"

build/deb/.made: dist/.made scripts/deb
	@scripts/setup --packages deb
	@scripts/deb dist/fdbroker-*.tar.gz build/deb
	@# Suppressed: what is wrong of a first upload to the archive of Debian alone.
	@lintian --allow-root --fail-on error,warning --suppress-tags initial-upload-closes-no-bugs \
		build/deb/fdbroker_*.changes
	@touch $@

bench: $(VENV)/.ready-bench ## run the benchmarks
	@$(BIN)/python benchmarks/run.py $(ARGS)

bench-scan: $(VENV)/.ready-bench ## compare scans with clamdscan (as root; needs ClamAV, takes three minutes)
	@$(BIN)/python benchmarks/run.py --scans --rounds 5 $(ARGS)

constraints: ## resolve all dependencies anew and write constraints.txt
	@scripts/setup --constraints $(EXTRAS),bench,docs,fuzz

clean: ## remove all that was made
	@rm -rf build dist .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
