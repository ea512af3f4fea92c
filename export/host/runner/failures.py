"""Names what ended a run, as the protocol does."""

from __future__ import annotations

import errno
import traceback

from export.contract.runner_protocol import FailureReason
from export.contract.validation import sentence
from export.host.process import peak_address_space_bytes
from quantize.errors import BundleError, UserError

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_OUT_OF_MEMORY = (
    "bad_alloc",
    "can't allocate memory",
    "cannot allocate memory",
    "out_of_memory",
    "memoryallocationfailed",
    "failed to map segment",  # the dynamic linker
    "can't start new thread",
    "unable to allocate",
)
"""What libraries write, in lower case, where they raise something else than MemoryError."""


class Cancelled(Exception):
    """A signal ended the run."""


def describe(error: Exception, limit_bytes: int | None) -> dict[str, str]:
    """`reason` and `sentence` of what ended a run; the trace of what no user caused is printed.

    limit_bytes: of the address space, if the request set one.
    """
    reason: FailureReason
    text = traceback.format_exception_only(error)[-1]
    if isinstance(error, Cancelled):
        reason, text = "cancelled", "the run was ended by a signal before it was done"
    elif _is_out_of_memory(error, limit_bytes):
        limit = "" if limit_bytes is None else f" within {limit_bytes} bytes of address space"
        reason = "out_of_memory"
        text = f"there is no memory left{limit} ({text.strip()}); take a smaller bundle or context"
    elif isinstance(error, OSError) and error.errno in _DISK_FULL:
        where = f"{error.filename}: " if error.filename else ""
        reason, text = "storage_full", f"{where}no space left on the disk; free some space"
    elif isinstance(error, BundleError):
        reason, text = "bundle_refused", str(error)
    elif isinstance(error, UserError):
        reason, text = "input", str(error)
    else:
        reason = "internal"
    if reason in ("internal", "out_of_memory"):
        traceback.print_exception(error)
    return {"reason": reason, "sentence": sentence(text)}


def _is_out_of_memory(error: BaseException, limit_bytes: int | None) -> bool:
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    for link in chain:
        if isinstance(link, MemoryError):
            return True
        if isinstance(link, OSError) and link.errno == errno.ENOMEM:
            return True
        if any(words in str(link).lower() for words in _OUT_OF_MEMORY):
            return True
    # ExecuTorch reports some failed allocations as a mere number. Under a limit that is used up,
    # that is what they are.
    is_native = any(type(link) is RuntimeError for link in chain)
    return is_native and limit_bytes is not None and (
        peak_address_space_bytes() >= 0.95 * limit_bytes
    )  # fmt: skip
