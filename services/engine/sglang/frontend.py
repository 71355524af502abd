"""SGLang's scheduler processes and the sockets to them: no tokenizer manager and no detokenizer in between."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing.connection
import os
import signal
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvmesh.errors import Unavailable
from services.engine.sglang.plugin import CACHE, DATA_VARIABLE, ENGINE_VARIABLE, PLATFORM

log = logging.getLogger(__name__)

STOP_S = 8.0


@dataclass(frozen=True)
class SglangOptions:
    """What SGLang is started with. 0 or empty: SGLang's own default."""

    model: str
    dtype: str = "auto"
    kv_tokens: int = 0
    page_size: int = 1
    chunk_tokens: int = 0
    max_running: int = 0
    seed: int = 0
    # As services.engine.sglang.transports.data_settings makes it.
    data: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


def arguments(options: SglangOptions, cuda: bool) -> dict[str, Any]:
    """ServerArgs. `extra` comes last and overrides."""
    given: dict[str, Any] = {
        "model_path": options.model,
        "dtype": options.dtype,
        "page_size": options.page_size,
        "random_seed": options.seed,
        "grammar_backend": "xgrammar",
        "radix_cache_backend": CACHE,
        "skip_tokenizer_init": True,
        # An idle scheduler would spin a core.
        "sleep_on_idle": True,
        # Seeds of single requests need it.
        "sampling_backend": "pytorch",
        "log_level": "warning",
        # Copies of a chunk begin when its forward pass is known to be done.
        "disable_overlap_schedule": True,
    }
    if not cuda:
        given |= {"device": "cpu", "attention_backend": "torch_native", "disable_cuda_graph": True}
    if options.kv_tokens:
        given["max_total_tokens"] = options.kv_tokens
    if options.chunk_tokens:
        given["chunked_prefill_size"] = options.chunk_tokens
    if options.max_running:
        given["max_running_requests"] = options.max_running
    return given | options.extra


