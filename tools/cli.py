"""The ``blockcache`` command: expected errors in one line, exit code 1, no traceback.

Whatever takes time to import is imported under the signal handlers, so that Ctrl-C is one line from
the start.
"""

from __future__ import annotations

import errno
import sys
from typing import Any

from blockcache.tools.interrupts import Interrupted, interruptible

RESUMED = ("build", "compile", "demo", "evaluate")
"""Commands that keep what they have finished, and go on from it."""

DISK_ERRORS = {
    errno.ENOSPC: "Free some space and run the same command again.",
    errno.EDQUOT: "Free some space and run the same command again.",
    errno.EROFS: "Choose a folder that can be written.",
    errno.EACCES: "Choose a folder that can be written, or change its permissions.",
    errno.EPERM: "Choose a folder that can be written, or change its permissions.",
}
"""What to do about an error of the disk; all others are faults of ours and keep their traceback."""

EXPORT_PACKAGES = {
    "PIL", "accelerate", "diffusers", "filelock", "matplotlib", "ml_dtypes", "onnx", "onnx_ir",
    "onnxscript", "torch", "transformers",
}  # fmt: skip
"""What the extra ``export`` brings, as modules: a command that needs one says so."""


def main() -> None:
    """Entry point of the ``blockcache`` script."""
    try:
        with interruptible():
            _app()(prog_name="blockcache")
    except Interrupted as stop:
        command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
        resumes = "; the same command resumes" if command in RESUMED else ""
        print(f"interrupted{resumes}", file=sys.stderr)
        sys.exit(stop.exit_code)
    except BrokenPipeError:
        sys.exit(1)
    except Exception as error:
        message = _explained(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(1)


def _explained(error: Exception) -> str | None:
    """An expected error in one line; None for a fault of ours, which keeps its traceback."""
    from blockcache.runtime.errors import BlockCacheError, MissingExtraError

    if isinstance(error, BlockCacheError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        missing = package in EXPORT_PACKAGES
        return str(MissingExtraError.of(package, "export", "This command")) if missing else None
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        place = f" at {error.filename}" if error.filename else ""
        return f"{error.strerror}{place}. {DISK_ERRORS[error.errno]}"
    return None


def _app() -> Any:
    """The typer application; commands import heavy libraries only when they run."""
    from blockcache.runtime.errors import MissingExtraError

    try:
        import typer
    except ImportError as error:
        raise MissingExtraError.of("typer", "cli", "The command line") from error
    from blockcache.tools.commands import (
        bench,
        build,
        check,
        compile,
        demo,
        estimate,
        evaluate,
        run,
        show,
    )
    from blockcache.tools.commands.options import Command, Group, every_command

    app = typer.Typer(
        name="blockcache",
        help="Block Caching for diffusion U-Nets: compile a bundle, denoise by schedule.",
        cls=Group,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(every_command)
    commands: dict[str, Any] = {
        "demo": demo.demo,
        "compile": compile.compile_bundle,
        "run": run.run,
        "show": show.show,
        "build": build.build,
        "check": check.check,
        "bench": bench.bench,
        "estimate": estimate.estimate,
        "evaluate": evaluate.evaluate,
    }
    for name, function in commands.items():
        app.command(name, cls=Command)(function)
    return app


if __name__ == "__main__":
    main()
