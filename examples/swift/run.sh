#!/bin/sh
# GRPO with degraded views in ms-swift, on a CPU, in half a minute: sh examples/swift/run.sh [OUT]
# Needs ms-swift 4.6 and this package with its extra `views`, as docs/SWIFT.md has them. With a
# model of your own the two lines marked ROMA, and $plugin, are what views add.
set -e
out=${1:-runs/swift}
here=$(dirname "$0")
mkdir -p "$out"
python "$here/tiny.py" "$out"
export TINY_MODEL="$out/model" USE_HF=1 HF_HUB_OFFLINE=1

export ROMA_OPTIONS="num_views=2,lambda_inv=1,lambda_aux=0.5" # ROMA
plugin=$(python -m roma.integrations.swift)                   # ROMA

swift rlhf --rlhf_type grpo --external_plugins "$plugin" "$here/reward.py" \
    --model "$TINY_MODEL" --dataset "$out/rows.jsonl" --output_dir "$out/run" \
    --model_type qwen3_vl --template qwen3_vl --check_model false --torch_dtype float32 \
    --reward_funcs names_the_side --tuner_type full --freeze_vit false --freeze_aligner false \
    --num_generations 8 --per_device_train_batch_size 16 --max_completion_length 2 --beta 0 \
    --learning_rate 3e-4 --lr_scheduler_type constant --warmup_ratio 0 --max_steps "${STEPS:-30}" \
    --use_cpu true --split_dataset_ratio 0 --gradient_checkpointing false \
    --logging_steps 5 --report_to none --save_strategy no
