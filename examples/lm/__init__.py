# SPDX-License-Identifier: Apache-2.0
"""The parts of examples/train_lm.py: text, model, training, checkpoints, report."""
