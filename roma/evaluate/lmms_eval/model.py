"""The model "roma" of lmms-eval: another of its models, whose images are degraded on their way in.

    lmms-eval --model roma --tasks mmstar_reasoning \
        --model_args pretrained=Qwen/Qwen3-VL-4B-Instruct,corruption=gaussian_blur,level=3

lmms-eval loads this class when the model is asked for; `roma.evaluate.lmms_eval.manifest` names it.
"""

import copy
import difflib
import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models import MODEL_REGISTRY_V2

from roma.evaluate.conditions import Cell
from roma.evaluate.lmms_eval.images import (
    Degrading,
    Documents,
    Origin,
    ToMessages,
    cell_of,
    read_table,
    require_images,
)
from roma.evaluate.lmms_eval.resize import Resizer, check_resize
from roma.evaluate.lmms_eval.suite import INSTALL
from roma_kernels.errors import fail

ENGINES = ("hf", "vllm")
_OURS = ("pretrained", "engine", "corruption", "level", "seed", "level_table", "base", "resize")
# One class of lmms-eval for both forms of a family.
_FAMILIES = {"qwen3_vl_moe": "qwen3_vl", "qwen3_5_moe": "qwen3_5"}
_GENERIC = "huggingface"


class RomaModel(lmms):
    """A chat model of lmms-eval that sees degraded images.

    Clean, it is that model: requests pass through as they are. At a cell, every image of every
    message is degraded at the size at which the task hands it over, with noise that depends on
    (seed, task, document, position of the image, corruption, level) alone: neither the order of
    the requests, nor the batch size, nor the number of processes changes a pixel.

    Attributes:
        cell: the condition of the images; may be set between calls of `generate_until`.
        task_dict: of each task its datasets, which lmms-eval fills in.

    Args:
        pretrained: the checkpoint, a folder or a name on the hub.
        engine: "hf": lmms-eval's own class for the checkpoint's model type, else its generic one.
            "vllm": its class for vLLM.
        corruption: a name in the table of levels; None: clean.
        level: whole, 1 for the mildest.
        seed: of the noise.
        level_table: YAML with other levels; as text with a digest, see `read_table`.
        base: the name of any other chat model of lmms-eval, in place of the engine's.
        resize: "model" degrades an image at the size at which the model sees it, for the Qwen-VL
            families; None: at its own.
        options: handed on to that model. On a machine without a GPU, `device` and `device_map` are
            "cpu" where they are not named.

    Raises:
        ValueError: an unknown engine, corruption (the nearest is suggested), level, base or way of
            resizing, one of corruption and level alone, a corruption that needs a policy, or an
            option that looks like a slip of the pen; before anything is loaded.
        FileNotFoundError: there is no such level table.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str | Path | None = None,
        engine: str = "hf",
        corruption: str | None = None,
        level: int | None = None,
        seed: int = 0,
        level_table: str | Path | None = None,
        base: str | None = None,
        resize: str | None = None,
        **options: Any,
    ) -> None:
        """Checks the arguments, then loads the model."""
        # Not lmms's own: what it sets, rank and caches, is the model's here.
        self._corruptions = read_table(level_table)
        self.cell = cell_of(corruption, level, self._corruptions)
        if isinstance(seed, bool) or not isinstance(seed, int):
            fail("seed", "a whole number", repr(seed), "leave it out for 0")
        self._seed = seed
        name = base_of(pretrained, engine, base)
        model_class = _chat_class(name)
        given = _arguments(model_class, name, pretrained, options)
        check_resize(resize, name)
        if resize and "mm_processor_kwargs" in options:
            remedy = "set its sizes in the checkpoint"
            fail("resize", "no mm_processor_kwargs beside it", "both", remedy)
        every = (name, sorted(given.items()), seed, sorted(self._corruptions.items()), resize)
        self._fingerprint = hashlib.sha256(repr(every).encode()).hexdigest()[:16]
        self._model = model_class(**given)
        if name == _GENERIC and not hasattr(self._model.model, "generate"):
            # lmms-eval 0.7.3 takes AutoModel for every type; only some remote code can generate so.
            got = f"{type(self._model.model).__name__}, which generates nothing"
            remedy = "take engine=vllm, or name lmms-eval's class for the type by base="
            fail("pretrained", "a type that lmms-eval has a chat class for", got, remedy)
        self.task_dict = {}
        self._resize = Resizer(name, _image_processor(self._model, given)) if resize else None

    @property
    def cell(self) -> Cell:
        """The condition of the images."""
        return self._cell

    @cell.setter
    def cell(self, cell: Cell) -> None:
        """Takes effect at the next call; ValueError: the table of levels lacks it."""
        if cell != Cell() and cell_of(cell.corruption, cell.level, self._corruptions) != cell:
            fail("cell", "one of the table of levels", repr(cell), "make it with cells_of")
        self._cell = cell

    @property
    def task_dict(self) -> dict[str, Any]:
        """Of each task its datasets."""
        return self._task_dict

    @task_dict.setter
    def task_dict(self, datasets: dict[str, Any]) -> None:
        """The model inside reads them through `Documents`."""
        self._task_dict = datasets
        self._checked: set[tuple[str, str]] = set()  # (task, split) that has images
        self._model.task_dict = Documents(datasets)

    def __repr__(self) -> str:
        # lmms-eval's cache of answers knows a model that it was given as an object by this text.
        return f"RomaModel({self._fingerprint}, {self.cell})"

    def generate_until(self, requests: list[Instance]) -> list[Any]:
        """Answers of the model, with its images at `cell`.

        Raises:
            ValueError: a task without images, or with a video or a sound; an image that cannot be
                read.
        """
        return self._model.generate_until(self._degraded(requests))

    def generate_until_multi_round(self, requests: list[Instance]) -> list[Any]:
        """The same for tasks of several rounds; the images of every round are degraded."""
        return self._model.generate_until_multi_round(self._degraded(requests))

    def generate_visual_cot(self, requests: list[Instance]) -> list[Any]:
        """Clean images alone: the images that a model draws for itself are no task's."""
        self._only_clean("generate_visual_cot", requests)
        return self._model.generate_visual_cot(requests)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Clean images alone; lmms-eval asks no chat model for it."""
        self._only_clean("loglikelihood", requests)
        return self._model.loglikelihood(requests)

    def _only_clean(self, kind: str, requests: Sequence[Instance]) -> None:
        if self.cell != Cell():
            expected, remedy = "a task whose answers are generated", "leave it out at this cell"
            fail(str(requests[0].task_name), expected, f"requests of kind {kind}", remedy)

    def _degraded(self, requests: list[Instance]) -> list[Instance]:
        """The requests with functions that degrade; clean: as they are."""
        if self.cell == Cell():
            return requests
        functions = {_origin(request): _to_messages(request) for request in requests}
        for origin, function in functions.items():
            self._require_images(origin, function)
        degrading = partial(
            Degrading,
            functions=functions,
            cell=self.cell,
            seed=self._seed,
            corruptions=self._corruptions,
            resize=self._resize,
        )
        return [_with_messages(request, degrading) for request in requests]

    def _require_images(self, origin: Origin, function: ToMessages) -> None:
        """Looks through a task's documents until one has an image; once for each task."""
        where = origin.task, origin.split
        if where in self._checked:
            return
        rows = self.task_dict[origin.task][origin.split]
        require_images(origin.task, (function(rows[i]) for i in range(len(rows))))
        self._checked.add(where)

    def __getattr__(self, name: str) -> Any:
        # Device, accelerator, batch size, tokenizer, chat template, …: the model's.
        if name == "_model":
            raise AttributeError(name)
        return getattr(self._model, name)

    @property
    def rank(self) -> int:
        """The model's."""
        rank: int = self._model.rank
        return rank

    @property
    def world_size(self) -> int:
        """The model's."""
        size: int = self._model.world_size
        return size

    @property
    def _rank(self) -> int:
        return self.rank

    @_rank.setter
    def _rank(self, rank: int) -> None:
        self._model._rank = rank

    @property
    def _world_size(self) -> int:
        return self.world_size

    @_world_size.setter
    def _world_size(self, size: int) -> None:
        self._model._world_size = size

    def set_cache_hook(self, cache_hook: Any) -> None:
        """The model's."""
        self._model.set_cache_hook(cache_hook)

    def clean(self) -> None:
        """Frees the model's memory."""
        self._model.clean()


