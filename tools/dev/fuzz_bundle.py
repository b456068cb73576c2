"""Try many mutations of a bundle: each must be refused by our own error, or draw the same picture.

    python -m blockcache.tools.dev.fuzz_bundle BUNDLE --count 2000
    python -m blockcache.tools.dev.fuzz_bundle BUNDLE --count 600 --bits

Mutations run in a process of their own, so that a crash is an outcome like another. ``--bits``
flips one bit of the manifest each time and signs nothing: every flip must be refused. The exit code
is 1 where a mutation crashed, raised another library's error, or drew another picture unnoticed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from blockcache.runtime import BlockCacheError, Bundle, Pipeline, Session
from blockcache.runtime.bundles.manifest import MANIFEST
from blockcache.tools.dev.bundle_mutations import Mutation, flip_bit, mutate

PATIENCE_S = 60
"""A mutation that takes longer hangs."""

REFUSED, SAME, OTHER = "refused", "same picture", "other picture"
LATE, FOREIGN, CRASH = "refused at the first request", "foreign exception", "crash"


@dataclass(frozen=True)
class Outcome:
    """How one mutation ended."""

    seed: int
    mutation: str
    undetectable: bool  # see ``Mutation``
    end: str
    detail: str  # the error

    @property
    def allowed(self) -> bool:
        """Whether it may end so."""
        undetected = self.undetectable and self.end in (OTHER, LATE)
        return self.end in (REFUSED, SAME) or undetected


def fuzz(bundle: Path, seeds: Iterable[int], *, bits: bool = False) -> Iterator[Outcome]:
    """Every seed's outcome, in order."""
    waiting = list(seeds)
    while waiting:
        for outcome in _worker(bundle, list(waiting), bits):
            waiting.remove(outcome.seed)
            yield outcome


