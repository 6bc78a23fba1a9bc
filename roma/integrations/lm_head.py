"""`roma.linear_logprob` as the head of any causal language model of transformers.

    from roma.integrations import patch_lm_head
    patch_lm_head(model)
    loss = model(**inputs, labels=labels, fused_lm_head=True).loss

The contract is the one of TRL's `add_fused_lm_head`: with `fused_lm_head=True` the forward returns
log-probs of the labels in the place of logits. For TRL's own trainers: `trl_uses_our_head()`.
"""

import importlib
import importlib.metadata
import sys
from types import ModuleType, TracebackType
from typing import Any, TypeVar

from torch import nn

from roma.integrations.head_fields import OUTPUTS
from roma.integrations.head_forward import HeadSettings, fused_forward, settings_of
from roma.integrations.head_probe import read_transform
from roma_kernels.arguments import check_positive
from roma_kernels.backends import NAMES
from roma_kernels.errors import fail

__all__ = ["fused_head", "patch_lm_head", "trl_uses_our_head"]

M = TypeVar("M", bound=nn.Module)


def patch_lm_head(
    model: M,
    *,
    temperature: float = 1.0,
    outputs: tuple[str, ...] = ("log_probs",),
    backend: str = "auto",
    workspace: int | None = None,
) -> M:
    """Puts `roma.linear_logprob` into a model's forward, for calls with `fused_lm_head=True`.

        x = W h + b ;  z = c·x  or  s·tanh(c·x/s), as the model's own forward does ;  z ← z/τ
        log_probs = z_y − log Σ_v exp z_v        of each next token y whose label is not −100

    Such a call takes `labels` [B, S], or `shift_labels` [B, S] that are shifted already, and
    `num_items_in_batch`; it returns what `roma.integrations.head_output` lists (TRL's class if TRL
    is loaded). Logits are fp32 and never whole: only counted rows meet the head, and only those
    with a gradient in the backward. All other calls, `generate` among them, are the model's own.

    Patch before the model is wrapped (PEFT, DDP, FSDP, DeepSpeed). Patching twice replaces the
    settings. If TRL is installed, its trainers keep this head instead of putting theirs over it.

    Args:
        model: a causal language model of transformers, with images or without; of a PEFT model the
            base model is patched.
        temperature: τ > 0.
        outputs: fields that are computed: "log_probs" (always), "entropy", "log_sum_sq_probs",
            "mean_logits", "is_top1".
        backend: as in `roma.linear_logprob`.
        workspace: bytes, as in `roma.linear_logprob`.

    Returns:
        The model that came.

    Raises:
        ValueError: an argument does not fit; the model has no linear head of its own, one with an
            adapter, or a forward that does to its logits what this head cannot.

    Example:
        >>> import torch, transformers
        >>> model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        ...     vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        ...     num_attention_heads=2))
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> patch_lm_head(model)(input_ids=ids, labels=ids, fused_lm_head=True).log_probs.shape
        torch.Size([1, 2])
    """
    _patch(model, temperature, False, outputs, backend, workspace)
    _keep_in_trl()
    return model


def fused_head(
    model: nn.Module,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: tuple[str, ...] = ("log_probs",),
    *,
    backend: str = "auto",
    workspace: int | None = None,
) -> None:
    """`patch_lm_head` with the signature of TRL's `add_fused_lm_head`, to stand in its place.

    Args:
        model: as in `patch_lm_head`, where the others are explained too.
        temperature: τ.
        cast_lm_head_to_fp32: converts the hidden states to fp32 first, and ignores autocast. Logits
            are fp32 in any case.
        outputs: fields.
        backend: back end.
        workspace: bytes.
    """
    _patch(model, temperature, cast_lm_head_to_fp32, outputs, backend, workspace)


