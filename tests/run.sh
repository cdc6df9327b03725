#!/usr/bin/env bash
# Sets up .venv where needed, then checks and tests everything: ruff, mypy, pytest.
#
#   bash tests/run.sh               the fast tier
#   bash tests/run.sh --slow        the slow tier too: real models, long property runs, sanitizers
#   bash tests/run.sh -k softcap    further arguments go to pytest
#   bash tests/run.sh -n 0 --pdb    in one process; else a process for every core, eight at most
#
# LOGITLESS_VENV names another folder for the environment; recipes/environment.sh says what else can be set.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${LOGITLESS_VENV:-.venv}
if [ "${1:-}" = --slow ]; then
    shift
    set -- -m "slow or not slow" "$@"
fi

bash recipes/environment.sh "$venv" recipes,test,dev
"$venv/bin/python" -m ruff check .
"$venv/bin/python" -m mypy
exec "$venv/bin/python" -m pytest -n auto --maxprocesses 8 --dist worksteal "$@"
