#!/usr/bin/env bash
# Draws the pictures of the README from real runs (about ten minutes on two cores):
#   docs/live.svg      the live view of the demo, as it stood at its last step
#   docs/reshape.png   one training of the demo recipe that is stopped and goes on over five layouts, laid over an
#                      undisturbed one
# usage: docs/pictures.sh [FOLDER FOR THE RUNS]
set -euo pipefail
cd "$(dirname "$0")/.."
runs=${1:-runs/pictures}
llmpipe=${LLMPIPE:-.venv/bin/llmpipe}
common=(recipes/demo.yaml --set "output_dir=$runs" --set train.max_steps=100 --set train.warmup_ratio=0.1
    --set evaluation.every_steps=20)

name() { ls -td "$runs/$1"-* | head -n 1; }
go_on() { # STEP PIPELINE DATA: the next part of the training, up to STEP
    "$llmpipe" train "${common[@]}" --set name=reshaped --resume auto --stop-at "$1" \
        --set parallel.pipeline="$2" --set parallel.data="$3" || [[ $? -eq 75 ]]
}

"$llmpipe" train "${common[@]}" --set name=undisturbed --set parallel.pipeline=2
go_on 20 2 1
go_on 40 1 1
go_on 60 3 1
go_on 80 2 2
go_on 100 1 2
"$llmpipe" runs show "$(name undisturbed)" --svg docs/live.svg --width 100
"$llmpipe" runs report "$(name reshaped)" --compare "$(name undisturbed)" --output docs/reshape.png
