#!/usr/bin/env bash
# Kills training runs and compares what they come to with runs that were left alone: tiny models in every format of a
# base (crash_cases.py makes them), every method, every optimizer. A run is killed by SIGKILL at a random moment, or as it
# enters a system call that its uninterrupted twin made, up to three times; it goes on with --resume, or as it began where
# there is nothing to go on from. Some take the place of an old run, which must not be lost before the new one has a
# checkpoint. In the end every file must be the twin's, but for times, and no other file may be there.
#
#   scripts/crash_test.sh [--kills N] [--seed S] [--jobs J] [--methods M,..] [--optimizers O,..] [--formats F,..]
#   scripts/crash_test.sh --kills 20 --model smollm2-135m-instruct
#
# Writes tables (Markdown) to standard output; exit code 1 where anything differs. Needs python3 (no packages) and strace;
# as root on Debian it installs them. ENAMEL_BIN, a binary, skips the build.
set -euo pipefail
cd "$(dirname "$0")/.."
missing=()
command -v python3 >/dev/null || missing+=(python3)
command -v strace >/dev/null || missing+=(strace)
if [ "${#missing[@]}" -gt 0 ]; then
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "install ${missing[*]} first" >&2
    exit 2
  fi
  { apt-get update -qq && apt-get install -y -qq --no-install-recommends "${missing[@]}"; } >&2
fi
more=()
if ! strace -o /dev/null true 2>/dev/null; then
  echo "strace may not trace here: kills only at random moments" >&2
  more=(--calls 0)
fi
if [ -z "${ENAMEL_BIN:-}" ]; then
  cargo build --release --locked >&2
  ENAMEL_BIN=${CARGO_TARGET_DIR:-target}/release/enamel
fi
commit=$(git describe --always --dirty --exclude '*' 2>/dev/null || true)
exec nice -n 19 python3 scripts/crash_test.py --enamel "$ENAMEL_BIN" ${commit:+--commit "$commit"} "$@" "${more[@]}"
