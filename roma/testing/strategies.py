"""What Hypothesis draws: sizes from short lists, a seed, switches and a named difficulty.

No raw floats. A drawn value is a small frozen dataclass whose repr makes it again: `HeadSpec(...)`
builds the inputs of `linear_logprob`, `LossSpec(...)` those of the loss, each from its own
torch.Generator. A found bug stays as an @example.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from roma.testing import oracle
from roma.testing.loss_configs import configs
from roma.testing.tensors import generator, head_tensors, strided
from roma_kernels.roma_loss.config import RomaConfig

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

HEAD_DIFFICULTIES = (
    "plain",
    "huge_logits",  # |z| in the hundreds: overflow unless the maximum is taken off first
    "below_zero",  # every logit near -100: a padded lane of exp(0) would dominate the sum
    "peaked_tail",  # the last vocabulary entry, in the ragged tail, takes nearly all probability
    "peaked_elsewhere",  # the same mass on an entry that is not the target
    "uniform_weights",  # all logits equal: the weights under which a padded tail stays hidden
    "zero_rows",  # hidden states of 0
    "equal_rows",
)

LOSS_DIFFICULTIES = (
    "plain",
    "at_clip_edge",  # log-ratios within 0.002 of every clip and of the dual clip, on either side
    "row_all_masked",
    "everything_masked",
    "views_identical",  # exact ties
    "views_equal_clean",  # δ = 0
    "tiny_delta",  # δ about 1e-4, where exp(δ) - δ - 1 has no digit left
    "far_ratios",  # beyond the clamp
    "all_wrong",
    "all_right",
    "zero_advantages",
    "nan_when_masked",  # NaN, inf and token -100 wherever the mask is False
)


@dataclass(frozen=True)
class HeadSpec:
    """One call of linear_logprob."""

    shape: tuple[int, ...] = (5,)
    d: int = 8
    v: int = 33
    seed: int = 0
    difficulty: str = "plain"
    dtype: torch.dtype = torch.float32
    weight_dtype: torch.dtype | None = None
    bias: bool = False
    softcap: float | None = None
    temperature: str = "one"
    entropy: bool = False
    strided: bool = False

    def make(self) -> dict[str, Any]:
        """The arguments of linear_logprob, as leaves without gradient."""
        g = generator(self.seed)
        rows = math.prod(self.shape)
        hidden, weight, bias, tokens = head_tensors(
            rows, self.d, self.v, self.difficulty, g, bias=self.bias
        )
        temperature: float | Tensor = {"one": 1.0, "float": 0.7, "rows": 1.0}[self.temperature]
        if self.temperature == "rows":
            temperature = (0.5 + torch.rand(self.shape, generator=g)).float()
        hidden = hidden.to(self.dtype).reshape(*self.shape, self.d)
        weight_dtype = self.weight_dtype or self.dtype
        weight = weight.to(weight_dtype)
        tokens = tokens.reshape(self.shape)
        if self.strided:
            hidden, weight = strided(hidden), strided(weight)
            bias = None if bias is None else strided(bias)
            tokens = torch.stack([tokens, tokens], dim=-1)[..., 0]
        return {
            "hidden": hidden,
            "weight": weight,
            "tokens": tokens,
            "bias": None if bias is None else bias.to(weight_dtype),
            "temperature": temperature,
            "softcap": self.softcap,
        }


def head_specs(**fixed: Any) -> st.SearchStrategy[HeadSpec]:
    """Calls of linear_logprob; keyword arguments pin fields."""
    drawn: dict[str, st.SearchStrategy] = {
        # no row, one row, two and three leading dimensions
        "shape": st.sampled_from([(0,), (1,), (5,), (17,), (2, 3), (2, 1, 4), (2, 0, 3)]),
        "d": st.sampled_from([1, 5, 8, 33]),
        # one entry, either side of a block of 128, a tail of one, two blocks and a tail
        "v": st.sampled_from([1, 2, 33, 127, 128, 129, 257]),
        "seed": st.integers(0, 2**16),
        "difficulty": st.sampled_from(HEAD_DIFFICULTIES),
        "dtype": st.sampled_from(DTYPES),
        "bias": st.booleans(),
        "softcap": st.sampled_from([None, 5.0, 30.0]),
        "temperature": st.sampled_from(["one", "float", "rows"]),
        "entropy": st.booleans(),
        "strided": st.booleans(),
    }
    return st.builds(HeadSpec, **(drawn | {k: st.just(x) for k, x in fixed.items()}))


DEFAULT = RomaConfig()


@dataclass(frozen=True)
class LossSpec:
    """One call of roma_loss or of roma_loss_from_logp (which ignores the fields of the head).

    old: whether old_logp is given. weights: the sampler's: "none", by "sequence" or by "token".
    own: whether the gradient of another objective on the returned log-probs joins the loss's.
    strided: whether bias, correct and aux_view have a stride of 2.
    """

    b: int = 3
    t: int = 5
    k: int = 2
    seed: int = 0
    difficulty: str = "plain"
    packed: bool = False
    token_advantages: bool = False
    totals: str = "own"
    aux: bool = True
    old: bool = True
    weights: str = "none"
    own: bool = False
    strided: bool = False
    config: RomaConfig = DEFAULT
    d: int = 8
    v: int = 33
    dtype: torch.dtype = torch.float32
    bias: bool = False
    head_difficulty: str = "plain"

    def make_logp(self, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """The arguments of roma_loss_from_logp."""
        g = generator(self.seed)
        logp = -torch.rand(self.b, self.t, generator=g, dtype=torch.float64) * 4 - 0.05
        view_logp = logp + 0.5 * torch.randn(
            self.k, self.b, self.t, generator=g, dtype=torch.float64
        )
        return self._finish({"logp": logp, "view_logp": view_logp}, logp, view_logp, g, dtype)

    def make(self) -> dict[str, Any]:
        """The arguments of roma_loss; old log-probs lie near those of these hidden states."""
        g = generator(self.seed)
        rows = self.b * self.t
        hidden, weight, bias, tokens = head_tensors(
            rows, self.d, self.v, self.head_difficulty, g, bias=self.bias
        )
        hidden, weight = hidden.to(self.dtype), weight.to(self.dtype)
        bias = None if bias is None else bias.to(self.dtype)
        spread = {"views_equal_clean": 0.0, "tiny_delta": 1e-4, "far_ratios": 30.0}.get(
            self.difficulty, 0.3
        )
        shift = torch.randn(self.k, rows, self.d, generator=g, dtype=torch.float64)
        view_hidden = (hidden.double() + spread * shift).to(self.dtype)
        if self.difficulty == "views_identical" and self.k:
            view_hidden = view_hidden[:1].expand(self.k, -1, -1).contiguous()

        def score(states: Tensor) -> Tensor:
            return oracle.head(
                states,
                weight,
                tokens,
                bias=bias,
                temperature=self.config.temperature,
                softcap=self.config.softcap,
            ).logp.reshape(self.b, self.t)

        logp = score(hidden)
        view_logp = (
            torch.stack([score(h) for h in view_hidden])
            if self.k
            else logp.new_zeros(0, self.b, self.t)
        )
        states = {
            "hidden": hidden.reshape(self.b, self.t, self.d),
            "view_hidden": view_hidden.reshape(self.k, self.b, self.t, self.d),
            "tokens": tokens.reshape(self.b, self.t),
        }
        case = self._finish(states, logp, view_logp, g, torch.float32)
        bias = strided(bias) if self.strided and bias is not None else bias
        return case | {"weight": weight, "bias": bias}

    def _finish(
        self,
        states: dict[str, Tensor],
        logp: Tensor,
        view_logp: Tensor,
        g: torch.Generator,
        dtype: torch.dtype,
    ) -> dict[str, Any]:
        b, t, k, config = self.b, self.t, self.k, self.config
        normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
        lengths = torch.randint(1, t + 1, (b,), generator=g)
        mask = torch.arange(t)[None] < lengths[:, None]
        # holes in the middle count as masked too (tool output, for one)
        mask &= (torch.rand(b, t, generator=g) < 0.85) | (torch.arange(t)[None] == 0)
        if self.difficulty == "row_all_masked":
            mask[0] = False
        elif self.difficulty == "everything_masked":
            mask[:] = False
        correct = torch.rand(b, generator=g) < 0.6
        if self.difficulty in ("all_wrong", "all_right"):
            correct[:] = self.difficulty == "all_right"
        advantages = normal(b, t) if self.token_advantages else normal(b)
        if self.difficulty == "zero_advantages":
            advantages.zero_()

        in_states = "view_logp" in states
        if in_states:
            if self.difficulty == "views_identical" and k:
                view_logp = view_logp[:1].expand(k, -1, -1).clone()
            elif self.difficulty == "views_equal_clean":
                view_logp = logp.expand(k, -1, -1).clone()
            elif self.difficulty == "tiny_delta":
                view_logp = logp + 1e-4 * normal(k, b, t)
            elif self.difficulty == "far_ratios":
                view_logp = logp + 25 * normal(k, b, t).sign() + normal(k, b, t)
            states = {"logp": logp, "view_logp": view_logp}

        old_logp = logp + 0.25 * normal(b, t)
        view_old_logp = logp + 0.25 * normal(b, t)
        ref_logp = logp + 0.5 * normal(b, t)
        if self.difficulty == "at_clip_edge":
            high = config.clip_high + (config.main != "cispo")
            edges = [1 - config.clip_low, high, config.dual_clip or 1.0]
            edge = torch.tensor(edges, dtype=torch.float64).log()[
                torch.randint(3, (b, t), generator=g)
            ]
            side = 2e-3 * normal(b, t).sign()
            old_logp = logp - edge - side
            if k and in_states:
                states["view_logp"] = (old_logp + edge - side).expand(k, -1, -1) + 1e-6 * normal(
                    k, b, t
                )
            view_old_logp = old_logp
        elif self.difficulty == "far_ratios":
            far = 25 * normal(b, t).sign()
            old_logp, view_old_logp, ref_logp = old_logp + far, view_old_logp - far, ref_logp + far

        tokenwise = {
            **states,
            "mask": mask,
            "old_logp": old_logp,
            "ref_logp": ref_logp,
            "view_old_logp": view_old_logp,
        }
        if self.token_advantages:
            tokenwise["advantages"] = advantages
        case: dict[str, Any] = {"correct": correct, "advantages": advantages, "cu_seqlens": None}
        if in_states:
            case["entropy"] = None
        if in_states and config.entropy_coef > 0:
            of_entropy = generator(self.seed + 3)
            tokenwise["entropy"] = 3 * torch.rand(b, t, generator=of_entropy, dtype=torch.float64)
        case["rollout_weight"] = None
        if self.weights != "none":
            shape = (b,) if self.weights == "sequence" else (b, t)
            # Between 0 and 2, a fifth of them 0.
            weights = (torch.rand(shape, generator=g, dtype=torch.float64) * 2.5 - 0.5).clamp(min=0)
            (case if self.weights == "sequence" else tokenwise)["rollout_weight"] = weights
        if self.packed:
            kept = torch.arange(t)[None] < lengths[:, None]
            if self.difficulty == "row_all_masked":
                kept[0] = False  # a sequence of length 0
            if int(kept.sum()) == b:
                kept = torch.ones_like(kept)  # keeps [B] and [N] apart wherever t > 1
            tokenwise = {name: _pack(name, x, kept) for name, x in tokenwise.items()}
            zero = torch.zeros(1, dtype=torch.int64)
            case["cu_seqlens"] = torch.cat([zero, kept.sum(dim=1).cumsum(0)]).to(torch.int32)
        case |= tokenwise
        if self.difficulty == "nan_when_masked":
            self._spoil(case)
        states_dtype = {"hidden", "view_hidden"}
        for name, x in case.items():
            if isinstance(x, Tensor) and x.is_floating_point():
                case[name] = x.to(self.dtype if name in states_dtype else dtype)
        case["ref_logp"] = case["ref_logp"] if config.ref_coef > 0 and config.main else None
        case["aux_view"] = torch.randint(k, (b,), generator=g) if self.aux and k else None
        if config.aux_old != "view" or case["aux_view"] is None:
            case["view_old_logp"] = None
        if not self.old:
            case["old_logp"] = None
        case |= self._totals(case)
        if self.strided:
            case |= {n: strided(case[n]) for n in ("correct", "aux_view") if case[n] is not None}
        return case | {"config": config}

    def _spoil(self, case: dict[str, Any]) -> None:
        """Fill every masked place with what padding may hold."""
        masked = ~case["mask"]
        for name in ("logp", "old_logp", "ref_logp", "view_old_logp", "entropy"):
            if case.get(name) is not None:
                case[name] = case[name].masked_fill(masked, float("nan"))
        if "view_logp" in case:
            case["view_logp"] = case["view_logp"].masked_fill(masked, float("inf"))
        if self.token_advantages:
            case["advantages"] = case["advantages"].masked_fill(masked, float("nan"))
        if self.weights == "token":
            case["rollout_weight"] = case["rollout_weight"].masked_fill(masked, float("nan"))
        if "tokens" in case:
            case["tokens"] = case["tokens"].masked_fill(masked, -100)

    def _totals(self, case: dict[str, Any]) -> dict[str, Any]:
        if self.totals == "own":
            return {}
        counts = {
            "total_sequences": self.b + 3,
            "total_tokens": int(case["mask"].sum()) + 7,
            "total_correct": int(case["correct"].sum()) + 2,
        }
        return (
            counts
            if self.totals == "number"
            else {n: torch.tensor(float(x)) for n, x in counts.items()}
        )


def _pack(name: str, x: Tensor, kept: Tensor) -> Tensor:
    return x[:, kept] if name.startswith("view_") and name != "view_old_logp" else x[kept]


def loss_specs(
    config: st.SearchStrategy[RomaConfig] | None = None, **fixed: Any
) -> st.SearchStrategy[LossSpec]:
    """Calls of the loss; keyword arguments pin fields."""
    drawn: dict[str, st.SearchStrategy] = {
        "b": st.sampled_from([1, 2, 3, 5]),
        "t": st.sampled_from([1, 2, 3, 7]),
        "k": st.sampled_from([0, 1, 2, 4]),
        "seed": st.integers(0, 2**16),
        "difficulty": st.sampled_from(LOSS_DIFFICULTIES),
        "packed": st.booleans(),
        "token_advantages": st.booleans(),
        "totals": st.sampled_from(["own", "number", "tensor"]),
        "aux": st.booleans(),
        "old": st.booleans(),
        "weights": st.sampled_from(["none", "none", "sequence", "token"]),
        "own": st.booleans(),
        "strided": st.booleans(),
        "config": configs() if config is None else config,
        "d": st.sampled_from([1, 5, 8, 33]),
        "v": st.sampled_from([2, 33, 127, 128, 129]),
        "dtype": st.sampled_from(DTYPES),
        "bias": st.booleans(),
        "head_difficulty": st.sampled_from(
            ["plain", "plain", "peaked_tail", "equal_rows", "zero_rows"]
        ),
    }
    specs = st.builds(LossSpec, **(drawn | {k: st.just(x) for k, x in fixed.items()}))
    return specs.map(_made_right)


def _made_right(spec: LossSpec) -> LossSpec:
    """A drawn call without what would be refused."""
    if not spec.k:  # no view to penalise
        spec = replace(spec, config=replace(spec.config, lambda_inv=0.0), aux=False)
    if spec.config.main == "vespo" and spec.weights == "sequence":
        spec = replace(spec, weights="token")
    return spec
