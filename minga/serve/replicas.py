"""`minga serve --replicas N`: N processes, each with the whole application and its own copy of the models, behind Ray Serve.

Ray's proxy hands each request to the replica with the shorter queue of two; what a replica does with it is what a single
server does. A replica that dies is replaced while the others go on. On one machine they share the file of keys and usage.
Limits of keys, kept responses, the cache of prompts and the metrics are each replica's own (docs/deploy.md).

Ray starts for this process alone and ends with it, or, where RAY_ADDRESS names a cluster, joins that.
"""

from __future__ import annotations

import logging
import math
import os
import re
import secrets
import signal
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from starlette.applications import Starlette

from minga import store
from minga.errors import UserError
from minga.serve.server import Options, announce, bind, open_app, open_settings, with_key

_NAME = "minga"
_MAX_REPLICAS = 1024
_SIDE_REQUESTS = 64  # to one replica besides answers: of the page, of Prometheus
_LOOPBACK = "127.0.0.1"
_RAY_PATIENCE = 60.0  # seconds that one call waits for an application to be gone


def serve_replicas(
    models: Mapping[str, str | Path],
    options: Options,
    num_replicas: int,
    *,
    as_json: bool = False,
    check: Callable[[], None] = lambda: None,
) -> None:
    """As `server.serve`, by `num_replicas` processes."""
    if not 1 <= num_replicas <= _MAX_REPLICAS:
        raise UserError(f"--replicas is {num_replicas} (serve). it must be from 1 to {_MAX_REPLICAS}")
    if find_spec("ray") is None:
        raise UserError("ray is not installed (--replicas). pip install 'minga[jobs]', or serve without replicas")
    options = _absolute(with_key(options))
    paths = {name: Path(path).absolute() for name, path in models.items()}
    with bind(options.host, options.port) as listener:  # Ray binds it again, once the replicas are there
        port = listener.getsockname()[1]
    with ExitStack() as checked:  # what is wrong is said here, before N processes say it
        open_settings(options, checked)
        for path in paths.values():
            store.load_tokenizer(path)
        check()
    with ExitStack() as stack:
        _start_ray(stack, options.host, port)
        _deploy(paths, options, num_replicas, stack)
        told = _signalled(stack)
        announce(models, options.host, port, as_json=as_json)
        told.wait()


def _absolute(options: Options) -> Options:
    """Paths as a process that runs elsewhere needs them."""

    def absolute(path: Any) -> Any:
        return None if path is None else Path(path).absolute()

    guard = options.guard
    if guard not in ("rules", "none"):
        kind = "model:" if guard.startswith("model:") else ""
        guard = f"{kind}{absolute(guard.removeprefix(kind))}"
    return replace(
        options, guard=guard, runs_dir=absolute(options.runs_dir), keys_file=absolute(options.keys_file),
        watermark=absolute(options.watermark),
        access_log=options.access_log if options.access_log == "-" else absolute(options.access_log),
    )  # fmt: skip


def _start_ray(stack: ExitStack, host: str, port: int) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing leaves this machine
    address, node = os.environ.get("RAY_ADDRESS"), {}
    if not address:
        # Ray listens on every address and runs what it is sent. Only this process and its children know the token.
        os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"] = "token", secrets.token_hex(32)
        node = {"_node_ip_address": _LOOPBACK, "include_dashboard": False}
    import ray
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    ray.init(address=address or "local", namespace=_NAME, logging_level="ERROR", **node)
    stack.callback(ray.shutdown)
    serve.start(
        proxy_location="HeadOnly", http_options={"host": host, "port": port}, logging_config={"log_level": "WARNING"}
    )
    stack.callback(serve.shutdown)


def _deploy(paths: Mapping[str, Path], options: Options, num_replicas: int, stack: ExitStack) -> None:
    """Returns once every replica has its models open."""
    import ray
    from ray import serve

    there = ray.cluster_resources()
    num_cpus = there["CPU"] / num_replicas
    actor: dict[str, Any] = {
        "num_cpus": min(1.0, num_cpus),
        "runtime_env": {"env_vars": {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, int(num_cpus))))}},
    }
    if num_gpus := there.get("GPU", 0.0):
        actor["num_gpus"] = min(1.0, num_gpus / num_replicas)

    def build() -> Starlette:  # runs in the replica
        rank = serve.get_replica_context().rank.rank
        return open_app(paths, options, ExitStack(), engine=str(rank))  # the process's end closes what is open

    places = len(paths) * (options.max_running + options.max_waiting) + _SIDE_REQUESTS
    deployment = serve.deployment(
        serve.ingress(build)(), name=_NAME, num_replicas=num_replicas, ray_actor_options=actor,
        max_ongoing_requests=places, graceful_shutdown_timeout_s=options.shutdown_seconds, max_constructor_retry_count=1,
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
    )  # fmt: skip
    try:
        serve.run(deployment.bind(), name=_NAME)
    except RuntimeError as error:
        if reason := re.search(r"UserError: (.+)", str(error)):
            raise UserError(reason[1]) from None
        raise
    stack.callback(_drain, options.shutdown_seconds)


def _drain(seconds: float) -> None:
    """Requests under way are answered, new ones refused."""
    from ray import serve

    for _ in range(1 + math.ceil(seconds / _RAY_PATIENCE)):
        with suppress(TimeoutError):
            return serve.delete(_NAME)


def _signalled(stack: ExitStack) -> threading.Event:
    """Set by the first SIGTERM or Ctrl-C. A second one, while requests under way are answered, ends all at once."""
    told = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        stack.callback(signal.signal, number, signal.signal(number, lambda *_: told.set()))
    return told