def _worker(bundle: Path, seeds: list[int], bits: bool) -> Iterator[Outcome]:
    """Outcomes from one process, until it is through or has crashed at one."""
    command = [sys.executable, "-m", "blockcache.tools.dev.fuzz_bundle", str(bundle), "--worker"]
    with tempfile.TemporaryFile("w+") as listed:
        listed.write("".join(f"{seed}\n" for seed in seeds))
        listed.seek(0)
        process = subprocess.Popen(
            [*command, *(["--bits"] if bits else [])],
            stdin=listed,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
    done = 0
    with process:
        assert process.stdout is not None
        for line in process.stdout:
            yield Outcome(**json.loads(line))
            done += 1
    if done < len(seeds):
        yield Outcome(seeds[done], "", False, CRASH, f"exit status {process.returncode}")


# -- in the worker ---------------------------------------------------------------------------------


def _work(bundle: Path, *, bits: bool) -> None:
    """Print the outcome of every seed that comes in, one a line."""
    report = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # engine libraries print too
    with report, tempfile.TemporaryDirectory() as scratch:
        base, work = Path(scratch) / "base", Path(scratch) / "bundle"
        shutil.copytree(bundle, base)
        shutil.copytree(base, work, copy_function=os.link)
        opened = Bundle.open(work)
        inputs = _inputs(opened)
        # Held open: what a mutation leaves alone is shared with it, not loaded again.
        held = _open(opened, opened.preset_names, whole=opened.pipeline is not None)
        picture = _draw(held, inputs)
        for line in sys.stdin:
            shutil.rmtree(work)
            shutil.copytree(base, work, copy_function=os.link)
            signal.alarm(PATIENCE_S)
            outcome = _outcome(work, int(line), opened, inputs, picture, bits)
            signal.alarm(0)
            print(json.dumps(asdict(outcome)), file=report, flush=True)


def _outcome(
    work: Path,
    seed: int,
    base: Bundle,
    inputs: Mapping[str, np.ndarray],
    picture: Sequence[np.ndarray],
    bits: bool,
) -> Outcome:
    mutation = _flip_manifest(work, seed) if bits else mutate(work, seed)

    def ended(end: str, error: Exception | None = None) -> Outcome:
        detail = f"{type(error).__name__}: {error}"[:300] if error is not None else ""
        return Outcome(seed, mutation.text, mutation.undetectable, end, detail)

    try:
        bundle = Bundle.open(work)
        opened = _open(bundle, base.preset_names, whole=base.pipeline is not None)
    except BlockCacheError as error:
        return ended(REFUSED, error)
    except Exception as error:  # what this looks for
        return ended(FOREIGN, error)
    try:
        drawn = _draw(opened, inputs)
    except BlockCacheError as error:
        return ended(LATE, error)
    except Exception as error:
        return ended(FOREIGN, error)
    same = all(np.array_equal(a, b) for a, b in zip(drawn, picture, strict=True))
    return ended(SAME if same else OTHER)


def _flip_manifest(folder: Path, seed: int) -> Mutation:
    path = folder / MANIFEST
    content = flip_bit(path.read_bytes(), random.Random(seed))
    path.unlink()
    path.write_bytes(content)
    return Mutation("a bit of the manifest flipped")


def _inputs(bundle: Bundle) -> dict[str, np.ndarray]:
    """Noise and conditions of one image with guidance, at the model's own sizes."""
    rng = np.random.default_rng(0)
    sizes = bundle.model.sizes.for_images(1, guided=False)
    shape = (1, bundle.model.channels, sizes.height, sizes.width)
    made = {"noise": rng.standard_normal(shape, np.float32)}
    for spec in bundle.model.conditions:
        whole = spec.dtype == "int64"
        values = rng.integers(0, 2, spec.shape(sizes)) if whole else rng.random(spec.shape(sizes))
        made[spec.name] = values.astype(np.int64 if whole else np.float32)
    return made


@dataclass(frozen=True)
class _Opened:
    sessions: Sequence[Session]
    pipeline: Pipeline | None  # of the first preset


def _open(bundle: Bundle, presets: Sequence[str], *, whole: bool) -> _Opened:
    """Every preset, and where the bundle is of a whole pipeline that, too."""
    sessions = [Session.open(bundle, preset=name) for name in presets]
    return _Opened(sessions, Pipeline.open(bundle, preset=presets[0]) if whole else None)


def _draw(opened: _Opened, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The latents of the same request by every session, and a prompt's and a picture's picture."""
    latents = _denoise(opened.sessions, inputs)
    if opened.pipeline is None:
        return latents
    prompted = opened.pipeline("abc", "x", seeds=[0])
    again = opened.pipeline("abc", seeds=[1], image=prompted.images, strength=0.5)
    return [*latents, prompted.images, again.images]


def _denoise(sessions: Sequence[Session], inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The latents of the same request by every session."""
    conditions = {name: values for name, values in inputs.items() if name != "noise"}
    prompt = conditions.pop("encoder_hidden_states")
    return [
        session.denoise(
            inputs["noise"],
            prompt,
            np.zeros_like(prompt),
            conditions=conditions,
            negative_conditions={name: np.zeros_like(v) for name, v in conditions.items()},
            seeds=range(len(inputs["noise"])),
        ).latents
        for session in sessions
    ]


# -- the report ------------------------------------------------------------------------------------


def main() -> int:
    """Run the mutations, print how they ended."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("bundle", type=Path, help="what blockcache compile wrote; it is copied")
    parser.add_argument("--count", type=int, default=2000, help="mutations to try")
    parser.add_argument("--first", type=int, default=0, help="seed of the first one")
    parser.add_argument("--bits", action="store_true", help="flip bits of the manifest instead")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        _work(options.bundle, bits=options.bits)
        return 0
    seeds = range(options.first, options.first + options.count)
    outcomes = list(fuzz(options.bundle, seeds, bits=options.bits))
    wrong = [outcome for outcome in outcomes if not outcome.allowed]
    unseen = [outcome for outcome in outcomes if outcome.allowed and outcome.end in (OTHER, LATE)]
    for title, listed in (("Only a signature could tell", unseen), ("Faults", wrong)):
        print(f"{title}: {len(listed)}")
        for outcome in listed:
            print(f"  {outcome.seed}: {outcome.mutation}: {outcome.end} {outcome.detail}")
    counts = Counter(outcome.end for outcome in outcomes)
    print(", ".join(f"{count} {end}" for end, count in counts.most_common()))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
