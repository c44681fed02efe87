"""Settings that fit a data set: spacing, patch, batch and limits from the cases, the network and the memory.

The rules are those of nnU-Net (Isensee et al., Nature Methods 18 (2021) 203): the median spacing, a patch of the shape
of the median image that fits the memory, and a batch of at least 2. A setting of the bundle that is near to what they
give stays as it is, so that the bundle's weights can still be used.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser
from torch import nn

from segbundles.commands import args_path
from segbundles.data import Datalist
from segbundles.datasets import Case, DataFaults
from segbundles.datasets.kinds import FRAMES, SECTIONS, STACKS, VOLUMES, Kind, LabelValues
from segbundles.datasets.reading import SIZE
from segbundles.errors import fail
from segbundles.files import DATALIST_NAME, read_json, write_json

__all__ = ["Cases", "Machine", "Plan", "adapt", "measure", "per_voxel_bytes", "read_cases"]

_GIB = 2**30
_MOST_GIB = 8.0  # as nnU-Net: larger patches than fit into this hardly help
_OVERHEAD = 1.3  # gradients of activations, workspaces
_ADAM = 16  # bytes per parameter: weight, gradient and two moments
_NEAR = 1.25  # factor by which a spacing or a limit may be off
_FINER = 2.0  # factor by which the bundle's spacing may be finer than the files': see benchmarks/adapt.py
_THICK = 3.0  # slices are thick if they are so many times as thick as a pixel is wide
_SMALLEST_COVER = 0.25  # of the median image that a patch covers; below it the spacing is coarsened
_DEEPEST = 4  # pixels of the smallest feature map
_LOCATED = 8  # voxels of the locator along the smallest edge of an object
_VNET_STEP = 16  # a V-Net halves its input four times
_FCN_STEP = 32


@dataclass(frozen=True)
class Machine:
    """What a training may use.

    Args:
        device: ``cpu`` or ``cuda``.
        memory_gib: memory for it, in GiB.
    """

    device: str
    memory_gib: float


def measure(device: str | None = None, memory_gib: float | None = None) -> Machine:
    """Return the device that a training would take, and how much of its memory it may use.

    Args:
        device: ``cpu`` or ``cuda``; None takes a GPU if there is one.
        memory_gib: memory in GiB; None takes four fifths of what is free now, at most 8.

    Raises:
        ValueError: when there is no such device.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device != "cpu" and not (device.startswith("cuda") and torch.cuda.is_available()):
        fail(f"device must be cpu, or cuda on a machine with a GPU, got {device!r}")
    if memory_gib is None:
        free = torch.cuda.mem_get_info(device)[0] if device != "cpu" else _free_memory()
        memory_gib = min(0.8 * free / _GIB, _MOST_GIB)
    return Machine(device, memory_gib)


def _free_memory() -> int:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not Linux
        return int(_MOST_GIB * _GIB)


@dataclass
class Cases:
    """What training cases are like. Axes of volumes are right-left, front-back, up-down.

    Args:
        num_classes: number of classes, background included.
        void_class: class of pixels to be ignored.
        sizes: size of each image in voxels or pixels.
        spacings: spacing of each volume in mm; empty where no file contains it.
        boxes: edges of the box around the foreground of each volume, in mm.
        classes: classes that the labels contain; empty if they are not counted.
    """

    num_classes: int = 2
    void_class: int | None = None
    sizes: list[tuple[float, ...]] = field(default_factory=list)
    spacings: list[tuple[float, ...]] = field(default_factory=list)
    boxes: list[tuple[float, ...]] = field(default_factory=list)
    classes: set[int] = field(default_factory=set)

    def add(self, facts: Mapping[str, Any], spacing_mm: Sequence[float] | None = None) -> None:
        """Add a case.

        Args:
            facts: what :meth:`segbundles.datasets.kinds.Kind.check` found.
            spacing_mm: spacing that the list gives, instead of the file's.
        """
        orientation = facts.get("orientation", "RAS")
        order = [next(k for k, letter in enumerate(orientation) if letter in pair) for pair in ("RL", "AP", "SI")]
        size, box = facts.get("size (voxels)") or facts[SIZE], facts.get("label box (voxels)")
        self.sizes.append(tuple(size[axis] for axis in order[: len(size)]))
        if (spacing := spacing_mm or facts.get("spacing (mm)")) is not None:
            self.spacings.append(tuple(float(spacing[axis]) for axis in order))
            self.boxes += [tuple(float(box[axis] * spacing[axis]) for axis in order)] if box is not None else []
        self.classes |= {int(word) for word in str(facts.get("classes", "")).split() if word.isdecimal()}

    @property
    def extents(self) -> np.ndarray:
        """Size of each volume in mm, (cases, 3)."""
        return np.array(self.sizes) * np.array(self.spacings)


