"""The work of one request: check the bundle, load it, answer the prompts; `result` fills up."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.contract.runner_protocol import (
    MAXIMUM_REQUEST_BYTES,
    RunnerProtocolError,
    RunRequest,
    read_request,
    run_id_of,
)
from export.contract.validation import VERSION
from export.host import memory_sampler
from export.host.process import peak_rss_bytes
from export.host.runner import machine
from export.host.runner.failures import Cancelled
from export.host.runner.files import EventsFile
from export.host.streaming import page_cache
from quantize.errors import BundleError, InputError
from quantize.files.durable import sha256_of

# torch and what imports it come later: a request that is refused must not wait for them.
if TYPE_CHECKING:
    from export.contract.bundle import Bundle
    from export.host.engine import Engine
    from export.host.generation import GenerationResult
    from export.host.runner.progress import Progress
    from export.host.streaming.mapped_weights import MemoryOptions
    from export.host.tokenizer import TextTokenizer

_OF_AN_ANSWER = (
    "prompt_tokens", "prompt_ms", "encode_ms", "total_ms", "first_draft_ms", "first_commit_ms",
    "finish_reason", "answer_tokens", "new_tokens",
)  # fmt: skip


class Work:
    """One request's work in this process."""

    def __init__(self, events: EventsFile, thermal_folder: Path) -> None:
        self.events = events
        self.result = empty_result()
        self.limit_bytes: int | None = None
        self._thermal_folder = thermal_folder
        self._is_cancelled = False
        self._sampler: subprocess.Popen[bytes] | None = None

    def cancel(self, signal_number: int, frame: object) -> None:
        """A signal handler: the run ends before the model runs again."""
        self._is_cancelled = True

    def run(self, request_file: Path) -> None:
        """All but writing the result. Raises whatever ends it."""
        request = self._begin(request_file)
        bundle = self._check_bundle(request)
        tokenizer, prompts = self._read_prompts(request, bundle)
        self._import_libraries()
        engine = self._load(request, bundle)
        from export.host.runner.progress import Progress

        progress = Progress(self.events, engine.special_tokens, tokenizer, self._thermal_folder)
        progress.temperature()
        self._warm_up(request, engine, prompts[0])
        weights = engine.weights
        before = None if weights is None else weights.report()
        for number, prompt in enumerate(prompts):
            answer = self._answer(request, engine, prompt, number, progress)
            self.result["answers"].append(_described(answer, progress.encodings, tokenizer))
            if answer.finish_reason == "cancelled":
                self._stop_if_cancelled()
            self.events("answer", done=number + 1, total=len(prompts), total_ms=answer.total_ms)
            if len(prompts) > 1:
                progress.temperature()
        if weights is not None:
            self.result["weights"] = weights.report(since=before)

    def end(self) -> None:
        """End the memory's sampling, and measure it for the last time."""
        if self._sampler is not None:
            self._sampler.terminate()
            self._sampler.wait()
            self._sampler = None
        sample = memory_sampler.sample()
        self.result["memory"] |= {
            "peak_rss_bytes": peak_rss_bytes(),
            "at_end": sample,
            "major_faults": sample["major_faults"],
        }

    def _begin(self, request_file: Path) -> RunRequest:
        request: RunRequest | RunnerProtocolError
        run_id: str | None
        try:
            request = read_request(request_file)
            run_id = request.run_id
        except RunnerProtocolError as error:
            request, run_id = error, _salvaged_run_id(request_file)
        self.result |= {"run_id": run_id, "versions": machine.versions()}
        common = ("protocol", "run_id", "runtime", "versions")
        self.events("started", pid=os.getpid(), **{name: self.result[name] for name in common})
        if isinstance(request, RunnerProtocolError):
            raise request
        if request.memory_interval_ms is not None:
            self._sampler = machine.start_memory_sampler(self.events, request.memory_interval_ms)
        if request.memory_limit_bytes is not None:
            self.limit_bytes = request.memory_limit_bytes
            machine.limit_memory(request.memory_limit_bytes)
        return request

    def _check_bundle(self, request: RunRequest) -> Bundle:
        """Refuse a bundle before anything large is imported."""
        from export.contract.bundle import open_bundle
        from export.contract.manifest import MANIFEST_FILE

        with self._timed("verify_ms"):
            bundle = open_bundle(request.bundle, verify=request.verify)
            manifest = bundle.folder / MANIFEST_FILE
            expected = request.bundle_sha256
            if expected is not None and (found := sha256_of(manifest)) != expected:
                raise BundleError(
                    f"{manifest} has the SHA-256 {found[:16]}..., the request is for "
                    f"{expected[:16]}...; deploy the bundle again"
                )
        self.result["delegation"] = {
            stage.name: {
                "delegates": report.delegates,
                "delegated": sum(report.delegated.values()),
                "portable": sum(report.portable.values()),
            }
            for stage in bundle.manifest.stages
            if (report := stage.delegation) is not None
        }
        return bundle

    def _read_prompts(
        self, request: RunRequest, bundle: Bundle
    ) -> tuple[TextTokenizer | None, list[list[int]]]:
        """The tokenizer, if the bundle has one, and the tokens of each prompt."""
        prompts, tokenizer = request.prompts, None
        if bundle.manifest.tokenizer is not None or any(isinstance(p, str) for p in prompts):
            with self._timed("import_ms"):
                import jinja2.sandbox  # noqa: F401
                import tokenizers  # noqa: F401

                from export.host.tokenizer import open_tokenizer
            with self._timed("tokenizer_ms"):
                try:
                    tokenizer = open_tokenizer(bundle)
                except InputError as error:
                    if bundle.manifest.tokenizer is None:
                        raise
                    raise BundleError(str(error)) from error
                encode = tokenizer.encode_prompt
                return tokenizer, [encode(p) if isinstance(p, str) else list(p) for p in prompts]
        return None, [list(prompt) for prompt in prompts if not isinstance(prompt, str)]

    def _import_libraries(self) -> None:
        self._stop_if_cancelled()
        with self._timed("import_ms"):
            from export.host.executorch_1_5_1 import import_bindings

            import_bindings()  # here, or it would count as loading

    def _load(self, request: RunRequest, bundle: Bundle) -> Engine:
        from export.contract.bundle import open_bundle
        from export.contract.manifest import MANIFEST_FILE
        from export.host.bundle_engine import open_engine

        self._stop_if_cancelled()
        memory = _memory_options(request)
        paths = [bundle.folder / MANIFEST_FILE, *(bundle.path(name) for name in bundle.files)]
        if memory is not None:
            from export.host.streaming.mapped_weights import prepare

            with self._timed("pack_ms"):
                paths.append(prepare(bundle, memory))
            self._stop_if_cancelled()
        cold: dict[str, Any] = {
            "requested": request.cold,
            "method": None,
            "resident_before": page_cache.resident_share(paths),
            "resident_after": None,
        }
        if request.cold:
            page_cache.drop(paths)
            cold |= {"method": "fadvise", "resident_after": page_cache.resident_share(paths)}
        with self._timed("load_ms"):
            opened = open_bundle(request.bundle, verify=False)
            engine = open_engine(opened, request.threads, memory=memory)
        sample = memory_sampler.sample()
        self.result |= {"cold": cold, "threads": engine.threads}
        self.result["memory"]["after_load"] = sample
        common = (
            "import_ms", "verify_ms", "tokenizer_ms", "load_ms", "threads", "delegation", "cold",
        )  # fmt: skip
        fields = {name: self.result[name] for name in common}
        self.events("loaded", **fields, rss_bytes=sample["rss_bytes"])
        return engine

    def _warm_up(self, request: RunRequest, engine: Engine, prompt: Sequence[int]) -> None:
        """A short answer of a session of its own, which leaves nothing behind."""
        if request.warmup_steps == 0:
            return
        with self._timed("warmup_ms"):
            engine.session().generate(
                prompt[: engine.info.canvas_length],
                1,
                request.seed,
                force_steps=request.warmup_steps,
                cancel=lambda: self._is_cancelled,
            )
        self._stop_if_cancelled()
        self.events("warmed_up", ms=self.result["warmup_ms"], steps=request.warmup_steps)

    def _answer(
        self,
        request: RunRequest,
        engine: Engine,
        prompt: Sequence[int],
        number: int,
        progress: Progress,
    ) -> GenerationResult:
        """One prompt by itself, as it would be answered alone."""
        progress.encodings = 0
        return engine.session().generate(
            prompt,
            request.max_new_tokens,
            (request.seed + number) % 2**64,
            settings=engine.settings_with(request.settings or {}),
            force_steps=request.force_steps,
            on_event=progress.every_event if len(request.prompts) == 1 else progress.brief,
            cancel=lambda: self._is_cancelled,
        )

    def _stop_if_cancelled(self) -> None:
        if self._is_cancelled:
            raise Cancelled

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        """Add what the block takes to the result's `name`; nothing if it fails."""
        began = time.perf_counter()
        yield
        ms = 1000 * (time.perf_counter() - began)
        self.result[name] = (self.result[name] or 0.0) + ms


