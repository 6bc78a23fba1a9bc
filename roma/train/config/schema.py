"""From YAML to a tree of frozen dataclasses, every key and type checked against the annotations.

Understands bool, int, float, str, `Literal` of strings, `X | None`, tuples (YAML lists),
`Annotated[number, Range(…)]` and dataclasses within dataclasses. Of a union that has more members
YAML can express the first. A field without a default must be given. Errors name the full dotted
key.
"""

import ast
import dataclasses
import difflib
import inspect
import itertools
import math
import re
import types
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from types import NoneType
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    NoReturn,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import yaml

from roma_kernels.errors import fail

T = TypeVar("T")


@dataclass(frozen=True)
class Range:
    """Closed range of a number; `above` is an open lower end instead."""

    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf

    def __str__(self) -> str:
        """The range as messages write it."""
        ends = ((">", self.above), ("≥", self.low), ("≤", self.high))
        return " and ".join(f"{sign} {end:g}" for sign, end in ends if math.isfinite(end))

    def __contains__(self, value: float) -> bool:
        """Whether the number lies in the range."""
        return self.low <= value <= self.high and value > self.above


PositiveInt = Annotated[int, Range(low=1)]
NonNegativeInt = Annotated[int, Range(low=0)]
PositiveFloat = Annotated[float, Range(above=0)]
NonNegativeFloat = Annotated[float, Range(low=0)]
Share = Annotated[float, Range(low=0, high=1)]


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-6 is a number (1.1 wants 1.0e-6) and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """A mapping with each key once."""
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                got = f"it again in line {key_node.start_mark.line + 1} of {self.name}"
                fail(str(key), "each key once", got, "remove one")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def parse_yaml(text: str, name: str) -> Any:
    """The value of a YAML text; `name` (a path) is what an error calls it.

    Raises:
        ValueError: the text is not YAML, or gives a key twice.

    Example:
        >>> parse_yaml("{lr: 1e-6, betas: [0.9, 0.98]}", "inline")
        {'lr': 1e-06, 'betas': [0.9, 0.98]}
    """
    try:
        loader = _Loader(text)
        loader.name = name
        return loader.get_single_data()
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        fail(name, "YAML", f"text that is not ({reason})", "correct it there")


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Sets one `a.b=c` in a tree of nested dicts, in place, `c` read as YAML.

    Raises:
        ValueError: no key or no `=`, a value that is not YAML, a key that leads through a value.
    """
    name = f"override {override!r}"
    key, sign, text = override.partition("=")
    if not sign or not key:
        fail(name, "SECTION.KEY=VALUE", "no key or no =", "e.g. trainer.total_steps=100")
    *sections, leaf = key.split(".")
    for depth, section in enumerate(sections, 1):
        below = tree.get(section)
        if below is not None and not isinstance(below, dict):
            expected = f"{'.'.join(sections[:depth])} to be a section"
            fail(name, expected, show(below), "shorten the key")
        # A copy: with a YAML alias the same dict is in the tree twice.
        tree[section] = tree = dict(below or {})
    tree[leaf] = parse_yaml(text, name)


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything in nested dicts that is no dict itself.

    Example:
        >>> dict(leaves({"a": {"b": 1, "c": None}, "d": [2]}))
        {'a.b': 1, 'a.c': None, 'd': [2]}
    """
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def check_keys(section: type, tree: Any, key: str = "", *, root: type | None = None) -> None:
    """Checks that every key of nested dicts is a field of the dataclass; looks at no value.

    Raises:
        ValueError: an unknown key; the nearest one of its section, or else of `root`, is suggested.
    """
    hints = get_type_hints(section)
    prefix = f"{key}." if key else ""
    for name, value in tree.items() if isinstance(tree, Mapping) else ():
        if name not in hints:
            _unknown(str(name), list(hints), key, list(keys(root or section)))
        if dataclasses.is_dataclass(hints[name]):
            check_keys(hints[name], value, prefix + name, root=root or section)


