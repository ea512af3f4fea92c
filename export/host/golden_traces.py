"""Writes the golden traces: what this host does for fixed requests, token by token.

    python -m export.host.golden_traces BUNDLE INT4_FOLDER CHECKPOINT

once for each of the three small models (docs/bundle.md has the whole way). Which requests they are
is the table `REQUESTS`; replaying them is `play`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from export.contract.bundle import open_bundle
from export.contract.traces import Canvas, Conversation, Step, Traces, Turn, write_traces
from export.host.engine import Engine
from export.host.generation import (
    CanvasCommitted,
    CanvasDenoised,
    CanvasStarted,
    Event,
    PromptEncoded,
)
from quantize.files.durable import sha256_of


@dataclass(frozen=True)
class Request:
    """One turn of a conversation; `prompt` goes through the chat template."""

    prompt: str
    max_new_tokens: int = 20
    seed: int = 0
    settings: dict[str, float] = field(default_factory=dict)
    force_steps: int | None = None


SUDOKU, SORT, ADD = "sudoku 3..1 12.. ..1. 2..4", "sort 66403971", "add 6228+3587"
REQUESTS: dict[str, dict[str, tuple[Request, ...]]] = {
    "uniform_diffusion": {
        "sudoku": (Request(SUDOKU),),
        "sort, a large seed": (Request(SORT, seed=2**64 - 1),),
        "add": (Request(ADD, seed=3),),
        # The model was trained on one turn: the second is held to the steps that are no near-tie.
        "two turns": (Request(SORT, seed=1), Request(SUDOKU, seed=2, force_steps=2)),
        "forced steps, two canvases": (Request(SORT, 40, seed=4, force_steps=3),),
        "other settings": (
            Request(SUDOKU, seed=5, settings={
                "max_steps": 12, "t_min": 0.2, "t_max": 0.5, "entropy_bound": 0.02,
                "stability_threshold": 2, "confidence_threshold": 0.001,
            }),
        ),
    },
    "masked_diffusion": {
        "sudoku": (Request(SUDOKU),),
        "sort, an answer cut off by its length": (Request(SORT, 4),),
        "add": (Request(ADD, seed=3),),
        "two turns": (Request(SORT, seed=1), Request(SUDOKU, seed=2)),
        "forced steps": (Request(SORT, 16, seed=4, force_steps=3),),
        "one position a step": (Request(SUDOKU, settings={"threshold": 2.0}),),
        "a temperature, by entropy": (
            Request(SORT, seed=2**64 - 1, settings={"temperature": 0.5, "order": 1.0}),
        ),
        "a low threshold, by margin": (
            Request(ADD, settings={"threshold": 0.5, "order": 2.0, "steps_per_canvas": 4}),
        ),
    },
    "autoregressive": {
        "sudoku": (Request(SUDOKU, 24),),
        "sort, an answer cut off by its length": (Request(SORT, 4),),
        "add": (Request(ADD, 24, seed=3),),
        "two turns": (Request(SORT, 24, seed=1), Request(SUDOKU, 24, seed=2)),
        "forced steps go on behind the end": (Request(SORT, 16, seed=4, force_steps=1),),
        "a temperature": (Request(SORT, 24, seed=2**64 - 1, settings={"temperature": 0.5}),),
    },
}  # fmt: skip


def play(engine: Engine, turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """The turns' requests on a fresh conversation, and what comes of them now."""
    session = engine.session()
    played = []
    for turn in turns:
        canvases: list[Canvas] = []
        encodings: list[int] = []
        steps: list[Step] = []
        start: list[tuple[int, ...]] = []

        def take(
            event: Event,
            canvases: list[Canvas] = canvases,
            encodings: list[int] = encodings,
            steps: list[Step] = steps,
            start: list[tuple[int, ...]] = start,
        ) -> None:
            match event:
                case PromptEncoded():
                    encodings.append(event.done - sum(encodings))
                case CanvasStarted():
                    start.append(tuple(event.tokens.tolist()))
                case CanvasDenoised():
                    accepted = tuple(int(position) for position in event.accepted)
                    tokens, draft = event.tokens.tolist(), event.draft.tolist()
                    steps.append(Step(tuple(tokens), tuple(draft), accepted, event.finished))  # type: ignore[arg-type]
                case CanvasCommitted():
                    began = start[0] if start else None
                    committed = tuple(event.tokens.tolist())
                    canvases.append(Canvas(tuple(encodings), began, tuple(steps), committed))
                    for collected in (encodings, steps, start):
                        collected.clear()

        result = session.generate(
            turn.prompt,
            turn.max_new_tokens,
            turn.seed,
            settings=engine.settings_with(turn.settings),
            force_steps=turn.force_steps,
            on_event=take,
        )
        played.append(
            msgspec.structs.replace(
                turn, canvases=tuple(canvases), finish_reason=result.finish_reason
            )
        )
    return tuple(played)