def read_cases(kind: Kind, dataset_dir: str | os.PathLike, track: Callable[[Sequence], Iterable] = iter) -> Cases:
    """Read the training cases of a data set as training does.

    Args:
        kind: what the bundle reads.
        dataset_dir: folder with a datalist.json.
        track: wraps the cases while they are read, for a progress bar.

    Raises:
        DataFaults: (a ValueError) when a file has a fault.
        ValueError: when there is no list.
    """
    entries = Datalist(dataset_dir, "training").cases
    head = read_json(Path(dataset_dir) / DATALIST_NAME)
    cases, faults = Cases(len(head.get("labels") or kind.classes), head.get("void_class")), []
    for number, entry in enumerate(track(entries)):
        images = tuple(map(Path, entry["image"] if isinstance(entry["image"], list) else [entry["image"]]))
        name = str(entry.get("case", number))
        case = Case(
            name=name,
            image=images if len(images) > 1 else images[0],
            label=Path(entry["label"]),
            group=str(entry.get("group", name)),
            page=entry.get("page"),
        )
        values = entry.get("label_values")
        labels = LabelValues(cases.num_classes, values and tuple(values), void_class=cases.void_class)
        checked = kind.check(case, labels)
        faults += checked.faults
        if not checked.faults:
            cases.add(checked.facts, entry.get("spacing_mm"))
    if faults:
        raise DataFaults(faults, Path(dataset_dir))
    return cases


