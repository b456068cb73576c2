"""The ``blockcache`` command: expected errors in one line, exit code 1, no traceback."""

from __future__ import annotations

import sys
from typing import Any

from blockcache.runtime.errors import BlockCacheError, MissingExtraError


def main() -> None:
    """Entry point of the ``blockcache`` script."""
    try:
        _app()()
    except BlockCacheError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:
        sys.exit(1)


def _app() -> Any:
    """The typer application; commands import heavy libraries only when they run."""
    try:
        import typer
    except ImportError as error:
        raise MissingExtraError.of("typer", "export", "The command line") from error
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

    app = typer.Typer(
        name="blockcache",
        help="Block Caching for diffusion U-Nets: compile a bundle, denoise by schedule.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=False,
    )
    app.command("demo")(demo.demo)
    app.command("compile")(compile.compile_bundle)
    app.command("run")(run.run)
    app.command("show")(show.show)
    app.command("build")(build.build)
    app.command("check")(check.check)
    app.command("bench")(bench.bench)
    app.command("estimate")(estimate.estimate)
    app.command("evaluate")(evaluate.evaluate)
    return app


if __name__ == "__main__":
    main()
