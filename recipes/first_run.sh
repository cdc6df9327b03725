#!/usr/bin/env bash
# From nothing to a trained model: environment, model, data, DFT and DPO with and without logits, a table and a plot.
#
#   bash recipes/first_run.sh                about 15 minutes on two cores; a second call keeps environment, model and data
#   bash recipes/first_run.sh --steps 2      arguments go to first_run.py (--help lists them)
#
# LOGITLESS_VENV names another folder for the environment; recipes/environment.sh says what else can be set.
set -euo pipefail
recipes=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=${LOGITLESS_VENV:-$recipes/../.venv}

bash "$recipes/environment.sh" "$venv" recipes
exec "$venv/bin/python" "$recipes/first_run.py" --setup-seconds "$SECONDS" "$@"
