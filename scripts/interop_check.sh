#!/usr/bin/env bash
# Real interoperability with transformers and PEFT, recorded: builds Enamel, runs interop_check.py (a real
# model) and interop_methods.py (every method) with PYTHON, which must have torch, transformers, peft and
# gguf, and writes docs/measurements/interop.md and interop_methods.md.
# ENAMEL_BIN skips the build.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -z "${ENAMEL_BIN:-}" ]; then
  cargo build --release --locked
  ENAMEL_BIN=${CARGO_TARGET_DIR:-target}/release/enamel
fi
mkdir -p docs/measurements
status=0
for name in interop interop_methods; do
  out=docs/measurements/$name.md
  script=scripts/${name/%interop/interop_check}.py
  "${PYTHON:-python3}" "$script" --enamel "$ENAMEL_BIN" >"$out.new" || status=$?
  if [ -s "$out.new" ]; then mv "$out.new" "$out"; cat "$out"; else rm -f "$out.new"; fi
done
exit "$status"
