"""Gluon functions as generators of Python, from their own source.

Every call becomes a point where the function may hand over to a scheduler: `f(x)` is rewritten to
`yield from called(f, x)`. What the language's names stand for is the caller's choice, so the very
source that is compiled for a GPU runs on a model of one.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Generator, Mapping
from typing import Any

from triton.experimental.gluon._runtime import GluonJITFunction
from triton.language import constexpr

Steps = Generator[Any, Any, Any]


class Operation:
    """What a scheduler has to do for a function: yielded to it with its arguments."""

    def __init__(self, do: Callable[..., Any]) -> None:
        self.do, self.name = do, do.__name__


class Translated:
    """A Gluon function that a scheduler can run step by step."""

    def __init__(self, steps: Callable[..., Steps], names: tuple[str, ...]) -> None:
        self.steps, self.names = steps, names

    def at_once(self, *args: Any) -> Any:
        """The value, of a function without operations."""
        steps = self.steps(*args)
        try:
            operation = next(steps)
        except StopIteration as done:
            return done.value
        raise AssertionError(f"{operation} where there is no scheduler")


def called(function: Any, *args: Any, **kwargs: Any) -> Steps:
    """A call inside a translated function."""
    if isinstance(function, Translated):
        return (yield from function.steps(*args, **kwargs))
    if isinstance(function, Operation):
        return (yield function, args, kwargs)
    return function(*args, **kwargs)


class Translator:
    """Translates a kernel and whatever it calls.

    Args:
        names: what the names of the language stand for, `gl`, `mbarrier` and so on.
        edits: pairs of a text and what replaces it, each to be found once in all the source.
    """

    def __init__(self, names: Mapping[str, Any], *edits: tuple[str, str]) -> None:
        self._names, self._edits = names, edits
        self._done: dict[str, Translated] = {}
        self._applied = dict.fromkeys(edits, 0)

    def kernel(self, function: Any) -> Translated:
        """A kernel of Gluon, or one of Triton, with every edit made."""
        found = self._translated(function)
        assert all(count == 1 for count in self._applied.values()), self._applied
        return found

    def _translated(self, function: Any) -> Translated:
        name = function.fn.__name__
        if name not in self._done:
            source = textwrap.dedent(inspect.getsource(function.fn))
            for edit in self._edits:
                self._applied[edit] += source.count(edit[0])
                source = source.replace(*edit)
            tree = _Rewriter().visit(ast.parse(source))
            (definition,) = tree.body
            definition.decorator_list = []
            names = tuple(argument.arg for argument in definition.args.args)
            scope: dict[str, Any] = {}
            exec(compile(ast.fix_missing_locations(tree), name, "exec"), scope)
            steps = scope[name]
            self._done[name] = Translated(steps, names)
            used = {used: function.fn.__globals__.get(used) for used in steps.__code__.co_names}
            scope |= {used: self._meaning(used, value) for used, value in used.items()}
            scope["called"] = called
        return self._done[name]

    def _meaning(self, name: str, value: Any) -> Any:
        if name in self._names:
            return self._names[name]
        if isinstance(value, GluonJITFunction):
            return self._translated(value)
        return value.value if isinstance(value, constexpr) else value


class _Rewriter(ast.NodeTransformer):
    """Calls into `yield from`; types of arguments and variables away, for they are Gluon's."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.generic_visit(node)
        # A function without a call is a generator, too.
        node.body.insert(0, ast.parse("if False: yield").body[0])
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        name = ast.Name("called", ast.Load())
        return ast.YieldFrom(ast.Call(name, [node.func, *node.args], node.keywords))

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        self.generic_visit(node)
        assert node.value is not None
        return ast.Assign([node.target], node.value)
