"""Kill ``compile`` and ``build`` at random moments, and look at what is left.

    python -m blockcache.tools.dev.kills --count 40

Each command replaces what an earlier one made: ``compile`` a bundle of other weights, ``build``
engines of another level. It is started again after every kill, so later kills meet what earlier
ones left; when it gets through, its result is compared with that of a run which nobody stopped.
After every kill the old bundle or the new one must open, no process may be left, and the command
must have said in one line how to go on. Exit 1 where one of these failed.

Kills come while the command has its signal handlers set. Before and after it is Python that starts
or ends, and takes a signal as in every Python program; the work then has not begun, or is done.
TensorRT does not always build the same bytes from the same graph, so of engines the keys and the
names of files are compared, and every plan is checked against its hash.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from blockcache.runtime import BlockCacheError, Bundle
from blockcache.runtime.bundles.manifest import MANIFEST
from blockcache.runtime.engines.files import built_targets, read_engines, read_plan
from blockcache.runtime.files import PARTIAL
from blockcache.tools.report.tables import markdown_table

if TYPE_CHECKING:
    from blockcache.runtime.engines.files import EngineSet

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}
PROGRAM = "blockcache.tools.cli"
MESSAGE = "interrupted; the same command resumes"
MARK = "BLOCKCACHE_KILLS"
"""Environment variable by which a command's processes are known, also when it is gone."""

TARGET = "sm80"
NOT_COMPARED = ("presets.svg", ".lock")
"""No part of a bundle: the plot has its date in it."""

PATIENCE_S = 30
"""A command that does not end so soon after a signal hangs; so does a worker that outlives it."""

WIDTH = 8
UNET: dict[str, Any] = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (8, 8),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
SCHEDULER = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@dataclass(frozen=True)
class Work:
    """A command, the folder that it finds, and the one that it leaves where nobody stops it."""

    arguments: tuple[str, ...]
    before: Path
    after: Path
    seconds: float  # that it takes

    @property
    def command(self) -> str:
        """Its name: compile or build."""
        return self.arguments[0]


@dataclass(frozen=True)
class Outcome:
    """What one run left behind; it was killed, or it got through."""

    command: str
    killed_by: str  # a signal, or nothing
    moment: float  # seconds after its handlers stood
    faults: tuple[str, ...]


def try_kills(
    work: Work, signals: Iterable[signal.Signals], rng: random.Random, scratch: Path
) -> Iterator[Outcome]:
    """Kill a command once by each signal; let it through at the end, and whenever it is faster."""
    folder = _copied(work.before, scratch)
    waiting = list(signals)
    while waiting:
        moment, earlier = rng.uniform(0, work.seconds), _partials(folder)
        run = _Run.start(work.arguments, folder)
        if run.ends_within(moment) or not run.is_at_work():
            run.ends_within(PATIENCE_S)
            yield _through(work, run, moment, folder)
            folder = _copied(work.before, scratch)
        else:
            number = waiting.pop(0)
            run.send(number)
            faults = run.faults(number) + _faults_of_bundle(folder, (work.before, work.after))
            left = _partials(folder) - earlier
            if left and number is not signal.SIGKILL:  # which leaves no time to delete anything
                faults.append(f"left {sorted(left)}")
            yield Outcome(work.command, number.name, moment, tuple(faults))
    run = _Run.start(work.arguments, folder)
    run.ends_within(10 * work.seconds + PATIENCE_S)
    yield _through(work, run, 0.0, folder)


def _through(work: Work, run: _Run, moment: float, folder: Path) -> Outcome:
    return Outcome(work.command, "", moment, (*run.faults(None), *_differences(work, folder)))


def _copied(source: Path, scratch: Path) -> Path:
    folder = Path(tempfile.mkdtemp(dir=scratch)) / "bundle"
    return shutil.copytree(source, folder)


