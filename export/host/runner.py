"""The Linux runner: one process that loads a bundle, answers what is asked and tells how.

`python -m export.host.runner REQUEST_FILE` leaves events.jsonl and result.json beside the request,
as docs/runner.md says. Who writes the request and reads the rest is not known here.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import importlib.metadata
import math
import os
import platform
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.contract.runner_protocol import (
    EVENTS_FILE,
    EXIT_FAILED,
    EXIT_OK,
    MAXIMUM_REQUEST_BYTES,
    RESULT_FILE,
    FailureReason,
    RunnerProtocolError,
    RunRequest,
    event_line,
    read_request,
    result_bytes,
    run_id_of,
)
from export.contract.validation import VERSION, sentence
from export.host import memory_sampler
from export.host.process import captured_stderr, peak_rss_bytes
from export.host.streaming import page_cache
from quantize.errors import BundleError, InputError, UserError

# torch and what imports it come later: a request that is refused must not wait for them.
if TYPE_CHECKING:
    from export.contract.bundle import Bundle
    from export.host.engine import Engine
    from export.host.generation import Event, GenerationResult
    from export.host.streaming.mapped_weights import MemoryOptions
    from export.host.tokenizer import TextTokenizer

THERMAL_FOLDER = Path("/sys/class/thermal")
_LIBRARIES = {
    "pocket_diffusion": "pocket-diffusion",
    "executorch": "executorch",
    "torch": "torch",
    "numpy": "numpy",
    "tokenizers": "tokenizers",
}
_OF_AN_ANSWER = (
    "prompt_tokens", "prompt_ms", "encode_ms", "total_ms", "first_draft_ms", "first_commit_ms",
    "finish_reason", "answer_tokens", "new_tokens",
)  # fmt: skip
_TEXT_INTERVAL_S = 0.1
"""Between two `text` events: each decodes the whole text, and a canvas may be one token."""
_TEMPERATURE_INTERVAL_S = 1.0
"""Between two readings of the thermal zones, which are files."""
_SIGN_INTERVAL_S = 1.0
"""Between two signs of life while several prompts are answered."""
_RESERVED_BYTES = 4096
"""Held for the result, so that a full disk can still be told; a result without numbers fits."""
_MAXIMUM_TEXT = 200_000
"""Characters of a `text` event: four bytes each, and escaped, they fit in a line."""
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_MEMORY = (
    "bad_alloc",
    "can't allocate memory",
    "cannot allocate memory",
    "out_of_memory",
    "memoryallocationfailed",
    "failed to map segment",  # the dynamic linker
    "can't start new thread",
    "unable to allocate",
)
"""How libraries tell, in lower case, that there is no memory, where they raise something else."""


class _Cancelled(Exception):
    pass


class _Pace:
    """Says when something that costs time is due again."""

    def __init__(self, interval_s: float) -> None:
        self.interval_s = interval_s
        self._last_s = -math.inf

    def is_due(self) -> bool:
        """Whether the interval is over, and then begin another."""
        now_s = time.monotonic()
        if now_s - self._last_s < self.interval_s:
            return False
        self._last_s = now_s
        return True


class _Events:
    """events.jsonl in the making: a line is written whole, in one piece."""

    def __init__(self, path: Path, began_s: float) -> None:
        """Raises FileExistsError for a folder that was used for a run before."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o644)
        self.path = path
        self.began_s = began_s

    def __call__(self, event: str, **fields: Any) -> None:
        line = event_line(event, 1000 * (time.monotonic() - self.began_s), fields)
        written = os.write(self._descriptor, line)
        while written < len(line):  # a disk that is nearly full takes a part
            try:
                written += os.write(self._descriptor, line[written:])
            except OSError:
                size = os.fstat(self._descriptor).st_size
                os.ftruncate(self._descriptor, size - written)
                raise

    def sync(self) -> None:
        os.fsync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)


