"""What dann_at_scale.py needs beside its training: options, a run folder, metrics."""

import argparse
import errno
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import signal
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from .run import parse

SAVED = 75  # EX_TEMPFAIL: stopped by SIGTERM with everything saved, to be resumed
DEFAULTS = {
    "steps": 2000,
    "batch_size": 64,
    "checkpoint_every": 20,
    "dtype": "float32",
    "scale": 1.0,
    "seed": 0,
    "remat": False,
}
FREE = {"checkpoint_every"}  # may be another after a resumption
NUMBERS = ("loss", "label_loss", "domain_loss", "domain_accuracy")
RULES = {
    "steps": (lambda v: 0 < v < 10**9, "between 1 and 999999999"),
    "batch-size": (lambda v: v > 0, "positive"),
    "checkpoint-every": (lambda v: v > 0, "positive"),
    "seed": (lambda v: 0 <= v < 2**31, "between 0 and 2147483647"),
    "num-processes": (lambda v: v > 0, "positive"),
    "timeout": (lambda v: 0 < v < 10**6, "between 1 and 999999"),
}


def read_options(doc: str | None) -> argparse.Namespace:
    """Returns the options, checked; of a run to be resumed, with what it was given.

    ``refuse`` among them prints what is wrong and exits with status 2.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, d = parser.add_argument, DEFAULTS
    path = pathlib.Path
    add("--data", type=path, help="folder or .npz of images (default: digits)")
    add("--steps", type=int, help=f"training steps (default: {d['steps']})")
    text = "examples of each domain in a step, over all devices"
    text += f" (default: {d['batch_size']})"
    add("--batch-size", type=int, help=text)
    text = f"steps between two checkpoints (default: {d['checkpoint_every']})"
    add("--checkpoint-every", type=int, help=text)
    add("--output", type=path, metavar="RUN", help="new folder (default: in runs)")
    text = "folder of a run to go on with; if --output is the same, RUN may be new"
    add("--resume", type=path, metavar="RUN", help=text)
    text = "address of the host of process 0, as the other hosts reach it"
    add("--coordinator", metavar="HOST:PORT", help=text)
    add("--num-processes", type=int, help="number of processes")
    add("--process-id", type=int, help="number of this process, from 0")
    text = "seconds to wait for another process (default: 60)"
    add("--timeout", type=int, default=60, help=text)
    text = f"of the computation; parameters are float32 (default: {d['dtype']})"
    add("--dtype", choices=("float32", "bfloat16"), help=text)
    text = "recompute activations in the backward pass: less memory, more time"
    add("--remat", action="store_true", default=None, help=text)
    text = f"final strength of the reversal (default: {d['scale']})"
    add("--scale", type=float, help=text)
    text = f"of weights, dropout and data order (default: {d['seed']})"
    add("--seed", type=int, help=text)
    args = parse(parser, **RULES)
    args.refuse = parser.error
    _check_processes(args)
    if args.resume and args.output and args.resume.resolve() != args.output.resolve():
        args.refuse(f"--output must be absent or equal to --resume, got {args.output}")
    args.folder = args.resume or args.output
    if args.output and not args.folder.exists():
        args.resume = None
    args.saved = _read_configuration(args) if args.resume else {}
    for name, default in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, args.saved.get(name, default))
    if args.folder is None:
        args.folder = path("runs", f"dann_at_scale-{time.strftime('%Y%m%d-%H%M%S')}")
    if not args.resume and args.folder.exists():
        args.refuse(f"--output must be a new folder, got {args.folder}")
    return args


def _check_processes(args: argparse.Namespace) -> None:
    """Refuses options of several processes that do not fit each other."""
    several = args.coordinator, args.num_processes, args.process_id
    if several == (None, None, None):
        return
    if None in several:
        rule = "given together with --num-processes and --process-id"
        args.refuse(f"--coordinator must be {rule}, got {several}")
    host, _, port = args.coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        args.refuse(f"--coordinator must be HOST:PORT, got {args.coordinator}")
    if not 0 <= args.process_id < args.num_processes:
        rule = f"between 0 and {args.num_processes - 1}"
        args.refuse(f"--process-id must be {rule}, got {args.process_id}")
    if not (args.output or args.resume):
        args.refuse("--output must be given to several processes, got none")


def _read_configuration(args: argparse.Namespace) -> dict[str, Any]:
    """Returns what a run was started with."""
    file = args.resume / "configuration.json"
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        known = {k: type(v) for k, v in (DEFAULTS | {"data": ""}).items()}
        if {k: type(v) for k, v in saved.items()} != known:
            raise ValueError(f"{file} is of another kind")
    except (OSError, ValueError, AttributeError) as error:
        args.refuse(f"--resume must be the folder of a run, got {args.resume}: {error}")
        raise
    return saved


def connect(args: argparse.Namespace) -> None:
    """Connects the processes of one run, if there are several."""
    if args.coordinator:
        several = f"{args.num_processes} processes at {args.coordinator}"
        print(f"Waiting up to {args.timeout} s for {several}", file=sys.stderr)
        jax.distributed.initialize(
            args.coordinator,
            args.num_processes,
            args.process_id,
            initialization_timeout=args.timeout,
            heartbeat_timeout_seconds=args.timeout,
            coordinator_bind_address=args.coordinator,  # not every address of the host
            # All devices of the host. Under Slurm JAX would take one.
            cluster_detection_method="deactivate",
        )


class Folder:
    """The folder of a run: its configuration, metrics and checkpoints.

    Attributes:
      path: Of the folder.
      checkpoints: The folder of the checkpoints.
      configuration: What determines the result, and is in every checkpoint.
    """

    def __init__(self, args: argparse.Namespace, data: str):
        """Checks an old folder against the options, or makes a new one.

        Args:
          args: The options.
          data: The fingerprint of the data.
        """
        self.path = args.folder.resolve()
        self.checkpoints = self.path / "checkpoints"
        options = {name: getattr(args, name) for name in DEFAULTS} | {"data": data}
        self.configuration = {k: v for k, v in options.items() if k not in FREE}
        self.agree("options, data and folder", [options, str(self.path)])
        if args.resume:
            self.compare(args.saved, args.refuse)
            for path in (self.checkpoints, self.path / "metrics.jsonl"):
                if path.resolve() != path:
                    rule = "inside the folder, and no link out of it"
                    args.refuse(f"{path} must be {rule}, got {path.resolve()}")
        elif jax.process_index() == 0:
            # In one move: there is no folder without a configuration.
            draft = self.path.with_name(f"{self.path.name}.{os.getpid()}.part")
            draft.mkdir(parents=True, exist_ok=True)
            text = json.dumps(options, indent=1)
            (draft / "configuration.json").write_text(text, encoding="utf-8")
            try:
                draft.rename(self.path)
            except OSError:
                if not self.path.exists():
                    raise
                shutil.rmtree(draft)  # another job was first
                args.refuse(f"--output must be a new folder, got {self.path}")
        self._lock = None
        if jax.process_index() == 0:
            self._lock = (self.path / "configuration.json").open("r+")
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._lock.close()
                rule = "the folder of a run that has ended"
                args.refuse(f"--resume must be {rule}, got {self.path}")
            except OSError as error:
                if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                    raise
                print(f"{self.path} cannot be locked: {error}", file=sys.stderr)
        multihost_utils.sync_global_devices("the folder is there")
        self._stop = False
        if jax.process_count() == 1:  # in several, JAX catches it
            signal.signal(signal.SIGTERM, self._request_stop)

    def __enter__(self) -> "Folder":
        """Returns the folder."""
        return self

    def __exit__(self, kind: Any, error: BaseException | None, *_: Any) -> None:
        """Lets other processes use the folder; adds to an error how to go on."""
        if self._lock:
            self._lock.close()
        if error:
            error.add_note(f"What was saved is whole: go on with --resume {self.path}")

    def agree(self, name: str, value: Any) -> None:
        """Ends the run if a value, as JSON, is not the same in every process."""
        own = zlib.crc32(json.dumps(value).encode())
        found = multihost_utils.process_allgather(np.uint32(own))
        if (found != own).any():
            sys.exit(f"The {name} must be the same in every process, got {value}")

    def compare(self, saved: Mapping[str, Any], refuse: Callable[[str], Any]) -> None:
        """Refuses a configuration that is not the one of this run."""
        for name, value in self.configuration.items():
            if saved[name] != value:
                option = name.replace("_", "-")
                refuse(f"--{option} must be {saved[name]} as in the run, got {value}")

    def exit_saved(self, step: int) -> None:
        """Ends a run that SIGTERM stopped, with the status that says so."""
        print(f"SIGTERM: saved step {step} in {self.path}", file=sys.stderr)
        sys.exit(SAVED)

    def _request_stop(self, *_: Any) -> None:
        self._stop = True

    def must_stop(self, step: int) -> bool:
        """Returns whether SIGTERM came; every process says so at the same step."""
        return self._stop or multihost_utils.reached_preemption_sync_point(step)


def _step(line: bytes) -> Any:
    try:
        return json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return None


class Metrics:
    """The file of metrics: a JSON object for each step, written once it is known.

    Each step is written when the next one is under way, so that no device waits.
    """

    def __init__(self, folder: Folder, step: int):
        """Opens the file behind the line of a step; what follows it is cut off."""
        self.path = folder.path / "metrics.jsonl"
        self.waiting: tuple[int, Mapping[str, Any]] | None = None
        self.file = None
        if jax.process_index() == 0:
            self.file = self.path.open("a+b")
            self.file.seek(0)
            for number in range(1, step + 1):
                line = self.file.readline()
                if not line.endswith(b"\n") or _step(line) != number:
                    self.file.close()
                    sys.exit(f"{self.path} must hold steps 1 to {step}, got {line!r}")
            self.file.truncate(self.file.tell())

    def add(self, step: int, found: Mapping[str, Any]) -> None:
        """Takes the metrics of a step, and writes those of the step before."""
        self.flush()
        self.waiting = step, found

    def sync(self) -> None:
        """Writes all metrics and waits until they are on the disk."""
        self.flush()
        if self.file:
            os.fsync(self.file.fileno())

    def flush(self) -> None:
        """Writes the metrics that wait; a loss that is not finite ends the run."""
        if self.waiting is None:
            return
        step, found = self.waiting
        self.waiting = None
        row = {"step": step} | {name: float(found[name]) for name in NUMBERS}
        if not np.isfinite(row["loss"]):
            sys.exit(f"The loss must be finite, got {row['loss']} at step {step}.")
        if self.file:
            self.file.write(json.dumps(row).encode() + b"\n")
            self.file.flush()

    def __enter__(self) -> "Metrics":
        """Returns the open file."""
        return self

    def __exit__(self, *_: Any) -> None:
        """Closes the file; what waits belongs to no checkpoint."""
        if self.file:
            self.file.close()


def sha256(state: Any, *texts: str) -> str:
    """Returns a digest of every name, shape, dtype and bit of a replicated state."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf.addressable_data(0))
        name = f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}"
        digest.update(name.encode() + array.tobytes())
    for text in texts:
        digest.update(text.encode())
    return digest.hexdigest()


def run_to_end(main: Callable[[], Any]) -> None:
    """Runs a program of one or several processes; one that fails ends the others."""
    try:
        main()
    except BaseException as error:
        saved = isinstance(error, SystemExit) and error.code == SAVED
        if saved or not jax.distributed.is_initialized():
            raise
        # The ordinary way out would wait for the others, and they for this one.
        code: Any = 1
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        elif isinstance(error.code, int):
            code = error.code
        else:
            print(error.code, file=sys.stderr)
        sys.stderr.flush()
        os._exit(code)
