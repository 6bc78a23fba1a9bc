"""What stands in for EasyR1 where it is not: classes with its recorded names and shapes.

Written here, from easyr1.json; a loss of the stand-in's own, so that what is added can be told from
it. And a small Qwen3-VL with a batch as EasyR1's workers see it, for both.
"""

from types import SimpleNamespace

import numpy as np
import torch

PATCH, MERGE = 4, 2
IMAGE, START, END, PAD = 60, 61, 62, 0
PROMPT, ANSWER = 24, 6


class Batch(dict):
    """Of a TensorDict what is used."""

    def clone(self, recurse=True):
        return Batch({k: v.clone() if recurse else v for k, v in self.items()})


class DataProto:
    def __init__(self, batch, non_tensor_batch=None, meta_info=None):
        self.batch, self.non_tensor_batch = batch, non_tensor_batch or {}
        self.meta_info = meta_info or {}

    @classmethod
    def from_dict(cls, tensors, non_tensors=None, meta_info=None):
        return cls(Batch(tensors), non_tensors, meta_info)

    def __len__(self):
        return len(next(iter(self.batch.values())))

    def select(
        self, batch_keys=None, non_tensor_batch_keys=None, meta_info_keys=None, deepcopy=False
    ):
        tensors = {k: self.batch[k] for k in batch_keys if k in self.batch}
        others = {k: v for k, v in self.non_tensor_batch.items() if k in non_tensor_batch_keys}
        return DataProto(Batch(tensors), others, self.meta_info)

    def split(self, split_size):
        parts = [slice(i, i + split_size) for i in range(0, len(self), split_size)]
        return [
            DataProto(
                Batch({k: v[part] for k, v in self.batch.items()}),
                {k: v[part] for k, v in self.non_tensor_batch.items()},
                self.meta_info,
            )
            for part in parts
        ]


class DataParallelPPOActor:
    """With the parameters, keys and order of calls that are recorded."""

    def __init__(self, config, actor_module, actor_optimizer=None):
        self.config, self.world_size, self.rank = config, 1, 0
        self.actor_module, self.actor_optimizer = actor_module, actor_optimizer

    def _forward_micro_batch(self, micro_batch, temperature):
        own = list(micro_batch.get("multi_modal_inputs", []))
        names = sorted({name for row in own for name in row})
        images = {name: torch.cat([row[name] for row in own if name in row]) for name in names}
        output = self.actor_module(
            input_ids=micro_batch["input_ids"],
            attention_mask=micro_batch["attention_mask"],
            position_ids=micro_batch["position_ids"].transpose(0, 1),
            use_cache=False,
            **images,
        )
        length = micro_batch["responses"].shape[1]
        logits = output.logits[:, -length - 1 : -1].float() / temperature
        picked = micro_batch["responses"][..., None]
        return logits.log_softmax(-1).gather(-1, picked)[..., 0]

    def _optimizer_step(self):
        self.actor_optimizer.step()
        self.actor_optimizer.zero_grad()
        return torch.zeros(())

    @torch.no_grad()
    def compute_log_prob(self, data):
        names = ["input_ids", "attention_mask", "position_ids", "responses"]
        kept = data.select(names, ["multi_modal_inputs"])
        rows = {**kept.batch, **kept.non_tensor_batch}
        return self._forward_micro_batch(rows, temperature=data.meta_info["temperature"])

    def update_policy(self, data):
        names = ["input_ids", "attention_mask", "position_ids", "responses", "response_mask"]
        names += ["old_log_probs", "ref_log_probs", "advantages"]
        kept = data.select(names, ["multi_modal_inputs"])
        losses = []
        for mini in kept.split(self.config.global_batch_size_per_device):
            total = mini.batch["response_mask"].sum()
            for micro in mini.split(self.config.micro_batch_size_per_device_for_update):
                rows = {**micro.batch, **micro.non_tensor_batch}
                logp = self._forward_micro_batch(rows, temperature=data.meta_info["temperature"])
                ratio = (logp - rows["old_log_probs"]).exp()
                loss = -(ratio * rows["advantages"] * rows["response_mask"]).sum() / total
                loss.backward()
                losses.append(loss.item())
            self._optimizer_step()
        return {"actor/pg_loss": losses}


