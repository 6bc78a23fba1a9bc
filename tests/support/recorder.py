"""Calls of Triton's language, recorded once for the types of their arguments and then replayed.

Triton's rules of types, promotion and broadcasting see no values: where a kernel is compiled there
are none. So what the interpreter does for `x + y` depends on the types of x and y, on the Python
constants among the arguments, and on nothing else. The first call with given types runs as shipped,
and the operations of numpy that it came to are written down; later calls run these alone. The rules
were nine tenths of the interpreter's time. A function that looks at a value, as in `if x > 0`, runs
as shipped each time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import triton.language as tl
from triton.runtime.interpreter import (
    BlockPointerHandle,
    ReduceOps,
    ScanOps,
    TensorDescHandle,
    TensorHandle,
    interpreter_semantic,
)

_builder = interpreter_semantic.builder

# Operations that read or change more than their arguments. Others are left out where nothing uses
# their result, and done once where they have no tensor among their arguments.
_EFFECTS = ("load", "store", "atomic", "assert", "assume", "print", "barrier", "program")
_CONSTANTS = (bool, int, str, type(None), tl.PropagateNan)


class _CannotRecordError(Exception):
    """A value that is neither a tensor nor a constant."""


def recorded(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which takes tensors and constants; replayed wherever its types decide."""
    replays: dict[Any, Callable[..., Any] | None] = {}

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if interpreter_semantic.builder is not _builder:  # a part of a call that is being recorded
            return function(*args, **kwargs)
        handles: list[TensorHandle] = []
        try:
            key = _key(args, handles)
            if kwargs:
                key += (*kwargs, *_key(tuple(kwargs.values()), handles))
        except _CannotRecordError:
            return function(*args, **kwargs)
        if key not in replays:
            result, replays[key] = _record(function, args, kwargs)
            return result
        replay = replays[key]
        return function(*args, **kwargs) if replay is None else replay(*handles)

    return call


