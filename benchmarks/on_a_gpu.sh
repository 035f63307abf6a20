#!/usr/bin/env bash
# On an NVIDIA GPU: does it work there, how fast is it, and where does the time go? In stages of at most nine minutes.
#
#   benchmarks/on_a_gpu.sh FOLDER STAGE…
#
#   smoke    a run (RUN, else runs/quickstart) left alone, twice, and one stopped with Ctrl-C and resumed, bit for bit; losses against the CPU's
#   speed    GPT-2 small in bfloat16 by microbatch (MICROBATCHES, else 8 16 32 64); memory foretold and real
#   memory   what a step needs: foretold for a card that is not there (DEVICE, else h100), by XLA on this one, and the real peak
#   loop     train.py itself at that shape, with checkpoints
#   trace    kernels of a step by their time (MICROBATCH, else 16), and the compiled program
#   peers    against torch.compile in interleaved pairs (MICROBATCH, else 32; ATTENTION of PyTorch, else flash)
#   modern   runs/modern-124m against runs/gpt2-124m: the speed of their own steps, in interleaved rounds
#   tests    the tests that mean something on a GPU
#
# FOLDER gets JSON lines, logs and programs. PYTHON names an interpreter that has all packages; without it uv brings them.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:?"expected a folder for the results"}
shift
mkdir -p "$folder"
folder=$(realpath "$folder")
python=${PYTHON:-uv run python}
torch=${PYTHON:-uv run}
shape="--shape gpt2-small --precision bfloat16 --accumulation ${ACCUMULATION:-4}"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} # where the project is not installed
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$folder/compiled}

train() { # FOLDER: with nothing but errors and the last line
  $python train.py "$1" 2>&1 | tail -n 1
}

stop_and_resume() { # FOLDER
  set -m # or the program in the background would ignore Ctrl-C
  $python train.py "$1" >"$1/log" 2>&1 &
  until [ "$(wc -l 2>/dev/null <"$1/metrics.jsonl" || echo 0)" -ge 200 ]; do
    kill -0 $! || return 1
    sleep 0.05
  done
  kill -INT $!
  wait $! || echo "stopped with exit code $? after $(wc -l <"$1/metrics.jsonl") steps"
  set +m
  train "$1"
}

smoke() {
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
  for name in alone again stopped; do
    mkdir -p "$folder/smoke/$name"
    cp "${RUN:-runs/quickstart}"/*.json "$folder/smoke/$name/"
  done
  train "$folder/smoke/alone"
  train "$folder/smoke/again"
  stop_and_resume "$folder/smoke/stopped"
  for name in again stopped; do
    cmp "$folder"/smoke/{alone,$name}/checkpoints/latest/model.safetensors && echo "$name: the same weights"
  done
  $python test_generation.py "$folder/smoke/stopped"
  JAX_DEFAULT_MATMUL_PRECISION=highest $python benchmarks/same_training.py "$python benchmarks/throughput.py" \
    "env JAX_PLATFORMS=cpu $python benchmarks/throughput.py" -- --shape S
}

speed() {
  for microbatch in ${MICROBATCHES:-8 16 32 64}; do
    # shellcheck disable=SC2086
    $python benchmarks/throughput.py $shape --microbatch "$microbatch" --steps 20 --ceiling \
      >>"$folder/speed.jsonl" || echo "microbatch $microbatch failed"
    tail -n 1 "$folder/speed.jsonl" | $python -c "import json, sys
report = json.loads(sys.stdin.read())
print($microbatch, *(f'{key} {report[key]:,.3f}' for key in ('tokens_per_second', 'mfu', 'product_tflops', 'needed_device_bytes', 'peak_device_bytes', 'first_step_seconds')))"
  done
}

memory() {
  for options in "--microbatch 8" "--microbatch 32" "--microbatch 32 --remat blocks" "--microbatch 8 --precision float32"; do
    # shellcheck disable=SC2086
    $python benchmarks/roofline.py $shape $options --device "${DEVICE:-h100}" --rows 0 --json "$folder/foretold.json" >/dev/null
    # shellcheck disable=SC2086
    $python benchmarks/throughput.py $shape $options --steps 3 >"$folder/real.json"
    $python -c "import json, sys
foretold, real = (json.load(open(name)) for name in sys.argv[2:])
print(json.dumps({'options': sys.argv[1], 'foretold_bytes': foretold['needed_device_bytes'],
    'needed_bytes': real['needed_device_bytes'], 'peak_bytes': real['peak_device_bytes']}))" \
      "$options" "$folder/foretold.json" "$folder/real.json" | tee -a "$folder/memory.jsonl"
  done
}

loop() {
  run=$folder/loop
  mkdir -p "$run"
  cp runs/gpt2-small/model.json "$run/"
  echo '{"dataset": "builtin/python-docs", "microbatch_size": 16, "gradient_accumulation_steps": 6, "min_train_tokens": 393216,
    "epochs": 50, "learning_rate": 0.0014, "weight_decay": 0.01, "warmup_period_percent": 5, "clipping_max_norm": 3.5,
    "precision": "bfloat16", "checkpoint_interval": 50, "val_tokens": 16384}' >"$run/train.json"
  train "$run"
  cp "$run/metrics.jsonl" "$folder/loop.jsonl"
}

trace() {
  # shellcheck disable=SC2086
  $python benchmarks/kernel_times.py "$folder/trace" $shape --microbatch "${MICROBATCH:-16}"
}

peers() { # both programs are on the GPU at once, and JAX would take three quarters of it
  # shellcheck disable=SC2086
  XLA_PYTHON_CLIENT_MEM_FRACTION=0.45 $python benchmarks/compare.py --pairs 7 --steps 10 --json \
    "$python benchmarks/throughput.py" "$torch benchmarks/torch_gpt.py --compile --attention ${ATTENTION:-flash}" \
    -- $shape --microbatch "${MICROBATCH:-32}" >>"$folder/peers.jsonl"
}

modern() {
  $python benchmarks/rungs.py runs/gpt2-124m runs/modern-124m --rounds 7 --steps 5 | tee "$folder/modern.json"
}

tests() { # compiled as users do
  XLA_FLAGS=${XLA_FLAGS:-} JAX_DEFAULT_MATMUL_PRECISION=highest $python -m pytest -q -n 0 -p no:cacheprovider -k "not on_a_cpu" tests/layers \
    tests/test_loss.py tests/test_modern_parts.py tests/test_optimizer.py tests/test_update_rules.py tests/test_train_step.py tests/test_sampling.py tests/test_forking.py
}

for stage in "$@"; do
  echo "--- $stage"
  $stage
done
