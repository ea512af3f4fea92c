"""Memory that a model needs against what a device can give one app, and the verdict.

Of a config.json (`budget_of_layout`) or of a bundle's own programs (`budget_of_bundle`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from export.contract.styles import STYLES
from export.plan.device import Device
from export.plan.layout import Layout, largest_layer_bytes

if TYPE_CHECKING:
    from export.contract.bundle import Bundle

Verdict = Literal["fits", "tight", "needs streaming", "refuses"]
Kind = Literal["anonymous", "file"]

COMFORTABLE = 0.9
"""Share of what can be had up to which a model fits; beyond it is tight."""

NATIVE_RUNTIME = (64 * 2**20, 32 * 2**20)
"""Anonymous and file-backed bytes of a process without a model, where the device's file says
nothing: an assumption, for a native runtime."""

LINUX_RUNNER = (150 * 2**20, 85 * 2**20)
"""The same of this project's Linux runner, a Python process with PyTorch in it: measured on x86-64,
as `plan --measure` does (devices/xeon-2-cores.toml)."""


@dataclass(frozen=True)
class Line:
    """One thing that takes memory. anonymous: stays until it is freed. file: pages of a mapped
    file, which the system may drop and read again."""

    what: str
    kind: Kind
    bytes: int


@dataclass(frozen=True)
class Budget:
    """What is needed and what can be had.

    available_bytes: None if the device does not say. streamed_bytes: what is read from flash in
    each pass when weights are streamed, 0 where they need not be.
    """

    lines: tuple[Line, ...]
    available_bytes: int | None
    verdict: Verdict | None
    reason: str
    streamed_bytes: int = 0

    @property
    def anonymous_bytes(self) -> int:
        """That cannot be dropped."""
        return sum(line.bytes for line in self.lines if line.kind == "anonymous")

    @property
    def file_bytes(self) -> int:
        """Of mapped files."""
        return sum(line.bytes for line in self.lines if line.kind == "file")

    @property
    def total_bytes(self) -> int:
        """The peak of the resident set, with all mapped tables resident."""
        return self.anonymous_bytes + self.file_bytes


def budget_of_layout(
    layout: Layout, device: Device | None, available_bytes: int | None = None
) -> Budget:
    """The budget of a model laid out under a recipe.

    available_bytes: what the app can have; None: what the device's file says.
    """
    lines: list[Line] = []
    sums: dict[tuple[str, Kind], int] = {}
    for item in layout.stored:
        kind: Kind = "file" if item.where == "mapped" else "anonymous"
        what: str = item.part
        if item.stage == "head" or item.what == "lookup":
            what = f"{item.part}, {item.what}"
        sums[what, kind] = sums.get((what, kind), 0) + item.bytes
    lines += [Line(f"weights: {what}", kind, size) for (what, kind), size in sums.items()]
    lines += [
        Line(f"KV cache, {layout.context:,} positions, fp32", "anonymous", layout.kv_bytes),
        Line(
            "KV cache, allocated again by the memory planner",
            "anonymous",
            layout.kv_planned_bytes - layout.kv_bytes,
        ),
        Line("activations between operators", "anonymous", layout.activation_bytes),
        Line("buffers of the head", "anonymous", layout.head_bytes),
        Line("backend's workspace", "anonymous", layout.workspace_bytes),
        *_loading(layout.loading_bytes, layout.workspace_bytes),
        *_runtime(device),
    ]
    packed = sum(i.bytes for i in layout.stored if i.stage == "layers" and i.where == "packed")
    largest = largest_layer_bytes(layout.shape, layout.recipe)
    return _judged(tuple(lines), _available(device, available_bytes), packed, largest)


def budget_of_bundle(
    bundle: Bundle,
    device: Device | None,
    available_bytes: int | None = None,
    *,
    workspace_bytes: int = 0,
    runtime: tuple[int, int] = NATIVE_RUNTIME,
) -> Budget:
    """The budget of a bundle, from what its program files say of themselves.

    workspace_bytes: of the backend, which the files do not say. runtime: of a process without a
    model, if the device does not say. Raises BundleError for a program that cannot be read.
    """
    from export.host.program_file import read_program_memory  # with numpy, which a plan spares

    lines, packed, head = [], 0, 0
    for stage in bundle.manifest.stages:
        memory = read_program_memory(bundle.path(stage.file))
        lines += [
            Line(f"weights of {stage.name}, packed", "anonymous", memory.weight_bytes),
            Line(f"tables of {stage.name}, mapped", "file", memory.constant_bytes),
            Line(f"buffers of {stage.name}, KV cache included", "anonymous", memory.planned_bytes),
        ]
        if stage.role == "layers":
            packed += memory.weight_bytes
        if stage.role == "head":
            head = memory.weight_bytes
    if workspace_bytes:
        lines.append(Line("backend's workspace", "anonymous", workspace_bytes))
    if STYLES[bundle.manifest.style].loads_head_whole:
        lines += _loading(head, workspace_bytes)
    lines += _runtime(device, runtime)
    kept = tuple(line for line in lines if line.bytes)
    return _judged(kept, _available(device, available_bytes), packed, packed)


def _loading(head_bytes: int, workspace_bytes: int) -> list[Line]:
    """The head's weights in the file beside the packed ones, at the end of loading; later the
    workspace is there in their place."""
    beyond = head_bytes - workspace_bytes
    what = "the head's weights in the file while they are packed"
    return [Line(what, "file", beyond)] if beyond > 0 else []


def _runtime(device: Device | None, assumed: tuple[int, int] = NATIVE_RUNTIME) -> list[Line]:
    anonymous = None if device is None else device.value("runtime_anonymous_mib")
    file = None if device is None else device.value("runtime_file_mib")
    if anonymous is None or file is None:
        return [
            Line("runtime, assumed", "anonymous", assumed[0]),
            Line("runtime, assumed", "file", assumed[1]),
        ]
    return [
        Line("runtime, measured", "anonymous", round(anonymous * 2**20)),
        Line("runtime, measured", "file", round(file * 2**20)),
    ]


def _available(device: Device | None, available_bytes: int | None) -> int | None:
    if available_bytes is not None or device is None:
        return available_bytes
    return device.app_bytes


def _judged(
    lines: tuple[Line, ...], available: int | None, packed_layers: int, largest_layer: int
) -> Budget:
    plain = Budget(lines, available, None, "the device does not say how much an app can have")
    if available is None:
        return plain
    anonymous, total = plain.anonymous_bytes, plain.total_bytes
    # While one layer computes, the next is read: two are held.
    least = anonymous - packed_layers + min(packed_layers, 2 * largest_layer)
    streamed = 0
    verdict: Verdict
    if total <= COMFORTABLE * available:
        verdict, reason = "fits", f"{_gb(total)} needed of {_gb(available)}"
    elif anonymous <= available:
        verdict = "tight"
        reason = (
            f"{_gb(total)} needed of {_gb(available)}; {_gb(anonymous)} of them cannot be dropped, "
            f"{_gb(total - anonymous)} of tables can and would be read again"
        )
    elif least <= available:
        streamed = anonymous - available + min(packed_layers, 2 * largest_layer)
        verdict = "needs streaming"
        reason = (
            f"{_gb(anonymous)} cannot be dropped, {_gb(available)} can be had: about "
            f"{_gb(streamed)} of weights have to be read in each pass (--memory-budget, on Linux)"
        )
    else:
        verdict = "refuses"
        reason = (
            f"{_gb(anonymous)} cannot be dropped, {_gb(available)} can be had, and {_gb(least)} "
            "would remain with the layers' weights streamed"
        )
    return Budget(lines, available, verdict, reason, streamed)


def _gb(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
