#!/usr/bin/env bash
# What only a GPU can show, in under nine minutes, with one JSON file of results:
#
#     tools/gpu_check.sh [WHEELS [OUTPUT]]
#
# For a machine with one NVIDIA card, PyTorch and no network. WHEELS is a folder of wheels, filled on
# a machine with a network and the same version of Python by
#     pip download --dest wheels --no-deps REQUIREMENT...
# for all that the machine lacks: transformers, qwen-vl-utils, datasets, peft, pytest and what they
# need. Leave it out, or empty (""), where all is installed. OUTPUT (default runs/gpu_check) gets
# results.json and a log of each part. A part that fails or takes too long does not stop the others.
# Without a card everything runs on the CPU, with the toy, as a test of this script.
set -uo pipefail
cd "$(dirname "$0")/.."
wheels=${1:-}
output=${2:-runs/gpu_check}
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
mkdir -p "$output"
rm -f "$output"/*.log "$output"/*.json "$output"/*.jsonl

part() { # NAME SECONDS COMMAND...: run it within its limit, note how it ended
    local name=$1 limit=$(($2 * patience)) started=$SECONDS
    shift 2
    echo "== $name (at most $limit s): $*"
    timeout --kill-after=5 "$limit" "$@" >"$output/$name.log" 2>&1
    local code=$?
    tail -n 4 "$output/$name.log"
    printf '{"part": "%s", "exit": %d, "seconds": %d, "limit": %d}\n' \
        "$name" "$code" $((SECONDS - started)) "$limit" >>"$output/parts.jsonl"
}

patience=1
if [ -n "$wheels" ]; then
    python3 -m venv --system-site-packages "$output/environment"
    source "$output/environment/bin/activate"
    part install 60 pip install --quiet --no-index --find-links "$wheels" \
        -r requirements.txt peft pytest
fi

if python -c 'import torch; raise SystemExit(not torch.cuda.is_available())'; then
    rollout=(--model 3b --pictures 1024 --max_new_tokens 256 --repeats 2)
    step=(--model 3b --pictures 1024 --max_new_tokens 256 --prompts_per_step 2)
else
    patience=8
    rollout=(--pictures 16 --max_new_tokens 8 --repeats 1 --prompts_per_step 2)
    step=(--pictures 16 --max_new_tokens 8 --prompts_per_step 2)
fi
step+=(--gradient_checkpointing true)

part tests 150 python -m pytest -q -p no:cacheprovider tests/test_gpu.py
part rollout 110 python tools/bench.py rollout "${rollout[@]}"
part update 90 python tools/bench.py update "${rollout[@]}"
part lora 50 python tools/bench.py step --lora_rank 64 "${step[@]}"
part full 60 python tools/bench.py step "${step[@]}"

python - "$output" <<'END'
import json
import sys
from pathlib import Path

import torch
import transformers

output = Path(sys.argv[1])
parts = [json.loads(line) for line in (output / "parts.jsonl").read_text().splitlines()]
for part in parts:
    lines = (output / f"{part['part']}.log").read_text(errors="replace").splitlines()
    part["rows"] = [line for line in lines if line.startswith("| ")]
    part["end"] = lines[-12:]
card = torch.cuda.get_device_name() if torch.cuda.is_available() else "none: on the CPU"
versions = {"torch": torch.__version__, "transformers": transformers.__version__}
result = {"card": card, "versions": versions, "parts": parts}
(output / "results.json").write_text(json.dumps(result, indent=1))
failed = [part["part"] for part in parts if part["exit"]]
print(f"{card}: {len(parts) - len(failed)} of {len(parts)} parts passed; {output}/results.json")
raise SystemExit(f"failed: {', '.join(failed)}" if failed else 0)
END
