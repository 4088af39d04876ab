#!/usr/bin/env bash
# What needs a GPU, in stages meant to end within ten minutes each, without a network:
#     benchmarks/on_gpu.sh STAGE...
# With ten minutes in all, run `python -m benchmarks.lease --out FOLDER` instead: the most valuable
# of it in one command, whose steps are killed when their time is over.
# correctness       the tests marked gpu: bf16 dots, real Triton code
# sanitize          out-of-bounds and misaligned accesses, uninitialised memory
# peak-rates          copy bandwidth and the best matrix products
# tune              which implementation and tiles serve DeiT's shapes best: cache/tuned/<chip>.json
# kernels           every operation on DeiT's shapes but those in eight bits, predicted and measured; then with its
#                   gradients
# table5-deit       DeiT and ViT in every forward mode, then by the paper's protocol
# table5-convnets   the convolutional networks, eager first, then compiled
# relatives         ViT, DeiT-III, CaiT and TinyViT in the modes that matter most
# latency           batch 1, 8, 32; and 256 from pinned host memory
# eight-bits        DeiT-S, B and B-384 at batch 256 in fp8 and int8, beside our bf16 and torchao's fp8 where it is
#                   installed (where not, its rows say so); then the operations in eight bits
# train             forward + backward, and the full step with AdamW, batch 64 and 256
# Results and logs go to ${OUT:-benchmarks/results}. A stage run again goes on where it stopped: rows
# that this build has measured on this chip are kept. Without a GPU every stage runs in little.
# Where the checkout is no git repository, DEIT_FAST_COMMIT says which commit it is.
set -euo pipefail
cd "$(dirname "$0")/.."
stages=(correctness sanitize peak-rates tune kernels table5-deit table5-convnets relatives latency eight-bits train)
[ $# -gt 0 ] || { echo "on_gpu.sh: expected stages, of: ${stages[*]}" >&2; exit 2; }
for stage; do
    [[ " ${stages[*]} " == *" $stage "* ]] ||
        { echo "on_gpu.sh: no stage $stage, expected one of: ${stages[*]}" >&2; exit 2; }
done
out=${OUT:-benchmarks/results}
mkdir -p "$out"
for file in benchmarks/results/*/*.json; do # what was measured before
    copy=$out/${file#benchmarks/results/}
    if [ -e "$file" ] && [ ! -e "$copy" ]; then
        mkdir -p "$(dirname "$copy")"
        cp "$file" "$copy"
    fi
done
export PYTHONUNBUFFERED=1
export DEIT_FAST_CACHE=$out/cache # the stage tune writes its table there, the stages after it use it
python=${PYTHON:-python3}

# No installation: an older setuptools does not know this project's metadata. The checkout is
# importable where the kernels lie in the package, as an installation has them.
if [ ! -e deit_fast/kernels ]; then
    ln -s ../kernels deit_fast/kernels
    trap 'rm -f deit_fast/kernels' EXIT
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
gpu=$("$python" -c 'import torch; print(int(torch.cuda.is_available()))')
"$python" -c 'import torch; c = torch.cuda
print(c.get_device_name() if c.is_available() else "no GPU", torch.__version__)
from deit_fast.bench.results import commit
print("commit", commit())'

seconds=450 # of a stage, after which no row is begun; the last may take two minutes more
left() { awk "BEGIN {s = $seconds - $SECONDS; print (s > 0 ? s : 0) / 60}"; }

# bench FILE... OPTION...: what was measured is kept whether or not every row could be
bench() {
    local little=()
    [ "$gpu" = 1 ] || little=(--max-batch 1 --runs 2 --warmup 1)
    "$python" -m pytest -q --benchmark-only --benchmark-columns=median,mean,rounds \
        --out "$out" --minutes "$(left)" "$@" "${little[@]}" || failed=1
}

deits="DeiT-Ti distilled,DeiT-S distilled,DeiT-B distilled"
forward=eager_fp32,eager_tf32,eager_amp_fp16,eager_fp16,eager_bf16
fast=deit_fast_fp32,deit_fast_fp16,deit_fast_bf16,deit_fast_engine_bf16
compiled=compile_bf16,compile_max_autotune_bf16
vits=transformer convnets=convnet one=()
quantized=("DeiT-B distilled" "DeiT-B-384 distilled" "DeiT-S distilled")
eight="deit_fast_bf16,deit_fast_fp8,deit_fast_engine_bf16,deit_fast_engine_fp8,torchao_fp8_compile"
eight="$eight deit_fast_int8,deit_fast_fp8_attention,eager_bf16"
if [ "$gpu" = 0 ]; then
    deits="DeiT-Ti distilled" vits="DeiT-Ti distilled" convnets=ResNet-18
    quantized=("$deits") eight=deit_fast_fp8,torchao_fp8_compile,deit_fast_int8
    one=(--rows TinyViT-5M)
    forward=eager_fp32 fast=deit_fast_fp32 compiled=compile_bf16
fi

run_stage() {
    case $1 in
    correctness)
        # what no CPU can show; everything else is CI's
        "$python" -m pytest -q -n 8 -m "gpu or device and not slow" tests/kernels tests/layers \
            tests/{checkpoint,cli} tests/distill/test_{training,training_loops}.py \
            tests/test_{engine,images,bulk,pretrained,export}.py \
            tests/test_quantization*.py 2>&1 | tee "$out/correctness.log" || failed=1
        "$python" -m pytest -q -m gpu tests/bench/test_{networks,timing,profiling}.py 2>&1 |
            tee -a "$out/correctness.log" || failed=1
        ;;
    sanitize)
        if [ "$gpu" = 0 ]; then
            echo "sanitize: compute-sanitizer has nothing to watch without a GPU"
            return
        fi
        # Real allocations, so that the tool sees the true bounds; compile first, it slows all.
        local tests='no_less_accurate or every_configuration or test_layer_norm or test_add_layer_norm'
        # those in eight bits: their names have no dtype, or one of several
        local quantized_tests='test_round_trip and float16 or test_quantized_result'
        quantized_tests="$quantized_tests or test_per_tensor_scales_of_x or test_quantized_in_every"
        quantized_tests="$quantized_tests or test_products_in_fp8 or test_what_the_rule_takes"
        for tool in memcheck initcheck; do
            PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
                compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 20 \
                "$python" -m pytest -q -x tests/kernels \
                -k "($tests or test_two_heads) and float16 or $quantized_tests" 2>&1 |
                tee "$out/sanitize-$tool.log" || failed=1
        done
        ;;
    peak-rates)
        bench benchmarks/bench_peak_rates.py --again
        ;;
    tune)
        if [ "$gpu" = 0 ]; then
            echo "tune: made of measurements, there are none without a GPU"
            return
        fi
        # what the minutes leave goes on in the next run of the stage
        for model in deit_base_distilled deit_base_distilled_384 deit_small_distilled \
            deit_tiny_distilled; do
            "$python" -m deit_fast.tune --model "$model" --minutes 2 || failed=1
        done
        ;;
    kernels)
        for ways in "not backward" backward; do # forward first
            bench benchmarks/bench_{layer_norm,linear,layer_norm_linear,attention,layer_norm_attention}.py \
                benchmarks/bench_{patch_embed,layer_norm_mlp,classifier,distillation_loss,sparse_cross_entropy}.py \
                benchmarks/bench_{talking_heads,window_attention,conv_norm}.py \
                --rows "$deits,DeiT-B-384 distilled" --against-playbook -k "$ways"
        done
        ;;
    table5-deit)
        bench benchmarks/bench_table5.py --rows "$vits" --protocols batch \
            --modes "$forward,$fast,$compiled"
        bench benchmarks/bench_table5.py --rows "$deits" --protocols paper --max-batch 2048 \
            --modes "eager_fp32,$fast"
        ;;
    table5-convnets)
        # no max-autotune: minutes for each of the large ones
        for modes in eager_fp32 $forward ${compiled%%,*}; do
            bench benchmarks/bench_table5.py --rows "$convnets" --protocols batch --modes "$modes"
        done
        ;;
    relatives)
        bench benchmarks/bench_relatives.py --modes "$first" "${one[@]}"
        bench benchmarks/bench_relatives.py --modes "$compiled" "${one[@]}"
        ;;
    latency)
        bench benchmarks/bench_latency.py --rows "$deits" \
            --modes "eager_${half},deit_fast_${half},$engine$compiled"
        bench benchmarks/bench_table5.py --rows "$deits" --protocols host \
            --modes "$host"
        ;;
    eight-bits)
        if [ "$gpu" = 1 ]; then # what the table has already is not measured again
            for format in fp8 int8; do
                for model in deit_base_distilled deit_base_distilled_384 deit_small_distilled; do
                    "$python" -m deit_fast.tune --model "$model" --format "$format" --minutes 0.5 ||
                        failed=1
                done
            done
        fi
        for modes in $eight; do # those that the marks are about first
            for network in "${quantized[@]}"; do # a call for each: --rows are in the table's order
                bench benchmarks/bench_table5.py --rows "$network" --protocols batch --modes "$modes"
            done
        done
        bench benchmarks/bench_*quantize*.py --rows "$deits,DeiT-B-384 distilled" \
            --against-playbook -k "not backward"
        ;;
    train)
        for modes in $marked $train; do # those that the marks are about first
            bench benchmarks/bench_train.py --rows "$deits" --modes "$modes"
        done
        [ "$gpu" = 0 ] || bench benchmarks/bench_train.py --rows ResNet-50 --batch 256 --modes "$train"
        ;;
    esac
}

half=bf16 engine=deit_fast_engine_bf16,compile_reduce_overhead_bf16,
host=eager_bf16,deit_fast_bf16,deit_fast_engine_bf16
marked=deit_fast_reduce_overhead_amp_bf16_train,compile_max_autotune_amp_bf16_train
marked=$marked,deit_fast_amp_bf16_train,eager_amp_bf16_train,compile_amp_bf16_train
train=eager_fp32_train,eager_amp_fp16_train,eager_bf16_train,deit_fast_bf16_train
train=$train,compile_bf16_train,compile_max_autotune_bf16_train
first=eager_bf16,deit_fast_bf16,$engine${compiled%%,*},eager_fp32
[ "$gpu" = 1 ] || { first=eager_fp32,deit_fast_fp32; half=fp32 engine= host=deit_fast_fp32 marked=; train=eager_fp32_train,deit_fast_fp32_train; }

failed=0
for stage; do
    printf '\n== %s\n' "$stage"
    SECONDS=0
    run_stage "$stage"
    echo "$stage: $SECONDS s"
done
exit "$failed"
