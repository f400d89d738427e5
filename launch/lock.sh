#!/usr/bin/env bash
# Resolve pyproject.toml into requirements-cpu.txt: names, versions and hashes, no download addresses.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/sources.sh
.venv/uv/bin/uv pip compile --quiet --python-version 3.11 --extra cpu --extra dev pyproject.toml \
  --generate-hashes --no-emit-index-url --no-emit-find-links --no-annotate --no-header -o requirements-cpu.txt
