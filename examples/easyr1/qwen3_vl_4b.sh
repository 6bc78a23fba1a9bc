#!/bin/bash
# EasyR1's own example for Qwen3-VL 4B, with ROMA. Run it in a clone of EasyR1, on its GPUs.
#
# Up to two views ride along with each row of an update. If that does not fit, take
# worker.actor.dynamic_batching=false: then a micro-batch is one row and its views, not a sum of
# tokens that counts clean rows alone.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export ROMA_OPTIONS=${ROMA_OPTIONS:-$HERE/roma.yaml}

python3 -m roma.integrations.easyr1 \
    config=examples/config.yaml \
    data.train_files=hiyouga/geometry3k@train \
    data.val_files=hiyouga/geometry3k@test \
    worker.actor.model.model_path=Qwen/Qwen3-VL-4B-Instruct \
    trainer.experiment_name=qwen3_vl_4b_geo_roma \
    trainer.n_gpus_per_node=2 \
    "$@"
