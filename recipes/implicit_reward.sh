#!/usr/bin/env bash
# From nothing to the AUC of the implicit reward: environment, model, fine-tuning, pairs, six runs of `logitless reward`.
#
#   bash recipes/implicit_reward.sh                                  about eleven minutes on two cores
#   bash recipes/implicit_reward.sh --tuned runs/first-run/dft       the first run's model; --help lists what else
#
# LOGITLESS_VENV names another folder for the environment; recipes/environment.sh says what else can be set.
set -euo pipefail
recipes=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=${LOGITLESS_VENV:-$recipes/../.venv}

bash "$recipes/environment.sh" "$venv" recipes
exec "$venv/bin/python" "$recipes/implicit_reward.py" "$@"