class _Run:
    """The work of one request; `result` fills up on the way."""

    def __init__(self, events: _Events, thermal_folder: Path) -> None:
        self.events = events
        self.thermal_folder = thermal_folder
        self.is_cancelled = False
        self.engine: Engine | None = None
        self.tokenizer: TextTokenizer | None = None
        self.tokens: list[int] = []
        self.encodings = 0
        self._text_pace = _Pace(_TEXT_INTERVAL_S)
        self._temperature_pace = _Pace(_TEMPERATURE_INTERVAL_S)
        self._sign_pace = _Pace(_SIGN_INTERVAL_S)
        self.limit_bytes: int | None = None
        self._sampler: subprocess.Popen[bytes] | None = None
        self.result = _empty_result()

    def cancel(self, signal_number: int, frame: object) -> None:
        """A signal handler: the run ends before the model runs again."""
        self.is_cancelled = True

    def work(self, request_file: Path) -> None:
        """The whole run but the result. Raises whatever ends it."""
        request = self.begin(request_file)
        bundle = self.check_bundle(request)
        prompts = self.open_prompts(request, bundle)
        self.import_libraries()
        self.load(request, bundle)
        self.warm_up(request, prompts[0])
        weights = self.engine.weights
        before = None if weights is None else weights.report()
        self.answer(request, prompts)
        if weights is not None:
            self.result["weights"] = weights.report(since=before)

    def begin(self, request_file: Path) -> RunRequest:
        request: RunRequest | RunnerProtocolError
        try:
            request = read_request(request_file)
            run_id = request.run_id
        except RunnerProtocolError as error:
            request, run_id = error, _salvaged_run_id(request_file)
        self.result |= {"run_id": run_id, "versions": _versions()}
        common = ("protocol", "run_id", "runtime", "versions")
        self.events("started", pid=os.getpid(), **{name: self.result[name] for name in common})
        if isinstance(request, RunnerProtocolError):
            raise request
        if request.memory_interval_ms is not None:
            self._sampler = _start_sampler(self.events, request.memory_interval_ms)
        if request.memory_limit_bytes is not None:
            self.limit_bytes = request.memory_limit_bytes
            _limit_memory(request.memory_limit_bytes)
        return request

    def check_bundle(self, request: RunRequest) -> Bundle:
        """Refuse a bundle before anything large is imported."""
        from export.contract.bundle import MANIFEST_FILE, open_bundle

        with self.timed("verify_ms"):
            bundle = open_bundle(request.bundle, verify=request.verify)
            if request.bundle_sha256 is not None:
                manifest = (bundle.folder / MANIFEST_FILE).read_bytes()
                found = hashlib.sha256(manifest).hexdigest()
                if found != request.bundle_sha256:
                    raise BundleError(
                        f"{bundle.folder / MANIFEST_FILE} has the SHA-256 {found[:16]}..., the "
                        f"request is for {request.bundle_sha256[:16]}...; deploy the bundle again"
                    )
        delegation = {
            stage: {
                "delegates": report.delegates,
                "delegated": sum(report.delegated.values()),
                "portable": sum(report.portable.values()),
            }
            for stage, report in bundle.manifest.delegation.items()
        }
        self.result["delegation"] = delegation
        return bundle

    def open_prompts(self, request: RunRequest, bundle: Bundle) -> list[list[int]]:
        """The tokens of each prompt; opens the tokenizer, if the bundle has one."""
        has_text = any(isinstance(prompt, str) for prompt in request.prompts)
        if bundle.manifest.tokenizer is not None or has_text:
            with self.timed("import_ms"):
                import jinja2.sandbox  # noqa: F401
                import tokenizers  # noqa: F401

                from export.host.tokenizer import open_tokenizer
            with self.timed("tokenizer_ms"):
                try:
                    self.tokenizer = tokenizer = open_tokenizer(bundle)
                except InputError as error:
                    if bundle.manifest.tokenizer is None:
                        raise
                    raise BundleError(str(error)) from error
                return [
                    tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else list(prompt)
                    for prompt in request.prompts
                ]
        return [list(prompt) for prompt in request.prompts]

    def import_libraries(self) -> None:
        self.stop_if_cancelled()
        with self.timed("import_ms"):
            import export.host.bundle_engine  # noqa: F401

            # What `open_engine` imports when it is called: here, or it would count as loading.
            with captured_stderr():  # it tells how it counted the cores
                import executorch.kernels.quantized  # noqa: F401
                from executorch.extension.pybindings import _C  # noqa: F401

    def load(self, request: RunRequest, bundle: Bundle) -> None:
        from export.contract.bundle import MANIFEST_FILE, open_bundle
        from export.host.bundle_engine import open_engine

        self.stop_if_cancelled()
        memory = _memory_options(request)
        files = [bundle.folder / MANIFEST_FILE, *(bundle.path(name) for name in bundle.files)]
        if memory is not None:
            from export.host.streaming.mapped_weights import prepare

            with self.timed("pack_ms"):
                files.append(prepare(bundle, memory))
            self.stop_if_cancelled()
        cold: dict[str, Any] = {
            "requested": request.cold,
            "method": None,
            "resident_before": page_cache.resident_share(files),
            "resident_after": None,
        }
        if request.cold:
            page_cache.drop(files)
            cold |= {"method": "fadvise", "resident_after": page_cache.resident_share(files)}
        with self.timed("load_ms"):
            opened = open_bundle(request.bundle, verify=False)
            self.engine = open_engine(opened, request.threads, memory=memory)
        sample = memory_sampler.sample()
        self.result |= {"cold": cold, "threads": self.engine.threads}
        self.result["memory"]["after_load"] = sample
        told = ("import_ms", "verify_ms", "tokenizer_ms", "load_ms", "threads", "delegation")
        self.events(
            "loaded",
            **{name: self.result[name] for name in told},
            cold=cold,
            rss_bytes=sample["rss_bytes"],
        )
        self.tell_temperature()

    def warm_up(self, request: RunRequest, prompt: Sequence[int]) -> None:
        """A short answer of a session of its own, which leaves nothing behind."""
        if request.warmup_steps == 0:
            return
        session = self.engine.session()
        with self.timed("warmup_ms"):
            session.generate(
                prompt[: session.info.canvas_length],
                1,
                request.seed,
                force_steps=request.warmup_steps,
                cancel=lambda: self.is_cancelled,
            )
        self.stop_if_cancelled()
        self.events("warmed_up", ms=self.result["warmup_ms"], steps=request.warmup_steps)

    def answer(self, request: RunRequest, prompts: Sequence[Sequence[int]]) -> None:
        """Each prompt by itself, as it would be answered alone; what is done stays if one fails."""
        is_alone = len(prompts) == 1
        listener = self.tell if is_alone else self.tell_sign_of_life
        for number, prompt in enumerate(prompts):
            seed = (request.seed + number) % 2**64
            result = self.generate(request, prompt, seed, listener)
            self.result["answers"].append(self.described(result))
            if result.finish_reason == "cancelled":
                self.stop_if_cancelled()
            self.events("answer", done=number + 1, total=len(prompts), total_ms=result.total_ms)
            if not is_alone:
                self.tell_temperature()

    def generate(
        self,
        request: RunRequest,
        prompt: Sequence[int],
        seed: int,
        listener: Callable[[Event], None],
    ) -> GenerationResult:
        session = self.engine.session()
        self.encodings = 0
        return session.generate(
            prompt,
            request.max_new_tokens,
            seed,
            settings=self.engine.settings_with(request.settings or {}),
            force_steps=request.force_steps,
            on_event=listener,
            cancel=lambda: self.is_cancelled,
        )

    def described(self, result: GenerationResult) -> dict[str, Any]:
        """One of the result's `answers`."""
        text = None if self.tokenizer is None else self.tokenizer.decode(result.answer_tokens)
        canvases = [
            {
                "canvas": canvas.canvas,
                "tokens": canvas.tokens,
                "converged": canvas.converged,
                "steps": [vars(step) for step in canvas.steps],
            }
            for canvas in result.canvases
        ]
        return {name: getattr(result, name) for name in _OF_AN_ANSWER} | {
            "encodings": self.encodings,
            "canvases": canvases,
            "text": text,
        }

    def tell(self, event: Event) -> None:
        """An event of the loop as one of the protocol; the loop's clock does not run meanwhile."""
        from export.host.generation import CanvasCommitted, CanvasDenoised, PromptEncoded

        match event:
            case PromptEncoded():
                self.encodings += 1
                self.events("prefill", done=event.done, total=event.total, ms=event.ms)
            case CanvasDenoised():
                self.events(
                    "step",
                    canvas=event.canvas,
                    step=event.step,
                    max_steps=event.max_steps,
                    layers_ms=event.layers_ms,
                    head_ms=event.head_ms,
                    accepted=int(event.accepted.sum()),
                    mean_entropy=float(event.entropy.mean()),
                    finished=event.finished,
                )
            case CanvasCommitted():
                special = self.engine.special_tokens
                tokens = event.tokens.tolist()
                self.events(
                    "canvas",
                    canvas=event.canvas,
                    steps=event.steps,
                    new_tokens=sum(token != special.pad for token in tokens),
                    is_last=event.is_last,
                )
                self.tokens += tokens
                if event.is_last or self._text_pace.is_due():
                    self.tell_text(special.eos)
                self.tell_temperature()

    def tell_sign_of_life(self, event: Event) -> None:
        """Of several prompts: count the passes, and tell little of each."""
        from export.host.generation import CanvasDenoised, PromptEncoded

        if isinstance(event, PromptEncoded | CanvasDenoised) and self._sign_pace.is_due():
            self.tell(event)
        else:
            self.encodings += isinstance(event, PromptEncoded)

    def tell_text(self, eos: Sequence[int]) -> None:
        if self.tokenizer is None:
            return
        ends = (i for i, token in enumerate(self.tokens) if token in eos)
        text = self.tokenizer.decode(self.tokens[: next(ends, len(self.tokens))])
        if len(text) <= _MAXIMUM_TEXT:
            self.events("text", text=text)

    def tell_temperature(self) -> None:
        if not self._temperature_pace.is_due():
            return
        zones = read_temperatures(self.thermal_folder)
        if zones:
            self.events("temperature", zones=zones)

    def stop_if_cancelled(self) -> None:
        if self.is_cancelled:
            raise _Cancelled

    def end_sampling(self) -> None:
        if self._sampler is not None:
            self._sampler.terminate()
            self._sampler.wait()
            self._sampler = None

    def measure_end(self) -> None:
        sample = memory_sampler.sample()
        self.result["memory"] |= {
            "peak_rss_bytes": peak_rss_bytes(),
            "at_end": sample,
            "major_faults": sample["major_faults"],
        }

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add what the block takes to the result's `name`; nothing if it fails."""
        began = time.perf_counter()
        yield
        ms = 1000 * (time.perf_counter() - began)
        self.result[name] = (self.result[name] or 0.0) + ms


