"""`RomaWorker`: EasyR1's FSDPWorker, which builds its policy with `ViewTerms`.

Importing this needs EasyR1 with all that its workers need. A Ray process gets the class by its
name, so that importing it there is what puts the actor in place.
"""

import functools
from typing import Any

from roma.integrations.easyr1.actor import ViewTerms, maker_for
from roma.integrations.easyr1.seams import ACTOR, COMMIT, PROTO, WORKER, check_class, easyr1
from roma_kernels.errors import fail

_dp_actor = easyr1("workers.actor.dp_actor")
_fsdp = easyr1("workers.fsdp_workers")
_Stock = _dp_actor.DataParallelPPOActor
_FSDPWorker, _Worker = _fsdp.FSDPWorker, _fsdp.Worker
check_class(_Stock, ACTOR)
check_class(_fsdp.DataProto, PROTO)
check_class(_FSDPWorker, WORKER)


class RomaActor(ViewTerms, _Stock):  # type: ignore[misc, valid-type]
    """EasyR1's actor with the view terms."""


class _First(_Worker):  # type: ignore[misc, valid-type]
    """Comes first among RomaWorker's bases.

    EasyR1 puts all workers of a process into one of a class derived from `cls.__base__`, which it
    makes without arguments. That has to be a plain Worker still, not FSDPWorker.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


class RomaWorker(_First, _FSDPWorker):  # type: ignore[misc, valid-type]
    """FSDPWorker, whose policy is a RomaActor where its configuration has `roma_options`."""

    @functools.wraps(_FSDPWorker.init_model)  # with EasyR1's mark that says how it is dispatched
    def init_model(self) -> None:
        """EasyR1's, which imports the actor's class when it is called.

        Raises:
            ValueError: it built another actor all the same.
        """
        before = _dp_actor.DataParallelPPOActor
        _dp_actor.DataParallelPPOActor = self._actor
        try:
            super().init_model()
        finally:
            _dp_actor.DataParallelPPOActor = before
        if self._has_actor and not isinstance(self.actor, RomaActor):
            got, remedy = type(self.actor).__name__, f"use EasyR1 at {COMMIT}, which was read"
            fail("FSDPWorker.actor", "a RomaActor", got, remedy)

    def _actor(self, config: Any, actor_module: Any, actor_optimizer: Any = None) -> RomaActor:
        actor = RomaActor(config, actor_module, actor_optimizer)
        actor.maker = maker_for(config, self.processor)
        return actor
