# `make` runs the whole assignment and writes the report; a second `make` redoes only what is out of date.
#
#   make DATA=path     CIFAR-10 is already at path (the folder that holds cifar-10-batches-py)
#   make RESULTS=path  write somewhere else
#   make STEM=name     the network and its recipe: imagenet, stride2 or cifar (default: by device)
#   make FLAGS="..."   flags for every script, for instance FLAGS="--device cuda --seed 1"

DATA    ?= data
RESULTS ?= results
STEM    ?=
FLAGS   ?=
PYTHON  ?= python3

VENV   := .venv/bin/python
COMMON := --data $(DATA) --results $(RESULTS) $(FLAGS)

all: $(RESULTS)/report.html

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(VENV) -m pip install --quiet --requirement requirements.txt
	touch $@

$(RESULTS)/q1/metrics.json: q1_split.py common.py | .venv/installed
	$(VENV) q1_split.py $(COMMON)

$(RESULTS)/q2/metrics.json: q2_train_ce.py common.py $(RESULTS)/q1/metrics.json
	$(VENV) q2_train_ce.py $(COMMON) $(if $(STEM),--stem $(STEM))

$(RESULTS)/q3/metrics.json: q3_attack.py common.py $(RESULTS)/q2/metrics.json
	$(VENV) q3_attack.py $(COMMON)

$(RESULTS)/q4/metrics.json: q4_adv_train.py common.py $(RESULTS)/q2/metrics.json
	$(VENV) q4_adv_train.py $(COMMON)

$(RESULTS)/q6/metrics.json: q6_angular.py common.py $(RESULTS)/q2/metrics.json
	$(VENV) q6_angular.py $(COMMON)

METRICS := $(foreach question,q1 q2 q3 q4 q6,$(RESULTS)/$(question)/metrics.json)

$(RESULTS)/report.html: report.py common.py $(METRICS)
	$(VENV) report.py $(COMMON)

# Question 2 with three seeds: the mean and standard deviation of its accuracy on test.
seeds:
	for seed in 0 1 2; do $(MAKE) results-seed$$seed/q2/metrics.json RESULTS=results-seed$$seed FLAGS="$(FLAGS) --seed $$seed" || exit; done
	$(VENV) -c 'import common, statistics; \
	    files = [f"results-seed{seed}/q2/metrics.json" for seed in range(3)]; \
	    scores = [common.read_metrics(file, "make seeds")["models"][common.CROSS_ENTROPY]["accuracy"]["clean"] for file in files]; \
	    print(f"question 2 on test: {statistics.mean(scores):.2%} ± {statistics.stdev(scores):.2%}")'

quick:
	$(MAKE) RESULTS=results-quick FLAGS="--quick $(FLAGS)"

lint: .venv/installed
	$(VENV) -m pip install --quiet ruff
	$(VENV) -m ruff check .

test: .venv/installed
	$(VENV) -m pytest tests

stress: .venv/installed
	$(VENV) -m pytest tests/stress.py

bench: .venv/installed
	$(VENV) -m pip install --quiet --requirement tests/requirements-peers.txt
	$(VENV) tests/bench.py --data $(DATA)

.PHONY: all seeds quick lint test stress bench
.NOTPARALLEL:  # two trainings at once would share the cores and take longer