def per_voxel_bytes(network: nn.Module, channels: int, size: Sequence[int]) -> float:
    """Return the bytes that a training step keeps for the backward pass, per voxel of the input.

    Args:
        network: network on the CPU, in training mode.
        channels: channels of its input.
        size: spatial size to measure with.
    """
    own = {parameter.data_ptr() for parameter in network.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = network(torch.zeros(2, channels, *size))
    del output  # until here it kept the tensors, so that no address was used twice
    return sum(kept.values()) / (2 * math.prod(size))


class Plan:
    """Settings of one training that differ from the bundle's, and why.

    Args:
        bundle: folder of the bundle.
        config: config of the training.
        machine: device and memory.

    Attributes:
        patch_name: the knob for the size of a training patch.
        chosen: value by knob.
        reasons: a sentence by knob, also of those that stay as they are.
    """

    def __init__(self, bundle: Path, config: str, machine: Machine) -> None:
        self.config = config
        self.patch_name = "locator_patch_size" if config == "train_locator.json" else "patch_size"
        self.machine = machine
        self.chosen: dict[str, Any] = {}
        self.reasons: dict[str, str] = {}
        self._settings = {"bundle_root": str(bundle), "device": "cpu"}
        self._path = bundle / "configs" / config
        self._parser = self._parsed({})

    def _parsed(self, settings: Mapping[str, Any]) -> ConfigParser:
        parser = ConfigParser()
        parser.read_config(str(self._path))
        parser.update({**self._settings, **settings})
        return parser

    def knob(self, name: str) -> Any:
        """Return the bundle's value of a knob."""
        return self._parser.get_parsed_content(name)

    def choose(self, name: str, value: Any, reason: str, keep: bool = False) -> Any:
        """Choose the value of a knob.

        Args:
            name: the knob.
            value: its value.
            reason: why.
            keep: whether the bundle's value is near enough and stays.

        Returns:
            The value that the training will have.
        """
        usual = self.knob(name)
        self.reasons[name] = reason
        if keep or value == usual:
            return usual
        self.chosen[name] = value
        return value

    def most_voxels(self, step: int) -> int:
        """Return how many voxels the patches of a training step may have in all.

        On a CPU time is scarce, not memory: there a step may cost no more than one with the bundle's settings.

        Args:
            step: factor by which the network divides its input.
        """
        parser, patch = self._parsed(self.chosen), self.knob(self.patch_name)
        network = parser.get_parsed_content("network_def").train()
        channels = parser.get_parsed_content("network_def::in_channels")
        self.bytes_each = _OVERHEAD * per_voxel_bytes(network, channels, [2 * step] * len(patch))
        fixed = _ADAM * sum(parameter.numel() for parameter in network.parameters())
        self.memory_voxels = int(max(self.machine.memory_gib * _GIB - fixed, 0) / self.bytes_each)
        usual = math.prod(patch) * self.knob("batch_size")
        return min(self.memory_voxels, usual) if self.machine.device == "cpu" else self.memory_voxels

    def choose_patches(
        self, median: Sequence[float], most: int, step: int, least: int, what: str, **shape: Any
    ) -> None:
        """Choose patch and batch: the bundle's if they suit the median image and the memory.

        Args:
            median: size of the median image in the voxels of the network.
            most: see `most_voxels`.
            step: multiple of the edges.
            least: smallest batch.
            what: what the median image is, for the reason.
            shape: see `fit`.
        """
        usual, batch = self.knob(self.patch_name), self.knob("batch_size")
        whole = [up(n, step) for n in median]
        keep = (
            batch >= least
            and math.prod(usual) * batch <= most
            and (batch == 1 or math.prod(usual) <= 2 * math.prod(whole))  # patches of a batch are padded to one size
            and 2 * math.prod(min(p, w) for p, w in zip(usual, whole, strict=True)) >= math.prod(whole)
        )
        patch = fit(median, most / least, step, **shape)
        patch = self.choose(self.patch_name, patch, f"{what} is {text(median)}", keep)
        room, before = max(int(most / math.prod(patch)), 1), batch
        batch = self.choose("batch_size", min(room, max(batch, least)), "", keep)
        if batch > before:
            for name in ("max_epochs", "lr_epochs"):
                same = f"as many steps as with patches {'one by one' if before == 1 else f'by {before}'}"
                self.choose(name, round(self.knob(name) * batch / before), same)
        gib, machine = self.bytes_each * math.prod(patch) * batch / _GIB, self.machine
        slow = ", and as much time as with the bundle's settings" if machine.device == "cpu" else ""
        self.reasons["batch_size"] = (
            f"a step needs about {gib:.1f} of {machine.memory_gib:.1f} GiB ({machine.device}){slow}"
        )

    def document(self, what: str) -> dict[str, Any]:
        """Return the contents of an args file: each setting after a remark that says why."""
        content: dict[str, Any] = {"_desc_": what}
        for name, value in self.chosen.items():
            content |= {f"_{name}_desc_": self.reasons[name], name: value}
        return content


def up(value: float, step: int) -> int:
    """Return the next multiple of a step."""
    return max(math.ceil(value / step - 1e-6), 1) * step


def fit(median: Sequence[float], most: float, step: int, square: bool = False) -> list[int]:
    """Return a patch of the shape of the median image, cut until it has at most so many voxels.

    As in nnU-Net, the axis along which most of the image is covered is cut first.

    Args:
        median: size of the median image.
        most: voxels.
        step: edges are multiples of it.
        square: whether all edges are equal, at most the shortest of the image.
    """
    whole = [up(n, step) for n in median]
    if square:
        edge = min(*whole, max(int(most ** (1 / len(whole))) // step, 1) * step)
        return [edge] * len(whole)
    patch = list(whole)
    while math.prod(patch) > most and max(patch) > step:
        axis = max((k for k, n in enumerate(patch) if n > step), key=lambda k: (patch[k] / whole[k], patch[k]))
        patch[axis] -= step
    return patch


def text(values: Iterable[float], unit: str = "") -> str:
    """Return numbers as ``96 x 80 x 12``."""
    return " x ".join(f"{float(value):.4g}" for value in values) + (f" {unit}" if unit else "")


def adapt(
    bundle: str | os.PathLike,
    dataset_dir: str | os.PathLike,
    machine: Machine | None = None,
    track: Callable[[Sequence], Iterable] = iter,
) -> tuple[list[Plan], list[str]]:
    """Find the settings of a training that fit a data set.

    Args:
        bundle: folder or name of the bundle.
        dataset_dir: folder with a datalist.json, as from ``segbundles prepare``.
        machine: device and memory; None measures them.
        track: wraps the cases while they are read, for a progress bar.

    Returns:
        The settings of the training, and of the locator's where there is one; and notes for the person.

    Raises:
        ValueError: when there is no such bundle or data, or a file has a fault.
    """
    kind, machine = Kind.of(str(bundle)), machine or measure()
    cases = read_cases(kind, dataset_dir, track)
    configs = [name for name in ("train.json", "train_locator.json") if (kind.bundle / "configs" / name).is_file()]
    plans = [Plan(kind.bundle, name, machine) for name in configs]
    if kind.name != SECTIONS:
        reason = f"the list names {cases.num_classes} classes, background included"
        for plan in plans:
            plan.choose("num_classes", cases.num_classes, reason)
    rule = {VOLUMES: plan_volumes, STACKS: plan_slices, SECTIONS: plan_sections, FRAMES: plan_frames}[kind.name]
    rule(plans[0], cases)
    if len(plans) > 1:
        plan_locator(plans[1], cases)
        if "locator_spacing_mm" in plans[1].chosen:  # inference and training by boxes of the locator need it too
            plans[0].choose(
                "locator_spacing_mm", *(one["locator_spacing_mm"] for one in (plans[1].chosen, plans[1].reasons))
            )
    notes = []
    if cases.num_classes > 2 and (absent := sorted({*range(1, cases.num_classes)} - cases.classes)):
        notes.append(f"no training label contains the class {', '.join(map(str, absent))}")
    return plans, notes


def write_plans(plans: Sequence[Plan], path: Path, what: str) -> list[Path]:
    """Write the args file of each training.

    Args:
        plans: from `adapt`.
        path: JSON file of the first.
        what: what the files are for.

    Returns:
        The files. One of a locator that keeps all settings of the bundle is not written.
    """
    files = []
    for plan in plans:
        file = args_path(path, plan.config)
        if plan.chosen or file == path:
            write_json(file, plan.document(what))
            files.append(file)
    return files


def plan_volumes(plan: Plan, cases: Cases) -> None:
    """Choose spacing, patch, window and limits of a training on crops around an object."""
    if not cases.boxes:
        fail("no training case has a spacing and a foreground: correct the headers, or the labels")
    most, least = plan.most_voxels(_VNET_STEP), 1 if plan.machine.device == "cpu" else 2
    boxes = np.array(cases.boxes)
    room = 2 * (plan.knob("crop_margin_mm") + plan.knob("crop_jitter_mm"))
    crop = np.minimum(np.median(boxes, axis=0) + room, np.median(cases.extents, axis=0))
    largest = np.minimum(boxes.max(axis=0) + room, cases.extents.max(axis=0))

    usual, exact = plan.knob("network_spacing_mm"), median_spacing(cases)
    spacing = np.array(exact)
    while math.prod(fit(crop / spacing, most / least, _VNET_STEP)) < _SMALLEST_COVER * math.prod(crop / spacing):
        spacing = spacing * 1.03
    reason = f"median spacing of the training cases, {text(exact, 'mm')}"
    if (spacing != exact).any():
        reason += "; coarser, so that a patch that fits covers a quarter of the crop around the object"
    near = usual is None or all(1 / _NEAR <= a / b <= _FINER for a, b in zip(spacing, usual, strict=True))
    spacing = plan.choose("network_spacing_mm", [round(float(value), 2) for value in spacing], reason, near)
    spacing = np.array(exact if spacing is None else spacing)

    what = f"the median crop around the object ({text(crop, 'mm')}), in voxels,"
    plan.choose_patches(crop / spacing, most, _VNET_STEP, least, what)
    crops = [up(n, _VNET_STEP) for n in largest / spacing]
    whole = math.prod(crops) <= math.prod(plan.knob("window_size")) or math.prod(crops) > plan.memory_voxels
    what = f"the largest crop around an object, in voxels, is {text(largest / spacing)}"
    plan.choose("window_size", crops, f"{what}; the network sees it as a whole", keep=whole)
    low, high = 5.0 * math.floor(boxes.min() / 10), 10.0 * math.ceil(boxes.max() / 5)
    edges = (
        f"objects have edges of {boxes.min():.0f} to {boxes.max():.0f} mm; half and twice as much is still plausible"
    )
    for name, value, fits in (
        ("min_size_mm", low, lambda limit: limit * _NEAR <= boxes.min()),
        ("max_size_mm", high, lambda limit: boxes.max() * _NEAR <= limit <= 4 * boxes.max()),
    ):
        limit = plan.knob(name)
        plan.choose(name, value, edges, limit is None or fits(limit))


def median_spacing(cases: Cases) -> list[float]:
    """Return the median spacing in mm; along thick slices, the spacing that a tenth of the cases are below."""
    spacings = np.array(cases.spacings)
    target = np.median(spacings, axis=0)
    thick = int(target.argmax())
    others = np.delete(target, thick).max()
    if target[thick] > _THICK * others:
        target[thick] = max(np.percentile(spacings[:, thick], 10), others)
    return [round(float(value), 2) for value in target]


def plan_locator(plan: Plan, cases: Cases) -> None:
    """Choose spacing and patch of the locator, which sees whole volumes coarsely."""
    most = plan.most_voxels(_VNET_STEP)
    volume, edge = np.median(cases.extents, axis=0), float(np.median(np.array(cases.boxes).min(axis=1)))
    spacing = np.minimum(plan.knob("locator_spacing_mm"), edge / _LOCATED)
    while math.prod(volume / spacing) > 2 * most:
        spacing = spacing * 1.05
    reason = (
        f"the smallest edge of an object is {edge:.0f} mm in the median, and {_LOCATED} voxels are enough to find it"
    )
    spacing = plan.choose("locator_spacing_mm", [round(float(value), 2) for value in spacing], reason)
    plan.choose_patches(volume / spacing, most, _VNET_STEP, 1, "the median volume, in voxels of the locator,")


def plan_slices(plan: Plan, cases: Cases) -> None:
    """Choose depth, patch and window of a training on slices of volumes."""
    sizes = np.array([size[:2] for size in cases.sizes])
    median = np.median(sizes, axis=0)
    step = choose_depth(plan, median, "slice")
    plan.choose_patches(median, plan.most_voxels(step), step, 4, "the median slice, in pixels,")
    choose_window(plan, sizes.max(axis=0), step, "the largest slice, in pixels,")
    patch, window = (plan.chosen.get(name, plan.knob(name)) for name in ("patch_size", "window_size"))
    if any(w < p for w, p in zip(window, patch, strict=True)):
        larger = [max(pair) for pair in zip(window, patch, strict=True)]
        plan.choose("window_size", larger, "at least as large as the patch")


def plan_sections(plan: Plan, cases: Cases) -> None:
    """Choose depth, patch and window of a training on sections, which are turned by quarters and so are square."""
    median = np.median([size[:2] for size in cases.sizes], axis=0)
    step = choose_depth(plan, median, "section")
    smallest = min(up(min(median) - step + 1, step), *plan.knob("patch_size"))  # at most the section
    for name in ("patch_size", "window_size"):
        plan.choose(name, [smallest] * 2, f"the median section is {text(median)} pixels")
    plan.choose("border_pixels", min(plan.knob("border_pixels"), smallest // 4), "at most a quarter of the window")


def choose_depth(plan: Plan, median: Sequence[float], what: str) -> int:
    """Choose how often a U-Net halves an image; return the factor by which it divides it."""
    usual = plan.knob("depth")
    levels = int(math.log2(max(min(median) / _DEEPEST, 1))) + 1
    depth = plan.choose(
        "depth",
        max(min(levels, usual), 3),
        f"the smallest feature map of the median {what}, {text(median)} pixels, has {_DEEPEST} pixels or more",
    )
    return 2 ** (depth - 1)


def plan_frames(plan: Plan, cases: Cases) -> None:
    """Choose height, patch and classes of a training on frames."""
    height, width = np.median([size[1] for size in cases.sizes]), np.median([size[0] for size in cases.sizes])
    usual = plan.knob("frame_height")
    if cases.void_class is not None:
        plan.choose("void_class", cases.void_class, "the list names it")
    shown = plan.choose(
        "frame_height",
        int(height),
        f"the median frame is {text((width, height))} pixels, which are not enlarged",
        keep=usual is None or height >= usual,
    )
    scale = 1.0 if shown is None else shown / height
    most = plan.most_voxels(_FCN_STEP)
    plan.choose_patches(
        [width * scale, height * scale], most, _FCN_STEP, 4, "the median frame, in pixels of the network,", square=True
    )


def choose_window(plan: Plan, largest: Sequence[float], step: int, what: str) -> None:
    """Choose the window of inference: the bundle's if it costs at most twice what the largest image needs."""
    usual, whole = plan.knob("window_size"), [up(n, step) for n in largest]
    most = math.prod(usual)
    window = fit(largest, most, step)
    fits = all(n % step == 0 for n in usual) and most <= 2 * math.prod(whole)
    plan.choose("window_size", window, f"{what} is {text(largest)}", keep=fits)
