"""The update step: ROMA's forms, GRPO, and TRL's own step, on a small Qwen3-VL."""