# -- one run of a command --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    """A command at work."""

    process: subprocess.Popen[bytes]
    mark: str
    log: Path

    @classmethod
    def start(cls, arguments: Sequence[str], folder: Path) -> _Run:
        """Start it, and wait until it handles signals itself."""
        log = folder.parent / f"log-{time.monotonic_ns()}"
        mark = f"{MARK}={log}"
        command = [sys.executable, "-m", PROGRAM, *arguments[:-1]]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*command, arguments[-1].format(folder=folder)],
                env={**os.environ, MARK: str(log)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=output,
                start_new_session=True,
            )
        while process.poll() is None and not _handles(process.pid, signal.SIGTERM):
            time.sleep(0.005)
        return cls(process, mark, log)

    def is_at_work(self) -> bool:
        """Whether it still handles signals itself."""
        return self.process.poll() is None and _handles(self.process.pid, signal.SIGTERM)

    def ends_within(self, seconds: float) -> bool:
        """Whether it gets through by itself in this time."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def send(self, number: signal.Signals) -> None:
        """Send a signal as it comes in life, and wait for the end.

        Ctrl-C goes to all processes of the terminal's group; other signals go to one.
        """
        if number is signal.SIGINT:
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)
        if not self.ends_within(PATIENCE_S):
            self.process.kill()
            self.process.wait()

    def faults(self, number: signal.Signals | None) -> list[str]:
        """What is wrong with its exit code, its last words, or processes that it left."""
        faults = []
        status = self.process.returncode
        through = number is None or status == 0  # it may end just before the signal
        wanted = 0 if through or number is None else EXIT_CODES[number]
        said = self.log.read_text(errors="replace")
        last = said.rstrip().rpartition("\n")[2]
        if status != wanted:
            faults.append(f"exit code {status} instead of {wanted}: {last}")
        if not through and number is not signal.SIGKILL and last != MESSAGE:
            faults.append(f"last words {last!r}")
        if number is not signal.SIGKILL:  # of a worker that was just starting
            noise = ("Traceback", "Exception ignored")
            faults += [f"said {word}" for word in noise if word in said]
        left = self._left()
        if left:
            faults.append(f"left running: {left}")
        return faults

    def _left(self) -> list[str]:
        """Processes of this run that are still there; they get a moment to end."""
        end = time.monotonic() + PATIENCE_S / 10
        while (left := _processes_with(self.mark)) and time.monotonic() < end:
            time.sleep(0.02)
        return left


def _handles(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = re.search(r"SigCgt:\s*([0-9a-f]+)", status)
    return caught is not None and bool(int(caught[1], 16) >> (number - 1) & 1)


def _processes_with(mark: str) -> list[str]:
    """Running processes that have this in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes().split(b"\0"):
                words = path.with_name("cmdline").read_bytes().split(b"\0")
                found.append(f"{path.parent.name} {b' '.join(words).decode()[-60:]}")
        except OSError:  # it ended meanwhile, or is another user's
            continue
    return found


# -- what a folder holds ---------------------------------------------------------------------------


def _partials(folder: Path) -> set[str]:
    """Unfinished files and folders."""
    return {str(path.relative_to(folder)) for path in folder.rglob(f"*{PARTIAL}")}


def _faults_of_bundle(folder: Path, wanted: Sequence[Path]) -> list[str]:
    """Why a folder is not one of the wanted bundles with engines that can be read."""
    try:
        bundle = Bundle.open(folder)
        for target in built_targets(bundle):
            engines = read_engines(bundle, target)
            for segment in bundle.segments:
                if segment.name in engines.engines:
                    read_plan(bundle, engines, segment)
    except BlockCacheError as error:
        return [f"does not open: {error}"]
    if _identity(bundle) not in [_identity(Bundle.open(each)) for each in wanted]:
        return ["opens, but as neither the old bundle nor the new one"]
    return []


def _identity(bundle: Bundle) -> object:
    """What tells a bundle from another: its manifest, and the keys of its engines."""
    built = [read_engines(bundle, target) for target in built_targets(bundle)]
    return (bundle.folder / MANIFEST).read_bytes(), [_keys(engines) for engines in built]


def _keys(engines: EngineSet) -> dict[str, str]:
    return {name: entry.key for name, entry in engines.engines.items()}


def _differences(work: Work, folder: Path) -> list[str]:
    """How what a resumed command left differs from what an uninterrupted one leaves."""
    made, wanted = _files(folder), _files(work.after)
    faults = (
        [f"left over: {sorted(made.keys() - wanted.keys())}"] if made.keys() - wanted.keys() else []
    )
    faults += (
        [f"missing: {sorted(wanted.keys() - made.keys())}"] if wanted.keys() - made.keys() else []
    )
    common = sorted(made.keys() & wanted.keys())
    other = [name for name in common if "engines/" not in name and made[name] != wanted[name]]
    if other:
        faults.append(f"other bytes: {other}")
    return faults + _faults_of_bundle(folder, [work.after])


