# Every target sets up what it needs: a fresh clone and python3 (3.11 or newer) are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# EXTRA=gpu installs the whole of SGLang with its CUDA stack; the default is the CPU set.
EXTRA ?= cpu
# What decides, keeps bytes and moves them is checked strictly.
STRICT := $(wildcard $(addprefix python/symphony_sglang/,core store wire router sim telemetry))
STAMP := $(VENV)/.setup-$(EXTRA)

.PHONY: setup demo test soak lint bench clean

setup: $(STAMP)

$(STAMP): pyproject.toml requirements/cpu-no-deps.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --progress-bar off --editable '.[$(EXTRA),dev]'
ifeq ($(EXTRA),cpu)
	$(BIN)/python -m pip install --quiet --progress-bar off --no-deps --requirement requirements/cpu-no-deps.txt
endif
	touch $@

lint: $(STAMP)
	$(BIN)/ruff format --check python tests benchmark
	$(BIN)/ruff check python tests benchmark
	$(BIN)/mypy --strict $(STRICT)
	$(BIN)/mypy python/symphony_sglang
	$(BIN)/lint-imports

test: $(STAMP)
	$(BIN)/python -m pytest -m "not soak" tests

soak: $(STAMP)
	$(BIN)/python -m pytest -m soak tests

demo: $(STAMP)
	$(BIN)/symphony demo

# The short set, without traces: levels, one user's advisories, generated chats under pressure.
bench: $(STAMP)
	$(BIN)/python -m benchmark.serve --rounds 5
	$(BIN)/python -m benchmark.advise --rounds 5
	$(BIN)/python -m benchmark run conversations

clean:
	rm -rf $(VENV) build dist .demo