def run(request_file: Path, thermal_folder: Path = THERMAL_FOLDER) -> int:
    """Do what the request says in this process; returns the exit code.

    A memory limit of the request stays in force afterwards.
    """
    folder = request_file.parent
    try:
        if (folder / RESULT_FILE).exists():
            raise FileExistsError(errno.EEXIST, "holds a run already")
        events = _Events(folder / EVENTS_FILE, _process_began_s())
    except OSError as error:
        what = "holds a run already" if isinstance(error, FileExistsError) else error.strerror
        _say(f"{folder}: {what}; give each run a folder of its own that can be written")
        return EXIT_FAILED
    current = _Run(events, thermal_folder)
    failure = None
    with _handling_signals(current.cancel):
        try:
            _reserve_result(folder)
            current.work(request_file)
        except Exception as error:
            failure = _failure(error, current.limit_bytes)
        try:
            current.end_sampling()
            current.measure_end()
            failure = _finish(current, folder, failure)
        except Exception as error:  # not even a small result can be written
            failure = failure or _failure(error, current.limit_bytes)
    try:
        if failure is None:
            events("done")
        else:
            _say(f"{failure['reason']}: {failure['sentence']}")
            events("failed", **failure)
    except OSError as error:
        _say(f"{events.path} cannot be written ({error.strerror})")
    finally:
        events.close()
    return EXIT_OK if failure is None else EXIT_FAILED


