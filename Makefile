# `make` runs the whole assignment and writes the report; a second `make` redoes only what is out of date.
#
#   make DATA=path     CIFAR-10 is already at path (the folder that holds cifar-10-batches-py)
#   make RESULTS=path  write somewhere else
#   make STEM=name     the network and its recipe: imagenet, stride2 or cifar (default: by device)
#   make SEED=number   of everything but the split
#   make TORCH=cpu     on Linux without a GPU: a build of PyTorch without CUDA's several GB
#   make FLAGS="..."   flags for every script, for instance FLAGS="--device cuda"

DATA    ?= data
RESULTS ?= results
STEM    ?=
SEED    ?=
FLAGS   ?=
TORCH   ?=
PYTHON  ?= python3

# Make splits and matches names of its own accord: with these characters it would delete or skip files.
UNFIT := $(strip $(filter-out 1,$(words $(RESULTS))) $(foreach character,% : ; & | * ? ~ [ ] ( ) < > ',\
             $(findstring $(character),$(RESULTS))))
ifneq ($(UNFIT),)
    $(error RESULTS=$(RESULTS): give a folder name without spaces and special characters)
endif

CPU_BUILDS := https://download.pytorch.org/whl/cpu
VENV   := .venv/bin/python
COMMON := --data "$(DATA)" --results $(RESULTS) $(FLAGS)
MODEL  := $(COMMON) $(if $(SEED),--seed $(SEED))
ASKED  := $(strip $(STEM) $(if $(SEED),seed $(SEED)) $(FLAGS))

all: $(RESULTS)/report.html

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "error: Python 3.10 or newer is needed; name one, for instance: make PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -m venv .venv || \
	    { rm -rf .venv; echo "error: no virtual environment can be made; on Debian and Ubuntu: sudo apt install python3-venv" >&2; exit 2; }
	@{ $(if $(filter cpu,$(TORCH)),$(VENV) -m pip install --quiet torch torchvision --index-url $(CPU_BUILDS) &&) \
	    $(VENV) -m pip install --quiet --requirement requirements.txt; } || \
	    { echo "error: the packages of requirements.txt cannot be installed; connect to the network and run make again" >&2; exit 2; }
	touch $@

# Results of other flags must not be taken for these.
asked:
	@mkdir -p $(RESULTS)
	@if [ -f $(RESULTS)/made_with ] && [ "$$(cat $(RESULTS)/made_with)" != '$(ASKED)' ]; then \
	    echo "error: $(RESULTS) was made with '$$(cat $(RESULTS)/made_with)', not '$(ASKED)'; give another folder: make RESULTS=..." >&2; \
	    exit 2; fi
	@echo '$(ASKED)' >$(RESULTS)/made_with

$(RESULTS)/q1/metrics.json: q1_split.py common.py | .venv/installed asked
	$(VENV) q1_split.py $(COMMON)

$(RESULTS)/q2/metrics.json: q2_train_ce.py common.py $(RESULTS)/q1/metrics.json
	$(VENV) q2_train_ce.py $(MODEL) $(if $(STEM),--stem $(STEM))

$(RESULTS)/q3/metrics.json: q3_attack.py common.py $(RESULTS)/q2/metrics.json
	$(VENV) q3_attack.py $(MODEL)

$(RESULTS)/q4/metrics.json: q4_adv_train.py common.py $(RESULTS)/q2/metrics.json
	$(VENV) q4_adv_train.py $(MODEL)

$(RESULTS)/q6/metrics.json: q6_angular.py common.py $(RESULTS)/q2/metrics.json
	$(VENV) q6_angular.py $(MODEL)

METRICS := $(foreach question,q1 q2 q3 q4 q6,$(RESULTS)/$(question)/metrics.json)

$(RESULTS)/report.html: report.py common.py $(METRICS)
	$(VENV) report.py $(COMMON)

# Everything with three seeds and one split: each model's mean and standard deviation.
seeds:
	for seed in 0 1 2; do $(MAKE) RESULTS=$(RESULTS)-seed$$seed SEED=$$seed || exit; done
	$(VENV) tests/seeds.py $(RESULTS)-seed0 $(RESULTS)-seed1 $(RESULTS)-seed2

quick:
	$(MAKE) RESULTS=$(if $(filter command,$(origin RESULTS)),$(RESULTS),results-quick) FLAGS="--quick $(FLAGS)"

# A few minutes with nothing to fetch but the packages, on pictures that it draws itself.
demo: .venv/installed
	PYTHONPATH=. $(VENV) tests/demo.py

# Is the results folder what it says? Measures it again, without training.
verify: .venv/installed
	$(VENV) verify.py $(MODEL)

# AutoAttack on every classifier's first 1,000 test images: an hour or more each on two cores.
autoattack: .venv/installed
	$(VENV) -m pip install --quiet $$(grep autoattack tests/requirements-peers.txt)
	$(VENV) tests/autoattack.py $(COMMON)

lint: .venv/installed
	$(VENV) -m pip install --quiet ruff
	$(VENV) -m ruff check .

test: .venv/installed
	$(VENV) -m pytest tests

stress: .venv/installed
	$(VENV) -m pytest tests/stress.py

bench: .venv/installed
	$(VENV) -m pip install --quiet --requirement tests/requirements-peers.txt
	$(VENV) tests/bench.py --data "$(DATA)"

.PHONY: all asked seeds quick demo verify autoattack lint test stress bench
.NOTPARALLEL:  # two trainings at once would share the cores and take longer
