# make train: set up, prepare the bundled text, train the tiny model (3 minutes on 2 cores).
# make test:  set up, run the tests.   make test-slow: those that take long.
# make check: lint, types, import contract, lock file.

PYTHON := .venv/bin/python
TINY_RUN := runs/tiny

.PHONY: setup tokens train test test-slow check format lock clean

setup: .venv/installed

# The interpreter is looked for where Debian, pyenv and uv put it; a pyenv shim may be there without
# the version behind it, so each candidate is asked.
.venv/installed: requirements.lock
	@python=""; for candidate in python3.12 "$$HOME"/.pyenv/versions/3.12*/bin/python python3 python; do \
	  if $$candidate -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; \
	  then python=$$candidate; break; fi; done; \
	if [ -z "$$python" ]; then \
	  echo "error: Python 3.12 was not found: install it (pyenv install 3.12, or uv python install 3.12)" >&2; \
	  exit 1; fi; \
	echo "setting up .venv with $$($$python --version), about a minute ..."; \
	$$python -m venv --clear .venv
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	@touch $@

tokens: tokens/bundled/manifest.json

tokens/bundled/manifest.json: .venv/installed $(wildcard texts/train/* texts/validation/*) texts/tokenizer.json
	@$(PYTHON) -m asa_jax.data.prepare --input 'texts/train/*' --validation-input 'texts/validation/*' \
	  --tokenizer texts/tokenizer.json --output tokens/bundled --overwrite

train: setup tokens
	@$(PYTHON) train.py --config=configs/tiny.py --workdir=$(TINY_RUN)

test: setup
	@$(PYTHON) -m pytest -n auto --dist loadfile -m 'not slow'

test-slow: setup
	@$(PYTHON) -m pytest -n auto --dist loadfile -m slow

check: setup
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m mypy
	@.venv/bin/lint-imports --no-cache
	@if grep -nE 'https?://' requirements.lock; then echo 'error: requirements.lock holds URLs' >&2; exit 1; fi

format: setup
	@$(PYTHON) -m ruff check --fix .
	@$(PYTHON) -m ruff format .

# Needs uv (pip install uv).
lock:
	uv pip compile pyproject.toml --extra dev --universal --generate-hashes --python-version 3.12 \
	  --no-emit-index-url --no-header --upgrade --output-file requirements.lock

clean:
	rm -rf .venv runs tokens
