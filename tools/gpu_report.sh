#!/usr/bin/env bash
# Checks, measures and tunes the kernels on this machine, within ten minutes on one H200.
#
#   tools/gpu_report.sh FOLDER [option of the benchmark ...]
#
# Writes FOLDER/checks.txt, benchmark.json, benchmark.txt, tuned.json (a settings table) and
# tuning.json (every timing). Needs torch, Triton, typer and rich, and pytest for the checks; rivals
# that are not installed are rows that say so. Without a GPU it measures the CPU path and tunes nothing.
# PYTHON names the interpreter; STEPS some of "checks benchmark tuning".
set -euo pipefail

if [ $# -eq 0 ]; then
    sed -n '2,10s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
folder=$1
shift
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
steps=${STEPS:-checks benchmark tuning}
export PYTHONPATH=$PWD/tools/src${PYTHONPATH:+:$PYTHONPATH}
status=0

has() { case " $steps " in *" $1 "*) true ;; *) false ;; esac; }

run() { # run NAME SECONDS command ...: says how it ended and goes on
    local name=$1 seconds=$2 started=$SECONDS code=0
    shift 2
    echo "== $name"
    timeout "$seconds" "$@" || code=$?
    if [ "$code" -ne 0 ]; then
        status=1
        echo "== $name failed with status $code (124: not done after $seconds s)"
    fi
    echo "== $name took $((SECONDS - started)) s"
}

if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    gpu=yes
    on_gpu=(--quick --graphs --first-call)
else
    gpu=no
    on_gpu=()
    echo "no GPU: the CPU path is measured, and nothing is tuned"
fi
if has checks; then
    run checks 210 bash -c '"$0" -m pytest -q -m kernels_ci tests 2>&1 | tee "$1/checks.txt" | tail -3' \
        "$python" "$folder"
fi
if has benchmark; then
    run benchmark 240 "$python" -m esmfold2_trimul_tools bench ${on_gpu[@]+"${on_gpu[@]}"} \
        --budget 0.2 --out "$folder/benchmark.json" "$@"
    if [ -f "$folder/benchmark.json" ]; then
        "$python" -m esmfold2_trimul_tools bench --results "$folder/benchmark.json" \
            > "$folder/benchmark.txt" || status=1
    fi
fi
if has tuning && [ "$gpu" = yes ]; then
    run tuning 120 "$python" -m esmfold2_trimul_tools tune \
        --stage fused_dual_gemm --stage trimul_einsum --stage fused_ln_residual \
        --out "$folder/tuned.json" --results "$folder/tuning.json"
fi
echo "the report is in $folder"
exit "$status"