def _origin(request: Instance) -> Origin:
    # (context, doc_to_messages, generation kwargs, document, task, split)
    _, _, _, id, task, split = request.arguments
    return Origin(task, split, int(id))


def _to_messages(request: Instance) -> ToMessages:
    function: ToMessages = request.arguments[1]
    return function


def _with_messages(request: Instance, degrading: Callable[..., Degrading]) -> Instance:
    """A copy of a request whose images are degraded."""
    made = copy.copy(request)
    context, own, *rest = request.arguments
    made.arguments = (context, degrading(own=own, origin=_origin(request)), *rest)
    return made


def base_of(pretrained: str | Path | None, engine: str, base: str | None) -> str:
    """The name of lmms-eval's model inside, from the arguments of `RomaModel`.

    Raises:
        ValueError: an unknown engine, one beside a base, or no checkpoint to choose by.
    """
    if engine not in ENGINES:
        fail("engine", '"hf" or "vllm"', repr(engine), "name one of the two, or a model by base=")
    if base is not None:
        if engine != "hf":
            fail("base", "none beside engine", f"{base!r} and {engine!r}", "leave out one of them")
        return base
    if pretrained is None:
        fail("pretrained", "a checkpoint", "none", "give pretrained=, a folder or a hub's name")
    if engine == "vllm":
        return "vllm"
    kind = str(_config_of(pretrained, "pretrained").get("model_type", ""))
    name = _FAMILIES.get(kind, kind)
    return name if name in _chat_names() else _GENERIC


