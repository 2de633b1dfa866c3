#!/usr/bin/env bash
# All figures of the CUDA backend on one GPU, inside ten minutes: correctness first, then speed beside
# transformers + bitsandbytes and torch bf16, memory, and where the time goes.
#
#     bash benchmarks/gpu_figures.sh [OUT]            everything; OUT, or $OUT, or build/gpu-figures
#     bash benchmarks/gpu_figures.sh smoke [OUT]      a minute: every section on tiny shapes, to the
#                                                     first error, with its whole traceback
#     SECTIONS="decode big" bash benchmarks/gpu_figures.sh [OUT]      some sections alone
#     bash benchmarks/gpu_figures.sh --dry-run [OUT]  the same code without a GPU: no figure counts
#
# Needs torch for CUDA, triton, transformers, bitsandbytes >= 0.50, pytest, and what bloomq needs; a
# package that is missing is a line in the table, not the end, and so is a C compiler or Python.h,
# without which Triton compiles nothing and torch's own products take its place. The GPU is to be nobody else's: 70 GB
# of memory for bloom-7b1 and all its peers at once (less leaves some out, and says which), 132 GB for
# the 176B shapes. Writes figures.jsonl, table.md, profile.txt and log.txt into OUT (a run replaces
# those of the one before), and a pack of 2 GB into $TMPDIR, which it deletes. PYTHON names another
# interpreter, DEVICE another GPU (cuda:0), LIMIT another limit in seconds for everything (570).
#
# The first time on a GPU, with half an hour to spend, in this order:
#
#  1. smoke (1 to 2 minutes, compiling Triton's and Numba's kernels included). It stops at the first
#     error. Mend that, and again, until it ends with "smoke: every section ran". Nothing later is
#     worth its time before that.
#  2. SECTIONS="machine conformance parity greedy" (3 minutes): right before fast. The table says
#     which fail; log.txt has pytest's output.
#  3. SECTIONS="decode cuts profile ways" (6 minutes): 7b1 at batch 1 decides the most goals; where
#     one is missed, the profile says which kernels to look at, the ways whether another was faster,
#     and the cuts, which are lines to put into CUTS of bloomq/backends/cuda/triton_products.py,
#     what other sizes of blocks would give.
#  4. SECTIONS="big memory" (4 minutes): 176B in 4 bits, and the plan against what is really held.
#  5. Everything, for the figures to publish (10 minutes): one run, one table.
#
# 1 to 4 leave time for one or two corrections before 5. With ten minutes in all: 1, then 5 with
# LIMIT=420; sections run in the order of their worth, and what no time is left for says so.
set -u
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")
python=${PYTHON:-python3}

mode=all
case "${1:-}" in
    smoke) mode=smoke; shift ;;
    --dry-run) mode=dry; shift ;;
    -h | --help) sed -n '2,/^set -u/{/^set -u/!p}' "${BASH_SOURCE[0]}" | sed 's/^# \{0,1\}//'; exit 0 ;;
esac
out=${1:-${OUT:-$root/build/gpu-figures}}
mkdir -p "$out" || exit 1

scratch=$(mktemp -d) || exit 1
trap 'rm -rf "$scratch"' EXIT
# This very checkout, installed or not: bloomq.converters lies in a folder beside bloomq's.
mkdir -p "$scratch/site/bloomq" || exit 1
ln -s "$root"/bloomq/* "$root/converters" "$scratch/site/bloomq/" || exit 1
export PYTHONPATH="$scratch/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
# What Triton compiles is kept for the next run; where nothing can be written at home, for this one.
[ -w "${HOME:-/nowhere}" ] || export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$scratch/triton}

if [ "$mode" = smoke ]; then
    "$python" "$here/gpu_worker.py" smoke --device "${DEVICE:-cuda:0}" --out "$out" \
        --scratch "$scratch" 2>&1 | tee "$out/smoke.txt"
    exit "${PIPESTATUS[0]}"
fi

options=(--out "$out" --seconds "${LIMIT:-570}" --scratch "$scratch")
[ "$mode" = dry ] && options+=(--dry-run)
[ -n "${DEVICE:-}" ] && options+=(--device "$DEVICE")
# shellcheck disable=SC2206 # names, split at spaces
[ -n "${SECTIONS:-}" ] && options+=(--sections $SECTIONS)
"$python" "$here/gpu_figures.py" "${options[@]}"
