PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/pytest -n 14 --dist load --maxschedchunk 1

.PHONY: help demo test windows lint coverage soak bench clean

help: ## Show what there is to make
	@sed -n 's/^\([a-z]*\):.*## /\1	/p' Makefile | expand -t 12

.venv/run: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable .
	@touch $@

.venv/dev: .venv/run
	$(BIN)/pip install --quiet --editable '.[dev]'
	@# Compile the tests once, and not in each of the processes that run them. What is wrong with one
	@# is told by lint and test.
	$(BIN)/pytest --collect-only > /dev/null || true
	@touch $@

demo: .venv/run ## Send three messages from a client to a server, two processes
	@PATH="$(CURDIR)/$(BIN):$$PATH" sh -eu -c ' \
	log=$$(mktemp); trap "rm -f $$log" EXIT; \
	zmqmsg serve --bind "tcp://127.0.0.1:*" --count 3 2>$$log | sed "s/^/server prints: /" & \
	until endpoint=$$(sed -n "s/.*listening on //p" $$log) && [ "$$endpoint" ]; do sleep 0.1; done; \
	echo "serve listens on $$endpoint"; \
	zmqmsg send --connect "$$endpoint" --timeout 10 "first message" "second message" "third message" \
	| sed "s/^/client prints: /"; \
	wait'

test: .venv/dev ## Run the tests
	$(PYTEST)

windows: .venv/dev ## Run the tests with a Python for Windows, under Wine
	$(BIN)/python tests/windows.py -n 2 --dist worksteal --timeout 300 $(WINDOWS_OPTIONS)

lint: .venv/dev ## Check style, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/mypy --platform darwin zmqmsg
	$(BIN)/mypy --platform win32 zmqmsg
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/tests.yml

coverage: .venv/dev ## Run the tests and show what they leave out
	$(PYTEST) --cov --cov-report=term-missing

soak: .venv/dev ## Run the long tests at full size
	$(BIN)/pytest -m soak --timeout 900

bench: .venv/dev ## Compare the speed with plain loops in pyzmq
	$(BIN)/python tests/bench.py

clean: ## Remove all that was made
	rm -rf .venv .coverage* .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
	find zmqmsg tests -name __pycache__ -prune -exec rm -rf {} +
