# make setup | demo | science | test | check | bench | wheels | kernels. Each first installs what it needs into .venv, once; after
# that wheels, kernels-all, example-trl and test-<package> alone use a network. Another interpreter: make PYTHON=python3.12 setup.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
PEERS := $(VENV)/.peers-done
NATIVE := CMakeLists.txt $(wildcard csrc/*)

.DEFAULT_GOAL := help
.PHONY: help setup demo science test test-deepspeed test-vllm test-trl test-trl-suite test-swift test-verl test-easyr1 test-lmms example-trl check bench gpu wheels kernels kernels-all

help:
	@echo "make setup   .venv with everything the tests and the demo need"
	@echo "make demo    train GRPO and ROMA on real digits, evaluate on bad images: runs/demo;"
	@echo "             METHOD=\"mssr vgpo\" adds methods to it: docs/METHODS.md"
	@echo "make science every run, figure and table of docs/SCIENCE.md; hours, and what is finished is not run again;"
	@echo "             STAGES=\"severity pages\" runs some of it"
	@echo "make test    every test"
	@echo "make test-deepspeed   the trainer under ZeRO-1, 2 and 3, with DeepSpeed in a folder of its own"
	@echo "make test-vllm   rollouts by vLLM's CPU build, in an environment of its own"
	@echo "make test-trl   ROMA in TRL, its oldest and newest version that fit"
	@echo "make test-trl-suite TRL_TESTS=/path   TRL's own GRPO tests with our trainer in their place"
	@echo "make test-swift   ROMA in ms-swift, in an environment of its own"
	@echo "make test-verl   ROMA in verl, in an environment of its own"
	@echo "make test-easyr1 EASYR1=/path   ROMA in a clone of EasyR1, which is on no index"
	@echo "make test-lmms   benchmarks of lmms-eval on degraded images, in an environment of its own"
	@echo "make example-trl   TRL's GRPO with ROMA on a small Qwen3-VL, on a CPU: runs/example-trl"
	@echo "make check   ruff, mypy, imports, links, README, doctests, every kernel compiled for every chip"
	@echo "make bench   the loss against its peers, held to float64 first: bench/results, docs/BENCHMARKS.md"
	@echo "make wheels  the peers' wheels for a machine with a GPU and without a network: .wheels"
	@echo "make gpu     what a card must show, in minutes: runs/gpu, docs/GPU.md; ARGS=--plan prints how"
	@echo "make kernels the same compilation, written to docs/KERNELS.md; kernels-all: under every Triton"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt $(NATIVE)
	@echo "setup: installing into $(VENV), versions from constraints.txt; minutes the first time"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt \
		--editable '.[train,views,lora,math,dev]'
	@# Its table of ImageNet-C's levels is read by a test; never imported, so it needs nothing else.
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps imagecorruptions-imaug
	@touch $@

demo: $(STAMP)
	@echo "demo: the whole method on two cores, about ten minutes; the report goes to runs/demo"
	@$(BIN)/python -m experiments.digits --out runs/demo --methods "$(METHOD)"

science: $(STAMP)
	@echo "science: two hours on two cores the first time; stages resume; runs/science"
	@$(BIN)/python -m experiments.science $(STAGES)

# Two test processes on two cores: more threads in each would only wait for one another.
test test-deepspeed test-vllm test-trl test-trl-suite test-swift test-verl test-easyr1 test-lmms example-trl check: export OMP_NUM_THREADS ?= 1

test: $(STAMP)
	@echo "test: every test, two at a time"
	@$(BIN)/pytest -q -n 2 --dist worksteal --ignore tests/trl_stack

# Not in .venv's own packages: transformers and accelerate import it wherever they find it.
$(VENV)/deepspeed: $(STAMP)
	@test -d $@ || $(BIN)/python -m pip install --quiet --no-deps --no-build-isolation \
		--constraint constraints.txt --target $@ deepspeed einops hjson msgpack py-cpuinfo
	@touch $@

test-deepspeed: $(VENV)/deepspeed
	@PATH="$(CURDIR)/$(BIN):$$PATH" PYTHONPATH=$(VENV)/deepspeed \
		$(BIN)/pytest -q -n 0 tests/train/test_ranks.py tests/train/test_engines.py \
		tests/train/test_engine_options.py tests/train/test_estimate_ranks.py \
		tests/integrations/test_lm_head_ranks.py
	@PATH="$(CURDIR)/$(BIN):$$PATH" PYTHONPATH=$(VENV)/deepspeed \
		$(BIN)/pytest -q -n 0 tests/train/test_checkpoint_kill.py -k zero2

# An environment of its own: vLLM names its transformers. The two that go have no CPU build.
$(VENV)/vllm/.ready: tests/vllm_engine/requirements.txt
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip install --quiet --requirement $<
	@$(@D)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	@touch $@

test-vllm: $(VENV)/vllm/.ready
	@PYTHONPATH=.:kernels:tests/vllm_engine/cpu $(VENV)/vllm/bin/python -m pytest -q \
		--confcutdir tests/vllm_engine tests/vllm_engine

# Each version in a folder of its own. They go with the transformers that is here.
TRL_OLDEST := 1.15.0
TRL_NEWEST := 1.16.0

$(VENV)/trl-%: $(STAMP)
	@test -d $@ || $(BIN)/python -m pip install --quiet --no-deps --target $@ trl==$*
	@touch $@

test-trl: $(VENV)/trl-$(TRL_OLDEST) $(VENV)/trl-$(TRL_NEWEST) $(VENV)/deepspeed
	@for version in $(TRL_NEWEST) $(TRL_OLDEST); do \
		echo "test-trl: TRL $$version"; \
		PATH="$(CURDIR)/$(BIN):$$PATH" PYTHONPATH=$(VENV)/trl-$$version:$(VENV)/deepspeed \
			$(BIN)/pytest -q -n 2 --dist worksteal tests/trl_stack || exit 1; \
	done

# TRL's own tests with our trainer in their place: make test-trl-suite TRL_TESTS=trl/tests, of a clone of TRL.
# jmespath: without it those of tools are skipped.
test-trl-suite: $(VENV)/trl-$(TRL_NEWEST)
	@test -d "$(TRL_TESTS)" || { echo "test-trl-suite: give TRL_TESTS=/path/of/trl/tests"; exit 2; }
	@test -d $(VENV)/jmespath || $(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/jmespath jmespath
	@PYTHONPATH=$(VENV)/trl-$(TRL_NEWEST):$(VENV)/jmespath $(BIN)/python tests/trl_suite/run.py --tests $(TRL_TESTS) -n 2

# Environments of their own: both name their transformers. torchvision has no build for this torch.
$(VENV)/swift/.ready: tests/swift_stack/requirements.txt
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip install --quiet --requirement $<
	@touch $@

test-swift: $(VENV)/swift/.ready
	@PYTHONPATH=.:kernels:tests/vllm_engine/cpu $(VENV)/swift/bin/python -m pytest -q \
		--confcutdir tests/swift_stack tests/swift_stack

$(VENV)/verl/.ready: tests/verl_stack/requirements.txt
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip install --quiet --requirement $<
	@$(@D)/bin/python -m pip install --quiet --no-deps torchvision==0.28.0
	@touch $@

test-verl: $(VENV)/verl/.ready
	@PYTHONPATH=.:kernels:tests/vllm_engine/cpu:tests/verl_stack/cpu $(VENV)/verl/bin/python -m pytest -q \
		--confcutdir tests/verl_stack tests/verl_stack

# EASYR1 is the absolute path of a clone: Ray starts its workers elsewhere.
$(VENV)/easyr1/.ready: tests/integrations/recorded/requirements.txt
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip install --quiet --requirement $<
	@touch $@

test-easyr1: $(VENV)/easyr1/.ready
	@test -d "$(EASYR1)/verl" || { echo "test-easyr1: give EASYR1=/path/of/a/clone of EasyR1"; exit 2; }
	@PYTHONPATH=$(CURDIR):$(CURDIR)/kernels:$(CURDIR)/tests:$(EASYR1) $(VENV)/easyr1/bin/python -m pytest \
		-q --confcutdir tests/integrations tests/integrations/test_easyr1*.py

# The package itself is in it: lmms-eval finds its plug-ins by their entry points.
$(VENV)/lmms/.ready: tests/lmms_stack/requirements.txt pyproject.toml $(NATIVE)
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip install --quiet --requirement $<
	@$(@D)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	@$(@D)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

test-lmms: $(VENV)/lmms/.ready
	@PYTHONPATH=.:kernels:tests/vllm_engine/cpu $(VENV)/lmms/bin/python -m pytest -q \
		--confcutdir tests/lmms_stack tests/lmms_stack

example-trl: $(VENV)/trl-$(TRL_NEWEST)
	@PYTHONPATH=$(VENV)/trl-$(TRL_NEWEST) $(BIN)/python examples/trl/train.py --out runs/example-trl

check: $(STAMP)
	@echo "check: ruff"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@echo "check: mypy"
	@$(BIN)/mypy
	@echo "check: imports run downwards"
	@$(BIN)/lint-imports --no-cache --no-logo
	@echo "check: links"
	@$(BIN)/python .ci/check_links.py
	@echo "check: README's code"
	@$(BIN)/python .ci/check_readme.py
	@echo "check: doctests"
	@$(BIN)/pytest -q --doctest-modules --doctest-ignore-import-errors \
		roma kernels/roma_kernels experiments .ci
	@echo "check: kernels"
	@$(BIN)/python -m bench.compiled --check

$(PEERS): $(STAMP)
	@echo "bench: installing the peers"
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	@# The files of its heads need torch alone; verl itself wants ray and an older transformers.
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps verl
	@touch $@

bench: $(PEERS)
	@echo "bench: about ten minutes on two cores"
	@$(BIN)/python -m bench --preset quick --report

wheels: $(STAMP)
	@$(BIN)/python -m bench.wheels $(ARGS)

# Installs nothing: a machine with a card may have no network. The first steps need torch and triton.
gpu:
	@PYTHONPATH=.:kernels $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m bench.gpu $(ARGS)

kernels: $(STAMP)
	@echo "kernels: compiling for sm_80, sm_90, sm_100, sm_120 and gfx942; no GPU takes part"
	@$(BIN)/python -m bench.compiled

kernels-all: $(STAMP)
	@echo "kernels-all: every combination under four Tritons, installed into $(VENV)/tritons: twenty minutes each"
	@$(BIN)/python -m bench.compiled --tritons
