"""The generation styles by name; a new one is one file here and one line in this table."""

from __future__ import annotations

from export.contract.styles.autoregressive import Autoregressive
from export.contract.styles.base import Style
from export.contract.styles.masked_diffusion import MaskedDiffusion
from export.contract.styles.uniform_diffusion import UniformDiffusion

STYLES: dict[str, Style] = {
    style.name: style for style in (UniformDiffusion(), MaskedDiffusion(), Autoregressive())
}

__all__ = ["STYLES", "Style"]