def empty_result() -> dict[str, Any]:
    """The result of a run that has done nothing yet."""
    nothing = (
        "run_id", "failure", "import_ms", "verify_ms", "tokenizer_ms", "load_ms", "cold", "threads",
        "delegation", "warmup_ms", "pack_ms", "weights",
    )  # fmt: skip
    version = machine.version_of("pocket-diffusion") or "unknown"
    memory = ("peak_rss_bytes", "after_load", "at_end", "major_faults")
    return dict.fromkeys(nothing) | {
        "protocol": VERSION,
        "status": "failed",
        "runtime": {"host": "python", "version": version},
        "versions": {},
        "answers": [],
        "memory": dict.fromkeys(memory),
    }


def _described(
    answer: GenerationResult, encodings: int, tokenizer: TextTokenizer | None
) -> dict[str, Any]:
    """One of the result's `answers`."""
    return {name: getattr(answer, name) for name in _OF_AN_ANSWER} | {
        "encodings": encodings,
        "canvases": [
            vars(canvas) | {"steps": [vars(step) for step in canvas.steps]}
            for canvas in answer.canvases
        ],
        "text": None if tokenizer is None else tokenizer.decode(answer.answer_tokens),
    }


def _memory_options(request: RunRequest) -> MemoryOptions | None:
    from export.host.streaming.mapped_weights import MemoryOptions

    if request.memory_budget_bytes is None and request.packed_weights is None:
        return None
    folder = None if request.packed_weights is None else Path(request.packed_weights)
    return MemoryOptions(request.memory_budget_bytes, folder)


def _salvaged_run_id(request_file: Path) -> str | None:
    try:
        with request_file.open("rb") as file:
            return run_id_of(file.read(MAXIMUM_REQUEST_BYTES + 1))
    except OSError:
        return None
