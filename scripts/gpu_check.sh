#!/usr/bin/env bash
# Builds Enamel for a graphics processor, runs the kernels' tests on it, trains a few steps there and on Flex (with
# every adapter method, on every kind of quantised base, with blocks computed again), compares the losses to
# 1e-3 (5e-2 on an int8 base) and times both. Run it on any machine with an NVIDIA driver; building with CUDA needs LLVM
# (ARCHITECTURE.md, "Building with CUDA").
#
#   scripts/gpu_check.sh [RECIPE] > docs/measurements/cuda.md
#   DEVICE=wgpu scripts/gpu_check.sh > docs/measurements/wgpu.md
#
# ENAMEL_BIN, a binary with that device, skips the build and the kernels' tests. For a slow device: STEPS and FEW say how
# many steps the longer and the shorter runs have, RUNS names the runs to make, SETTINGS are more settings of the recipe.
set -euo pipefail
cd "$(dirname "$0")/.."
recipe=${1:-datasets/handbook/lora.toml}
device=${DEVICE:-cuda}
steps=${STEPS:-20}
few=${FEW:-5}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if [ -z "${ENAMEL_BIN:-}" ]; then
  cargo build --release --locked -p enamel-cli --features "$device" >&2
  ENAMEL_NEEDS_GPU=1 cargo test --release --locked -p enamel-kernels -p enamel-cli --features "enamel-cli/$device" --lib -- cube >&2
  ENAMEL_BIN=${CARGO_TARGET_DIR:-target}/release/enamel
fi

# train DEVICE NAME STEPS SETTING...
train() {
  local on=$1 name=$2 count=$3
  shift 3
  [[ -z "${RUNS:-}" || " $RUNS " == *" $name "* ]] || return 0
  # shellcheck disable=SC2206 # settings are words
  local all=("$@" ${SETTINGS:-})
  "$ENAMEL_BIN" train "$recipe" --no-tui --device "$on" --output "$work/$on-$name" --set train.max_steps="$count" \
    --set train.samples=0 --set train.logging_steps=1 --set train.eval_strategy=no --set train.save_strategy=no \
    --set train.load_best_model_at_end=false "${all[@]/#/--set=}" >&2
}

four=(model.quantization.load_in_4bit=true model.quantization.bnb_4bit_use_double_quant=true)
for on in flex "$device"; do
  train "$on" lora "$steps"
  train "$on" dense "$steps" model.quantization.dequantize=true
  train "$on" nf4 "$steps" "${four[@]}"
  train "$on" fp4 "$few" model.quantization.load_in_4bit=true model.quantization.bnb_4bit_quant_type=fp4
  train "$on" int8 "$few" model.quantization.load_in_8bit=true
  train "$on" nf4-checkpointed "$few" "${four[@]}" train.gradient_checkpointing=true
  train "$on" adamw_8bit "$few" "${four[@]}" train.optim=adamw_8bit
  for method in dora loha lokr adalora vera ia3 miss; do
    train "$on" "$method" "$few" adapter.method="$method"
  done
  train "$on" full "$few" adapter.method=full model.quantization.dequantize=true
done

python3 - "$work" "$device" <<'PY'
import json, os, platform, statistics, subprocess, sys

work, device = sys.argv[1:]
names = sorted({d.split("-", 1)[1] for d in os.listdir(work)}, key=lambda n: os.path.getctime(f"{work}/flex-{n}"))

def rows(on, name):
    with open(f"{work}/{on}-{name}/metrics.jsonl") as f:
        return [r for r in map(json.loads, f) if r["kind"] == "train"]

def card():
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    except FileNotFoundError:
        return os.environ.get("GPU_NAME", "unknown")

def speed(rs):
    return statistics.median(r["tokens_per_second"] for r in rs[3:] or rs)

print(f"# {device} against Flex\n")
print("By `scripts/gpu_check.sh`: the same recipe on both, losses of each step compared; the bound is 1e-3, on an int8 base 5e-2. Speeds are medians")
print("without the first three steps.\n")
print(f"GPU: {card()}. CPU: {platform.processor() or platform.machine()}, {os.cpu_count()} threads.\n")
if os.environ.get("SETTINGS"):
    print(f"Settings beside the recipe's: `{os.environ['SETTINGS']}`.\n")
print(f"| run | steps | largest difference of a loss | flex, tokens/s | {device}, tokens/s |\n|---|---|---|---|---|")
# LLM.int8() rounds inputs in steps, so that last bits move products by a step: Flex's own instruction sets and NdArray
# differ from each other by up to 1.8e-2 (docs/measurements/wgpu.md).
bounds = {"int8": 5e-2}
wrong = False
for name in names:
    a, b = rows("flex", name), rows(device, name)
    off = max(abs(x["loss"] - y["loss"]) for x, y in zip(a, b, strict=True))
    wrong |= off > bounds.get(name, 1e-3)
    print(f"| {name} | {len(a)} | {off:.2e} | {speed(a):.0f} | {speed(b):.0f} |")
sys.exit(1 if wrong else 0)
PY