def _files(folder: Path) -> dict[str, bytes]:
    """All files of a folder but those that are no part of it."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in NOT_COMPARED
    }


# -- what is killed --------------------------------------------------------------------------------


def make_works(scratch: Path) -> list[Work]:
    """A compile over a bundle of other weights, and a build over engines of another level."""
    calibration = _write_calibration(scratch / "prompts.safetensors")
    models = [_write_model(scratch / f"model-{seed}", seed) for seed in (0, 1)]
    measured = (
        *("--calibration", str(calibration), "--profile-prompts", "1", "--profile-seeds", "1"),
        *("--align-images", "2", "--precision", "bfloat16"),
    )
    presets = ("--preset", "dpm:3", "--preset", "dpm:3:0.5:scale-shift")
    old, new = (("compile", *measured, *presets, str(model), "{folder}") for model in models)
    level = ("build", "--target", TARGET, "--jobs", "2", "--level")
    compiled = _uninterrupted(old, None, scratch / "old")
    built = _uninterrupted((*level, "1", "{folder}"), compiled.after, scratch / "built")
    return [
        _uninterrupted(new, compiled.after, scratch / "new"),
        _uninterrupted((*level, "2", "{folder}"), built.after, scratch / "rebuilt"),
    ]


def _uninterrupted(arguments: tuple[str, ...], before: Path | None, after: Path) -> Work:
    """Run a command on a copy of ``before``, and measure how long it takes."""
    if before is not None:
        shutil.copytree(before, after)
    else:
        after.mkdir()
    run = _Run.start(arguments, after)
    begin = time.monotonic()
    run.process.wait()
    seconds = time.monotonic() - begin
    if run.process.returncode:
        raise SystemExit(f"{arguments} failed:\n{run.log.read_text()}")
    return Work(arguments, before or after, after, seconds)


def _write_model(folder: Path, seed: int) -> Path:
    """A tiny U-Net with random weights, and its scheduler, as diffusers saves them."""
    import torch
    from diffusers import DDIMScheduler, UNet2DConditionModel

    torch.manual_seed(seed)
    UNet2DConditionModel(**UNET).save_pretrained(folder / "unet")
    DDIMScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
    return folder


def _write_calibration(file: Path) -> Path:
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    names = ("encoder_hidden_states", "negative.encoder_hidden_states")
    save_file({name: rng.standard_normal((1, 3, WIDTH), np.float32) for name in names}, file)
    return file


# -- the report ------------------------------------------------------------------------------------


def table(outcomes: Sequence[Outcome]) -> str:
    """Outcomes as markdown: a row for each command and way to end."""
    rows = []
    for command in dict.fromkeys(outcome.command for outcome in outcomes):
        for name in (*(number.name for number in SIGNALS), ""):
            these = [o for o in outcomes if (o.command, o.killed_by) == (command, name)]
            faults = sum(bool(o.faults) for o in these)
            rows.append((command, name or "none: got through", str(len(these)), str(faults)))
    return markdown_table(("command", "ended by", "runs", "with faults"), rows, words=2)


def main() -> int:
    """Kill both commands, print how each run ended that has a fault, and a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--count", type=int, default=40, help="kills by each signal and command")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--command", choices=("compile", "build"), help="only this one")
    options = parser.parse_args()
    outcomes = []
    with tempfile.TemporaryDirectory() as scratch:
        for work in make_works(Path(scratch)):
            if options.command not in (None, work.command):
                continue
            print(f"{work.command}: {work.seconds:.1f} s uninterrupted", flush=True)
            rng = random.Random(options.seed)
            signals = list(SIGNALS) * options.count
            rng.shuffle(signals)
            for outcome in try_kills(work, signals, rng, Path(scratch)):
                outcomes.append(outcome)
                if outcome.faults:
                    print(json.dumps(outcome.__dict__), flush=True)
    print(table(outcomes))
    return 1 if any(outcome.faults for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
