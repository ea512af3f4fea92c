"""The defaults of a style's sampler, as generation_config.json states them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from export.contract.manifest import Sampler
from export.contract.styles import Style
from quantize.errors import CheckpointError, InputError

TRUNCATION = ("top_p", "top_k")


def sampler_of(style: Style, found: Mapping[str, Any]) -> Sampler:
    """The style's sampler with all its settings; those `found` replace defaults, None leaves them.

    Raises CheckpointError for a value that cannot be.
    """
    try:
        settings = style.settings(**{k: v for k, v in found.items() if v is not None})
    except (InputError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"generation_config.json has sampler settings that cannot be used: {error}"
        ) from error
    return Sampler(style.sampler, asdict(settings))


def autoregressive_sampler(style: Style, generation_config: Mapping[str, Any]) -> Sampler:
    """Temperature, top_p and top_k of `generate()`: greedy unless the checkpoint says `do_sample`.

    transformers' own defaults are 1.0, 1.0 and, oddly, 50; a top_k that is not stated is off here.
    """
    found: dict[str, Any] = {}
    if generation_config.get("do_sample"):
        found = {name: generation_config.get(name) for name in ("temperature", *TRUNCATION)}
        if found["temperature"] is None:
            found["temperature"] = 1.0
    return sampler_of(style, found)


def truncates(sampler: Sampler) -> bool:
    """Whether a sampler's settings use top-p or top-k."""
    settings = sampler.settings
    return settings.get("top_p", 1.0) < 1.0 or settings.get("top_k", 0) > 0
