"""What a checkpoint's generation_config.json and config.json say about sampling and special tokens.

The same for every family that keeps to transformers' keys; which settings a sampler has is not
known here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from export.contract.bundle import Sampler, SpecialTokens
from export.contract.styles.autoregressive import AutoregressiveSettings
from quantize.errors import CheckpointError, InputError

TRUNCATION = ("top_p", "top_k")


def checked_settings(settings: Callable[..., Any], found: Mapping[str, Any]) -> dict[str, float]:
    """All of a sampler's settings by name, checked by its own class; `found` replaces defaults.

    Raises CheckpointError for a value that cannot be.
    """
    try:
        return asdict(settings(**found))
    except (InputError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"generation_config.json has sampler settings that cannot be used: {error}"
        ) from error


def autoregressive_settings(generation_config: Mapping[str, Any]) -> dict[str, float]:
    """Temperature, top_p and top_k of `generate()`: greedy unless the checkpoint says `do_sample`.

    transformers' own defaults are 1.0, 1.0 and, oddly, 50; a top_k that is not stated is off here.
    """
    found: dict[str, Any] = {}
    if generation_config.get("do_sample"):
        stated = {name: generation_config.get(name) for name in ("temperature", "top_p", "top_k")}
        found = {"temperature": 1.0}
        found |= {name: value for name, value in stated.items() if value is not None}
    return checked_settings(AutoregressiveSettings, found)


def truncated_sampler(name: str, settings: dict[str, float], truncation: bool | None) -> Sampler:
    """A sampler that can have top-p and top-k in its graph; they are settings only if it has.

    `truncation`: whether it has them; None: if `settings` use them.
    """
    if truncation is None:
        truncation = settings["top_p"] < 1.0 or settings["top_k"] > 0
    left_out = () if truncation else TRUNCATION
    return Sampler(name, {k: v for k, v in settings.items() if k not in left_out})


def truncates(sampler: Sampler) -> bool:
    """Whether top-p and top-k are in the sampler's graph."""
    return set(TRUNCATION) <= sampler.settings.keys()


def special_tokens(*sections: Mapping[str, Any]) -> SpecialTokens:
    """The ids of the first section that states each: generation_config.json, then config.json.

    Raises CheckpointError for what is no id.
    """

    def find(name: str) -> Any:
        stated = (section.get(f"{name}_token_id") for section in sections)
        return next((value for value in stated if value is not None), None)

    eos, pad, bos = find("eos"), find("pad"), find("bos")
    ends = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
    for name, ids in (("eos", ends), ("pad", (pad,)), ("bos", (bos,))):
        for value in ids:
            is_id = type(value) is int and value >= 0
            if not (is_id or (value is None and name != "eos")):
                raise CheckpointError(
                    f"the checkpoint has {name}_token_id = {list(ids)!r}; expected token ids"
                )
    return SpecialTokens(eos=ends, pad=pad, bos=bos)