RENAMED = {
    "worker.actor.micro_batch_size": "it is worker.actor.micro_batch_tokens now, in tokens",
}
"""Keys of older versions, whose nearest neighbour today is another thing."""


def _unknown(name: str, siblings: list[str], section: str, everywhere: list[str]) -> NoReturn:
    prefix = f"{section}." if section else ""
    near = [prefix + other for other in difflib.get_close_matches(name, siblings, n=1)]
    near = near or [full for full in everywhere if full.rpartition(".")[2] == name]
    others = [full for full in everywhere if full != section]
    near = near or difflib.get_close_matches(prefix + name, others, n=1)
    where = section or "the configuration"
    if prefix + name in RENAMED:
        remedy = RENAMED[prefix + name]
        fail(prefix + name, f"a key of {where}", "one of an older version", remedy)
    remedy = f"did you mean {near[0]}?" if near else f"it has {', '.join(siblings)}"
    fail(prefix + name, f"a key of {where}", "an unknown one", remedy)


def build(kind: type[T], tree: Any, key: str = "") -> T:
    """Turns nested dicts into the dataclass `kind`; messages name its keys below `key`.

    Raises:
        ValueError: an unknown key (the nearest one is suggested), a missing one, or a value of the
            wrong type or range.

    Example:
        >>> build(Range, {"low": 1})
        Range(low=1.0, high=inf, above=-inf)
    """
    check_keys(kind, tree, key)
    built: T = _section(kind, tree, key)
    return built


