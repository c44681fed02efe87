#!/usr/bin/env bash
# Lint and every test, in the environment that quickstart.sh makes: ./runtests.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source common/environment.sh
install_segbundles dev,export,label,tracking,federated

say "ruff"
"$python" -m ruff check .
"$python" -m ruff format --check .
say "pytest"
mkdir -p output
"$python" -m pytest -n 2 --dist loadfile --junitxml=output/tests.xml "$@"
say "All passed. Results: $PWD/output/tests.xml"