class Frontend:
    """Owns the processes. `on_message` gets each message of the scheduler, in the event loop."""

    def __init__(self, options: SglangOptions, model_digest: str, run_dir: Path, name: str) -> None:
        self._options = options
        self._environment = f"{model_digest}:{name}"
        self._run_dir = run_dir
        self._processes: list[Any] = []
        self._context: Any = None
        self._tx: Any = None
        self._rx: Any = None
        self._receive: Callable[[Any], Any] = lambda socket: None
        self._instance = ""
        self._stopping = False
        self.on_message: Callable[[Any], None] = lambda message: None

    async def start(self) -> list[dict[str, Any]]:
        """Starts everything; one description a rank (Agent.describe). Raises Unavailable."""
        ready = await asyncio.to_thread(self._launch)
        try:
            infos = await asyncio.to_thread(ready)
        except (Exception, SystemExit) as error:
            raise Unavailable(f"SGLang did not start: {error or type(error).__name__}; its log says why") from error
        loop = asyncio.get_running_loop()
        # An edge-triggered descriptor: it must be read until nothing is left.
        loop.add_reader(self._rx.getsockopt(_FD), self._readable)
        loop.call_soon(self._readable)
        return [info["kvmesh"] for info in infos]

    def _launch(self) -> Callable[[], list[dict[str, Any]]]:
        import torch

        os.environ[ENGINE_VARIABLE] = self._environment
        os.environ[DATA_VARIABLE] = self._options.data
        # Log-probabilities as the model gives them, whatever the temperature.
        os.environ.setdefault("SGLANG_RETURN_ORIGINAL_LOGPROB", "1")
        cuda = torch.cuda.is_available()
        if not cuda:
            os.environ["SGLANG_PLATFORM"] = PLATFORM
            # Nothing worth compiling runs on the CPU, and the first requests would wait for a C++ compiler.
            os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        # SGLang puts its sockets and files there, and so does torch's compiler.
        self._run_dir.mkdir(parents=True, exist_ok=True)
        tempfile.tempdir = os.environ["TMPDIR"] = str(self._run_dir)
        from sglang.srt.plugins import load_plugins

        load_plugins()
        import zmq
        from sglang.srt.entrypoints.engine import Engine, _set_envs_and_config
        from sglang.srt.managers.io_struct import sock_recv
        from sglang.srt.managers.scheduler import run_scheduler_process
        from sglang.srt.server_args import PortArgs, ServerArgs
        from sglang.srt.utils.network import get_zmq_socket

        args = ServerArgs(**arguments(self._options, cuda))
        if hasattr(args, "resolve_once"):
            args.resolve_once()
        _set_envs_and_config(args)
        args.check_server_args()
        ports = PortArgs.init_new(args)
        self._instance = str(getattr(ports, "instance_id", ""))
        (self._run_dir / "instance").write_text(f"{self._instance}\n")
        self._receive = lambda socket: sock_recv(socket, zmq.NOBLOCK)
        self._context = zmq.Context(1)
        self._tx = get_zmq_socket(self._context, zmq.PUSH, ports.scheduler_input_ipc_name, True)
        self._rx = get_zmq_socket(self._context, zmq.PULL, ports.tokenizer_ipc_name, True)
        result, self._processes = Engine._launch_scheduler_processes(args, ports, run_scheduler_process)

        def ready() -> list[dict[str, Any]]:
            result.wait_for_ready()
            return list(result.scheduler_infos)

        return ready

    def send(self, message: Any) -> None:
        """Tells the scheduler. Raises Unavailable when it is gone."""
        import zmq
        from sglang.srt.managers.io_struct import sock_send

        if self._stopping or self._tx is None or not all(p.is_alive() for p in self._processes[:1]):
            raise Unavailable("the engine is stopping")
        try:
            sock_send(self._tx, message, zmq.NOBLOCK)
        except zmq.Again:
            raise Unavailable("the scheduler takes no messages") from None

    def _readable(self) -> None:
        import zmq

        while not self._stopping:
            try:
                message = self._receive(self._rx)
            except zmq.Again:
                return
            try:
                self.on_message(message)
            except Exception:
                log.exception("a message of the scheduler was not understood: %s", type(message).__name__)

    async def died(self) -> str:
        """Returns when one of the processes has ended."""
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        sentinels = {p.sentinel: p for p in self._processes}
        for sentinel in sentinels:
            loop.add_reader(sentinel, ended.set)
        try:
            await ended.wait()
        finally:
            for sentinel in sentinels:
                loop.remove_reader(sentinel)
        over = multiprocessing.connection.wait(list(sentinels), 0)
        codes = ", ".join(str(sentinels[s].exitcode) for s in over if isinstance(s, int))
        return f"the SGLang scheduler process ended with status {codes}"

    async def stop(self) -> None:
        """Ends the processes: SIGTERM, then SIGKILL; removes what SGLang leaves in shared memory."""
        if self._stopping:
            return
        self._stopping = True
        if self._rx is not None:
            asyncio.get_running_loop().remove_reader(self._rx.getsockopt(_FD))
        await asyncio.to_thread(self._end_processes)
        if self._context is not None:
            self._context.destroy(linger=0)
        await asyncio.to_thread(self._clean)

    def _clean(self) -> None:
        if self._instance:
            for path in Path("/dev/shm").glob(f"sglang_loads_{self._instance}*"):
                with contextlib.suppress(OSError):
                    path.unlink()

    def _end_processes(self) -> None:
        import psutil

        family: list[psutil.Process] = []
        for process in self._processes:
            with contextlib.suppress(psutil.Error):
                family += [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for number, patience in ((signal.SIGTERM, STOP_S), (signal.SIGKILL, 3.0)):
            for member in family:
                with contextlib.suppress(psutil.Error):
                    member.send_signal(number)
            _, family = psutil.wait_procs(family, patience)
        for process in self._processes:
            process.join(1.0)


# zmq.FD, without importing zmq here.
_FD = 14
