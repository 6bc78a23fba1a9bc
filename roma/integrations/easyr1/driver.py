"""`CorrectnessTrainer`: the driver tells the workers which rollouts are right.

EasyR1's batch carries the sum of a reward's parts alone. ROMA needs the accuracy by itself: what
`compute_score` returns as "accuracy", which the trainer averages and drops.
"""

from typing import TYPE_CHECKING, Any

import torch

from roma.integrations.easyr1.actor import CORRECT, STEP
from roma.integrations.options import RomaOptions
from roma_kernels.errors import fail

ACCURACY = "accuracy"

if TYPE_CHECKING:

    class _Trainer:
        config: Any
        reward_fn: Any
        actor_rollout_ref_wg: Any
        global_step: int

        def init_workers(self) -> None: ...

else:
    _Trainer = object


class RewardMemory:
    """Stands before the handle of a reward manager and remembers what it scored.

    Filtering and balancing reorder a batch after its rewards; so a rollout is known by the id of
    its prompt and by its completion.

    Args:
        handle: Ray's, of a reward manager.
        get: `ray.get`.
    """

    def __init__(self, handle: Any, get: Any) -> None:
        self.handle, self.get = handle, get
        self.compute_reward = self  # so that `.compute_reward.remote(data)` arrives below
        self._asked: list[tuple[list[tuple[str, bytes]], Any]] = []

    def remote(self, data: Any) -> Any:
        """Asks the reward manager, and remembers for which rollouts."""
        answer = self.handle.compute_reward.remote(data)
        self._asked.append((_keys(data), answer))
        return answer

    def accuracies(self, data: Any) -> torch.Tensor:
        """[B] fp32, of the rollouts of data; what was remembered is forgotten.

        Raises:
            ValueError: the reward has no such part, or a rollout was never scored.
        """
        known: dict[tuple[str, bytes], float] = {}
        for keys, answer in self._asked:
            _, parts = self.get(answer)
            if ACCURACY not in parts:
                got, remedy = ", ".join(sorted(parts)), "return it from compute_score, 0 or 1"
                fail("the reward", f"a part called {ACCURACY!r}", got, remedy)
            known.update(zip(keys, parts[ACCURACY], strict=True))
        self._asked = []
        wanted = _keys(data)
        lost = sum(key not in known for key in wanted)
        if lost:
            remedy = "use EasyR1's own trainer: the completions changed after they were scored"
            fail("the reward", "every rollout scored", f"{lost} that were not", remedy)
        return torch.tensor([float(known[key]) for key in wanted])


class CorrectnessTrainer(_Trainer):
    """Mixin in front of EasyR1's RayPPOTrainer."""

    def init_workers(self) -> None:
        """EasyR1's; then each update of the actor gets roma_correct and roma_step."""
        super().init_workers()
        import ray

        options: RomaOptions = self.config.worker.actor.roma_options
        memory = RewardMemory(self.reward_fn, ray.get)
        group = self.actor_rollout_ref_wg
        stock = group.update_actor

        def update_actor(batch: Any) -> Any:
            batch.batch[CORRECT] = memory.accuracies(batch) > options.accuracy_threshold
            batch.meta_info[STEP] = self.global_step
            return stock(batch)

        self.reward_fn, group.update_actor = memory, update_actor


def _keys(data: Any) -> list[tuple[str, bytes]]:
    """The prompt's id and the completion of each rollout."""
    mask = data.batch["response_mask"]
    tokens = (data.batch["responses"] * mask).cpu().numpy()
    ids = data.non_tensor_batch["uid"]
    return [(str(uid), row.tobytes()) for uid, row in zip(ids, tokens, strict=True)]
