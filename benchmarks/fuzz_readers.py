"""Read files with damaged headers, of every format: each must be read or refused by name, without abort or hang.

    python benchmarks/fuzz_readers.py [--files 3000] [--seed 0] [--keep FOLDER]

Damages small files at random: flipped bits, random bytes, huge numbers, pieces cut off, left out or repeated. Each is
read in a process of its own, with limits on time and memory, by every reader that may meet it. Prints how many were
read, refused (InputError), ended the process, took too long, raised another exception, or gave an array that does not
fit its metadata. Exit status 1 if any of the last four happened; `--keep` keeps those files.
"""

from __future__ import annotations

import argparse
import gzip
import logging
import multiprocessing
import os
import random
import re
import resource
import shutil
import sys
import tempfile
import warnings
import zlib
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
TIME_LIMIT_S = 20
MEMORY_LIMIT = 2**31  # bytes, on top of what the imports take
HUGE = (b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x00\x00\x00\x80", b"\x00\x00\xc0\x7f", b"\x00\x00\x00\x00")
NUMBERS = (b"0", b"-1", b"nan", b"inf", b"1e300", b"99999", b"4294967296", b"99999999999999999999", b"x")
OUTCOMES = ("read", "refused", "abort", "hang", "exception", "misfit")


def write_samples(folder: Path) -> dict[str, Path]:
    """Write one small valid file of each format; DICOM series are folders."""
    import nibabel as nib
    import SimpleITK as sitk  # noqa: N813
    import tifffile
    from PIL import Image

    sys.path.insert(0, str(ROOT / "tests" / "bundles"))
    from dicom_series import write_enhanced, write_series

    rng = np.random.default_rng(0)
    volume = rng.integers(0, 1000, (12, 10, 6)).astype(np.int16)
    grey = rng.integers(0, 255, (40, 36), dtype=np.uint8)
    colour = rng.integers(0, 255, (40, 36, 3), dtype=np.uint8)
    affine = np.array([[-0.5, 0, 0, 4], [0, 0.75, 0, 5], [0, 0, 2, 6], [0, 0, 0, 1]])
    places = {}

    def place(kind: str, name: str) -> Path:
        places[kind] = folder / kind.replace(" ", "_") / name
        places[kind].parent.mkdir()
        return places[kind]

    nib.save(nib.Nifti1Image(volume, affine), place("NIfTI", "a.nii"))
    nib.save(nib.Nifti2Image(volume, affine), place("NIfTI-2", "a.nii"))
    nib.save(nib.Nifti1Image(volume, affine), place("NIfTI gz", "a.nii.gz"))
    image = sitk.GetImageFromArray(volume.T)
    image.SetSpacing((0.5, 0.75, 2))
    for kind, name, compressed in (
        ("NRRD raw", "a.nrrd", False),
        ("NRRD gzip", "a.nrrd", True),
        ("NRRD detached", "a.nhdr", False),
        ("MetaImage", "a.mha", False),
        ("MetaImage zlib", "a.mha", True),
        ("MetaImage detached", "a.mhd", False),
    ):
        sitk.WriteImage(image, str(place(kind, name)), compressed)
    tifffile.imwrite(place("TIFF", "a.tif"), grey, photometric="minisblack")
    tifffile.imwrite(place("TIFF LZW", "a.tif"), grey, photometric="minisblack", compression="lzw")
    tifffile.imwrite(place("TIFF tiles", "a.tif"), np.stack([colour] * 2), tile=(16, 16), compression="deflate")
    tifffile.imwrite(place("TIFF ImageJ", "a.tif"), np.stack([grey] * 3), imagej=True)
    palette = Image.fromarray(colour).quantize(16)
    palette.save(place("TIFF palette", "a.tif"))
    palette.save(place("PNG palette", "a.png"))
    Image.fromarray(grey).save(place("PNG", "a.png"))
    Image.fromarray(colour).save(place("JPEG", "a.jpg"))
    Image.fromarray(colour).save(place("BMP", "a.bmp"))
    write_series(place("DICOM series", "series"), volume[..., :3], affine)
    write_enhanced(place("DICOM enhanced", "series") / "a.dcm", volume[..., :3], affine)
    return places


def damage(whole: bytes, rng: random.Random) -> bytes:
    """Return a file with one to three faults, most of them near its beginning."""
    for _ in range(rng.randint(1, 3)):
        end = len(whole) if rng.random() < 0.3 else min(len(whole), 600)
        at = rng.randrange(max(end, 1))
        kind = rng.randrange(6)
        numbers = [found.span() for found in re.finditer(rb"-?\d+(\.\d+)?", whole[:600])]
        if kind == 0:
            at = min(at, len(whole) - 1)
            whole = whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :] if whole else whole
        elif kind == 1:
            new = rng.randbytes(rng.randint(1, 8))
            whole = whole[:at] + new + whole[at + len(new) :]
        elif kind == 2:
            at -= at % 2
            whole = whole[:at] + rng.choice(HUGE)[: rng.choice((2, 4))] + whole[at + 4 :]
        elif kind == 3 and numbers:
            start, stop = rng.choice(numbers)
            whole = whole[:start] + rng.choice(NUMBERS) + whole[stop:]
        elif kind == 4:
            whole = whole[:at]
        else:
            to = at + rng.randint(1, 20)
            whole = whole[:at] + (whole[at:to] * 2 if rng.random() < 0.5 else b"") + whole[to:]
    return whole


