# make demo    the main job on this machine, from end to end, touching nothing outside its own namespaces
# make test    formatting, types, import contracts and all tests
# Both make the virtual environment they need. `make help` lists the rest.

PYTHON ?= python3
COMPILE := uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --no-annotate --no-emit-index-url
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
PREFIX ?= /opt/ngrokd
BINDIR ?= /usr/local/bin
PIP_FLAGS := --quiet --disable-pip-version-check
OLD_PYTHON := import sys; sys.exit("ngrokd needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; try: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)

.PHONY: help demo test check unit netns bench lock install uninstall clean

help:
	@grep -E '^# make|^## ' $(MAKEFILE_LIST) | sed -E 's/^#+ //'

# The lock files pin every package by hash; the project itself is installed without build isolation so that
# nothing unpinned is fetched. A stamp says for which lock an environment was made.
.venv/stamp: requirements/dev.lock pyproject.toml
	@$(PYTHON) -c '$(OLD_PYTHON)'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install $(PIP_FLAGS) --require-hashes -r requirements/dev.lock
	.venv/bin/python -m pip install $(PIP_FLAGS) --no-deps --no-build-isolation -e .
	@touch $@

demo: .venv/stamp
	$(SUDO) .venv/bin/ngrokd demo --isolated --once
	@echo "To keep it running and try it by hand: sudo .venv/bin/ngrokd demo"

test: check unit

## make check        formatting, types and import contracts, without running tests
check: .venv/stamp
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports --no-cache

## make unit         all tests (those marked netns need root and make their own network namespaces)
unit: .venv/stamp
	$(SUDO) env CI="$$CI" .venv/bin/python -m pytest $(PYTEST_ARGS)

## make netns        only the tests on a real kernel
netns: .venv/stamp
	$(SUDO) env CI="$$CI" .venv/bin/python -m pytest -m netns $(PYTEST_ARGS)

## make bench        throughput and latency of the whole path
bench: .venv/stamp
	$(SUDO) .venv/bin/python bench/bench_path.py

## make lock         resolve the lock files anew (needs the `uv` command)
lock:
	$(COMPILE) pyproject.toml -o requirements/runtime.lock
	$(COMPILE) pyproject.toml --group dev -o requirements/dev.lock
	$(COMPILE) --group build -o requirements/build.lock

## make install      (as root) a root-owned installation in /opt/ngrokd, with the commands in /usr/local/bin
install:
	@[ "$$(id -u)" = 0 ] || { echo "install writes to $(PREFIX) and $(BINDIR); run it as root: sudo make install" >&2; exit 77; }
	@$(PYTHON) -c '$(OLD_PYTHON)'
	@echo "installing into $(PREFIX), commands in $(BINDIR)"
	@rm -rf $(PREFIX)/venv $(PREFIX)/build
	@umask 022 && mkdir -p $(PREFIX) $(BINDIR) && $(PYTHON) -m venv $(PREFIX)/build && $(PYTHON) -m venv $(PREFIX)/venv
	@umask 022 && $(PREFIX)/build/bin/python -m pip install $(PIP_FLAGS) --require-hashes -r requirements/build.lock
	@umask 022 && $(PREFIX)/build/bin/python -m pip wheel $(PIP_FLAGS) --no-deps --no-build-isolation -w $(PREFIX)/build/wheel .
	@umask 022 && $(PREFIX)/venv/bin/python -m pip install $(PIP_FLAGS) --require-hashes -r requirements/runtime.lock
	@umask 022 && $(PREFIX)/venv/bin/python -m pip install $(PIP_FLAGS) --no-deps --no-index $(PREFIX)/build/wheel/*.whl
	@rm -rf $(PREFIX)/build
	@ln -sfn $(PREFIX)/venv/bin/ngrokd $(BINDIR)/ngrokd
	@ln -sfn $(PREFIX)/venv/bin/ngrokctl $(BINDIR)/ngrokctl
	@$(BINDIR)/ngrokd version
	@echo "next: sudo ngrokd run      (and in another terminal: sudo ngrokd set-api-key)"

## make uninstall    (as root) removes what install made; the state in /etc/ngrokd stays
uninstall:
	@[ "$$(id -u)" = 0 ] || { echo "uninstall removes $(PREFIX) and commands of $(BINDIR); run it as root: sudo make uninstall" >&2; exit 77; }
	rm -f $(BINDIR)/ngrokd $(BINDIR)/ngrokctl
	rm -rf $(PREFIX)
	@echo "the state directory /etc/ngrokd (operator, key, certificate, addresses) was kept"

clean:
	rm -rf .venv dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
