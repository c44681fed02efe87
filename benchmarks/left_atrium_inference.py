"""Measure time and memory of each stage when left_atrium_vnet segments one volume.

`inferring` runs in this process, from the first import on, and its stages are timed. Memory is the peak of the process
up to the end of each stage.

    python benchmarks/left_atrium_inference.py VOLUME [--margin_mm 20 ...]
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

BEGIN = time.perf_counter()
BUNDLE = Path(__file__).resolve().parents[1] / "bundles" / "left_atrium_vnet"
LOCATOR = "locator: resampling, normalising, component"
SEGMENTER = "segmenter: cropping, normalising, resampling both ways"
REST = "engine, config and the rest"
seconds: dict[str, float] = {}
peaks: dict[str, float] = {}


def add(stage: str, spent: float) -> None:
    """Add time to a stage, and note the peak so far."""
    seconds[stage] = seconds.get(stage, 0.0) + spent
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peaks[stage] = (peak if sys.platform == "darwin" else peak * 1024) / 2**20


def timed(owner: Any, name: str, stage: str | Callable[..., str], within: Callable[..., str] | None = None) -> None:
    """Time a method; if it runs within another timed stage, its time is subtracted from that one."""
    method = getattr(owner, name)

    @wraps(method)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        since = time.perf_counter()
        result = method(*args, **kwargs)
        spent = time.perf_counter() - since
        add(stage if isinstance(stage, str) else stage(*args), spent)
        if within is not None:
            outer = within(*args)
            seconds[outer] = seconds.get(outer, 0.0) - spent
        return result

    setattr(owner, name, wrapper)


def main() -> None:
    """Run the command and print the table."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    import monai.bundle
    from monai.transforms import Invertd, Orientationd

    from segbundles.data import SuffixReader
    from segbundles.handlers import WeightsLoader
    from segbundles.inferers import LocatorCropInferer
    from segbundles.networks import AttentionVNet
    from segbundles.transforms import CheckImaged, KeepLargestConnectedComponentd, LogitsToClassd, SaveSegmentationd

    add("importing torch, MONAI and segbundles", time.perf_counter() - BEGIN)
    timed(WeightsLoader, "__call__", "reading the weights")
    timed(SuffixReader, "get_data", "reading the volume")
    timed(CheckImaged, "__call__", "checking the volume")
    timed(Orientationd, "__call__", "reorienting")
    timed(LocatorCropInferer, "locate", LOCATOR)
    timed(LocatorCropInferer, "_segment", SEGMENTER)

    networks: list[AttentionVNet] = []

    def which(network: AttentionVNet, *_: Any) -> str:
        if network not in networks:
            networks.append(network)
        return (LOCATOR, SEGMENTER)[networks.index(network)]

    timed(AttentionVNet, "forward", lambda *args: which(*args).split(":")[0] + ": network", which)
    timed(LogitsToClassd, "__call__", "class map")
    timed(KeepLargestConnectedComponentd, "__call__", "largest component")
    timed(Invertd, "__call__", "back to the file's orientation")
    timed(SaveSegmentationd, "__call__", "writing")

    values = dict(zip(sys.argv[2::2], sys.argv[3::2], strict=True))
    overrides = {key.removeprefix("--"): value for key, value in values.items()}
    with tempfile.TemporaryDirectory() as out:
        overrides = {"output_dir": out, "dataset_dir": sys.argv[1], **overrides}
        config = str(BUNDLE / "configs" / "inference.json")
        since = time.perf_counter()
        monai.bundle.run("inferring", bundle_root=str(BUNDLE), config_file=config, **overrides)
        whole = time.perf_counter() - since
    add(REST, 0.0)
    inside = sum(s for name, s in seconds.items() if not name.startswith(("importing", "engine")))
    seconds[REST] = whole - inside

    print("\n| stage | seconds | peak so far (MiB) |\n|---|---|---|")
    for stage, spent in seconds.items():
        print(f"| {stage} | {spent:.2f} | {peaks[stage]:.0f} |")
    print(f"| all | {time.perf_counter() - BEGIN:.2f} | {max(peaks.values()):.0f} |")


if __name__ == "__main__":
    main()
