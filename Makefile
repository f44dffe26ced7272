# What CONTRIBUTING names. Every target works on a clean clone.
.PHONY: setup check test test-all docs

setup:
	scripts/setup dev

check: setup
	scripts/check

test: setup
	scripts/test -m "not slow"

test-all: setup
	scripts/test

docs: setup
	.venv/bin/python scripts/reference.py
	.venv/bin/zensical build --strict --clean
