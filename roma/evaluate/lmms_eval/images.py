"""The images of lmms-eval's messages, degraded; and which document a message was made of.

Models of lmms-eval build messages when they need them: batch by batch, some in threads, and some
with the first request's function for a whole batch. So the documents say themselves which they are
(`Documents`), and the noise of an image depends on its document alone.
"""

import base64
import hashlib
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from roma.evaluate.conditions import Cell, degrade_at
from roma.models.images import decode_image
from roma.views import ADVERSARIAL, CORRUPTIONS, Corruption, load_levels
from roma.views.corruptions import find
from roma_kernels.errors import fail

Pixels = NDArray[np.uint8]
"""[H, W, 3] RGB, 0..255."""
Messages = Sequence[Mapping[str, Any]]
"""A chat: {"role": …, "content": a text, or [{"type": "text", …}, {"type": "image", "url": …}]}."""
ToMessages = Callable[..., Any]
"""A task's `doc_to_messages`."""

_TIMEOUT_S = 60


def read_table(level_table: str | Path | None) -> Mapping[str, Corruption]:
    """The table of levels of a `level_table=` argument.

    lmms-eval's cache of answers knows a model by its arguments alone. So a table that is given as
    text carries the first eight digits of its file's SHA-256: `levels.yaml@1f3a5c70`. A `Path` is
    taken as it is: whoever calls from Python answers for the cache.

    Raises:
        ValueError: no or another digest, or as in `load_levels`. FileNotFoundError: no such file.
    """
    if level_table is None:
        return CORRUPTIONS
    if isinstance(level_table, Path):
        return load_levels(level_table)
    path, _, digest = str(level_table).rpartition("@")
    path = path or digest
    table = load_levels(path)
    found = digest_of(path)
    if digest != found:
        remedy = "an answer cached for another table of that name would be taken for this one's"
        fail("level_table", f"{path}@{found}", str(level_table), remedy)
    return table


def digest_of(path: str | Path) -> str:
    """Eight digits that stand for a file's content."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:8]


def cell_of(
    corruption: str | None, level: int | None, corruptions: Mapping[str, Corruption] = CORRUPTIONS
) -> Cell:
    """The cell of a corruption at a level; of neither, the clean one.

    Raises:
        ValueError: one without the other, an unknown corruption (the nearest is suggested), one
            that needs a policy, or a level that the table lacks.

    Example:
        >>> str(cell_of("gaussian_blur", 3))
        'gaussian_blur L3'
    """
    if corruption is None and level is None:
        return Cell()
    if corruption is None:
        remedy = "name it, e.g. corruption=gaussian_blur, or leave out both for clean images"
        fail("corruption", "one beside the level", "none", remedy)
    row = find(corruption, corruptions, argument="corruption")
    if row.pool == ADVERSARIAL:
        remedy = f"measure it with `roma eval --pools {ADVERSARIAL}`"
        fail("corruption", "one that an image alone is enough for", repr(row.name), remedy)
    expected = f"1 to {len(row.levels)}, a level of {row.name}"
    if level is None:
        fail("level", expected, "none", "say how strong, e.g. level=3")
    if isinstance(level, bool) or not isinstance(level, int) or not 1 <= level <= len(row.levels):
        fail("level", expected, repr(level), "give one of the table's, or a table that has it")
    return Cell(row.pool, row.name, level)


@dataclass(frozen=True)
class Origin:
    """Of which document of which task a message is."""

    task: str
    split: str
    id: int

    def __str__(self) -> str:
        return f"{self.task}, document {self.id}"


class Document(dict[str, Any]):
    """A document that knows which one it is."""

    def __init__(self, row: Mapping[str, Any], origin: Origin) -> None:
        """A shallow copy of the row."""
        super().__init__(row)
        self.origin = origin


class Documents:
    """Datasets as lmms-eval's models read them, `datasets[task][split][i]`; rows are `Document`s.

    Args:
        datasets: of each task its splits; read at each access, so it may be filled later.
    """

    def __init__(self, datasets: Mapping[str, Any]) -> None:
        """Keeps the mapping itself."""
        self._datasets = datasets

    def __getitem__(self, task: str) -> "_Splits":
        return _Splits(task, self._datasets[task])

    def __contains__(self, task: str) -> bool:
        return task in self._datasets


@dataclass(frozen=True)
class _Splits:
    task: str
    splits: Mapping[str, Any]

    def __getitem__(self, split: str) -> "_Rows":
        return _Rows(self.task, split, self.splits[split])


@dataclass(frozen=True)
class _Rows:
    task: str
    split: str
    rows: Any

    def __getitem__(self, id: int) -> Document:
        return Document(self.rows[id], Origin(self.task, self.split, int(id)))

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Document]:
        return (self[i] for i in range(len(self)))


@dataclass(frozen=True)
class Degrading:
    """A `doc_to_messages` that degrades every image at a cell; safe in threads.

    Attributes:
        own: the request's function.
        origin: the request's document.
        functions: of every request of the call, since a model may give this one another's document.
        cell: not clean.
        seed: of the noise.
        corruptions: the table of levels.
        resize: brings an image to the size at which it is to be degraded; None: as it is.
    """

    own: ToMessages
    origin: Origin
    functions: Mapping[Origin, ToMessages]
    cell: Cell
    seed: int
    corruptions: Mapping[str, Corruption]
    resize: Callable[[Pixels], Pixels] | None = None

    def __call__(self, doc: Any, **rounds: Any) -> Any:
        """The messages of a document, or of one of its rounds: (messages, end, outputs, state).

        Raises:
            ValueError: an image that cannot be read, a video, a sound, or a document that did not
                come from the task's dataset.
        """
        origin = getattr(doc, "origin", None)
        if origin is None:
            got = f"another of {self.origin}, and the noise would have no key"
            fail("base", "a model that takes its documents from task_dict", got, "name another")
        own = self.own if origin == self.origin else self.functions[origin]
        made = own(doc, **rounds)
        if isinstance(made, tuple):
            return (made[0] and self._degraded(made[0], origin), *made[1:])
        return self._degraded(made, origin)

    def _degraded(self, messages: Messages, origin: Origin) -> list[dict[str, Any]]:
        sources = list(images_of(messages, str(origin)))
        pixels = [read_pixels(source, f"image {i} of {origin}") for i, source in enumerate(sources)]
        if self.resize:
            pixels = [self.resize(image) for image in pixels]
        keys = [(origin.task, origin.id, i) for i in range(len(pixels))]
        degrade = partial(degrade_at, seed=self.seed, corruptions=self.corruptions)
        views = iter(degrade(self.cell, pixels, keys) if pixels else [])
        return [dict(message) | {"content": _content(message, views)} for message in messages]


def _content(message: Mapping[str, Any], views: Iterator[Pixels]) -> Any:
    """The content of a message with the next views in place of its images."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return [
        dict(part) | {"url": Image.fromarray(next(views))} if part["type"] == "image" else part
        for part in content
    ]


