"""Data sets: from the publisher's layout to a ``datalist.json`` that training and evaluation read.

Each data set has a module that defines ``DATA_SET``, and a place in `DATA_SETS`, which the command line lists.
:mod:`segbundles.phantoms` makes synthetic data in the same layouts. Importing this package is fast: numpy, MONAI and
the readers are imported when the first case is read.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

from segbundles.errors import fail

from . import clinicdb, heart, isbi2012, lasc18, lgg, pairs, polyps912
from .datalist import DATALIST_NAME, Case, Checked, DataFaults, DataSet, Fault, Prepared, merge, prepare, write_datalist
from .splits import SPLITS, split_cases

__all__ = [
    "DATALIST_NAME",
    "DATA_SETS",
    "SPLITS",
    "Case",
    "Checked",
    "DataFaults",
    "DataSet",
    "Fault",
    "Prepared",
    "get_data_set",
    "merge",
    "prepare",
    "split_cases",
    "write_datalist",
]

DATA_SETS = {
    module.DATA_SET.name: module.DATA_SET for module in (lasc18, heart, lgg, clinicdb, polyps912, isbi2012, pairs)
}


def get_data_set(name: str, /, **options: Any) -> DataSet:
    """Return the description of a data set.

    Args:
        name: a key of `DATA_SETS`.
        options: options of this data set alone, such as ``invert_labels=True`` of isbi2012.

    Raises:
        ValueError: when there is no such data set, it has no such option, or a value is not allowed.
    """
    if name not in DATA_SETS:
        fail(f"unknown data set {name!r}: choose one of {', '.join(DATA_SETS)}")
    data_set = DATA_SETS[name]
    own = signature(data_set.options).parameters if data_set.options else {}
    for option in options:
        if option not in own:
            fail(f"{name} has no option {option!r}: it has {', '.join(own) or 'none'}")
    if lacking := [key for key, option in own.items() if option.default is option.empty and key not in options]:
        fail(f"{name} needs the options {', '.join(lacking)}")
    return data_set.options(**options) if data_set.options else data_set
