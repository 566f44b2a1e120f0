"""Plays many scenarios in worker processes, so that a crash costs one scenario and the others go on."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kvm2.errors import EnvironmentFault, UsageError
from kvm2.lab.engine import Played
from kvm2.lab.places import command_of
from kvm2.lab.scenarios import Scenario

# A scenario that takes longer than this hangs: none of the published ones takes a tenth of it.
HANG_SECONDS = 120.0
# Before its first answer a worker may have to build the machine that it plays in.
START_SECONDS = 900.0


class _Worker:
    """One worker process; a new one is started in place of one that died."""

    def __init__(self, host: str, guests: Mapping[str, bytes]) -> None:
        self._command = command_of(host)
        self._setup = {"host": host, "guests": {name: code.hex() for name, code in guests.items()}}
        self._process: subprocess.Popen[str] | None = None
        self._ended = False

    def _start(self) -> subprocess.Popen[str]:
        # The same kvm2, wherever this process has it from.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        pipe = subprocess.PIPE
        process = subprocess.Popen(self._command, stdin=pipe, stdout=pipe, text=True, env=environment)
        self._process = process
        self._send(process, self._setup)
        return process

    @staticmethod
    def _send(process: subprocess.Popen[str], row: Mapping[str, Any]) -> None:
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(row) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            return  # it is gone: reading its reply finds out

    def play(self, scenario: Scenario, patience_ms: int) -> Played:
        """What the scenario gave; no answers at all, and a fault, where the worker died of it."""
        if self._ended:
            raise UsageError("the pool is closed")
        allowed = HANG_SECONDS if self._process else START_SECONDS
        process = self._process or self._start()
        assert process.stdout is not None
        timer = threading.Timer(allowed, process.kill)
        timer.daemon = True  # an interrupt may arrive before anybody can cancel it
        try:
            timer.start()
            self._send(process, {"sc": scenario.name, "steps": scenario.steps, "patience_ms": patience_ms})
            line = process.stdout.readline()
        finally:
            timer.cancel()
        if not line:
            self._drop()
            fault = f"the process that played it ended with code {process.returncode}"
            return Played(scenario.name, (None,) * len(scenario.steps), faults=(fault,))
        reply = json.loads(line)
        if "error" in reply:
            raise (UsageError if reply.get("kind", "UsageError") == "UsageError" else EnvironmentFault)(reply["error"])
        faults = tuple(reply["faults"])
        return Played(scenario.name, tuple(reply["r"]), reply["cut_short"], faults, reply["seconds"])

    def close(self) -> None:
        """Ends the process and waits for it; no other is started."""
        self._ended = True
        self._drop()

    def _drop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Pool:
    """`jobs` workers of one host. `with Pool(...) as pool: for played in pool.play(scenarios): ...`"""

    def __init__(self, host: str, guests: Mapping[str, bytes], jobs: int = 1) -> None:
        if jobs < 1:
            raise UsageError(f"--jobs {jobs}: at least one is needed")
        self._workers = [_Worker(host, guests) for _ in range(jobs)]

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exc: object) -> None:
        for worker in self._workers:
            worker.close()

    def play_one(self, scenario: Scenario, patience_ms: int) -> Played:
        """Plays one scenario now."""
        return self._workers[0].play(scenario, patience_ms)

    def play(self, scenarios: Sequence[Scenario], patience_ms: int) -> Iterator[Played]:
        """Plays scenarios; they come as they finish, which is their order only with one worker."""
        if len(self._workers) == 1:
            yield from (self.play_one(scenario, patience_ms) for scenario in scenarios)
            return
        waiting: queue.SimpleQueue[Scenario | None] = queue.SimpleQueue()
        done: queue.SimpleQueue[Played | BaseException] = queue.SimpleQueue()
        for item in [*scenarios, *([None] * len(self._workers))]:
            waiting.put(item)

        def work(worker: _Worker) -> None:
            while (scenario := waiting.get()) is not None:
                try:
                    done.put(worker.play(scenario, patience_ms))
                except BaseException as error:
                    done.put(error)
                    return

        threads = [threading.Thread(target=work, args=(worker,), daemon=True) for worker in self._workers]
        for thread in threads:
            thread.start()
        for _ in scenarios:
            item_done = done.get()
            if isinstance(item_done, BaseException):
                raise item_done
            yield item_done