def config(**changes):
    """The fields of the actor's configuration that are used."""
    fields = {
        "global_batch_size_per_device": 8,
        "micro_batch_size_per_device_for_update": 8,
        "micro_batch_size_per_device_for_experience": 8,
        "loss_avg_mode": "token",
        "loss_type": "default",
        "clip_ratio_low": 0.2,
        "clip_ratio_high": 0.3,
        "clip_ratio_dual": 3.0,
        "padding_free": False,
        "dynamic_batching": False,
        "use_torch_compile": False,
        "max_grad_norm": 1e9,
    }
    return SimpleNamespace(**{**fields, **changes})


class Recorder:
    """An optimizer that keeps the gradients and leaves the weights as they are."""

    def __init__(self, model):
        self.weights = [p for p in model.parameters() if p.requires_grad]
        self.seen = []

    def step(self):
        blank = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.weights]
        self.seen.append(torch.cat([g.flatten() for g in blank]).clone())

    def zero_grad(self):
        for p in self.weights:
            p.grad = None


def small_model():
    """A Qwen3-VL with random weights in float64, matrices ten times as large: it sees its image."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(
            text_config={
                "vocab_size": 64,
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "head_dim": 16,
                "rope_scaling": {"rope_type": "default", "mrope_section": [4, 2, 2]},
            },
            vision_config={
                "hidden_size": 16,
                "intermediate_size": 16,
                "depth": 2,
                "num_heads": 2,
                "patch_size": PATCH,
                "spatial_merge_size": MERGE,
                "temporal_patch_size": 2,
                "out_hidden_size": 32,
                "num_position_embeddings": 64,
                "deepstack_visual_indexes": [0],
            },
            image_token_id=IMAGE,
            vision_start_token_id=START,
            vision_end_token_id=END,
        )
    ).double()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight *= 10
    return model.train()


def image_processor():
    from transformers import Qwen2VLImageProcessor

    return Qwen2VLImageProcessor(
        patch_size=PATCH, merge_size=MERGE, temporal_patch_size=2, min_pixels=64, max_pixels=4096
    )


def batch_for(processor, *, seed=0, with_images=True):
    """8 rows, two a prompt: one image, two images, text alone, one image; as EasyR1 has them."""
    draw = np.random.default_rng(seed)
    prompts = []
    for sizes in [[(16, 24)], [(16, 16), (24, 16)], [], [(16, 24)]]:
        images = [draw.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
        ids, inputs = [], {}
        if images and with_images:
            inputs = dict(processor(images=images, return_tensors="pt"))
            for grid in inputs["image_grid_thw"].tolist():
                ids += [START, *[IMAGE] * (grid[1] * grid[2] // MERGE**2), END]
        prompts.append(([*ids, *draw.integers(1, 50, 4).tolist()], inputs))
    rows, own = [], []
    for ids, inputs in prompts:
        for _ in range(2):
            length = int(draw.integers(2, ANSWER + 1))
            answer = draw.integers(1, 50, length).tolist()
            left, right = PROMPT - len(ids), ANSWER - length
            line = [PAD] * left + ids + answer + [PAD] * right
            rows.append((line, [0] * left + [1] * (PROMPT - left + length) + [0] * right, length))
            own.append(inputs)
    input_ids = torch.tensor([row[0] for row in rows])
    attention = torch.tensor([row[1] for row in rows])
    places = (attention.cumsum(1) - 1).clamp(min=0)
    mask = torch.arange(ANSWER) < torch.tensor([[row[2]] for row in rows])
    gains = torch.tensor([1.2, -0.7, 0.0, 0.9, 0.5, -1.1, -0.4, 0.8])
    column = np.empty(len(rows), dtype=object)
    column[:] = own
    tensors = {
        "input_ids": input_ids,
        "attention_mask": attention,
        "position_ids": places[:, None].expand(-1, 4, -1).contiguous(),
        "responses": input_ids[:, -ANSWER:].contiguous(),
        "response_mask": mask.long(),
        "advantages": gains[:, None] * mask,
        "roma_correct": torch.tensor([True, False, True, True, True, False, False, True]),
    }
    return tensors, {"multi_modal_inputs": column}
