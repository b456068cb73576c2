"""Ray Serve on this machine alone: it listens on 127.0.0.1, and SIGTERM drains it.

python -m blockcache.tools.serve.ray_local BUNDLE --slots 8
"""

from __future__ import annotations

import os
import signal
import threading
import time
import urllib.request
from pathlib import Path
from typing import Annotated

_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing phones home
    "RAY_AUTH_MODE": "token",  # its sockets take calls with this machine's token alone
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # no cluster: Ray's own sockets on 127.0.0.1, too
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",  # 5 are too few on a busy machine
    "OMP_NUM_THREADS": "1",  # of libraries; engines are told by cpus
}
for _name, _value in _SETTINGS.items():  # before Ray reads them, as it is imported
    os.environ.setdefault(_name, _value)

import ray  # noqa: E402
import typer  # noqa: E402
from ray import serve  # noqa: E402
from ray.serve.config import HTTPOptions  # noqa: E402

from blockcache.tools.report.errors import one_line_errors  # noqa: E402
from blockcache.tools.serve.ray_app import APP, application  # noqa: E402
from blockcache.tools.serve.ray_options import ServeOptions  # noqa: E402

HTTP_SECONDS = 180
"""For Ray's HTTP proxy to come up."""


def main(
    bundle: Annotated[
        list[str],
        typer.Argument(
            help="With text encoders and decoder: FOLDER or NAME=FOLDER, the default first."
        ),
    ],
    slots: Annotated[int, typer.Option(min=1, help="Pictures at a time, of a replica.")] = 8,
    queue: Annotated[int, typer.Option(min=1, help="Requests that may wait, of a replica.")] = 32,
    presets: Annotated[str, typer.Option(help="By commas, the default first.")] = "",
    replicas: Annotated[int, typer.Option(min=1)] = 1,
    most_replicas: Annotated[int, typer.Option(min=0, help="Autoscale up to these.")] = 0,
    cpus: Annotated[int, typer.Option(min=1, help="Cores of a replica.")] = 1,
    open_bundles: Annotated[int, typer.Option(min=1, help="Of a replica at a time.")] = 3,
    drain_seconds: Annotated[int, typer.Option(min=0, help="For what runs at SIGTERM.")] = 60,
    host: Annotated[str, typer.Option(help="Where HTTP listens.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    metrics_port: Annotated[
        int, typer.Option(min=0, max=65535, help="Of Prometheus' metrics. 0: Ray chooses.")
    ] = 0,
) -> None:
    """Serve until SIGTERM or SIGINT; then finish what runs."""
    given = ServeOptions(bundle=",".join(bundle)).bundles
    options = ServeOptions(  # a replica has a working folder of its own
        bundle=",".join(f"{name}={Path(folder).absolute()}" for name, folder in given.items()),
        slots=slots,
        queue=queue,
        presets=presets,
        replicas=replicas,
        most_replicas=most_replicas,
        cpus=cpus,
        open_bundles=open_bundles,
        drain_seconds=drain_seconds,
    )
    stopped = threading.Event()
    address = start(options, host, port, metrics_port)
    for number in (signal.SIGTERM, signal.SIGINT):  # after Ray has set its own
        signal.signal(number, lambda *_: stopped.set())
    print(f"ready on http://{host}:{port}, Ray on {address}", flush=True)
    stopped.wait()
    serve.delete(APP)  # returns when replicas have drained
    serve.shutdown()
    ray.shutdown()
    print("drained", flush=True)


def start(options: ServeOptions, host: str, port: int, metrics_port: int = 0) -> str:
    """Start Ray on this machine and the application on it; returns when it is ready.

    Returns:
        Ray's address, for a driver that deploys another application there.

    Raises:
        RuntimeError: no replica came up; Ray's log says why.
    """
    started = ray.init(
        num_cpus=options.most * options.cpus,
        include_dashboard=False,
        log_to_driver=False,
        _metrics_export_port=metrics_port or None,
    )
    serve.start(http_options=HTTPOptions(host=host, port=port))
    serve.run(application(options), name=APP, route_prefix="/")
    _wait_for_http(f"http://{host}:{port}/-/healthz")  # the proxy may come up after replicas
    return str(started.address_info["address"])


def _wait_for_http(url: str) -> None:
    until = time.monotonic() + HTTP_SECONDS
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError as error:
            if time.monotonic() > until:
                raise RuntimeError(
                    f"Expected Ray's HTTP proxy within {HTTP_SECONDS} s, got {error}. See its log "
                    f"under /tmp/ray/session_latest/logs/serve."
                ) from error
            time.sleep(0.1)


if __name__ == "__main__":
    with one_line_errors():
        typer.run(main)
