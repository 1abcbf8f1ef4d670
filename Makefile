# make demo     train, evaluate and build a real model on real tweets, offline except for packages; ends with a table
# make test     all tests, offline, in two processes
# make test-compat   load the published folder in an older transformers too
# make soak     kill -9 a run at random moments, 20 times, and compare each run with an uninterrupted one
# make app      a page in the browser to try a finished run
# make quality  formatter, linter and type checker
# make bench    benchmark this project against TRL and PEFT, about an hour and a half on two cores
# make .llama.cpp    llama.cpp's converter, for push_to_hub.py --gguf
# Each target creates .venv from the pinned requirements if it is missing or outdated. Nothing is installed globally.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_DIR := runs/demo
# For a shorter demo: make demo TRAIN_FLAGS="--max_steps 10" EVALUATE_FLAGS="--max_eval_samples 50"
TRAIN_FLAGS ?=
EVALUATE_FLAGS ?=
# For a smoke test: make bench BENCH_FLAGS=--quick
BENCH_FLAGS ?=

.PHONY: demo test test-compat soak quality bench assets app .llama.cpp

demo: $(VENV)/.runtime assets
	@if [ -e $(DEMO_DIR) ] && [ ! -e $(DEMO_DIR)/.made_by_make_demo ]; then \
		echo "$(DEMO_DIR) exists and was not made by make demo, so it was left alone." \
			"Move it away, or choose another folder: make demo DEMO_DIR=runs/demo2" >&2; exit 2; fi
	rm -rf $(DEMO_DIR) && mkdir -p $(DEMO_DIR) && touch $(DEMO_DIR)/.made_by_make_demo
	$(BIN)/accelerate launch --config_file accelerate_config.yaml train.py \
		--config recipes/quickstart.yaml --output_dir $(DEMO_DIR) $(TRAIN_FLAGS)
	$(BIN)/python evaluate.py $(DEMO_DIR) $(EVALUATE_FLAGS)
	$(BIN)/python push_to_hub.py $(DEMO_DIR) --dry_run true

# Two processes share the files of tests; TEST_FLAGS="-n 0" runs them in one. The tests of 4-bit bases run by themselves,
# because PEFT imports bitsandbytes wherever it is installed, which would slow every start of every other test.
TEST_FLAGS ?= -n 2

test: $(VENV)/.dev assets .llama.cpp .4bit/.done
	$(BIN)/python -m pytest --ignore tests/test_four_bit.py --dist loadfile --no-loadscope-reorder --durations 20 $(TEST_FLAGS)
	PYTHONPATH=.4bit $(BIN)/python -m pytest tests/test_four_bit.py $(TEST_FLAGS)

.4bit/.done: requirements-4bit.txt $(VENV)/.dev
	rm -rf .4bit
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .4bit -r requirements-4bit.txt
	touch $@

test-compat: $(VENV)/.dev assets .compat/.done
	$(BIN)/python -m pytest tests/test_compat.py

.compat/.done: requirements-compat.txt $(VENV)/.dev
	rm -rf .compat
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .compat -r requirements-compat.txt
	touch $@

# axolotl, for `python -m bench --only axolotl`. Its parts are one package of several folders, so they are fetched at once.
.axolotl/.done: requirements-axolotl.txt $(VENV)/.dev
	rm -rf .axolotl
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .axolotl -r requirements-axolotl.txt
	touch $@

# A page to try a finished run: make app MODEL=runs/quickstart
MODEL ?= $(DEMO_DIR)

app: $(VENV)/.app
	$(BIN)/python space/app.py $(MODEL) --open

$(VENV)/.app: requirements-app.txt $(VENV)/.runtime
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-app.txt
	touch $@

# llama.cpp's converter, for push_to_hub.py --gguf.
.llama.cpp: .llama.cpp/convert_hf_to_gguf.py

.llama.cpp/convert_hf_to_gguf.py: quickstart/converter.py $(VENV)/.runtime
	$(BIN)/python -m quickstart.converter
	touch $@

# transformers.js and its runtime, to test page/index.html.
.npm/.done: page/index.html
	rm -rf .npm && mkdir -p .npm/transformers .npm/onnxruntime-web
	cd .npm && npm pack --silent @huggingface/transformers@4.3.1 onnxruntime-web@1.31.0-dev.20260914-8d85527a0
	cd .npm && tar xzf huggingface-transformers-*.tgz -C transformers --strip-components 1
	cd .npm && tar xzf onnxruntime-web-*.tgz -C onnxruntime-web --strip-components 1
	rm .npm/*.tgz && touch $@

soak: $(VENV)/.dev
	TWEETDORA_SOAK=20 $(BIN)/python -m pytest -s tests/test_survival.py -k killed

quality: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --follow-imports silent evaluate.py

bench: $(VENV)/.dev assets
	$(BIN)/python -m bench $(BENCH_FLAGS)

assets: $(VENV)/.runtime
	$(BIN)/python -m quickstart

$(VENV)/.runtime: requirements.txt
	@echo "Installing the pinned packages into $(VENV); this takes a minute or two ..."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.runtime
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@
