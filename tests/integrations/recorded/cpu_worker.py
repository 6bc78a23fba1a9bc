"""EasyR1's own trainer and worker on a CPU: what they need of a GPU, stood in for. Test only.

Real: the command, the runner, the trainer's loop, Ray, the dispatch, the reward manager, the worker
with its configuration, its image inputs and their cache, its actor and the update. Stood in for:
the model (small, not under FSDP), vLLM (answers are drawn), tokenizer and data.
"""

import os
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import torch
from integrations.recorded import standin

ABSENT = (
    "vllm",
    "vllm.distributed",
    "vllm.lora",
    "vllm.lora.models",
    "vllm.lora.request",
    "vllm.lora.utils",
    "vllm.lora.worker_manager",
    "qwen_vl_utils",
    "qwen_vl_utils.vision_process",
)
EOS = 3


class Absent(ModuleType):
    """A module whose names are all there and do nothing."""

    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class Tokenizer:
    bos_token_id, eos_token_id, pad_token_id = 1, EOS, standin.PAD

    def decode(self, ids, skip_special_tokens=True):
        return " ".join(map(str, ids.tolist() if hasattr(ids, "tolist") else ids))


class Loader(list):
    def state_dict(self):
        return {}


class Rollout:
    """Draws answers in the place of vLLM, in the form that a rollout has."""

    def __init__(self, count, length):
        self.count, self.length = count, length
        self.draw = torch.Generator().manual_seed(0)

    def generate_sequences(self, prompts):
        from tensordict import TensorDict
        from verl.protocol import DataProto

        count = prompts.meta_info.get("n", self.count)
        rows = len(prompts) * count
        prompt = {k: v.repeat_interleave(count, 0) for k, v in prompts.batch.items()}
        responses = torch.randint(4, 50, (rows, self.length), generator=self.draw)
        lengths = torch.randint(2, self.length + 1, (rows, 1), generator=self.draw)
        place = torch.arange(self.length)
        responses = torch.where(place < lengths - 1, responses, standin.PAD)
        responses = torch.where(place == lengths - 1, EOS, responses)
        mask = (place < lengths).long()
        last = prompt["position_ids"][..., -1:]
        batch = {
            "prompts": prompt["input_ids"],
            "responses": responses,
            "input_ids": torch.cat([prompt["input_ids"], responses], 1),
            "attention_mask": torch.cat([prompt["attention_mask"], mask], 1),
            "response_mask": mask,
            "position_ids": torch.cat([prompt["position_ids"], last + 1 + place], -1),
        }
        images = np.repeat(prompts.non_tensor_batch["multi_modal_data"], count)
        return DataProto(
            batch=TensorDict(batch, batch_size=rows),
            non_tensor_batch={"multi_modal_data": images},
            meta_info=prompts.meta_info,
        )


def data(*_):
    """A training and a validation loader: one batch of four prompts, one of them text alone."""
    from PIL import Image

    draw = np.random.default_rng(0)
    ids, attention, images = [], [], []
    for sizes in [[(16, 24)], [(16, 16), (24, 16)], [], [(16, 24)]]:
        own = [draw.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
        line = []
        for height, width, _ in (image.shape for image in own):
            tokens = height * width // (standin.PATCH * standin.MERGE) ** 2
            line += [standin.START, *[standin.IMAGE] * tokens, standin.END]
        line += draw.integers(4, 50, 4).tolist()
        left = standin.PROMPT - len(line)
        ids.append([standin.PAD] * left + line)
        attention.append([0] * left + [1] * len(line))
        images.append({"images": [Image.fromarray(image) for image in own]})
    attention = torch.tensor(attention)
    places = (attention.cumsum(1) - 1).clamp(min=0)[:, None].expand(-1, 4, -1).contiguous()
    lists = {name: np.empty(4, dtype=object) for name in ("raw", "images")}
    lists["raw"][:], lists["images"][:] = ids, images
    batch = {
        "input_ids": torch.tensor(ids),
        "attention_mask": attention,
        "position_ids": places,
        "raw_prompt_ids": lists["raw"],
        "multi_modal_data": lists["images"],
        "ground_truth": np.array(["1"] * 4, dtype=object),
    }
    return Loader([batch]), Loader([batch])


def worker_class(module):
    """EasyR1's FSDPWorker without FSDP and vLLM."""

    class First(module.Worker):
        """EasyR1 makes the class of a process from the first base of its worker."""

    class CpuWorker(First, module.FSDPWorker):
        def __init__(self, config, role):
            if not torch.distributed.is_initialized():
                torch.distributed.init_process_group("gloo")
            super().__init__(config, role)

        def _build_model_optimizer(self, **given):
            self.tokenizer, self.generation_config = Tokenizer(), None
            self.processor = SimpleNamespace(image_processor=standin.image_processor())
            self.fsdp_module = standin.small_model()
            self.model_config = self.fsdp_module.config
            self.optimizer = torch.optim.SGD(self.fsdp_module.parameters(), lr=1e-4)
            self.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(self.optimizer)

        def _build_rollout(self):
            own = self.config.rollout
            self.rollout = Rollout(own.n, own.response_length)
            self.rollout_sharding_manager = SimpleNamespace(
                freed_bytes=0,
                load_vllm_and_sync_weights=lambda: None,
                offload_vllm=lambda: None,
                preprocess_data=lambda data: data,
                postprocess_data=lambda data: data,
            )

    def save_checkpoint(self, path, save_model_only=False):
        os.makedirs(path)

    dispatch = module.register(dispatch_mode=module.Dispatch.ONE_TO_ALL)
    CpuWorker.save_checkpoint = dispatch(save_checkpoint)
    # Classes travel by name, so both have one: EasyR1's, whose place is taken, and this.
    module.FSDPWorker.__qualname__ = "StockFSDPWorker"
    module.StockFSDPWorker = module.FSDPWorker
    CpuWorker.__module__, CpuWorker.__qualname__ = __name__, "CpuWorker"
    globals()["CpuWorker"] = CpuWorker
    return CpuWorker


def install():
    """In every process of Ray's, before anything of EasyR1's is imported there."""
    for name in ABSENT:
        sys.modules.setdefault(name, Absent(name))
    torch.set_num_threads(1)
    torch.cuda.get_device_name = lambda *_: "none"
    torch.cuda.current_device = lambda: "cpu"
    from torch.distributed.device_mesh import init_device_mesh
    from verl.trainer import main
    from verl.workers import fsdp_workers

    def mesh(_, **given):
        return init_device_mesh("cpu", **given)

    def unused(**_):  # no FSDP, so nothing to save
        return None

    fsdp_workers.init_device_mesh = mesh
    fsdp_workers.FSDPCheckpointManager = unused
    fsdp_workers.FSDPWorker = main.FSDPWorker = worker_class(fsdp_workers)
    main.get_tokenizer = lambda *_, **__: Tokenizer()
    main.get_processor = lambda *_, **__: None
    main.create_dataloader = data
