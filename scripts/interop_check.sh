#!/usr/bin/env bash
# Real interoperability with transformers and PEFT, recorded: builds Enamel, runs interop_check.py with
# PYTHON (which must have torch, transformers, peft and gguf) and writes docs/measurements/interop.md.
# ENAMEL_BIN skips the build.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -z "${ENAMEL_BIN:-}" ]; then
  cargo build --release --locked
  ENAMEL_BIN=${CARGO_TARGET_DIR:-target}/release/enamel
fi
out=docs/measurements/interop.md
mkdir -p "$(dirname "$out")"
status=0
"${PYTHON:-python3}" scripts/interop_check.py --enamel "$ENAMEL_BIN" >"$out.new" || status=$?
if [ -s "$out.new" ]; then mv "$out.new" "$out"; cat "$out"; else rm -f "$out.new"; fi
exit "$status"
