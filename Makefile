# `make` runs the whole assignment and writes the report. A second `make` redoes what is out of date.
#
#   make DATA=path     CIFAR-10 is already at path (the folder that holds cifar-10-batches-py)
#   make RESULTS=path  write somewhere else
#   make STEM=name     the network and its recipe: imagenet, stride2 or cifar (default: by device)
#   make SEED=number   of everything but the split
#   make FRESH=1       train anew whatever is out of date, for instance after a change of RECIPES
#   make AUTHOR="..." ID="..." NOTE="..."     your name, your number, a line for each page (each can be left out)
#   make TORCH=cpu     on Linux without a GPU: a build of PyTorch without CUDA's several GB
#   make PYTHON=name   the Python that .venv is made with (default: python3)
#   make FLAGS="..."   flags for every script, for instance FLAGS="--device cuda"

DATA    ?= data
RESULTS ?= results
STEM    ?=
SEED    ?=
FRESH   ?=
AUTHOR  ?=
ID      ?=
NOTE    ?=
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
ANEW   := $(if $(filter 1,$(FRESH)),--fresh)
ASKED  := $(strip make $(if $(STEM),STEM=$(STEM)) $(if $(SEED),SEED=$(SEED)) \
              $(if $(strip $(FLAGS)),FLAGS="$(strip $(FLAGS))"))

# The shell takes these from its environment, where quotes in them do no harm.
export AUTHOR ID NOTE ASKED
# What Apple's GPUs lack, the CPU does. PyTorch reads this while it is imported, so it is set before Python starts.
export PYTORCH_ENABLE_MPS_FALLBACK := 1

all: $(RESULTS)/report.html

# After an upgrade of Python, .venv may not start or may have lost its packages. tqdm is the fastest to import.
BROKEN := $(shell $(VENV) -c 'import tqdm' 2>/dev/null || echo yes)

.venv/installed: requirements.txt $(if $(BROKEN),always)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "error: Python 3.10 or newer is needed; name one, for instance: make PYTHON=python3.12" >&2; exit 2; }
	@$(VENV) -c '' 2>/dev/null || rm -rf .venv
	@$(PYTHON) -m venv .venv || \
	    { rm -rf .venv; echo "error: no virtual environment can be made; on Debian and Ubuntu: sudo apt install python3-venv" >&2; exit 2; }
	@{ $(if $(filter cpu,$(TORCH)),$(VENV) -m pip install --quiet torch torchvision --index-url $(CPU_BUILDS) &&) \
	    $(VENV) -m pip install --quiet --requirement requirements.txt; } || \
	    { echo "error: the packages of requirements.txt cannot be installed; connect to the network and run make again" >&2; exit 2; }
	touch $@

# Results of other flags must not be taken for these. made_with says which command made a folder. It is written
# when question 2 has succeeded, so a mistyped flag leaves nothing behind.
MADE_BY := $(or $(shell cat $(RESULTS)/made_with 2>/dev/null),$(ASKED))
UNLIKE  := $(RESULTS) was made by: $(MADE_BY). Give another folder: $(ASKED) RESULTS=... or train anew in this one: \
               $(ASKED) RESULTS=$(RESULTS) FRESH=1
ifneq ($(MADE_BY),$(ASKED))
ifdef ANEW
# Both files go first: if this run is interrupted, all results are still out of date in the next.
asked:
	@rm -f $(RESULTS)/made_with $(RESULTS)/q1/metrics.json
$(RESULTS)/q1/metrics.json: always
else
asked:
	$(error $(UNLIKE))
endif
endif

