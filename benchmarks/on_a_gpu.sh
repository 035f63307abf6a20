#!/usr/bin/env bash
# On an NVIDIA GPU: GPT-2 small in bfloat16, ours against torch.compile, in interleaved pairs at several microbatch sizes.
#
#   benchmarks/on_a_gpu.sh FOLDER [MICROBATCH…]
#
# FOLDER gets a JSON line per comparison. PYTHON names an interpreter that has all packages; without it uv brings them.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:?"expected a folder for the results"}
shift
[ $# -gt 0 ] || set -- 16 32 64
run=${PYTHON:-uv run}
mkdir -p "$folder"
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.45 # both programs are on the GPU at once, JAX would take three quarters of it

for attention in flash cudnn; do
  for microbatch in "$@"; do
    echo "microbatch $microbatch, PyTorch with $attention attention"
    ${PYTHON:-uv run python} benchmarks/compare.py --pairs 7 --steps 10 --json \
      "$run benchmarks/throughput.py" "$run benchmarks/torch_gpt.py --compile --attention $attention" \
      -- --shape gpt2-small --precision bfloat16 --microbatch "$microbatch" --accumulation 4 --ceiling \
      >>"$folder/gpt2-small.jsonl" || echo "microbatch $microbatch with $attention attention failed"
  done
done
