#!/usr/bin/env bash
# Lint and tests, in the environment that quickstart.sh makes: ./runtests.sh [--all] [pytest arguments]
# --all adds the tests that need MLflow, NVIDIA FLARE and MONAI Label, and installs these.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source common/environment.sh

tests=(-m "not label")
extras=dev,export,label
if [[ ${1:-} == --all ]]; then
    shift
    tests=()
    extras=$extras,tracking,federated
fi
install_segbundles "$extras"

say "ruff"
"$python" -m ruff check .
"$python" -m ruff format --check .
say "pytest"
mkdir -p output
# an empty array is unset for the bash of macOS
"$python" -m pytest -n 2 --dist loadfile --junitxml=output/tests.xml ${tests[@]+"${tests[@]}"} "$@"
say "All passed. Results: $PWD/output/tests.xml"