def _patch(
    model: Any,
    temperature: float,
    fp32: bool,
    outputs: tuple[str, ...],
    backend: str,
    workspace: int | None,
) -> None:
    check_positive("temperature", temperature, "pass 1.0 for none")
    unknown = [name for name in outputs if name not in OUTPUTS]
    if isinstance(outputs, str) or unknown:
        got, remedy = repr(outputs), "give a tuple of names"
        fail("outputs", f"names among {', '.join(OUTPUTS)}", got, remedy)
    if backend not in NAMES:
        fail("backend", f"one of {', '.join(NAMES)}", repr(backend), "pass 'auto'")
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    settings = HeadSettings(
        read_transform(model), float(temperature), tuple(outputs), fp32, backend, workspace
    )
    model.forward = fused_forward(model, settings)


class _InTrl:
    """What `trl_uses_our_head` did, and the way back.

    TRL's trainers call a function of `trl.trainer.utils` that each has imported by name.
    """

    def __init__(self) -> None:
        self.everywhere = False
        self.theirs: Any = None
        self.ours: Any = None

    def install(self, utils: ModuleType) -> None:
        """Puts a function that chooses between the two heads into the place of TRL's."""
        if self.theirs is not None:
            self._replace(self.theirs, self.ours)  # in modules imported since
            return
        self.theirs = theirs = utils.add_fused_lm_head

        def add_fused_lm_head(
            model: nn.Module,
            temperature: float = 1.0,
            cast_lm_head_to_fp32: bool = False,
            outputs: tuple[str, ...] = ("log_probs",),
        ) -> None:
            earlier = settings_of(model)
            if earlier is not None:
                own = {"backend": earlier.backend, "workspace": earlier.workspace}
                fused_head(model, temperature, cast_lm_head_to_fp32, outputs, **own)  # type: ignore[arg-type]
            elif self.everywhere:
                fused_head(model, temperature, cast_lm_head_to_fp32, outputs)
            else:
                theirs(model, temperature, cast_lm_head_to_fp32, outputs)

        self.ours = add_fused_lm_head
        self._replace(theirs, self.ours)

    @staticmethod
    def _replace(old: object, new: object) -> None:
        for name, module in list(sys.modules.items()):
            known = name.split(".")[0] == "trl" and isinstance(module, ModuleType)
            if known and vars(module).get("add_fused_lm_head") is old:
                module.add_fused_lm_head = new  # type: ignore[attr-defined]

    def __enter__(self) -> "_InTrl":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.everywhere = False


_IN_TRL = _InTrl()


def trl_uses_our_head() -> _InTrl:
    """From now on TRL's trainers (GRPO, RLOO, DPO, KTO, SFT) give their models this head.

    They call `add_fused_lm_head` when they are built; it is replaced where they have imported it,
    and where they will. Two lines, before the trainer:

        from roma.integrations.lm_head import trl_uses_our_head
        trl_uses_our_head()

    Returns:
        A context manager, for who wants TRL's head back: after `with trl_uses_our_head(): ...` new
        trainers have TRL's. Trainers that were built keep what they have.

    Raises:
        ImportError: TRL is not installed.
        ValueError: a TRL without a fused head, older than 1.15.
    """
    from roma.integrations.guard import require

    utils = require("trl.trainer.utils", "trl>=1.15")
    if not hasattr(utils, "add_fused_lm_head"):
        found = importlib.metadata.version("trl")
        fail("trl", "1.15 or newer, which has a fused head", found, "pip install 'trl>=1.15'")
    _IN_TRL.install(utils)
    _IN_TRL.everywhere = True
    return _IN_TRL


def _keep_in_trl() -> None:
    """A trainer of TRL would put its head over one that is there already, without a word.

    So TRL is imported, which takes seconds, if one that does so is installed.
    """
    try:
        found = importlib.metadata.version("trl")  # not a folder of that name
    except importlib.metadata.PackageNotFoundError:
        return
    from packaging.version import Version

    if Version(found) < Version("1.0"):
        return  # it has no fused head, and ms-swift has its own way with this one
    try:
        utils = importlib.import_module("trl.trainer.utils")
    except (ImportError, RuntimeError):
        return  # so no trainer of it runs
    if hasattr(utils, "add_fused_lm_head"):
        _IN_TRL.install(utils)
