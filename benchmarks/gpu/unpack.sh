# On the NVIDIA machine, from a checkout's root: . PACKED/unpack.sh PACKED WORK        (bash)
# Sets up WORK/site (MLX), WORK/tree (the packed checkout; its weights are this one's) and WORK/ptx, and the environment
# in which the package runs on CUDA. A second call finds what the first unpacked. GPU_SITE: a folder that Python looks
# into first, for a rehearsal.
packed=$(cd "$1" && pwd) || return
work=$(mkdir -p "$2" && cd "$2" && pwd) || return
if [ ! -e "$work/ready" ]; then
    mkdir -p "$work/site" "$work/tree" "$work/ptx"
    xz -dc "$packed/site.tar.xz" | tar x -C "$work/site" --no-same-owner || return
    xz -dc "$packed/tree.tar.xz" | tar x -C "$work/tree" --no-same-owner || return
    [ ! -e "$packed/ptx.tar.xz" ] || xz -dc "$packed/ptx.tar.xz" | tar x -C "$work/ptx" --no-same-owner || return
    find mlx_gemma_mtp/demo tests/data/e2b -name '*.safetensors' | while read -r file; do
        mkdir -p "$work/tree/$(dirname "$file")" && ln -sf "$PWD/$file" "$work/tree/$file"
    done
    # libmlx.so looks for CUDA's libraries in SITE/nvidia, and NVRTC for headers
    nvidia=$(python3 -c 'import os, sys; print(next(p + "/nvidia" for p in sys.path if os.path.isdir(p + "/nvidia/cu13/lib")))') &&
        ln -sfn "$nvidia" "$work/site/nvidia" || return
    touch "$work/ready"
fi
export PYTHONPATH="${GPU_SITE:+$GPU_SITE:}$work/site:$work/tree"
export LD_LIBRARY_PATH="$work/site/nvidia/cu13/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" # NVRTC asks for its builtins
export MLX_PTX_CACHE_DIR="$work/ptx"
export MLX_ENABLE_TF32=0          # float32 products in float32
export MLX_CUDA_USE_CUDNN_SDPA=0  # attention by MLX's own kernel, whatever the number of queries
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 MLX_GEMMA_MTP_CACHE="$work/cache"
cd "$work/tree" || return
