"""The five levels of ImageNet-C, read from the source of the package imagecorruptions.

Read, not imported: importing it needs numba and scikit-image, which nothing else here does.
"""

import ast
from importlib.util import find_spec
from pathlib import Path

import numpy as np


def _source() -> str:
    """The text of corruptions.py."""
    found = find_spec("imagecorruptions")
    if found is None or not found.submodule_search_locations:
        raise RuntimeError("the package imagecorruptions is missing: run `make setup`")
    return Path(found.submodule_search_locations[0], "corruptions.py").read_text(encoding="utf-8")


def _value(node: ast.expr) -> object:
    """A literal, or a call np.arange(a, b, s)."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "np.arange":
        return np.arange(*map(ast.literal_eval, node.args))
    return ast.literal_eval(node)


def levels(function_name: str) -> list:
    """The list of c = [...][severity - 1] in the function of this name, one entry a severity."""
    for function in ast.parse(_source()).body:
        if isinstance(function, ast.FunctionDef) and function.name == function_name:
            for node in ast.walk(function):
                if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "c":
                    assert isinstance(node.value, ast.Subscript)
                    assert isinstance(node.value.value, ast.List)
                    return [_value(entry) for entry in node.value.value.elts]
    raise LookupError(f"imagecorruptions has no levels of {function_name}")
