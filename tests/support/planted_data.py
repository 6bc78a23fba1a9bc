"""Imported by a worker: building the data fails where the vocabulary says so."""

import os
from typing import Any

from support.planted import KILLED, REFUSED

from bench import data

make = data.make


def failing(shape: data.Shape, *arguments: Any, **named: Any) -> data.Case:
    if shape.vocab == KILLED:
        os._exit(9)
    if shape.vocab == REFUSED:
        raise RuntimeError("no such file")
    return make(shape, *arguments, **named)


data.make = failing
