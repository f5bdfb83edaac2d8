# GNU make. Every verb is a line over course.py, which also works without make:
#     python3 course.py run      (Windows: py course.py run)
PYTHON ?= python3

# .PHONY, because folders may bear the names of verbs: make would call them up to date.
.PHONY: help setup run test test-all lab exercises grade capstone slides bundle
.PHONY: batch batch-dry batch-resume bench doctor lock

help:      ## what there is (the default)
	@$(PYTHON) course.py help

setup:     ## make .venv with everything in it
	@$(PYTHON) course.py setup

run:       ## run the notebooks; make run ARGS="02 07 --profile smoke"
	@$(PYTHON) course.py run $(ARGS)

test:      ## ruff, mypy, unit tests, notebook gates
	@$(PYTHON) course.py test

test-all:  ## the same and the long tests
	@$(PYTHON) course.py test-all

lab:       ## JupyterLab on a copy under work/; make lab ARGS="--no-browser"
	@$(PYTHON) course.py lab $(ARGS)

exercises: ## make exercises/ from solutions/; ARGS=--run executes these first
	@$(PYTHON) course.py exercises $(ARGS)

grade:     ## grade a folder; make grade SUBMISSIONS=folder ARGS="--seconds 60"
	@$(PYTHON) course.py grade "$(SUBMISSIONS)" $(ARGS)

batch:     ## a grid of experiments; make batch GRID=smoke PROFILE=local
	@$(PYTHON) course.py batch $(GRID) $(PROFILE:%=--profile %) $(ARGS)

batch-dry: ## its jobs and expected hours; make batch-dry GRID=table2
	@$(PYTHON) course.py batch-dry $(GRID) $(PROFILE:%=--profile %) $(ARGS)

batch-resume: ## take up the batch that was run last
	@$(PYTHON) course.py batch-resume $(ARGS)

capstone:  ## one per student; make capstone ARGS="make --students class.txt"
	@$(PYTHON) course.py capstone $(ARGS)

slides:    ## pages in build/slides; make slides ARGS="02 07"
	@$(PYTHON) course.py slides $(ARGS)

bundle:    ## for a room without a network; make bundle ARGS="--out DIR"
	@$(PYTHON) course.py bundle $(ARGS)

bench:     ## our attacks beside other libraries'; make bench ARGS="--quick"
	@$(PYTHON) course.py bench $(ARGS)

doctor:    ## what this machine has
	@$(PYTHON) course.py doctor

lock:      ## compile requirements.in into requirements.lock; make lock ARGS="--upgrade"
	@$(PYTHON) course.py lock $(ARGS)
