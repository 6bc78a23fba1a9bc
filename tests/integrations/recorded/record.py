"""Reads from a clone of EasyR1, without importing it, the names that the integration uses.

python tests/integrations/recorded/record.py CLONE > tests/integrations/recorded/easyr1.json

Names alone are kept: parameters, keys that an update selects, fields of the actor's configuration,
names of a module. No line of EasyR1's is.
"""

import ast
import json
import sys
from pathlib import Path

METHODS = {
    "verl/workers/actor/dp_actor.py": {
        "DataParallelPPOActor": [
            "__init__",
            "_forward_micro_batch",
            "_optimizer_step",
            "compute_log_prob",
            "update_policy",
        ]
    },
    "verl/protocol.py": {"DataProto": ["select", "split", "from_dict"]},
    "verl/workers/fsdp_workers.py": {"FSDPWorker": ["__init__", "init_model", "update_actor"]},
    "verl/trainer/ray_trainer.py": {"RayPPOTrainer": ["init_workers", "fit"]},
    "verl/workers/reward/function.py": {"AutoRewardManager": ["compute_reward"]},
    "verl/trainer/main.py": {"Runner": ["run"]},
}


def class_in(tree: ast.AST, name: str) -> ast.ClassDef:
    return next(n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == name)


def method_in(cls: ast.ClassDef, name: str) -> ast.FunctionDef:
    return next(n for n in cls.body if isinstance(n, ast.FunctionDef) and n.name == name)


def parameters(function: ast.FunctionDef) -> list[str]:
    """Names of the parameters but self, in order."""
    given = function.args
    every = [*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg]
    return [a.arg for a in every if a is not None and a.arg != "self"]


def strings(function: ast.FunctionDef) -> list[str]:
    """The strings that stand in lists: the keys that are selected."""
    lists = [n for n in ast.walk(function) if isinstance(n, ast.List)]
    constants = [e for n in lists for e in n.elts if isinstance(e, ast.Constant)]
    return sorted({c.value for c in constants if isinstance(c.value, str)})


def calls_on(function: ast.FunctionDef, name: str) -> list[str]:
    """Keywords of the calls of a method or function of this name."""
    calls = [n for n in ast.walk(function) if isinstance(n, ast.Call)]
    named = [c for c in calls if getattr(c.func, "attr", getattr(c.func, "id", None)) == name]
    return sorted({k.arg for c in named for k in c.keywords if k.arg})


def record(clone: Path) -> dict:
    trees = {path: ast.parse((clone / path).read_text(encoding="utf-8")) for path in METHODS}
    found = {}
    for path, classes in METHODS.items():
        for name, methods in classes.items():
            cls = class_in(trees[path], name)
            found[name] = {m: parameters(method_in(cls, m)) for m in methods}
    actor = class_in(trees["verl/workers/actor/dp_actor.py"], "DataParallelPPOActor")
    config = ast.parse((clone / "verl/workers/actor/config.py").read_text(encoding="utf-8"))
    fields = [n for n in class_in(config, "ActorConfig").body if isinstance(n, ast.AnnAssign)]
    worker = class_in(trees["verl/workers/fsdp_workers.py"], "FSDPWorker")
    imports = [
        n for n in ast.walk(method_in(worker, "init_model")) if isinstance(n, ast.ImportFrom)
    ]
    main = trees["verl/trainer/main.py"].body
    names = [a.asname or a.name for n in main if isinstance(n, ast.ImportFrom) for a in n.names]
    defined = [n.name for n in main if isinstance(n, (ast.ClassDef, ast.FunctionDef))]
    return {
        "parameters": found,
        "keys of update_policy": strings(method_in(actor, "update_policy")),
        "keys of compute_log_prob": strings(method_in(actor, "compute_log_prob")),
        "keywords to _forward_micro_batch": calls_on(
            method_in(actor, "update_policy"), "_forward_micro_batch"
        ),
        "keywords to the actor": calls_on(method_in(worker, "init_model"), "DataParallelPPOActor"),
        "ActorConfig": sorted(f.target.id for f in fields),
        "imported inside init_model": sorted({a.name for n in imports for a in n.names}),
        "names of trainer.main": sorted({*names, *defined}),
    }


if __name__ == "__main__":
    print(json.dumps(record(Path(sys.argv[1])), indent=1))
