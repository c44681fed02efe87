"""Data sets: from the publisher's layout to a ``datalist.json`` that training and evaluation read.

One module a data set, found by its name: ``segbundles.datasets.<name>`` defines ``DATA_SET``, and a line in
`DATA_SETS` makes it known to the command line. A phantom twin (made-up data in the same layout) is a module with a
``make_phantom`` function and a line in `PHANTOMS`.
"""

from __future__ import annotations

from importlib import import_module

from .datalist import (
    DATALIST_NAME,
    SECTIONS,
    Case,
    Checked,
    DataFaults,
    DataSet,
    Fault,
    Prepared,
    merge,
    prepare,
    split_cases,
    write_datalist,
)

__all__ = [
    "DATALIST_NAME",
    "DATA_SETS",
    "PHANTOMS",
    "SECTIONS",
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
    "lasc18": "2018 Atrial Segmentation Challenge, LGE-CMR: <case>/lgemri.nrrd and laendo.nrrd.",
    "heart": "Decathlon Task02_Heart, bright-blood MR: imagesTr and labelsTr, .nii.gz.",
    "lgg": "LGG MRI segmentation (kaggle_3m), brain MR slices: <patient>/<patient>_<slice>.tif and _mask.tif.",
    "clinicdb": "CVC-ClinicDB, polyps in colonoscopy frames: Original/<frame>.tif and Ground Truth/<frame>.tif.",
    "polyps912": "polyps912 (EndoScene), colonoscopy frames: <train, valid, test>/images and masks2, masks3 or masks4.",
    "isbi2012": "ISBI 2012 challenge, ssTEM: train-volume.tif and train-labels.tif, or PNG in image and label.",
}

PHANTOMS = {
    "left_atrium": "Made-up chest volumes with a left atrium, in LASC18's layout.",
    "brain": "Made-up brain MR slices with a FLAIR abnormality, in kaggle_3m's layout.",
    "polyp": "Made-up colonoscopy frames with a polyp, in CVC-ClinicDB's layout.",
    "em": "Made-up ssTEM sections of cells with dark membranes, in the ISBI 2012 challenge's layout.",
}


def get_data_set(name: str, invert_labels: bool = False, masks: str | None = None) -> DataSet:
    """Return the description of a data set.

    Args:
        name: a key of `DATA_SETS`.
        invert_labels: whether the two values of its label files are swapped, where the data set knows how to read
            them so (``INVERTED`` of its module).
        masks: which of several folders of masks to take, where the data set has them (``with_masks`` of its module).

    Raises:
        ValueError: when there is no such data set, its labels cannot be inverted, or it has no such masks.
    """
    if name not in DATA_SETS:
        raise ValueError(f"unknown data set {name!r}: choose one of {', '.join(DATA_SETS)}")
    module = import_module(f"{__name__}.{name}")
    if invert_labels and not hasattr(module, "INVERTED"):
        raise ValueError(f"labels of {name} cannot be inverted: leave out --invert-labels")
    if masks is not None and not hasattr(module, "with_masks"):
        raise ValueError(f"{name} has one folder of masks: leave out --masks")
    if masks is not None:
        return module.with_masks(masks)
    return module.INVERTED if invert_labels else module.DATA_SET
