#!/usr/bin/env bash
# Prepare .venv from requirements-cpu.txt. Idempotent: `make` calls it only when one of its inputs changed.
#
# The lock file holds names, versions and hashes but no addresses. pip's own configuration says where packages come
# from; when it names no local wheels, the CPU build of torch is looked up on PyTorch's CPU index.
set -euo pipefail
cd "$(dirname "$0")/.."

export PYTHON=${PYTHON:-python3.11}
command -v "$PYTHON" >/dev/null || PYTHON=python3
"$PYTHON" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' ||
  { echo "setup: needs Python 3.11, but $PYTHON is $("$PYTHON" -V); set PYTHON=/path/to/python3.11" >&2; exit 2; }
command -v gcc >/dev/null || { echo "setup: needs gcc (Debian: apt install gcc)" >&2; exit 2; }

if [ ! -x .venv/bin/python ]; then
  "$PYTHON" -m venv .venv ||
    { rm -rf .venv; echo "setup: '$PYTHON -m venv' failed (Debian: apt install python3-venv)" >&2; exit 2; }
fi
if [ ! -x .venv/uv/bin/uv ]; then
  echo "setup: installing uv"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --target .venv/uv uv==0.13.8
fi

. launch/sources.sh
echo "setup: installing the packages of requirements-cpu.txt (about 2.4 GB)"
.venv/uv/bin/uv pip sync --quiet --python .venv/bin/python requirements-cpu.txt
.venv/uv/bin/uv pip install --quiet --python .venv/bin/python --no-deps --no-build-isolation --editable .
touch .venv/.ready
echo "setup: .venv is ready"
