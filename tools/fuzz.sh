#!/usr/bin/env bash
# Runs every fuzz target of a sanitizer build for some seconds, starting from its committed corpus.
#
#   tools/fuzz.sh BUILD_DIR SECONDS
#
# A target stops at the first finding; the driver leaves the input beside the build and the exit status is not zero.
set -euo pipefail
build=${1:?build folder}
seconds=${2:-20}
found=0
for target in "$build"/fuzz_*; do
    [ -x "$target" ] && [ ! -d "$target" ] || continue
    name=$(basename "$target")
    corpus=tests/fuzz/corpus/${name#fuzz_}
    echo "== $name, $seconds s"
    if [ -d "$corpus" ]; then
        "$target" --seconds "$seconds" "$corpus"
    else
        "$target" --seconds "$seconds"
    fi
    found=$((found + 1))
done
if [ "$found" -eq 0 ]; then
    echo "no fuzz target was built in $build" >&2
    exit 1
fi
