"""What lmms-eval finds through the entry-point group `lmms_eval.models`: the model "roma".

lmms-eval reads it at its start, whichever model is asked for: nothing heavy is imported here.
"""

from typing import Any


def manifest() -> Any:
    """The `ModelManifest` of `RomaModel`, which is imported when it is asked for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="roma", chat_class_path="roma.evaluate.lmms_eval.model.RomaModel")
