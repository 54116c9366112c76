#!/usr/bin/env bash
# Handwritten digits, from images to test accuracy: pack, train as a job, evaluate afresh. Run again, it goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${VENV:-.venv}/bin run=runs/quickstart data=data/digits
if [ ! -f "$data/_info.json" ]; then "$bin/vmamba" shards pack digits "$data" --overwrite; fi
"$bin/python" launch/submit.py config=configs/quickstart.yaml "run.dir=$run" "data.train=$data"
echo "evaluating the newest checkpoint in a fresh process"
result=$("$bin/vmamba" eval "eval.checkpoint=$run" "eval.data=$data")
say='import json, sys; print("accuracy {top1:.2f} % of {num_samples:.0f} test images".format(**json.loads(sys.argv[1])))'
echo
"$bin/python" -c "$say" "$result"
"$bin/python" launch/status.py "$run"
