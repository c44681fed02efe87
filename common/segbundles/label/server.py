"""Find the bundles to serve with MONAI Label, and run its server."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

from segbundles.commands import find_bundle, known_bundles
from segbundles.errors import fail
from segbundles.facts import facts_path, sha256
from segbundles.files import check_writable, read_json, write_json
from segbundles.label.environment import clean_environment, log_end

__all__ = ["LabelServer", "find_bundles"]

# some of these are missing in MONAI Label's own list
_IMAGES = ("nii.gz", "nii", "nrrd", "mha", "tif", "tiff", "png", "bmp", "jpg", "jpeg")
_WORK = "segbundles_label"
_APP = '''"""Written by `segbundles label`; the app is in the library."""

from segbundles.label.app import BundlesApp  # noqa: F401
'''
_SHIPPED = "shipped.json"
#: the other members of an ensemble, beside the copy of the first one's weights; MONAI Label serves the shortest name
MEMBERS = "member_*.pt"
_STOP_SECONDS = 20


def find_bundles(names: Sequence[str] = ()) -> tuple[dict[str, Path], list[str]]:
    """Find the bundles to serve.

    Args:
        names: folders of bundles, or names of bundles of this project. If empty, all bundles of this project that have
            weights.

    Returns:
        Folders by name, and the names of this project's bundles that are left out because they have no weights.

    Raises:
        ValueError: when a bundle does not exist or has no weights, two have the same name, or none is found.
    """
    if not names:
        ours = Path(__file__).resolve().parents[3] / "bundles"
        known = {name: root for name, root in known_bundles().items() if root.parent == ours}
        found = {name: root for name, root in known.items() if _has_weights(root)}
        without = [name for name in known if name not in found]
        if not found:
            fail(f"no bundle with weights in {ours}: {_training(ours / 'NAME')}, or give --bundles folders.")
        return found, without
    found = {}
    for name in names:
        root = find_bundle(name).resolve()
        if not _has_weights(root):
            fail(f"{root.name} has no weights, {root / 'models' / 'model.pt'}: {_training(root)}, or leave it out.")
        if root.name in found:
            fail(f"two bundles are named {root.name}, {found[root.name]} and {root}: rename one of the folders.")
        found[root.name] = root
    return found, []


def _has_weights(root: Path) -> bool:
    return (root / "models" / "model.pt").is_file()


def _training(root: Path) -> str:
    return (
        f"train it (`python -m monai.bundle run training --bundle_root {root} --config_file {root}/configs/train.json "
        "--dataset_dir FOLDER`)"
    )


class LabelServer:
    """Run a MONAI Label server that segments and trains with bundles, in its own process.

    Use it in a ``with`` block: the server starts at the beginning and stops at the end, together with any training that
    it runs.

    It serves copies of the bundles in ``STUDIES/segbundles_label``. Configs are copied at every start; weights and
    their facts are copied until a training there has replaced them.

    With a single bundle, MONAI Label scores the images by itself: at the start, and after each training.

    Args:
        python: Python of the environment, see :func:`segbundles.label.make_environment`.
        studies: folder of images; MONAI Label keeps labels and its records in it.
        bundles: folders of bundles by name.
        host: address to listen on.
        port: port to listen on.
        weights: weights to serve instead of those of the bundle, which must be the only one; several are an ensemble.

    Raises:
        ValueError: when there are weights for several bundles, one of them is missing, the folder is missing or cannot
            be written to, the port is taken, or the server ends by itself; the message has the end of its log.
    """

    def __init__(
        self,
        python: str | os.PathLike,
        studies: str | os.PathLike,
        bundles: Mapping[str, Path],
        host: str = "127.0.0.1",
        port: int = 8000,
        weights: Sequence[str | os.PathLike] = (),
    ) -> None:
        self.python = Path(python)
        self.weights = [Path(path).expanduser() for path in weights]
        if self.weights and len(bundles) != 1:
            fail(f"weights are given, and there are {len(bundles)} bundles to serve: give --bundles one of them.")
        for missing in (path for path in self.weights if not path.is_file()):
            fail(f"there are no weights at {missing}: give files that a training wrote.")
        self.studies = Path(studies).expanduser().absolute()
        self.bundles = dict(bundles)
        self.host = host
        self.port = port
        self.work = self.studies / _WORK
        self.log = self.work / "server.log"
        #: bundles whose weights a training in this folder has replaced
        self.trained: list[str] = []
        self._process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        """Return the address for clients on this machine."""
        return f"http://{'127.0.0.1' if self.host == '0.0.0.0' else self.host}:{self.port}"

    def bundle_root(self, name: str) -> Path:
        """Return the folder of the copy that is served."""
        return self.work / "model" / name

    def __enter__(self) -> LabelServer:
        if not self.studies.is_dir():
            fail(f"studies {str(self.studies)!r} is not a folder: give --studies one with the images to label.")
        check_writable(self.studies, "studies")
        self._check_port()
        self._copy()
        command = [str(self.python), "-m", "monailabel.main", "start_server", "--app", str(self.work)]
        command += ["--studies", str(self.studies), "--host", self.host, "--port", str(self.port)]
        command += ["--conf", "models", ",".join(self.bundles)]
        variables = {
            "MONAI_LABEL_DATASTORE_FILE_EXT": json.dumps([f"*.{suffix}" for suffix in _IMAGES]),
            "MONAI_LABEL_AUTO_UPDATE_SCORING": str(len(self.bundles) == 1).lower(),
            "MONAI_LABEL_SESSION_PATH": str(self.work / "sessions"),
            "PATH": os.pathsep.join([str(self.python.parent), os.environ.get("PATH", "")]),
        }
        with self.log.open("wb") as log:
            # with its own session the server can be stopped together with its trainings, and Ctrl-C only reaches us
            self._process = subprocess.Popen(
                command,
                cwd=self.work,
                env={**clean_environment(), **variables},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._signal(signal.SIGTERM)
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:
            # also end what is still running, such as a training
            self._signal(getattr(signal, "SIGKILL", signal.SIGTERM))
            self._process.wait()

    def wait_until_ready(self) -> dict[str, Any]:
        """Wait until the server answers.

        Returns:
            Its description: ``models`` and more.
        """
        opener = build_opener(ProxyHandler({}))
        while True:
            self._check_alive("did not start")
            with suppress(URLError, OSError), opener.open(f"{self.url}/info/", timeout=60) as answer:
                return json.load(answer)
            time.sleep(0.5)

    def wait(self) -> None:
        """Wait for the end of the server, which is an error."""
        self._process.wait()
        self._check_alive("ended")

    def _check_alive(self, what: str) -> None:
        status = self._process.poll()
        if status is not None:
            fail(f"the server {what} (status {status}). Its log, {self.log}, ends with:\n{log_end(self.log)}")

    def _check_port(self) -> None:
        with socket.socket() as probe:
            if os.name != "nt":
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was just closed is free
            try:
                probe.bind((self.host, self.port))
            except (OSError, OverflowError) as error:
                reason = getattr(error, "strerror", None) or error
                fail(f"cannot listen on {self.host}, port {self.port} ({reason}): give another --port or --host.")

    def _copy(self) -> None:
        self.work.mkdir(exist_ok=True)
        (self.work / "main.py").write_text(_APP, encoding="utf-8")
        for name, root in self.bundles.items():
            copy = self.bundle_root(name)
            if (copy / "configs").exists():
                shutil.rmtree(copy / "configs")
            _copy_files(root / "configs", copy / "configs")
            models = copy / "models"
            models.mkdir(exist_ok=True)
            # hashes of the weights that were copied: other weights come from a training
            record = copy / _SHIPPED
            copied = read_json(record) if record.is_file() else {}
            served = {path.name: path for path in sorted((root / "models").glob("*.pt"))}
            names = ["model.pt", *(MEMBERS.replace("*", str(number)) for number in range(2, len(self.weights) + 1))]
            served |= dict(zip(names, self.weights, strict=False))
            for left in (path for path in models.glob(MEMBERS) if path.name not in served):
                left.unlink()  # of an earlier ensemble
                facts_path(left).unlink(missing_ok=True)
            for file, weights in served.items():
                mine = models / file
                if mine.is_file() and sha256(mine) != copied.get(file):
                    self.trained += [] if name in self.trained else [name]
                    continue
                shutil.copyfile(weights, mine)
                copied[file] = sha256(mine)
                facts_path(mine).unlink(missing_ok=True)
                if facts_path(weights).is_file():
                    shutil.copyfile(facts_path(weights), facts_path(mine))
            record.write_text(json.dumps(copied), encoding="utf-8")
            if len(self.weights) > 1:
                config = read_json(copy / "configs" / "inference.json")
                config["weights"] = [str(models / file) for file in names]
                write_json(copy / "configs" / "inference.json", config)

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError, PermissionError):
            if os.name == "nt":
                self._process.send_signal(number)
            else:
                os.killpg(self._process.pid, number)


def _copy_files(source: Path, target: Path) -> None:
    """Copy the contents of files without their modes, so that the copy of a read-only bundle can be replaced."""
    for path in sorted(source.rglob("*")):
        if path.is_file():
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
