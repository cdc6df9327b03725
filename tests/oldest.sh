#!/usr/bin/env bash
# The tests of the ops and of the losses under the oldest PyTorch that pyproject.toml admits, in an environment of its own.
#
#   bash tests/oldest.sh                 makes .venv-oldest where there is none, then runs them
#   bash tests/oldest.sh -k compiled     arguments go to pytest
#
# That release is installed as its package index has it, which may be a CUDA build of several gigabytes.
# LOGITLESS_OLDEST_VENV names another folder for the environment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

OLDEST_TORCH=2.9.1
SUITES=(
    capture denormals library linear_divergence linear_logprobs linear_losses memory sweep tail token_loss
    every_loss lists losses_cross_tokenizer losses_demonstrations losses_distillation losses_dpo losses_f_divergence
    losses_implicit_reward losses_nll_dft losses_on_policy_distillation losses_policy losses_preference losses_registry
    losses_rewards losses_sampled losses_sft losses_top_k sequence_logprob
    constants depths grad_out peer_names
)

venv=${LOGITLESS_OLDEST_VENV:-.venv-oldest}
LOGITLESS_TORCH="torch==$OLDEST_TORCH" LOGITLESS_CPU=off LOGITLESS_CUDA=off bash recipes/environment.sh "$venv" core-test
"$venv/bin/python" -c "import torch; assert torch.__version__.startswith('$OLDEST_TORCH'), torch.__version__"
suites=("${SUITES[@]/#/tests/test_}")
exec "$venv/bin/python" -m pytest -n auto --maxprocesses 8 --dist worksteal "${suites[@]/%/.py}" "$@"
