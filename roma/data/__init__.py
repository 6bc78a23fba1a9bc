"""Questions about images: reads datasets in EasyR1's columns, and writes two generated ones.

    write_digits("data/digits")                               # roma data digits --out data/digits
    data = load_dataset_rows("data/digits", split="train")    # a sequence of Example

Needs numpy, Pillow and pyarrow, `datasets` for folders that it saved, and scikit-learn for the
digits; the extra `train` has them all.
"""

import roma.namesake  # noqa: F401 - an ImportError if another `roma` is in the way
from roma.data.example import Example, RowError
from roma.data.loader import Columns, RomaDataset, load_dataset_rows
from roma.data.synthetic.charts import write_charts
from roma.data.synthetic.digits import DIGIT_WORDS, write_digits
from roma.data.synthetic.writer import FORMATS
from roma.models.images import decode_image

__all__ = [
    "DIGIT_WORDS",
    "FORMATS",
    "Columns",
    "Example",
    "RomaDataset",
    "RowError",
    "decode_image",
    "load_dataset_rows",
    "write_charts",
    "write_digits",
]
