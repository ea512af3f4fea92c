"""Every program of a cut DiffusionGemma against the module that it was lowered from, by PyTorch.

    python -m benchmarks.stage_check CHECKPOINT BUNDLE WORK

Two passes as the loop makes them: a prompt is encoded, which fills the KV cache, then a canvas of
random tokens behind it is denoised. What a stage takes from the one before, program and module both
take from that program, so errors do not add up. One stage is in memory at a time. A stage that is
in WORK/records.jsonl is not run again; what it gave lies beside it.

The error of a row is |program - module| / |module| in the Euclidean norm, where for hidden states
that pass through a layer |module - input| is divided by, the layer's own work: what it leaves alone
must not count. Of a stage the median over the rows of both passes is compared with LIMIT; the share
of unequal integers is told (a token is sampled from nearly equal logits, the weights being random).
To show what wrong weights cost, one program is compared with the module of the layer before, too.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from export.contract.bundle import open_bundle
from export.host.bundle_engine import load_stage
from export.host.eager import eager_stage
from export.host.process import peak_rss_bytes, return_large_blocks
from export.host.stages import LoadedStage
from export.models import stage_model
from export.models.staging import StageModule
from quantize.checkpoint import open_checkpoint
from quantize.files.journal import Journal
from scripts.console import reporting

LIMIT = 0.02
"""Sums of fp32 in another order give 1e-6, an activation that rounds to int8 the other way 1e-2."""

Named = dict[str, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("work", type=Path)
    arguments = parser.parse_args()
    return_large_blocks()
    arguments.work.mkdir(parents=True, exist_ok=True)
    with reporting("checking") as progress:
        records = []
        for done, (total, record) in enumerate(check(**vars(arguments)), start=1):
            progress(done, total, record["stage"])
            records.append(record)
    print(json.dumps({"peak_rss_bytes": peak_rss_bytes(), "limit": LIMIT, "stages": records}))
    wrong = [record["stage"] for record in records if record["error"] > LIMIT]
    if wrong:
        raise SystemExit(f"beyond {LIMIT}: {', '.join(wrong)}")


def check(checkpoint: Path, bundle: Path, work: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The number of stages and the record of each, in order."""
    opened = open_bundle(bundle, verify=False)
    manifest = opened.manifest
    staged = stage_model(
        open_checkpoint(checkpoint),
        maximum_context=manifest.model.maximum_context,
        experts=manifest.experts.computation,
        layers_per_stage=1,
    )
    passes = _begin(staged.stages, manifest.model.vocabulary_size, manifest.model.canvas_length)
    journal = Journal(work / "records.jsonl", f"{checkpoint} {bundle}")
    if journal.is_new:
        journal.begin()
    records = list(journal.records)
    before: StageModule | None = None
    for number, (stage, module) in enumerate(zip(manifest.stages, staged.stages, strict=True)):
        kept = [work / f"{stage.name}.{which}.safetensors" for which in range(len(passes))]
        if number >= len(records):
            began = time.monotonic()
            ours = _run(load_stage(opened, stage), passes)
            error, unequal = _compare(passes, ours, module)
            record = {"stage": stage.name, "error": error, "unequal_integers": unequal}
            controlled = any("error_of_the_layer_before" in earlier for earlier in records)
            if before is not None and not controlled and _same_template(before, module):
                record["error_of_the_layer_before"] = _compare(passes, ours, before)[0]
            record |= {
                "seconds": round(time.monotonic() - began, 1),
                "peak_rss_bytes": peak_rss_bytes(),
            }
            for path, named in zip(kept, ours, strict=True):
                save_file({name: tensor.contiguous() for name, tensor in named.items()}, path)
            journal.append([record])
            records.append(record)
        for named, path in zip(passes, kept, strict=True):
            named |= load_file(path)
        before = module
        yield len(staged.stages), records[number]


def _same_template(one: StageModule, other: StageModule) -> bool:
    if one.template is None or other.template is None:
        return False
    return one.template.name == other.template.name


def _begin(stages: tuple[StageModule, ...], vocabulary: int, canvas: int) -> list[Named]:
    """What the loop gives in both passes; what only the head takes is as in its example."""
    generator = torch.Generator().manual_seed(0)
    passes: list[Named] = []
    for number in range(2):
        named: Named = {}
        for stage in (stages[0], stages[-1]):
            named |= zip(stage.input_names, stage.example_inputs, strict=True)
        for name in ("tokens", "canvas", "previous_argmax", "random_tokens", "targets"):
            named[name] = torch.randint(vocabulary, named[name].shape, generator=generator)
        named["uniform"] = torch.rand(named["uniform"].shape, generator=generator)
        named["signal"] = torch.randn(named["signal"].shape, generator=generator) * number
        named["start"] = torch.tensor([number * canvas])
        named["denoise"] = torch.tensor([number])
        passes.append(named)
    return passes


def _run(stage: LoadedStage, passes: list[Named]) -> list[Named]:
    # The outputs are the program's own memory, which the next pass writes anew.
    return [{k: v.clone() for k, v in stage(named).items()} for named in passes]


def _compare(
    passes: list[Named], ours: list[Named], stage: StageModule
) -> tuple[float, float | None]:
    """The rows' median error, and the share of integers that differ (None: there are none)."""
    errors: list[Tensor] = []
    unequal: list[Tensor] = []
    for named, found, expected in zip(passes, ours, _run(eager_stage(stage), passes), strict=True):
        for name, theirs in expected.items():
            if not theirs.is_floating_point():
                unequal.append((theirs != found[name]).flatten().float())
                continue
            work = theirs - named["hidden"] if name == "hidden" and stage.template else theirs
            size = work.flatten(0, -2).norm(dim=-1).clamp_min(1e-9)
            errors.append((found[name] - theirs).flatten(0, -2).norm(dim=-1) / size)
    share = float(torch.cat(unequal).mean()) if unequal else None
    return float(torch.cat(errors).median()), share


if __name__ == "__main__":
    main()
