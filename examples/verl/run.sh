#!/bin/sh
# GRPO with degraded views in verl 0.9, for a machine with 8 GPUs: sh examples/verl/run.sh [MORE]
# DATA has train.parquet and test.parquet in verl's columns (prompt, images, reward_model).
# The two lines marked ROMA are what views add to a script for verl's main_ppo.
set -e
here=$(cd "$(dirname "$0")" && pwd)

export ROMA_OPTIONS="${ROMA_OPTIONS-num_views=2,lambda_inv=1,lambda_aux=0.5}" # ROMA

# With two views a micro-batch is up to three times as long: its budgets are a third.
${PYTHON:-python} -m roma.integrations.verl `# ROMA, in the place of verl.trainer.main_ppo` \
    algorithm.adv_estimator=grpo \
    data.train_files="${DATA:-data}/train.parquet" \
    data.val_files="${DATA:-data}/test.parquet" \
    data.image_key=images \
    data.train_batch_size=256 \
    data.max_prompt_length=1024 \
    data.max_response_length=2048 \
    data.filter_overlong_prompts=True \
    reward.custom_reward_function.path="$here/reward.py" \
    actor_rollout_ref.model.path="${MODEL:-Qwen/Qwen3-VL-4B-Instruct}" \
    actor_rollout_ref.model.use_remove_padding=True \
    actor_rollout_ref.model.enable_gradient_checkpointing=True \
    actor_rollout_ref.actor.strategy=fsdp2 \
    actor_rollout_ref.actor.optim.lr=1e-6 \
    actor_rollout_ref.actor.ppo_mini_batch_size=128 \
    actor_rollout_ref.actor.use_dynamic_bsz=True \
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=8192 \
    actor_rollout_ref.actor.clip_ratio_low=0.2 \
    actor_rollout_ref.actor.clip_ratio_high=0.3 \
    actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean \
    actor_rollout_ref.rollout.name=vllm \
    actor_rollout_ref.rollout.n=5 \
    actor_rollout_ref.rollout.tensor_model_parallel_size=1 \
    actor_rollout_ref.rollout.gpu_memory_utilization=0.6 \
    actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True \
    trainer.n_gpus_per_node=8 \
    trainer.nnodes=1 \
    trainer.logger='["console"]' \
    trainer.total_epochs=1 \
    "$@"