def with_valid_sums(png: bytes) -> bytes:
    """Correct the check sums of a damaged PNG, so that a reader goes on to what is damaged."""
    out, at = png[:8], 8
    while at + 8 <= len(png):
        length = int.from_bytes(png[at : at + 4], "big")
        body = png[at + 4 : at + 8 + length]
        out += png[at : at + 4] + body + zlib.crc32(body).to_bytes(4, "big")
        at += 12 + length
    return out


def write_damaged(sample: Path, copy: Path, rng: random.Random) -> Path:
    """Write a damaged copy of a sample, a file or one slice of a series, into an empty folder."""
    shutil.copytree(sample.parent, copy)
    path = copy / sample.name
    target = rng.choice(sorted(path.iterdir())) if path.is_dir() else path
    whole = target.read_bytes()
    if target.name.endswith(".nii.gz") and rng.random() < 0.7:
        whole = gzip.compress(damage(gzip.decompress(whole), rng), 1)
    else:
        whole = damage(whole, rng)
    if target.suffix == ".png" and rng.random() < 0.7:
        whole = with_valid_sums(whole)
    target.write_bytes(whole)
    return path


def read_all(pipe: Connection) -> None:
    """Read the files whose paths arrive, until None does, and send back what each reader made of them."""
    from segbundles.data import FrameReader, StackReader, SuffixReader
    from segbundles.errors import InputError

    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    devnull = open("/dev/null", "w")  # noqa: SIM115, PTH123  ITK and libtiff write there
    os.dup2(devnull.fileno(), 2)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_LIMIT,) * 2)
    while (path := pipe.recv()) is not None:
        readers = [SuffixReader(), StackReader()]
        if FrameReader().verify_suffix(path):
            readers.append(FrameReader())
        outcomes = []
        for reader in readers:
            try:
                array, meta = reader.get_data(reader.read(path))
                shape = tuple(meta["spatial_shape"])
                fits = array.shape[: len(shape)] == shape and array.ndim - len(shape) <= 2
                fits = fits and bool(np.isfinite(meta["affine"]).all() and np.linalg.det(meta["affine"]) != 0)
                outcomes.append(("read" if fits else "misfit", f"{array.shape} {shape} {meta['affine']}"))
            except InputError as error:
                named = str(error).removeprefix("cannot read ").startswith(str(Path(path).parent))
                outcomes.append(("refused" if named else "exception", str(error)))
            except BaseException as error:
                outcomes.append(("exception", f"{type(error).__name__}: {error}"))
        pipe.send(outcomes)


class Reader:
    """A process that reads; it is started again when it ended or was ended."""

    def __init__(self) -> None:
        self.process: multiprocessing.process.BaseProcess | None = None

    def read(self, path: Path) -> list[tuple[str, str]]:
        """Return the outcome and a detail for each reader."""
        if self.process is None:
            context = multiprocessing.get_context("spawn")
            self.pipe, theirs = context.Pipe()
            self.process = context.Process(target=read_all, args=(theirs,), daemon=True)
            self.process.start()
            theirs.close()
            self.wait = 120  # the imports
        self.pipe.send(str(path))
        try:
            if self.pipe.poll(self.wait):
                self.wait = TIME_LIMIT_S
                return self.pipe.recv()
            outcome = "hang"
        except EOFError:
            outcome = "abort"
        self.process.kill()
        self.process.join()
        detail = f"exit code {self.process.exitcode}"
        self.process = None
        return [(outcome, detail)]


def main() -> None:
    """Run the command and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=3000, help="how many damaged files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the files that are neither read nor refused")
    args = parser.parse_args()
    counts: dict[str, Counter] = {}
    reader = Reader()
    with tempfile.TemporaryDirectory() as folder:
        samples = write_samples(Path(folder))
        for kind, sample in samples.items():
            outcomes = reader.read(sample)
            if any(outcome != "read" for outcome, _ in outcomes[:2]):
                sys.exit(f"the undamaged {kind} is not read: {outcomes}")
        for number in range(args.files):
            kind = list(samples)[number % len(samples)]
            copy = Path(folder) / "damaged"
            path = write_damaged(samples[kind], copy, random.Random(f"{args.seed} {number}"))
            outcomes = reader.read(path)
            counts.setdefault(kind, Counter()).update(outcome for outcome, _ in outcomes)
            bad = [one for one in outcomes if one[0] not in ("read", "refused")]
            for outcome, detail in bad:
                print(f"{kind}, file {number}: {outcome}, {detail}", flush=True)
            if bad and args.keep:
                shutil.copytree(copy, args.keep / f"{number}_{kind.replace(' ', '_')}", dirs_exist_ok=True)
            shutil.rmtree(copy)
    print(f"| format | {' | '.join(OUTCOMES)} |\n|---|{'---|' * len(OUTCOMES)}")
    total = sum(counts.values(), Counter())
    for kind, count in {**counts, "all": total}.items():
        print(f"| {kind} | {' | '.join(str(count[outcome]) for outcome in OUTCOMES)} |")
    sys.exit(any(total[outcome] for outcome in OUTCOMES[2:]))


if __name__ == "__main__":
    main()
