"""The loops, one file a style: a new one is a file with a `Session`, and one line here.

The loop itself is `Turn.run` of `export.host.session`; read `export.host.engine` first.
"""

from __future__ import annotations

from export.host.loops.autoregressive import AutoregressiveSession
from export.host.loops.masked_diffusion import MaskedDiffusionSession
from export.host.loops.uniform_diffusion import UniformDiffusionSession
from export.host.session import Session

SESSIONS: dict[str, type[Session]] = {
    session.model_class.style.name: session
    for session in (
        UniformDiffusionSession,
        MaskedDiffusionSession,
        AutoregressiveSession,
    )
}
"""Who runs which generation style."""
