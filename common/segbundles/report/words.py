"""Metrics and columns in words, as the pages show them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

__all__ = ["explain", "glossary", "label"]

# a column: its heading, and what a reader may want to know
_WORDS = {
    "dice": ("Dice", "twice the overlap of prediction and truth, divided by the sum of both; 1 is perfect"),
    "slice_dice": ("Dice of the slices", "mean Dice of those slices of a case that contain truth"),
    "slice_dice_all": ("Dice of all slices", "mean Dice of all slices of the set that contain truth, each counts once"),
    "jaccard": ("Jaccard (IoU)", "the overlap of prediction and truth, divided by their union"),
    "precision": ("precision", "share of the prediction that is true"),
    "recall": ("recall (sensitivity)", "share of the truth that was predicted"),
    "hd_mm": ("surface distance, largest (mm)", "Hausdorff distance: the largest distance between the two surfaces"),
    "hd95_mm": (
        "surface distance, 95th percentile (mm)",
        "HD95: 95 % of each surface is at most this far from the other one",
    ),
    "assd_mm": ("surface distance, mean (mm)", "ASSD: mean distance between the two surfaces, in both directions"),
    "surface_dice": ("surface Dice", "share of both surfaces that is closer to the other one than the tolerance"),
    "truth_in_box": ("truth inside the crop", "share of the truth that is inside the crop that the locator chose"),
    "pixel_accuracy": ("pixel accuracy", "share of the pixels whose most probable class is right"),
    "dice_membrane": ("Dice of the membranes", "Dice of the most probable class, membrane"),
    "pixel_accuracy_mask": ("pixel accuracy of the mask", "share of the pixels that are right in the written mask"),
    "v_rand": ("V_rand, best threshold", "Rand score of the ISBI 2012 challenge: are the same pixels in one cell?"),
    "v_info": ("V_info, best threshold", "information score of the ISBI 2012 challenge"),
    "v_rand_cells": ("V_rand of the cells", "Rand score of the cells that inference writes"),
    "v_info_cells": ("V_info of the cells", "information score of the cells that inference writes"),
    "pooled": ("pooled over all pixels", ""),
    "pooled_jaccard": ("Jaccard (IoU), pooled over all pixels", ""),
    "accuracy": ("pixel accuracy", "share of the pixels of the right class"),
    "jaccard_interval": ("Jaccard (IoU) of the foreground (95 % interval)", ""),
    "mean_jaccard_interval": ("mean Jaccard, background included (95 % interval)", ""),
    "lesion_slices": ("slices with truth", ""),
    "lesion_free_slices": ("slices without truth", ""),
    "false_positive_slices": ("false positive slices", "slices without truth in which something was predicted"),
    "spacing_mm": ("voxel size (mm)", ""),
    "true_volume_ml": ("true volume (ml)", ""),
    "predicted_volume_ml": ("predicted volume (ml)", ""),
    "true_area_mm2": ("true area (mm²)", ""),
    "predicted_area_mm2": ("predicted area (mm²)", ""),
    "true_pixels": ("true size (pixels)", ""),
    "predicted_pixels": ("predicted size (pixels)", ""),
    "true_fraction": ("true share of the image", ""),
    "predicted_fraction": ("predicted share of the image", ""),
    "cells": ("cells found", ""),
    "true_cells": ("true cells", ""),
    "objects": ("true objects", "an object is a connected part of the truth or of the prediction"),
    "objects_found": ("objects found", "true objects of which at least one pixel was predicted"),
    "false_objects": ("false objects", "predicted objects that do not touch any true one"),
}


def label(name: str, classes: Mapping[str, str] | None = None, unit: str = "") -> str:
    """Return the heading of a metric or column.

    Args:
        name: its name in ``metrics.csv``; that of a single class ends with its number.
        classes: name of each class, by its number.
        unit: unit of a metric that is not known here.
    """
    base, _, number = name.rpartition("_")
    if number.isdigit() and base:
        return f"{label(base, unit=unit)}, {(classes or {}).get(number, f'class {number}')}"
    if name in _WORDS:
        return _WORDS[name][0]
    if unit and name.endswith(f"_{unit}"):
        return f"{label(name.removesuffix(f'_{unit}'))} ({unit})"
    return name.replace("_", " ")


def explain(name: str) -> str:
    """Return what a metric or column means; empty where its heading says it."""
    base, _, number = name.rpartition("_")
    return _WORDS.get(base if number.isdigit() else name, ("", ""))[1]


def glossary(names: Iterable[str]) -> dict[str, str]:
    """Return what metrics and columns mean by their headings, each once; classes share an entry."""
    bases = (name.rpartition("_")[0] if name.rpartition("_")[2].isdigit() else name for name in names)
    return {label(name): explain(name) for name in dict.fromkeys(bases) if explain(name)}
