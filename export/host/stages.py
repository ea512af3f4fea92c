"""The stages of one model, ready to run, and the schedule of a pass over its layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from export.contract.manifest import Call, Decoding, ModelInfo

Run = Callable[[list[Tensor]], Sequence[Tensor]]


@dataclass(frozen=True)
class LoadedStage:
    """A stage that can be run: `run` takes and returns tensors in the order of the names."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    run: Run

    def __call__(self, named: Mapping[str, Any]) -> dict[str, Tensor]:
        values = self.run([torch.as_tensor(named[name]) for name in self.inputs])
        return dict(zip(self.outputs, values, strict=True))

    def planned(self, call: Call) -> LoadedStage:
        """The stage with the names and the constants of one call of the schedule."""
        constants = {name: torch.tensor([value]) for name, value in call.constants.items()}
        given = [name for name in self.inputs if name not in constants]

        def run(values: list[Tensor]) -> Sequence[Tensor]:
            named = constants | dict(zip(given, values, strict=True))
            return self.run([named[name] for name in self.inputs])

        return LoadedStage(
            self.name,
            tuple(call.inputs.get(name, name) for name in given),
            tuple(call.outputs.get(name, name) for name in self.outputs),
            run,
        )


class LoadedStages:
    """The stages of one model: a pass of its layers as scheduled, and its head.

    All values between stages stay tensors. A KV cache belongs to the stages, so to this object.
    """

    def __init__(
        self,
        info: ModelInfo,
        layers: Sequence[LoadedStage],
        head: LoadedStage,
        *,
        decoding: Decoding | None = None,
        schedule: Sequence[Call] = (),
    ) -> None:
        self.info = info
        self.decoding = decoding
        self._head = head
        by_name = {stage.name: stage for stage in layers}
        self._calls = [by_name[call.stage].planned(call) for call in schedule] or list(layers)

    def layers(self, named: Mapping[str, Any]) -> Tensor:
        """One pass on the loop's arrays or tensors by name; returns hidden states `[1, N, H]`."""
        values: dict[str, Any] = {name: torch.as_tensor(value) for name, value in named.items()}
        for call in self._calls:
            values |= call(values)
        return values["hidden"]

    def head(self, named: Mapping[str, Any]) -> dict[str, Tensor]:
        """The head on its inputs by name; returns its outputs by name."""
        return self._head(named)
