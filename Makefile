# Every target makes what it needs: `make demo` and `make test` work on a fresh clone.
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
# An accelerator extra of setup.cfg: tpu, cuda12 or cuda13.
EXTRAS ?=
# The first interpreter that is at least 3.11; 3.11 before newer ones, since CI proves that set.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
COMMA := ,
STAMP := $(VENV)/.env$(if $(EXTRAS),-$(subst $(COMMA),-,$(EXTRAS)))

# tensorflow-io's own environment (docs/tfio.md): no Python above 3.12 has a build of it, and on x86
# TensorFlow is smaller without CUDA.
TFIO := .venv-tfio
TFIO_PYTHON ?= $(shell for p in $(PYTHON) python3.11 python3.12 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && { echo $$p; break; }; done)
TFIO_EXTRA := $(if $(filter x86_64,$(shell uname -m)),tensorflow-cpu,tensorflow)

# Memory in huge pages: training and tests on a CPU are a third faster (docs/results/cpu.md).
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: help env dev tfio demo test test-all lint format tiny tiny-av clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 12

env: $(STAMP)  ## make .venv with the package (EXTRAS=tpu, cuda12 or cuda13 adds an accelerator)

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; install it or set PYTHON=..."; exit 2; }
	@echo "Making $(VENV) with $$($(PYTHON) --version) ..."
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "This Python cannot make environments; install its venv module (Debian: apt install python3-venv)"; exit 2; }

$(STAMP): $(BIN)/python setup.cfg constraints.txt
	$(PIP) -e '.$(if $(EXTRAS),[$(EXTRAS)])'
	@touch $@

# timm (an oracle) needs torchvision, which has no CPU build on the index: both go to a folder of
# their own, where only the tests look (tests/conftest.py), so that transformers never meets them.
# Of torchaudio and speechbrain one file each is read, and nothing imported (tests/audio_oracle.py).
dev: $(VENV)/.dev  ## add what the tests need (CPU torch, timm, ruff, pytest)
$(VENV)/.dev: $(STAMP)
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps --upgrade --target $(VENV)/oracle timm torchvision mistral-common
	$(PIP) --no-deps --upgrade --target $(VENV)/oracle_files torchaudio speechbrain
	@touch $@

tfio: $(TFIO)/.env  ## make .venv-tfio, which reads TFRecords for `vllama2 data ingest` (1.5 GB)
$(TFIO)/.env: constraints-tfio.txt
	@$(or $(TFIO_PYTHON),false) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null || { \
		echo "tensorflow-io needs Python 3.11 or 3.12; install one of them or set TFIO_PYTHON=..."; exit 2; }
	@echo "Making $(TFIO) with $$($(TFIO_PYTHON) --version) ..."
	@$(TFIO_PYTHON) -m venv --clear $(TFIO) || { rm -rf $(TFIO); \
		echo "This Python cannot make environments; install its venv module (Debian: apt install python3-venv)"; exit 2; }
	$(TFIO)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-tfio.txt \
		'tensorflow-io[$(TFIO_EXTRA)]' array_record 'etils[epath]' pillow
	@touch $@

demo: $(STAMP)  ## ask the embedded model about videos and sounds that it has never met
	$(BIN)/python -m vllama2_jax.demo --out demo

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(VENV)/.dev  ## format and mend what ruff can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: lint  ## lint and all tests but the heavy ones
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist worksteal

test-all: lint tfio  ## every test
	$(BIN)/python -m pytest -n 2 --dist worksteal

tiny: $(STAMP)  ## train the embedded model again, as far as it sees (15 minutes on 2 cores)
	$(BIN)/python -m vllama2_jax.train.schooling --out runs/tiny_start
	$(BIN)/vllama2 train --config=config:tiny_video_pretrain --out runs/tiny_video_pretrain
	$(BIN)/vllama2 train --config=config:tiny_video_sft --out runs/tiny_video_sft
	$(BIN)/python -m vllama2_jax.evals.toybox runs/tiny_video_sft --clips 500

tiny-av: $(STAMP)  ## go on behind `make tiny`: what it hears, and both together, into runs/tiny
	$(BIN)/python -m vllama2_jax.train.schooling --hearing runs/tiny_video_sft --out runs/tiny_ears
	$(BIN)/vllama2 train --config=config:tiny_audio_pretrain --out runs/tiny_audio_pretrain
	$(BIN)/vllama2 train --config=config:tiny_audio_sft --out runs/tiny_audio_sft
	$(BIN)/vllama2 train --config=config:tiny_av_joint --out runs/tiny_av_joint
	$(BIN)/vllama2 convert runs/tiny_av_joint runs/tiny
	$(BIN)/python -m vllama2_jax.evals.toybox runs/tiny --clips 1200

clean:  ## remove the environment and everything made
	rm -rf $(VENV) $(TFIO) build dist *.egg-info runs demo
