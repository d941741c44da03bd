#!/usr/bin/env bash
# Builds Enamel with CUDA, trains a few steps on the GPU and on Flex, with every adapter method,
# compares the losses to 1e-3 and times both. Run it on any machine with an NVIDIA driver; building needs LLVM (ARCHITECTURE.md,
# "Building with CUDA"). ENAMEL_BIN skips the build.
#
#   scripts/gpu_check.sh [RECIPE] > docs/measurements/cuda.md
set -euo pipefail
cd "$(dirname "$0")/.."
recipe=${1:-datasets/handbook/lora.toml}
steps=${STEPS:-20}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if [ -z "${ENAMEL_BIN:-}" ]; then
  cargo build --release --locked --features cuda >&2
  ENAMEL_BIN=${CARGO_TARGET_DIR:-target}/release/enamel
fi

for device in flex cuda; do
  "$ENAMEL_BIN" train "$recipe" --no-tui --device "$device" --output "$work/$device" \
    --set train.max_steps="$steps" --set train.samples=0 --set train.logging_steps=1 >&2
  for method in dora loha lokr adalora vera ia3 full; do
    "$ENAMEL_BIN" train "$recipe" --no-tui --device "$device" --output "$work/$device-$method" \
      --set adapter.method="$method" --set train.max_steps=5 --set train.samples=0 --set train.logging_steps=1 \
      --set train.eval_strategy=no --set train.save_strategy=no --set train.load_best_model_at_end=false >&2
  done
done

python3 - "$work" "$steps" <<'PY'
import json, platform, statistics, subprocess, sys

def rows(device):
    with open(f"{sys.argv[1]}/{device}/metrics.jsonl") as f:
        return [r for r in map(json.loads, f) if r["kind"] == "train"]

flex, cuda = rows("flex"), rows("cuda")
assert len(flex) == len(cuda) == int(sys.argv[2]), (len(flex), len(cuda))
worst = max(abs(a["loss"] - b["loss"]) for a, b in zip(flex, cuda))
name = subprocess.run(["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"],
                      capture_output=True, text=True).stdout.strip() or "unknown GPU"
print("# CUDA against Flex\n")
print(f"GPU: {name}. CPU: {platform.processor() or platform.machine()}. Steps: {len(flex)}.\n")
print("| device | tokens/s (median step, first three left out) |\n|---|---|")
for label, r in (("flex", flex), ("cuda", cuda)):
    print(f"| {label} | {statistics.median(x['tokens_per_second'] for x in r[3:] or r):.0f} |")
print(f"\nLargest difference of a step's loss: {worst:.2e} (bound: 1e-3).")
print("\n| method, five steps | largest difference of a loss | cuda, tokens/s (median) |\n|---|---|---|")
for method in ["dora", "loha", "lokr", "adalora", "vera", "ia3", "full"]:
    flex, cuda = rows(f"flex-{method}"), rows(f"cuda-{method}")
    off = max(abs(a["loss"] - b["loss"]) for a, b in zip(flex, cuda, strict=True))
    worst = max(worst, off)
    print(f"| {method} | {off:.2e} | {statistics.median(x['tokens_per_second'] for x in cuda):.0f} |")
sys.exit(0 if worst <= 1e-3 else 1)
PY
