#!/usr/bin/env bash
# Resolve pyproject.toml into requirements-cpu.txt and requirements-gpu.txt: names, versions and hashes, no download addresses.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/sources.sh
resolve() { # extra, file
  .venv/uv/bin/uv pip compile --quiet --python-version 3.11 --extra "$1" --extra dev pyproject.toml \
    --generate-hashes --no-emit-index-url --no-emit-find-links --no-annotate --no-header -o "$2"
}
resolve cpu requirements-cpu.txt

# The GPU profile has the same versions wherever it can: uv keeps those that are in the file already. CPU builds of torch would do
# for its requirements, so that it is resolved without the places that they come from.
gpu=$(mktemp)
trap 'rm -f "$gpu"' EXIT
cp requirements-cpu.txt "$gpu"
(unset UV_EXTRA_INDEX_URL UV_INDEX_STRATEGY UV_FIND_LINKS; resolve gpu "$gpu") ||
  { echo "lock: requirements-cpu.txt is made, requirements-gpu.txt is not: the gpu extra cannot be resolved" >&2; exit 1; }
cp "$gpu" requirements-gpu.txt