def reads_value(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which looks at the value of a tensor."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        recorder = interpreter_semantic.builder
        if recorder is not _builder:
            if recorder.in_presence_test:
                return True
            recorder.replayable = False
        return function(*args, **kwargs)

    return call


def tests_presence(rule: Callable[..., Any]) -> Callable[..., Any]:
    """A rule that takes a tensor's truth to see whether there is one; its value changes nothing."""

    @functools.wraps(rule)
    def call(*args: Any, **kwargs: Any) -> Any:
        recorder = interpreter_semantic.builder
        if recorder is not _builder:
            recorder.in_presence_test = True
        try:
            return rule(*args, **kwargs)
        finally:
            if recorder is not _builder:
                recorder.in_presence_test = False

    return call


def reduce(
    operation: type[ReduceOps | ScanOps], values: Any, *options: Any
) -> tl.tensor | tuple[tl.tensor, ...]:
    """A reduction or a scan; as shipped it goes past the builder."""
    recorder = interpreter_semantic.builder
    if recorder is _builder:
        return operation(*options).apply(values)
    many = isinstance(values, tuple)
    kinds = [_parts(x) for x in (values if many else (values,))]

    def create_reduction(*handles: TensorHandle) -> Any:
        tensors = tuple(_tensor(x, *kind) for x, kind in zip(handles, kinds, strict=True))
        results = operation(*options).apply(tensors)
        return tuple(x.handle for x in results) if many else results[0].handle

    interpreter_semantic.builder = _builder
    try:
        results = operation(*options).apply(values)
    finally:
        interpreter_semantic.builder = recorder
    handles = tuple(x.handle for x in (values if many else (values,)))
    outcome = tuple(x.handle for x in results) if many else results.handle
    recorder.note("create_reduction", create_reduction, handles, {}, outcome)
    return results


def _key(values: Any, handles: list[TensorHandle]) -> tuple[Any, ...]:
    """What decides about a call; the tensors are added to `handles`."""
    key: list[Any] = []
    for x in values:
        kind = type(x)
        if kind is tl.tensor and type(x.handle) is TensorHandle:
            handles.append(x.handle)
            key.append(x.type.name)
        elif kind in _CONSTANTS:
            key.append((kind, x))
        elif kind is float:
            key.append((kind, x.hex()))
        elif kind is tl.constexpr:
            key.append((kind, *_key((x.value,), handles)))
        elif kind in (tuple, list, tl.tuple):
            key.append((kind, *_key(x, handles)))
        elif kind is slice:
            key.append((kind, *_key((x.start, x.stop, x.step), handles)))
        elif isinstance(x, tl.dtype):
            key.append((kind, x.name))
        elif callable(x):
            key.append((kind, x))
        else:
            raise _CannotRecordError
    return tuple(key)


def _record(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Callable[..., Any] | None]:
    """The result of a call, and what repeats the call on other tensors of the same types."""
    # In handles of their own: the same tensor may be given twice, and others the next time.
    handles: list[TensorHandle] = []
    args = _renewed(args, handles)
    kwargs = dict(zip(kwargs, _renewed(tuple(kwargs.values()), handles), strict=True))
    recorder = interpreter_semantic.builder = Recorder(handles)
    try:
        result = function(*args, **kwargs)
    finally:
        interpreter_semantic.builder = _builder
    try:
        return result, recorder.replay(result) if recorder.replayable else None
    except _CannotRecordError:
        return result, None


def _renewed(values: Any, handles: list[TensorHandle]) -> Any:
    renewed: list[Any] = []
    for x in values:
        if type(x) is tl.tensor:
            handles.append(TensorHandle(x.handle.data, x.handle.dtype))
            renewed.append(tl.tensor(handles[-1], x.type))
        elif type(x) is tl.constexpr:
            renewed.append(tl.constexpr(*_renewed((x.value,), handles)))
        elif type(x) in (tuple, list, tl.tuple):
            renewed.append(type(x)(_renewed(x, handles)))
        else:
            renewed.append(x)
    return tuple(renewed)


def _tensor(
    handle: TensorHandle, kind: tl.dtype, shape: Any, numel: tl.constexpr, scalar: tl.dtype
) -> tl.tensor:
    """A tensor whose type another one has worked out."""
    x = object.__new__(tl.tensor)
    x.handle, x.type, x.shape, x.numel, x.dtype = handle, kind, shape, numel, scalar
    return x


def _parts(x: tl.tensor) -> tuple[Any, ...]:
    """What `_tensor` takes beside the handle."""
    return x.type, x.shape, x.numel, x.dtype


class _Place(int):
    """Which handle of a recording."""


class _Step(NamedTuple):
    """One call of the builder; the keyword of a positional argument is ""."""

    function: Callable[..., Any]
    args: list[tuple[str, Any]]
    results: list[_Place]
    pure: bool
    """Does nothing but compute its results."""


class Recorder:
    """Stands for the builder as long as one call is being recorded."""

    def __init__(self, inputs: list[TensorHandle]) -> None:
        self.replayable, self.in_presence_test = True, False
        self._inputs = len(inputs)
        self._handles = list(inputs)  # alive, so that an id means one handle
        self._places = {id(handle): _Place(place) for place, handle in enumerate(inputs)}
        self._steps: list[_Step] = []

    def __getattr__(self, name: str) -> Any:
        member = getattr(_builder, name)
        if not callable(member):
            return member

        def call(*args: Any, **kwargs: Any) -> Any:
            result = member(*args, **kwargs)
            if not isinstance(result, tl.dtype):
                self.note(name, member, args, kwargs, result)
            return result

        return call

    def note(
        self,
        name: str,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
    ) -> None:
        """Write down a call of the builder."""
        try:
            given = [("", self._argument(x)) for x in args]
            given += [(key, self._argument(x)) for key, x in kwargs.items()]
        except _CannotRecordError:
            self.replayable = False
            return
        results = []
        for handle in () if result is None else result if type(result) is tuple else (result,):
            self.replayable &= type(handle) is TensorHandle
            results.append(self._places.setdefault(id(handle), _Place(len(self._handles))))
            self._handles.append(handle)
        pure = not any(word in name for word in _EFFECTS)
        self._steps.append(_Step(function, given, results, pure))

    def _argument(self, x: Any) -> Any:
        if type(x) is TensorHandle:
            return self._place(x)
        if isinstance(x, (BlockPointerHandle, TensorDescHandle)) or (
            isinstance(x, (tuple, list)) and any(type(part) is TensorHandle for part in x)
        ):
            raise _CannotRecordError
        return x

    def _place(self, handle: TensorHandle) -> _Place:
        if id(handle) not in self._places:  # from somewhere else than the builder
            raise _CannotRecordError
        return self._places[id(handle)]

    def replay(self, result: Any) -> Callable[..., Any]:
        """A function of the inputs that runs what is needed of the steps and gives the result."""
        fixed: set[_Place] = set()
        for step in self._steps:
            if step.pure and fixed.issuperset(_places(step)):
                fixed.update(step.results)
        wanted: set[_Place] = set()
        scope: dict[str, Any] = {"tensor": _tensor}
        returned = self._returned(result, fixed, wanted, scope)
        lines = [f" return {returned}"]
        for step in reversed(self._steps):
            if step.pure and (fixed.issuperset(step.results) or wanted.isdisjoint(step.results)):
                continue
            places = set(_places(step)) - fixed
            # What nothing below needs is let go.
            lines += [f" del h{place}" for place in places - wanted if place >= self._inputs]
            wanted |= places
            args = (
                f"{key}{'=' * bool(key)}{self._source(x, fixed, wanted, scope)}"
                for key, x in step.args
            )
            targets = "".join(f"h{place}, " for place in step.results)
            if len(step.results) == 1:
                targets = targets[:-2]
            call = f"{_constant(step.function, scope)}({', '.join(args)})"
            lines.append(f" {targets} = {call}" if targets else f" {call}")
        lines.append(f"def replay({', '.join(f'h{place}' for place in range(self._inputs))}):")
        exec("\n".join(reversed(lines)), scope)
        return scope["replay"]

    def _source(
        self, x: Any, fixed: set[_Place], wanted: set[_Place], scope: dict[str, Any]
    ) -> str:
        """Source of an argument."""
        if isinstance(x, _Place):
            if x in fixed:
                return _constant(self._handles[x], scope)
            wanted.add(x)
            return f"h{x}"
        return _constant(x, scope)

    def _returned(
        self, x: Any, fixed: set[_Place], wanted: set[_Place], scope: dict[str, Any]
    ) -> str:
        """Source of a result."""
        if type(x) is tl.tensor and x.handle is not None:
            handle = self._source(self._place(x.handle), fixed, wanted, scope)
            parts = (_constant(part, scope) for part in _parts(x))
            return f"tensor({handle}, {', '.join(parts)})"
        if type(x) is tuple:
            return f"({''.join(f'{self._returned(part, fixed, wanted, scope)}, ' for part in x)})"
        constant = type(x) is float or type(x) in _CONSTANTS or isinstance(x, tl.dtype)
        if constant or type(x) is tl.tensor:  # a store's result is a tensor of nothing
            return _constant(x, scope)
        raise _CannotRecordError


def _places(step: _Step) -> list[_Place]:
    return [x for _, x in step.args if isinstance(x, _Place)]


def _constant(x: Any, scope: dict[str, Any]) -> str:
    name = f"c{len(scope)}"
    scope[name] = x
    return name
