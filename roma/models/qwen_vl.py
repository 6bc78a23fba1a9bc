"""A Hugging Face vision-language model as the separate passes that a trainer needs.

Unlike `model(**batch)`: the vision tower runs once per (image, view) and its features serve all
rollouts; the text model returns hidden states of completion tokens, since the loss needs no logits;
a degraded view is another set of `pixel_values` on the clean image's grid. Rollouts are scored in
packed groups, a prompt once for all of its rollouts, or as rows (prompt, completion), any number in
any order.
"""

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from roma.models import checkpointing, lora
from roma.models.device import resolve_device
from roma.models.export import check_base, save
from roma.models.flops import Adapters
from roma.models.prefix import Group, Packed, pack, share_prompts, shares_prompts
from roma.models.processor import Image, Processor
from roma.models.prompts import ImageFeatures, PromptBatch, positions_of
from roma_kernels.errors import fail


class Policy(nn.Module):
    """A model of the Qwen3-VL family and its processor.

    Args:
        model: `transformers` image-text-to-text model with `get_image_features` and
            `get_rope_index`.
        processor: of the same folder.
    """

    def __init__(self, model: Any, processor: Processor) -> None:
        """Keeps both."""
        super().__init__()
        self.model = model
        self.processor = processor

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> "Policy":
        """Reads a Hugging Face folder, the small model's or a real Qwen3-VL's.

        The model is in eval mode: without dropout, old and new log-probs agree.

        Raises:
            ValueError: no such device, not such a folder, a model without image features and 3-D
                positions, or a transformers that cannot take features already computed.
        """
        import transformers
        from transformers import AutoModelForImageTextToText
        from transformers.utils import logging

        device = resolve_device(device)
        logging.disable_progress_bar()  # its bars would break into the trainer's own

        if not (Path(path) / "config.json").is_file():
            got = f"no config.json in {str(path)!r}"
            fail("model", "a Hugging Face model's folder", got, "check the path")
        processor = Processor.load(path)
        try:
            model: Any = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype)
        except (KeyError, OSError, RuntimeError, SafetensorError, ValueError) as error:
            said = f"one of which transformers says: {str(error).strip().splitlines()[0]}"
            fail("model", f"one that loads in {path}", said, "correct it, or fetch it again")
        if not hasattr(model.model, "get_rope_index"):
            remedy = "other families need a policy of their own"
            fail("model", "one of the Qwen-VL family", type(model).__name__, remedy)
        if "mm_encoder_outputs" not in inspect.signature(model.model.forward).parameters:
            got = f"{transformers.__version__}, which would train without the images in silence"
            fail("transformers", "5.18 or newer", got, "pip install -U transformers")
        with suppress(ValueError):  # `shares_prompts` says so, and a trainer
            share_prompts(model)
        return cls(model.to(device), processor)

    @property
    def is_checkpointed(self) -> bool:
        """Whether layers are run again in the backward pass."""
        return checkpointing.is_enabled(self.model)

    def checkpoint(self, *, reentrant: bool = False) -> None:
        """Has layers run again in the backward pass (`roma.models.checkpointing.enable`)."""
        checkpointing.enable(self, reentrant=reentrant)

    @property
    def has_adapters(self) -> bool:
        """Whether the text model has low-rank adapters (`roma.models.lora.add_adapters`)."""
        return bool(lora.layers(self.model))

    @property
    def adapters(self) -> Adapters | None:
        """Their rank and targets, which decide what an update costs."""
        return lora.adapters_of(self.model)

    def reference(self) -> AbstractContextManager[None]:
        """A context without adapters: the frozen base, number for number, and no graph.

        Raises:
            ValueError: a policy without adapters, on entry.
        """
        return lora.without_adapters(self.model)

    @property
    def vision_is_frozen(self) -> bool:
        """Whether no weight of the vision tower is trained."""
        return not any(weight.requires_grad for weight in self.model.model.visual.parameters())

    @property
    def shares_prompts(self) -> bool:
        """Whether `packed_hidden` can be used: the model asks for its attention by name."""
        return shares_prompts(self.model)

    def save_pretrained(self, path: str | Path) -> None:
        """Writes weights, config, tokenizer and image processor in Hugging Face form.

        Adapters are merged into copies, and stand in peft's form in `adapter/` (`export.save`).
        """
        save(self, path)

    def load_adapters(self, path: str | Path) -> None:
        """Reads the adapters that `save_pretrained` wrote into this policy's, bit for bit.

        Raises:
            ValueError: none there, others, or those of another base.
        """
        lora.load_adapters(self.model, Path(path) / lora.ADAPTER)
        check_base(self, path)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device  # to read the head is a collective under ZeRO-3

    @property
    def head_weight(self) -> Tensor:
        """[V, D]."""
        weight: Tensor = self.model.get_output_embeddings().weight
        return weight

    @property
    def pad_id(self) -> int:
        """Token for positions that do not count."""
        return int(self.processor.tokenizer.pad_token_id)

    @property
    def image_id(self) -> int:
        """Token that stands in a prompt for each of its images' features."""
        return int(self.model.config.image_token_id)

    def autocast(self, dtype: str) -> torch.autocast:
        """A context in which matrix products run in `dtype`, "float32" or "bfloat16".

        Weights and logits stay fp32.
        """
        return torch.autocast(self.device.type, torch.bfloat16, enabled=dtype == "bfloat16")

    def encode_prompts(
        self, problems: Sequence[str], images: Sequence[Sequence[Image]]
    ) -> PromptBatch:
        """Prompts for problems whose `<image>` marks stand for images, uint8 [H, W, 3], any size.

        Raises:
            ValueError: a problem's marks and images differ in number.
        """
        resized = [[self.processor.resize(image) for image in own] for own in images]
        pixel_values, grids = self.processor.pixel_values(
            [image for own in resized for image in own]
        )
        first = [0]
        for own in resized:
            first.append(first[-1] + len(own))
        bounds = list(pairwise(first))
        ids = [
            self.processor.prompt_ids(text, grids[a:b])
            for text, (a, b) in zip(problems, bounds, strict=True)
        ]
        longest = max(map(len, ids))
        input_ids = torch.tensor([[self.pad_id] * (longest - len(row)) + row for row in ids])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])
        positions = positions_of(self.model, input_ids, mask, grids, first)
        return PromptBatch(
            input_ids=input_ids.to(self.device),
            attention_mask=mask.to(self.device),
            position_ids=positions.to(self.device),
            next_position=positions[0].where(mask.bool(), -1).amax(-1).to(self.device) + 1,
            images=resized,
            pixel_values=pixel_values.to(self.device),
            grids=grids,
            first_image=first,
            padded=bool((mask == 0).any()),
        )

    def view_pixels(self, prompts: PromptBatch, views: Sequence[Sequence[Image]]) -> Tensor:
        """Patches of a degraded view of every prompt's images, on the clean images' grids.

        Args:
            prompts: the clean prompts.
            views: per prompt, its degraded images, uint8, of the sizes in `prompts.images`.

        Raises:
            ValueError: a view's grid differs from the clean one.
        """
        pixel_values, grids = self.processor.pixel_values([image for own in views for image in own])
        clean, made = prompts.grids.tolist(), grids.tolist()
        if len(made) != len(clean):
            fail("views", f"{len(clean)} images", str(len(made)), "one per image of the prompts")
        for number, (expected, got) in enumerate(zip(clean, made, strict=True)):
            if got != expected:
                remedy = "degrade the image at model resolution and keep its height and width"
                fail(f"views, image {number}", f"the clean grid {expected}", str(got), remedy)
        return pixel_values.to(self.device)

    def image_features(self, pixel_values: Tensor, grids: Tensor) -> ImageFeatures:
        """One pass of the vision tower over n images; differentiable."""
        if not len(grids):
            return ImageFeatures([], [])
        checkpointing.check(self.model)
        made = self.model.model.get_image_features(
            pixel_values, grids.to(pixel_values.device), return_dict=True
        )
        levels = getattr(made, "deepstack_features", [])  # Qwen2.5-VL has none
        return ImageFeatures(list(made.pooler_output), [list(level) for level in levels])

    def blank_features(self, prompts: PromptBatch) -> ImageFeatures:
        """The features of one grey image, the smallest there is, where the prompts are.

        Nothing reads them. They let the vision tower take part on a rank without an image, where
        its weights are sharded or their gradients averaged.
        """
        merge = int(self.model.model.visual.spatial_merge_size)
        pixels = prompts.pixel_values.new_zeros(merge**2, prompts.pixel_values.shape[1])
        return self.image_features(pixels, torch.tensor([[1, merge, merge]]))

    def group_features(
        self,
        prompts: PromptBatch,
        view_pixels: Sequence[Tensor],
        groups: Sequence[Group],
        *,
        clean: ImageFeatures | None = None,
    ) -> ImageFeatures:
        """The features of the images of packed groups, in their order; one pass of the tower.

        Args:
            prompts: P prompts.
            view_pixels: K views of their images, each [Σ gh·gw, C].
            groups: variant 0 is the clean images, k + 1 view k.
            clean: features of all clean images, if they are known and need no gradient; they are
                not computed again.
        """
        sources = [prompts.pixel_values, *view_pixels]
        run = [g for g in groups if g.variant or clean is None]
        images = [i for g in run for i in prompts.images_of(g.prompt)]
        pixels = [sources[g.variant][prompts.patches(g.prompt)] for g in run]
        made = self.image_features(
            torch.cat(pixels) if pixels else prompts.pixel_values[:0], prompts.grids[images]
        )
        if clean is None or len(run) == len(groups):
            return made
        first = len(clean.embeddings)  # of those that were run, behind the known ones
        both = clean.joined(made)
        order: list[int] = []
        for g in groups:
            own = prompts.images_of(g.prompt)
            if g.variant:
                order += range(first, first + len(own))
                first += len(own)
            else:
                order += own
        return both.gather(order)

    def packed(
        self, prompts: PromptBatch, groups: Sequence[Group], tokens: Tensor, lengths: Tensor
    ) -> Packed:
        """Groups in one row (`roma.models.prefix.pack`).

        Args:
            prompts: P prompts.
            groups: of completions [R, T].
            tokens: [R, T] int64, padded on the right.
            lengths: [R] int64, at least 1.
        """
        width = prompts.input_ids.shape[1]
        starts = [width - length for length in prompts.lengths]
        return pack(
            [row[start:] for row, start in zip(prompts.input_ids, starts, strict=True)],
            tokens,
            lengths,
            groups,
            positions=[prompts.position_ids[:, p, start:] for p, start in enumerate(starts)],
            next_position=prompts.next_position,
        )

    def packed_hidden(self, packed: Packed, features: ImageFeatures) -> Tensor:
        """Hidden states [S, D] of packed groups, after the last norm.

        Args:
            packed: of `packed`; `packed.reads` tells which state predicts what.
            features: of the groups' images, in their order (`group_features`).
        """
        states: Tensor = self._body(
            **packed.inputs(), mm_encoder_outputs=features.encoder_outputs(), use_cache=False
        ).last_hidden_state
        return states[0]

    def completion_hidden(
        self,
        prompts: PromptBatch,
        features: ImageFeatures,
        rows: Tensor,
        tokens: Tensor,
        mask: Tensor,
    ) -> Tensor:
        """Hidden states, after the last norm, at the positions that predict each completion token.

        Args:
            prompts: P prompts.
            features: of all their images, in order (clean or degraded).
            rows: [R] int64: the prompt of each row.
            tokens: [R, T] int64 completions, padded on the right.
            mask: [R, T] bool, True = a token.

        Returns:
            [R, T, D]; positions outside `mask` hold arbitrary finite values.
        """
        states = self.row_hidden(prompts, features, rows, tokens, mask)
        return states[:, prompts.input_ids.shape[1] - 1 :]

    def row_hidden(
        self,
        prompts: PromptBatch,
        features: ImageFeatures,
        rows: Tensor,
        tokens: Tensor,
        mask: Tensor,
    ) -> Tensor:
        """Hidden states [R, L + T − 1, D] of whole rows: `completion_hidden` is their last part."""
        length = tokens.shape[1] - 1  # the last token predicts nothing
        completions = tokens.masked_fill(~mask, self.pad_id)[:, :length]
        ids = torch.cat([prompts.input_ids[rows], completions], dim=1)
        later = prompts.next_position[rows, None] + torch.arange(length, device=ids.device)
        positions = torch.cat([prompts.position_ids[:, rows], later.expand(3, -1, -1)], dim=2)
        states: Tensor = self._body(
            input_ids=ids,
            position_ids=positions,
            attention_mask=self._attention_mask(prompts, rows, length),
            mm_encoder_outputs=prompts.features_of(features, rows).encoder_outputs(),
            use_cache=False,
        ).last_hidden_state
        return states

    def _body(self, **inputs: Any) -> Any:
        checkpointing.check(self.model)
        return self.model.model(**inputs)

    def _attention_mask(self, prompts: PromptBatch, rows: Tensor, extra: int) -> Tensor | None:
        """None where no prompt is padded: padding after a completion is hidden by causality."""
        if not prompts.padded:
            return None
        mask = prompts.attention_mask[rows]
        return torch.cat([mask, mask.new_ones(len(rows), extra)], dim=1)

    def prefill(self, prompts: PromptBatch, features: ImageFeatures) -> Any:
        """The key-value cache of the prompts without their last token, for sampling."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config.text_config)
        rows = torch.arange(len(prompts.images), device=self.device)
        # The last prompt token starts generation. It is never an image token, so that all features
        # belong to the tokens before it.
        self.model.model(
            input_ids=prompts.input_ids[:, :-1],
            position_ids=prompts.position_ids[:, :, :-1],
            attention_mask=prompts.attention_mask[:, :-1] if prompts.padded else None,
            mm_encoder_outputs=prompts.features_of(features, rows).encoder_outputs(),
            past_key_values=cache,
            use_cache=True,
        )
        return cache