def conversations(bundle_folder: Path) -> dict[str, tuple[Turn, ...]]:
    """The requests for a bundle's style with their tokens; nothing came of them yet."""
    from export.host.tokenizer import open_tokenizer

    bundle = open_bundle(bundle_folder)
    tokenizer = open_tokenizer(bundle)
    return {
        name: tuple(
            Turn(
                tuple(tokenizer.encode_prompt(request.prompt)), request.max_new_tokens,
                request.seed, request.settings, request.force_steps, (), "length",
            )
            for request in requests
        )
        for name, requests in REQUESTS[bundle.manifest.style].items()
    }  # fmt: skip


def _eager(bundle: Path, int4: Path) -> dict[str, tuple[Turn, ...]]:
    """What the eager int4 model answers, in this process."""
    from export.host.eager import eager_engine
    from export.models import stage_model
    from quantize.checkpoint import open_checkpoint

    engine = eager_engine(stage_model(open_checkpoint(int4)))
    return {name: play(engine, turns) for name, turns in conversations(bundle).items()}


def _eager_elsewhere(bundle: Path, int4: Path, capability: str) -> dict[str, tuple[Turn, ...]]:
    """The same in a process whose PyTorch uses other vector instructions."""
    done = subprocess.run(
        [sys.executable, "-m", "export.host.golden_traces", "--eager", bundle, int4, int4],
        env=os.environ | {"ATEN_CPU_CAPABILITY": capability},
        stdout=subprocess.PIPE,
        check=True,
    )
    return msgspec.json.decode(done.stdout, type=dict[str, tuple[Turn, ...]])


def main() -> None:
    """The entry point."""
    parser = argparse.ArgumentParser(description=__doc__, prog="golden_traces")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("int4", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--eager", action="store_true", help="only print what the eager model says")
    arguments = parser.parse_args()
    if arguments.eager:
        answers = _eager(arguments.bundle, arguments.int4)
        sys.stdout.buffer.write(msgspec.json.encode(answers))
        return
    from export.host.bundle_engine import open_engine

    bundle = open_bundle(arguments.bundle)
    engine = open_engine(bundle, threads=1)
    others = [
        _eager_elsewhere(arguments.bundle, arguments.int4, capability)
        for capability in ("default", "avx2")
    ]
    played = {name: play(engine, turns) for name, turns in conversations(arguments.bundle).items()}
    write_traces(
        Traces(
            style=bundle.manifest.style,
            checkpoint=arguments.checkpoint.as_posix(),
            weights_sha256=sha256_of(arguments.checkpoint / "model.safetensors"),
            recipe=(bundle.manifest.recipe or {})["recipe"]["name"],
            backend=", ".join(bundle.manifest.backends),
            maximum_context=bundle.manifest.model.maximum_context,
            conversations=tuple(
                Conversation(name, turns, all(other[name] == turns for other in others))
                for name, turns in played.items()
            ),
        )
    )


if __name__ == "__main__":
    main()
