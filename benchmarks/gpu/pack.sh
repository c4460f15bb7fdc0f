#!/bin/sh
# Packs what an NVIDIA machine without a network needs beside Python 3.12, PyTorch with CUDA 13's wheels, transformers
# and pytest:
#   sh benchmarks/gpu/pack.sh OUT site         MLX's CUDA build with machine code for sm_90a alone, mlx-lm, mlx-vlm
#   sh benchmarks/gpu/pack.sh OUT tree         this checkout without the bundled weights, which unpack.sh links
#   sh benchmarks/gpu/pack.sh OUT ptx FOLDER   kernels that a rehearsal compiled (README.md)
# SITE: a folder that holds the unpacked wheels already, instead of the registry.
set -eu
here=$(cd "$(dirname "$0")" && pwd) root=$(cd "$(dirname "$0")/../.." && pwd)
mkdir -p "$1"
out=$(cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
case $2 in
site)
    mkdir "$work/site"
    if [ -n "${SITE:-}" ]; then
        cp -r "$SITE"/mlx "$SITE"/mlx_* "$SITE"/mlx-*.dist-info "$work/site"
    else
        for wheel in mlx==0.32.4 mlx-cuda-13==0.32.4 mlx-lm==0.32.2 mlx-vlm==0.7.10; do
            python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
                --platform manylinux_2_35_x86_64 -d "$work/wheels" "$wheel"
        done
        for wheel in "$work"/wheels/*.whl; do python3 -m zipfile -e "$wheel" "$work/site"; done
    fi
    cd "$work/site"
    rm -rf mlx/include/mlx mlx/share mlx/core # for hosts; what MLX compiles for the GPU needs cccl, cute and cutlass
    find . -name __pycache__ -prune -exec rm -rf {} +
    python3 "$here/trim.py" mlx/lib/libmlx.so "$work/libmlx.so" 90
    mv "$work/libmlx.so" mlx/lib/libmlx.so
    strip --strip-all mlx/lib/libmlx.so
    tar c . | xz -8 -T1 >"$out/site.tar.xz"
    ;;
tree)
    cd "$root"
    git ls-files -co --exclude-standard | grep -v -e '\.safetensors$' -e '^docs/' | tar c -T - | xz -6 >"$out/tree.tar.xz"
    cp "$here/unpack.sh" "$here/go.sh" "$out"
    ;;
ptx) tar c -C "$3" . | xz -2 >"$out/ptx.tar.xz" ;;
esac
ls -l "$out"
