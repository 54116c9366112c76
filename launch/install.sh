#!/usr/bin/env bash
# Make the environment in $VENV, unless it is there and nothing that decides its content has changed.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$VENV/bin stamp=$VENV/installed
wanted=$({ pwd; echo "$PIP_ARGS|$TORCH_INDEX"; cat pyproject.toml ${CONSTRAINTS:+"$CONSTRAINTS"}; } | sha256sum)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then exit 0; fi
suits='import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))'
if ! "$bin/python" -c "$suits" 2>/dev/null; then
  for python in ${PYTHON:-python3.12 python3.11 python3}; do
    if "$python" -c "$suits" 2>/dev/null; then found=$python; break; fi
  done
  [ "${found:-}" ] || { echo "No Python 3.11 or 3.12 (tried: ${PYTHON:-python3.12 python3.11 python3}); name one: make install PYTHON=…" >&2; exit 1; }
  "$found" -c "import ensurepip, venv" 2>/dev/null || { echo "$found cannot make environments; on Debian and Ubuntu: sudo apt-get install python3-venv" >&2; exit 1; }
  "$found" -m venv "$VENV"
fi
echo "installing into $VENV: some gigabytes, minutes the first time"
${TORCH_INDEX:+"$bin/python" -m pip install -q ${CONSTRAINTS:+-c "$CONSTRAINTS"} --index-url "$TORCH_INDEX" torch torchvision}
"$bin/python" -m pip install -q ${CONSTRAINTS:+-c "$CONSTRAINTS"} $PIP_ARGS -e '.[dev]'
echo "$wanted" > "$stamp"