@contextmanager
def _handling_signals(handler: Callable[[int, object], None]) -> Iterator[None]:
    before = {n: signal.signal(n, handler) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def read_temperatures(folder: Path = THERMAL_FOLDER) -> dict[str, float]:
    """Degrees Celsius of the thermal zones that can be read, by type.

    Zones of one type are told apart by their folder's name. Zones without a sensor say impossible
    values, so what is not between -50 and 200 is left out.
    """
    zones: dict[str, float] = {}
    for zone in sorted(folder.glob("thermal_zone*")):
        try:
            name = sentence((zone / "type").read_text(encoding="utf-8", errors="replace"))[:100]
            celsius = int((zone / "temp").read_text(encoding="ascii")) / 1000
        except (OSError, ValueError):
            continue
        if -50 <= celsius <= 200:
            zones[f"{name} ({zone.name})" if name in zones else name] = celsius
    return zones


def _empty_result() -> dict[str, Any]:
    return {
        "protocol": VERSION,
        "run_id": None,
        "status": "failed",
        "failure": None,
        "runtime": {"host": "python", "version": _version("pocket-diffusion") or "unknown"},
        "versions": {},
        "import_ms": None,
        "verify_ms": None,
        "tokenizer_ms": None,
        "load_ms": None,
        "cold": None,
        "threads": None,
        "delegation": None,
        "warmup_ms": None,
        "answers": [],
        "pack_ms": None,
        "weights": None,
        "memory": {
            "peak_rss_bytes": None, "after_load": None, "at_end": None, "major_faults": None,
        },
    }  # fmt: skip


def _memory_options(request: RunRequest) -> MemoryOptions | None:
    from export.host.streaming.mapped_weights import MemoryOptions

    if request.memory_budget_bytes is None and request.packed_weights is None:
        return None
    folder = None if request.packed_weights is None else Path(request.packed_weights)
    return MemoryOptions(request.memory_budget_bytes, folder)


def _process_began_s() -> float:
    """When the system made this process, on the clock of time.monotonic; to 10 ms."""
    fields = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
    began_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - began_s
    return time.monotonic() - max(age_s, 0.0)


def _salvaged_run_id(request_file: Path) -> str | None:
    try:
        with request_file.open("rb") as file:
            return run_id_of(file.read(MAXIMUM_REQUEST_BYTES + 1))
    except OSError:
        return None


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None  # a checkout that is not installed


def _versions() -> dict[str, str]:
    found = {name: _version(distribution) for name, distribution in _LIBRARIES.items()}
    known = {name: version for name, version in found.items() if version is not None}
    return {"python": platform.python_version()} | known


def _start_sampler(events: _Events, interval_ms: int) -> subprocess.Popen[bytes]:
    arguments = (os.getpid(), events.began_s, interval_ms, events.path)
    return subprocess.Popen(
        [sys.executable, "-I", "-S", memory_sampler.__file__, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )


def _limit_memory(limit_bytes: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard != resource.RLIM_INFINITY:
        limit_bytes = min(limit_bytes, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, hard))


def _failure(error: Exception, limit_bytes: int | None) -> dict[str, str]:
    """What ended the run, as the protocol tells it."""
    reason: FailureReason
    said = traceback.format_exception_only(error)[-1]
    if isinstance(error, _Cancelled):
        reason, said = "cancelled", "the run was ended by a signal before it was done"
    elif _is_out_of_memory(error, limit_bytes):
        limit = "" if limit_bytes is None else f" within {limit_bytes} bytes of address space"
        reason = "out_of_memory"
        said = f"there is no memory left{limit} ({said.strip()}); take a smaller bundle or context"
    elif isinstance(error, OSError) and error.errno in _FULL:
        where = f"{error.filename}: " if error.filename else ""
        reason, said = "storage_full", f"{where}no space left on the disk; free some space"
    elif isinstance(error, BundleError):
        reason, said = "bundle_refused", str(error)
    elif isinstance(error, UserError):
        reason, said = "input", str(error)
    else:
        reason = "internal"
    if reason in ("internal", "out_of_memory"):
        traceback.print_exception(error)
    return {"reason": reason, "sentence": sentence(said)}


def _is_out_of_memory(error: BaseException, limit_bytes: int | None) -> bool:
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    for link in chain:
        if isinstance(link, MemoryError):
            return True
        if isinstance(link, OSError) and link.errno == errno.ENOMEM:
            return True
        if any(words in str(link).lower() for words in _NO_MEMORY):
            return True
    # ExecuTorch tells some failed allocations as a mere number. Under a limit that is used up,
    # that is what they are.
    is_native = any(type(link) is RuntimeError for link in chain)
    return is_native and limit_bytes is not None and _peak_address_space() >= 0.95 * limit_bytes


def _peak_address_space() -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmPeak:"):
            return int(line.split()[1]) * 1024
    return 0


def _finish(current: _Run, folder: Path, failure: dict[str, str] | None) -> dict[str, str] | None:
    """Write the result, a small one if there is no room; returns how the run ended after all.

    Raises OSError if nothing can be written.
    """
    try:
        current.events.sync()
        status = "ok" if failure is None else "failed"
        _write_result(folder, current.result | {"status": status, "failure": failure})
    except (OSError, RunnerProtocolError) as error:
        failure = failure or _failure(error, current.limit_bytes)
        kept = {name: current.result[name] for name in ("run_id", "versions")}
        _write_result(folder, _empty_result() | kept | {"failure": failure})
    return failure


def _part(folder: Path) -> Path:
    return folder / (RESULT_FILE + ".part")


def _reserve_result(folder: Path) -> None:
    descriptor = os.open(_part(folder), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        os.posix_fallocate(descriptor, 0, _RESERVED_BYTES)
    finally:
        os.close(descriptor)


def _write_result(folder: Path, result: dict[str, Any]) -> None:
    """The result under its name, whole and on the disk."""
    content = memoryview(result_bytes(result))
    # Not truncated: what was reserved is written over.
    descriptor = os.open(_part(folder), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        written = 0
        while written < len(content):
            written += os.write(descriptor, content[written:])
        os.ftruncate(descriptor, len(content))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(_part(folder), folder / RESULT_FILE)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _say(text: str) -> None:
    sys.stderr.write(f"runner: {text}\n")


def main() -> None:
    """The entry point."""
    parser = argparse.ArgumentParser(
        prog="runner", description="Run one request of the runner protocol (docs/runner.md)."
    )
    parser.add_argument("request", type=Path, help="request.json in the run's own folder")
    code = run(parser.parse_args().request)
    # All is on the disk. PyTorch takes most of a second to be taken down, which nobody waits for.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