def keys(section: type, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a dataclass and of those within it."""
    for name, kind in get_type_hints(section).items():
        if dataclasses.is_dataclass(kind):
            yield from keys(kind, f"{prefix}{name}.")  # type: ignore[arg-type]  # a hint is a class
        yield prefix + name


class Entry(NamedTuple):
    """What `roma train --list-keys` prints of a key."""

    key: str
    kind: str
    default: str
    """As YAML; "required" where the field has no default."""
    meaning: str


def explain(section: type, prefix: str = "") -> Iterator[Entry]:
    """Every key that takes a value, with the meaning of its field.

    The meaning stands in the "Attributes:" section of the class docstring, or else in a string
    below the field in the source.

    Example:
        >>> from roma.train.config.sections import TrainerConfig
        >>> next(explain(TrainerConfig, "trainer."))[:3]
        ('trainer.total_steps', 'a whole number ≥ 1', '200')
    """
    hints = get_type_hints(section, include_extras=True)
    texts = {**_texts_below_fields(section), **_attributes_section(section)}
    for field in dataclasses.fields(section):
        kind, key = hints[field.name], prefix + field.name
        if dataclasses.is_dataclass(kind):
            yield from explain(kind, f"{key}.")  # type: ignore[arg-type]  # a hint is a class
            continue
        default = "required"
        if field.default is not dataclasses.MISSING:
            value = list(field.default) if isinstance(field.default, tuple) else field.default
            default = yaml.safe_dump(value, default_flow_style=True).splitlines()[0]
        yield Entry(key, _describe(kind), default, texts.get(field.name, ""))


def _texts_below_fields(section: type) -> dict[str, str]:
    body = ast.parse(inspect.getsource(section)).body[0].body  # type: ignore[attr-defined]  # a class
    return {
        ast.unparse(node.target): " ".join(str(ast.literal_eval(below.value)).split())
        for node, below in itertools.pairwise(body)
        if isinstance(node, ast.AnnAssign) and isinstance(below, ast.Expr)
    }


def _attributes_section(section: type) -> dict[str, str]:
    """Field -> text of the Google-style "Attributes:" section of a class docstring.

    An entry is `name: text` or `name (type): text`, and goes on in lines that are indented deeper.
    """
    _, found, below = (inspect.getdoc(section) or "").partition("\nAttributes:\n")
    texts: dict[str, str] = {}
    indent, name = 0, ""
    for line in below.splitlines() if found else ():
        text = line.strip()
        depth = len(line) - len(line.lstrip())
        if text and depth == 0:  # the next section
            break
        entry = re.fullmatch(r"(\w+)(?: \([^)]*\))?:(.*)", text)
        indent = indent or depth
        if entry and depth == indent:
            name, text = entry[1], entry[2]
        if name:
            texts[name] = f"{texts.get(name, '')} {text}".strip()
    return texts


def show(value: Any) -> str:
    """A YAML value as messages write it, with its kind where it is not obvious."""
    if value is None or isinstance(value, bool):
        return {None: "nothing (null)", True: "true", False: "false"}[value]
    kinds = ((str, "the text "), (dict, "the section "), (list, "the list "))
    return next((word + repr(value) for kind, word in kinds if isinstance(value, kind)), str(value))


def _value(kind: Any, value: Any, key: str) -> Any:
    """A value of the annotated type `kind`."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return None if value is None and NoneType in arguments else _value(arguments[0], value, key)
    if origin is tuple:
        return _items(arguments, kind, value, key)
    if dataclasses.is_dataclass(kind):
        return _section(kind, value, key)
    if origin is Literal:
        good, built = value in arguments, value
    elif origin is Annotated:
        built = _scalar(arguments[0], value)
        good = built is not None and built in arguments[1]
    else:
        built = _scalar(kind, value)
        good = built is not None
    return built if good else _reject(kind, value, key)


def _items(kinds: tuple[Any, ...], kind: Any, value: Any, key: str) -> tuple[Any, ...]:
    """A list, of given length or (with ... at the end) of any."""
    if not isinstance(value, list) or (kinds[-1] is not ... and len(value) != len(kinds)):
        _reject(kind, value, key)
    each = [kinds[0]] * len(value) if kinds[-1] is ... else kinds
    return tuple(_value(each[at], item, f"{key}[{at}]") for at, item in enumerate(value))


def _section(section: Any, value: Any, key: str) -> Any:
    """A dataclass."""
    given = {} if value is None else value
    hints = get_type_hints(section, include_extras=True)
    if not isinstance(given, Mapping):
        known = f"its keys are {', '.join(hints)}"
        fail(key or "the configuration", "a section (KEY: VALUE lines)", show(value), known)
    prefix = f"{key}." if key else ""
    built = {}
    for field in dataclasses.fields(section):
        kind, full = hints[field.name], prefix + field.name
        defaults = (field.default, field.default_factory)
        required = all(default is dataclasses.MISSING for default in defaults)
        if field.name in given or (required and dataclasses.is_dataclass(kind)):
            built[field.name] = _value(kind, given.get(field.name), full)
        elif required:
            fail(full, _describe(kind), "nothing", f"add it to the file, or give {full}=VALUE")
    try:
        return section(**built)
    except ValueError as error:
        # A dataclass that checks its values names itself in the message, not the key.
        raise ValueError(str(error).replace(section.__name__, key)) from error


def _scalar(kind: type, value: Any) -> Any:
    """The value as a `kind` (bool, int, float or str), None where it is not one."""
    if kind is float:
        finite = type(value) in (int, float) and math.isfinite(value)
        return float(value) if finite else None
    return value if type(value) is kind else None  # not isinstance: true is no whole number


def _reject(kind: Any, value: Any, key: str) -> NoReturn:
    option = key.partition("[")[0]
    fail(key, _describe(kind), show(value), f"correct it in the file, or give {option}=VALUE")


def _describe(kind: Any) -> str:
    """A type as messages write it."""
    words = {float: "a number", int: "a whole number", str: "text", bool: "true or false"}
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _describe(arguments[0]) + (", or null" if NoneType in arguments else "")
    if origin is Annotated:
        return f"{words[arguments[0]]} {arguments[1]}"
    if origin is Literal:
        return "one of " + ", ".join(arguments)
    if origin is tuple:
        length = "" if arguments[-1] is ... else f"of {len(arguments)} "
        return f"a list {length}like [a, b], each {_describe(arguments[0])}"
    return words[kind]
