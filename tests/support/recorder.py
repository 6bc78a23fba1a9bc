"""Calls of Triton's language, recorded once per types of their arguments and then replayed.

Triton's rules of types, promotion and broadcasting never see a value: compiled, there is none. So
what the interpreter does for `x + y` is decided by the types of x and y, by the Python constants
among the arguments, and by nothing else. The first call with given types runs as shipped and leaves
the calls of the builder that it made, of which each is an operation of numpy; later calls make the
same ones. Nine tenths of the interpreter's time were these rules. A function whose value a kernel
looks at on the way, as in `if x > 0`, is never replayed.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable
from typing import Any

import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction, TensorHandle, interpreter_semantic

_builder = interpreter_semantic.builder
# What reads or changes something beyond its arguments: never folded into a constant.
_WORLD = ("load", "store", "atomic", "assert", "assume", "print", "barrier", "program", "tensor")
# Of these a result that nobody uses need not be computed.
_IDLE = ("program",)


class _NotRecordableError(Exception):
    """An argument or a result that is more than tensors and constants."""


class Recorder:
    """Stands for the builder while a call is recorded."""

    def __init__(self, inputs: list[TensorHandle]) -> None:
        self.sound = True
        self.inputs = len(inputs)
        self.steps: list[tuple[str, Callable[..., Any], tuple[Any, ...], dict[str, Any], int]] = []
        self._handles = list(inputs)
        self._places = {id(handle): place for place, handle in enumerate(inputs)}

    def __getattr__(self, name: str) -> Any:
        member = getattr(_builder, name)
        if not callable(member):
            return member

        def call(*args: Any, **kwargs: Any) -> Any:
            result = member(*args, **kwargs)
            self.note(name, member, args, kwargs, result)
            return result

        self.__dict__[name] = call
        return call

    def note(
        self,
        name: str,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
    ) -> None:
        """Take down a call and its result."""
        if isinstance(result, tl.dtype):
            return
        first = len(self._handles)
        results = result if isinstance(result, tuple) else (result,)
        if result is not None:
            for handle in results:
                self.sound &= type(handle) is TensorHandle
                self._places[id(handle)] = len(self._handles)
                self._handles.append(handle)
        try:
            args = tuple(map(self._argument, args))
            kwargs = {key: self._argument(value) for key, value in kwargs.items()}
        except _NotRecordableError:
            self.sound = False


"""
"""