# Results without a training state were handed in or copied. Unpacking changes the times of files, by which make
# decides what is out of date. A wrong time must not start a training that replaces somebody's model.
handed_in = $(if $(ANEW),,$(if $(wildcard $(RESULTS)/$1/*.training.pt),,$(wildcard $(RESULTS)/$1/metrics.json)))
LEFT = @echo "$(@D) is left as it is, since models without a training state (handed in, copied) are not"\
           "replaced unasked. To train anew, add FRESH=1."

$(RESULTS)/q1/metrics.json: q1_split.py common.py | .venv/installed asked
	$(if $(call handed_in,q2),$(LEFT),$(VENV) q1_split.py $(COMMON))

$(RESULTS)/q2/metrics.json: q2_train_ce.py common.py $(RESULTS)/q1/metrics.json
	$(if $(call handed_in,q2),$(LEFT),$(VENV) q2_train_ce.py $(MODEL) $(if $(STEM),--stem $(STEM)) $(ANEW))
	$(if $(call handed_in,q2),,@printf '%s\n' "$$ASKED" >$(RESULTS)/made_with)

$(RESULTS)/q3/metrics.json: q3_attack.py common.py $(RESULTS)/q2/metrics.json
	$(VENV) q3_attack.py $(MODEL)

$(RESULTS)/q4/metrics.json: q4_adv_train.py common.py $(RESULTS)/q2/metrics.json
	$(if $(call handed_in,q4),$(LEFT),$(VENV) q4_adv_train.py $(MODEL) $(ANEW))

$(RESULTS)/q6/metrics.json: q6_angular.py common.py $(RESULTS)/q2/metrics.json
	$(if $(call handed_in,q6),$(LEFT),$(VENV) q6_angular.py $(MODEL) $(ANEW))

METRICS := $(foreach question,q1 q2 q3 q4 q6,$(RESULTS)/$(question)/metrics.json)
REPORT  := $(VENV) report.py $(COMMON) $(if $(AUTHOR),--author="$$AUTHOR") $(if $(ID),--student-id="$$ID") \
               $(if $(NOTE),--note="$$NOTE")

# An author's name must also reach a report that is up to date.
$(RESULTS)/report.html: report.py common.py $(wildcard q5_angular_loss.md) $(METRICS) \
                        $(wildcard $(RESULTS)/autoattack.json) $(if $(AUTHOR)$(ID)$(NOTE),always)
	$(REPORT)

# The report of what is there: nothing else is made first.
report: .venv/installed
	$(REPORT)

# Everything with three seeds and one split: each model's mean and standard deviation.
seeds:
	for seed in 0 1 2; do $(MAKE) RESULTS=$(RESULTS)-seed$$seed SEED=$$seed || exit; done
	$(VENV) -m tools.seeds $(RESULTS)-seed0 $(RESULTS)-seed1 $(RESULTS)-seed2

quick:
	$(MAKE) RESULTS=$(if $(filter command,$(origin RESULTS)),$(RESULTS),results-quick) FLAGS="--quick $(FLAGS)"

# A few minutes with nothing to fetch but the packages, on pictures that it draws itself.
demo: .venv/installed
	$(VENV) -m tools.demo

# Is the results folder what it says? Measures it again, without training.
verify: .venv/installed
	$(VENV) verify.py $(COMMON)

# AutoAttack on every classifier's first 1,000 test images: an hour or more each on two cores.
autoattack: .venv/installed
	$(VENV) -m pip install --quiet $$(grep autoattack tests/requirements-peers.txt)
	$(VENV) -m tools.autoattack $(COMMON)
	$(REPORT)

# Deletes all files of the kinds that the scripts write, and a folder only when nothing else is in it.
WRITTEN := $(addprefix q[1-6]/,metrics.json *.pt *.npz *.png *.part) \
               made_with report.html report.md all_models.png autoattack.json *.part
clean:
	@if [ -f $(RESULTS)/q1/split.npz ]; then \
	    for file in $(addprefix $(RESULTS)/,$(WRITTEN)); do \
	        if [ -f "$$file" ]; then rm "$$file" && echo "deleted $$file"; fi; \
	    done; \
	    rmdir $(RESULTS)/q[1-6] $(RESULTS) 2>/dev/null || true; \
	else echo "$(RESULTS) is left alone: without q1/split.npz it is no results folder"; fi

lint: .venv/installed
	$(VENV) -m pip install --quiet ruff
	$(VENV) -m ruff check .
	$(VENV) -m ruff format --check .

test: .venv/installed
	$(VENV) -m pytest tests

stress: .venv/installed
	$(VENV) -m pytest tests/stress.py

bench: .venv/installed
	$(VENV) -m pip install --quiet --requirement tests/requirements-peers.txt
	$(VENV) -m tools.bench --data "$(DATA)"

# What depends on this is always made.
always:

.PHONY: all asked always report seeds quick demo verify autoattack clean lint test stress bench
.NOTPARALLEL:  # two trainings at once would share the cores and take longer
