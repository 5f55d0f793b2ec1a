# SPDX-License-Identifier: Apache-2.0
# Aliases of run.py: `make test ARGS="-k merge"` is `python3 run.py test -k merge`, `make counters OP=merge_attention` is
# `python3 run.py counters merge_attention`.
PYTHON ?= python3
COMMANDS := setup demo train-demo test test-slow check cuda-report bench counters sanitize doctor clean

.PHONY: help $(COMMANDS)
help: ; @$(PYTHON) run.py --help
$(COMMANDS): ; @$(PYTHON) run.py $@ $(if $(filter counters,$@),$(OP)) $(ARGS)