def images_of(messages: Messages, where: str) -> Iterator[Any]:
    """The images of a chat, in order, in whatever form the task hands them over.

    Args:
        messages: the chat.
        where: what an error message calls it: the task and the document.

    Raises:
        ValueError: there is a video or a sound in it.
    """
    for message in messages:
        content = message["content"]
        for part in [] if isinstance(content, str) else content:
            if part["type"] == "image":
                yield part["url"]
            elif part["type"] != "text":
                remedy = "measure a task of images, or run this one without corruption="
                fail(where, "images and text", f"content of type {part['type']!r}", remedy)


def require_images(task: str, chats: Iterable[Messages]) -> None:
    """Holds a task to having images: reads chats until one has.

    Args:
        task: its name.
        chats: of its documents, made as they are asked for.

    Raises:
        ValueError: none has an image, or one has a video or a sound.
    """
    for i, messages in enumerate(chats):
        if any(True for _ in images_of(messages, f"{task}, document {i}")):
            return
    fail(
        task, "documents with images", "none with one", "there is nothing to degrade: leave it out"
    )


def read_pixels(source: Any, name: str) -> Pixels:
    """An image of a message as RGB.

    Args:
        source: a Pillow image, an image file's bytes, a `datasets` row of them, a path, or a
            `data:`, `file:` or `http(s):` address.
        name: what an error message calls the image.

    Returns:
        [H, W, 3] uint8, upright, transparency on white.

    Raises:
        ValueError: not an image, or a damaged one. TypeError: none of these forms.
        OSError: the address does not answer.
    """
    if isinstance(source, Mapping) and {"bytes", "path"} <= set(source):
        source = source["bytes"] or source["path"]
    if isinstance(source, str):
        source = _from_address(source)
    if not isinstance(source, bytes | Path | Image.Image):
        remedy = "let the task's doc_to_messages hand over a Pillow image"
        fail(name, "an image", f"a {type(source).__name__}", remedy, error=TypeError)
    return decode_image(source, name=name)


def _from_address(address: str) -> bytes | Path:
    scheme, _, rest = address.partition(":")
    if scheme == "data":
        return base64.b64decode(rest.partition(",")[2])
    if scheme == "file":
        return Path(rest.removeprefix("//"))
    if scheme in ("http", "https"):
        with urllib.request.urlopen(address, timeout=_TIMEOUT_S) as answer:
            content: bytes = answer.read()
            return content
    return Path(address)
