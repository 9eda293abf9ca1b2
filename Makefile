# `make` lists the targets. Every environment is made from a lock file with hashes; nothing outside this folder is changed,
# except that `make test` installs the servers that the tests need if they are missing.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
NODE := tests/acceptance/node
PIP := -m pip --disable-pip-version-check install -qq --no-compile
COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-header --no-annotate --no-emit-index-url

# What `make test` installed is more than the demos need.
DEMO := $(or $(wildcard .venv/dev.stamp),$(wildcard .venv/learn.stamp),.venv/demo.stamp)
LEARN := $(or $(wildcard .venv/dev.stamp),.venv/learn.stamp)

.PHONY: help install demo demo-learn check test services lock clean

help:
	@echo "make demo      show every action on a scripted model: no key, no network"
	@echo "make demo-learn  learn from reviews on a real, small model: a threshold that is promised, and what became of it"
	@echo "make install   everything to work on Holdgate, in .venv"
	@echo "make check     format, lint, types, architecture"
	@echo "make test      the whole test suite; installs PostgreSQL, Redis and Node.js if they are missing"
	@echo "make lock      renew requirements/*.lock from pyproject.toml"
	@echo "make clean     remove what the other targets made"

demo: $(DEMO)
	@$(BIN)/holdgate demo

demo-learn: $(LEARN)
	@$(BIN)/holdgate demo-learn

install: .venv/dev.stamp

check: .venv/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

test: .venv/dev.stamp .venv-openai3/stamp services $(NODE)/node_modules/.package-lock.json
	$(BIN)/pytest -n 2 --dist loadfile

lock: .venv/dev.stamp
	$(BIN)/python $(PIP) uv
	$(COMPILE) pyproject.toml --extra dev -o requirements/dev.lock
	$(COMPILE) pyproject.toml --extra demo -c requirements/dev.lock -o requirements/demo.lock
	$(COMPILE) pyproject.toml --extra demo --extra analysis -c requirements/dev.lock -o requirements/learn.lock
	echo "openai==3.*" | $(COMPILE) - -o requirements/openai3.lock

clean:
	rm -rf .venv .venv-openai3 .demo $(NODE)/node_modules .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/demo.stamp: requirements/demo.lock pyproject.toml | .venv/bin/python
	@echo "Installing what the demo needs into .venv; this takes less than a minute."
	@$(BIN)/python $(PIP) --require-hashes -r requirements/demo.lock
	@$(BIN)/python $(PIP) --no-deps -e .
	@touch $@

.venv/learn.stamp: requirements/learn.lock pyproject.toml | .venv/bin/python
	@echo "Installing what the demo and fitting need into .venv; this takes about a minute."
	@$(BIN)/python $(PIP) --require-hashes -r requirements/learn.lock
	@$(BIN)/python $(PIP) --no-deps -e .
	@touch $@

.venv/dev.stamp: requirements/dev.lock pyproject.toml | .venv/bin/python
	@echo "Installing what development needs into .venv; this takes a minute or two."
	@$(BIN)/python $(PIP) --require-hashes -r requirements/dev.lock
	@$(BIN)/python $(PIP) --no-deps --no-build-isolation -e .
	@touch $@

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Holdgate needs Python 3.11 or newer; name it: make PYTHON=/path/to/python3.11")'
	@$(PYTHON) -m venv .venv

# litellm pins version 2 of the OpenAI client, so version 3 is tested from an environment of its own.
.venv-openai3/stamp: requirements/openai3.lock
	@$(PYTHON) -m venv .venv-openai3
	@.venv-openai3/bin/python $(PIP) --require-hashes -r requirements/openai3.lock
	@touch $@

services:
	@missing=; \
	command -v redis-server >/dev/null || missing="$$missing redis-server"; \
	command -v postgres >/dev/null || ls /usr/lib/postgresql/*/bin/postgres >/dev/null 2>&1 || missing="$$missing postgresql"; \
	command -v node >/dev/null || missing="$$missing nodejs"; \
	command -v npm >/dev/null || missing="$$missing npm"; \
	test -z "$$missing" && exit; \
	root=; test "$$(id -u)" = 0 || root="sudo -n"; \
	if ! command -v apt-get >/dev/null || ! $$root true 2>/dev/null; then \
		echo "The tests need these packages of your system; please install them:$$missing" >&2; exit 1; \
	fi; \
	echo "Installing$$missing"; \
	$$root apt-get update -qq; \
	$$root env DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends $$missing >/dev/null

$(NODE)/node_modules/.package-lock.json: $(NODE)/package.json $(NODE)/package-lock.json | services
	@npm ci --prefix $(NODE) --ignore-scripts --loglevel error
	@touch $@
