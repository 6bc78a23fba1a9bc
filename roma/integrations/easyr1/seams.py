"""What of EasyR1 is relied on: names of parameters, as they are at commit b44b311."""

from collections.abc import Mapping
from typing import Any

from roma.integrations.guard import check_parameters, refuse_unsloth, require
from roma_kernels.errors import fail

COMMIT = "b44b311"
VERSION = "0.3"
INSTALL = "git+https://github.com/hiyouga/EasyR1@b44b311"

ACTOR = {
    "__init__": ("config", "actor_module", "actor_optimizer"),
    "_forward_micro_batch": ("micro_batch", "temperature"),
    "_optimizer_step": (),
    "update_policy": ("data",),
}
PROTO = {"select": ("batch_keys", "non_tensor_batch_keys", "meta_info_keys", "deepcopy")}
WORKER = {"__init__": ("config", "role"), "init_model": (), "update_actor": ("data",)}
TRAINER = {"init_workers": (), "fit": ()}
REWARD = {"compute_reward": ("data",)}


def check_class(cls: Any, expected: Mapping[str, tuple[str, ...]]) -> None:
    """Holds the methods of one of EasyR1's classes to the parameters that are relied on.

    Raises:
        ValueError: a method is missing, or has other parameters; the message names them.
    """
    for name, parameters in expected.items():
        where = f"EasyR1's {cls.__name__}.{name}"
        function = getattr(cls, name, None)
        if function is None:
            fail(where, "a method", "none", f"use EasyR1 at {COMMIT}, which was read")
        check_parameters(function, parameters, where)


def easyr1(module: str) -> Any:
    """A module of EasyR1's.

    Args:
        module: below its package: "trainer.main".

    Raises:
        ImportError: EasyR1 is not installed, or what it needs is not.
        ValueError: the package verl is verl, not EasyR1; or Unsloth is loaded.
    """
    refuse_unsloth()
    found = str(require("verl", INSTALL).__version__)
    if not found.startswith(VERSION + "."):
        remedy = "install EasyR1 in an environment without verl, or use roma.integrations.verl"
        fail("the package verl", f"EasyR1's, version {VERSION}", found, remedy)
    return require(f"verl.{module}", INSTALL)