def check_model(
    pretrained: str | Path, engine: str, base: str | None, options: Mapping[str, Any]
) -> None:
    """What `RomaModel` would refuse for its checkpoint and base; no weights are read or fetched.

    Raises:
        ValueError: no such checkpoint, base or option of it. ImportError: the base lacks a package.
    """
    config = None if base else _config_of(pretrained, "MODEL")
    name = base_of(pretrained, engine, base)
    model_class = _chat_class(name)
    own = dict(options)
    check_resize(own.pop("resize", None), name)
    _arguments(model_class, name, pretrained, own)
    if config is None and "pretrained" in inspect.signature(model_class.__init__).parameters:
        _config_of(pretrained, "MODEL")  # others take the name that a model has at an address


def _config_of(pretrained: str | Path, argument: str) -> dict[str, Any]:
    from transformers import PreTrainedConfig

    try:
        config: dict[str, Any] = PreTrainedConfig.get_config_dict(str(pretrained))[0]
        why = "" if config else "there is no config.json"
    except OSError as error:
        config, why = {}, str(error).strip().partition("\n")[0].rstrip(".")
    if why:
        expected = "a folder in Hugging Face form, or a name on the hub"
        fail(argument, expected, f"{str(pretrained)!r}: {why}", "check the name or the path")
    return config


def _chat_names() -> list[str]:
    every = MODEL_REGISTRY_V2.list_canonical_model_ids()
    return [name for name in every if MODEL_REGISTRY_V2.get_manifest(name).chat_class_path]


def _chat_class(name: str) -> type[lmms]:
    known = [known for known in _chat_names() if known != "roma"]
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
        fail("base", "a chat model of lmms-eval", repr(name), f"did you mean {nearest!r}?")
    try:
        found: type[lmms] = MODEL_REGISTRY_V2.get_model_class(name)
    except ModuleNotFoundError as error:
        got, remedy = f"no module {error.name}", f"pip install it, or {INSTALL}"
        fail(f"lmms-eval's {name}", "what it imports", got, remedy, error=ImportError)
    return found


def _image_processor(model: lmms, given: Mapping[str, Any]) -> Any:
    """Transformers' image processor of the model; vLLM has one of the checkpoint's in a process."""
    if hasattr(model, "processor"):
        return model.processor.image_processor
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(given["model"]).image_processor


def _arguments(
    model_class: type[lmms], name: str, pretrained: str | Path | None, options: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of the model inside."""
    named = inspect.signature(model_class.__init__).parameters
    for option in options:
        near = difflib.get_close_matches(option, _OURS, n=1, cutoff=0.8)
        if option not in named and near:
            # Some models of lmms-eval ignore what they do not know: that would be a clean run.
            fail("model_args", f"arguments of roma or {name}", option, f"did you mean {near[0]!r}?")
    if name == "vllm" and options.get("device") is not None:
        got = repr(options["device"])
        fail("device", "none with engine=vllm", got, "it takes the one that it was built for")
    given = dict(options)
    if pretrained is not None:
        key = next((key for key in ("pretrained", "model") if key in named), None)
        if key is None:
            fail("pretrained", f"none with base={name}", repr(pretrained), "leave it out")
        given[key] = str(pretrained)
    if {"device", "device_map"} <= set(named) and not torch.cuda.is_available():
        given.setdefault("device", "cpu")
        given.setdefault("device_map", given["device"])
    return given
