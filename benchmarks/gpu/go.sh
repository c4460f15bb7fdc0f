#!/bin/bash
# On the NVIDIA machine, from a checkout's root: bash PACKED/go.sh PACKED OUT [SECONDS] [arguments of benchmarks.gpu.run]
packed=$1 out=$(mkdir -p "$2" && cd "$2" && pwd) seconds=${3:-280}
shift 3 2>/dev/null || shift $#
began=$SECONDS until=$(($(date +%s) + seconds))
. "$packed/unpack.sh" "$packed" "${GPU_WORK:-/tmp/gpu-work}" || { echo "unpacking failed"; exit 1; }
echo "unpacked in $((SECONDS - began)) s"
exec python3 -m benchmarks.gpu.run "$out" --until "$until" --work "$work/run" "$@"
