#!/usr/bin/env bash
# Make the environment in $VENV, unless it is there and nothing that decides its content has changed.
set -euo pipefail
cd "$(dirname "$0")/.."
fail() { echo "make install: $1" >&2; exit 1; }
suits() { "$1" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null; }

stamp=$VENV/installed
wanted=$({ pwd; echo "$PIP_ARGS|$TORCH_INDEX"; cat pyproject.toml ${CONSTRAINTS:+"$CONSTRAINTS"}; } | sha256sum)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then exit 0; fi

usable() { suits "$VENV/bin/python" || fail "$VENV is no environment of Python 3.11 or 3.12: rm -r $VENV, or give another VENV=…"; }
if [ -L "$VENV/bin/python" ] || [ -e "$VENV/bin/python" ]; then usable; fi
# pip's own metadata is unpacked after its code: a kill in between leaves a pip that starts but cannot install.
if ! "$VENV/bin/python" -m pip show --quiet pip 2>/dev/null; then
  candidates=${PYTHON:-python3.12 python3.11 python3}
  for python in "$VENV/bin/python" $candidates; do  # what is half there is completed by its own Python
    if suits "$python"; then found=$python; break; fi
  done
  [ -n "${found:-}" ] || fail "no Python 3.11 or 3.12 (tried: $candidates); name one: make install PYTHON=…"
  "$found" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$found cannot make environments; on Debian and Ubuntu: sudo apt-get install python3-venv"
  "$found" -m venv "$VENV"
fi
usable

echo "installing into $VENV: some gigabytes, minutes the first time"
pip=("$VENV/bin/python" -m pip install --quiet ${CONSTRAINTS:+-c "$CONSTRAINTS"})
if [ -n "$TORCH_INDEX" ]; then "${pip[@]}" --index-url "$TORCH_INDEX" torch torchvision; fi
# shellcheck disable=SC2086  # several words are meant
"${pip[@]}" $PIP_ARGS --editable '.[dev]'
echo "$wanted" > "$stamp"
