"""Cases run in forked processes, each with limits of its own, and what is wrong with an answer."""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import os
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz.seeds import MARKER, SEEDS, Seed

SECONDS = 20.0
# Beyond the size of the file that is read.
MEMORY = 2**30
# What no reader of a file has to do.
_ACTS = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "pty.spawn")
_ACTS += ("subprocess.Popen", "socket.connect")


@dataclass(frozen=True)
class Case:
    """One damaged file and what is done with it, made by its number and the seed alone."""

    number: int
    kind: Seed
    rng: Random

    @classmethod
    def of(cls, number: int, seed: int) -> Case:
        return cls(number, SEEDS[number % len(SEEDS)], Random(f"{seed} {number}"))

    def write(self, sound: Path, folder: Path) -> list[str]:
        """Damages a copy of the sound files; the arguments of the command."""
        shutil.copytree(sound, folder, dirs_exist_ok=True)
        path = folder / (folder / "path").read_text()
        (folder / "path").unlink()
        self.rng.choice(self.kind.mutations)(self.rng, path / self.kind.damaged)
        command = self.rng.choice(self.kind.commands)
        return [argument.replace("{}", str(path)) for argument in command]


@dataclass(frozen=True)
class Answer:
    """What came of a case; `wrong` is empty for a good answer."""

    number: int
    kind: str
    code: int
    wrong: str
    last_line: str


# --------------------------------------------------------------------------------- in the processes


def _run(arguments: Sequence[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command in this process; -1 with the traceback as well."""
    from farms_fast.cli.main import app

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            app(list(arguments))
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(bool(end.code))
        except BaseException:
            code = -1
            err.write(traceback.format_exc())
    return code, out.getvalue(), err.getvalue()


def judged(code: int, out: str, err: str) -> str:
    """What is wrong with an answer."""
    if code == -1:
        return "traceback: " + " | ".join(err.strip().splitlines()[-3:])
    if code not in (0, 1, 2):
        return f"exit code {code}"
    if found := re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", out + err):
        return f"raw {found[0]!r} on the terminal"
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    if code == 2 and not (len(errors) == 1 and err.endswith(errors[0] + "\n")):
        return "exit code 2 without one line that says why: " + repr(err[-300:])
    if "MemoryError" in err + out or "allocate" in err + out:
        return f"takes more memory than there is: {(err + out)[-300:]!r}"
    if "weights_only=False" in err or "trust_remote_code=True" in err:
        return "advises to run code"
    return ""


def _status(name: str) -> int:
    """A size of this process, in bytes."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{name}:\s+(\d+)", text)[1])  # type: ignore[index]


def _answer(case: Case, sound: Path, folder: Path, acts: list[str]) -> Answer:
    arguments = case.write(sound, folder)
    os.chdir(folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    acts.clear()
    code, out, err = _run(arguments)
    wrong = judged(code, out, err)
    if (taken := _status("VmHWM") - before - size) > MEMORY:
        wrong = f"{taken / 2**20:.0f} MiB more than its size; {wrong}"
    if acts or MARKER.exists():
        wrong = f"ran {acts or 'code of the file'}; {wrong}"
    lines = err.strip().splitlines() or [""]
    return Answer(case.number, case.kind.name, code, wrong, lines[-1][:200])


def _work(root: Path, seed: int, requests: int, answers: int) -> None:
    """Answers cases by their number until the requests end."""
    faulthandler.disable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limit = _status("VmSize") + 4 * MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    acts: list[str] = []

    def watch(event: str, arguments: Any) -> None:
        if event in _ACTS:
            acts.append(event)

    sys.addaudithook(watch)
    with os.fdopen(requests) as lines, os.fdopen(answers, "w") as told:
        for line in lines:
            case = Case.of(int(line), seed)
            with tempfile.TemporaryDirectory(dir=root) as folder:
                answer = _answer(case, root / folder_of(case.kind), Path(folder), acts)
                os.chdir(root)
            told.write(json.dumps(vars(answer)) + "\n")
            told.flush()


def folder_of(kind: Seed) -> str:
    return re.sub(r"\W+", "-", kind.name)


# ------------------------------------------------------------------------------------ the parent's


class Worker:
    """A forked process that answers one case at a time, and is replaced when it dies or hangs."""

    def __init__(self, root: Path, seed: int) -> None:
        self._root, self._seed = root, seed
        self._start()

    def _start(self) -> None:
        requests, self._requests = os.pipe()
        self._answers, answers = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(self._requests)
            os.close(self._answers)
            try:
                _work(self._root, self._seed, requests, answers)
            finally:
                os._exit(0)
        os.close(requests)
        os.close(answers)

    def ask(self, number: int) -> Answer:
        """The answer to a case, at most `SECONDS` later."""
        os.write(self._requests, f"{number}\n".encode())
        line, end = b"", time.monotonic() + SECONDS
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([self._answers], [], [], max(0, end - time.monotonic()))
            part = os.read(self._answers, 2**16) if ready else b""
            if not part:
                return self._dead(number, f"no answer in {SECONDS:.0f} s" if not ready else "")
            line += part
        return Answer(**json.loads(line))

    def _dead(self, number: int, why: str) -> Answer:
        status = self.close(kill=True)
        killed = f"ended by {signal.Signals(status).name}" if status in list(signal.Signals) else ""
        self._start()
        return Answer(number, Case.of(number, 0).kind.name, -1, why or killed or "process lost", "")

    def close(self, kill: bool = False) -> int:
        """Ends the process; the signal that ended it."""
        os.close(self._requests)
        os.close(self._answers)
        if kill:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
        return os.waitpid(self._pid, 0)[1] & 127


def make_seeds(root: Path) -> list[str]:
    """Writes the sound files of every kind; a line for each that cannot be made or is not read.

    In a process of its own: nothing has run in parallel in the parent, so it may fork.
    """
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        lines = []
        for kind in SEEDS:
            folder = root / folder_of(kind)
            folder.mkdir()
            try:
                path = kind.make(folder)
            except ImportError as error:
                lines.append(f"{kind.name}: not made ({error})")
                continue
            (folder / "path").write_text(str(path.relative_to(folder)))
            os.chdir(root)
            for command in kind.commands:
                code, _, err = _run([a.replace("{}", str(path)) for a in command])
                if code not in (0, 1):
                    lines.append(f"{kind.name}: {err.strip()}")
        with os.fdopen(write, "w") as told:
            told.write("\n".join(lines))
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as told:
        lines = told.read().splitlines()
    if os.waitpid(pid, 0)[1]:
        raise RuntimeError("the sound files could not be made")
    return lines


def answers(numbers: Sequence[int], seed: int, root: Path) -> Iterator[Answer]:
    """The answers to cases, one after the other."""
    worker = Worker(root, seed)
    try:
        for number in numbers:
            if (root / folder_of(Case.of(number, seed).kind) / "path").exists():
                yield worker.ask(number)
    finally:
        worker.close()
