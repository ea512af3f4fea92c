"""Makes XNNPACK keep packed weights in a mapped file, which its Python bindings cannot ask for.

ExecuTorch's runtime takes the file as an option of loading a program in C++; the Python bindings
load without options. All programs loaded so share one weights cache, so this asks the backend for
that cache, by symbols that its libraries export, and gives it the file. What is in the file is
`packed_file`'s, who loads what is `runtime`'s.

Sources: ExecuTorch 1.5.1, backends/xnnpack/runtime/XNNWeightsCache.cpp and XNNPACKBackend.cpp
(`init` asks for the cache of the empty path), runtime/backend/options.h (the layout of an option).
"""

from __future__ import annotations

import ctypes
import fcntl
import importlib.metadata
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quantize.errors import InputError

VERSION = "1.5.1"
"""The version of ExecuTorch whose objects have the layout that is relied on here."""

_BACKEND = b"XnnpackBackend"
_ENABLED = b"weight_cache_enabled"
_KEY_BYTES, _VALUE_BYTES = 64, 256
_OPTIONS_AT = 8
"""Of the options within the backend: behind its table of virtual methods."""

_STRING = "RKNSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE"
_RUNTIME_SYMBOLS = {
    "set_option": "_ZN10executorch7runtime10set_optionEPKcNS0_4SpanINS0_13BackendOptionEEE",
    "get_backend": "_ZN10executorch7runtime17get_backend_classEPKc",
}
_BACKEND_SYMBOLS = {
    "get_cache": "_ZN10executorch8backends7xnnpack21XnnpackBackendOptions"
    f"27get_or_create_weights_cacheE{_STRING}",
    "set_path": f"_ZN10executorch8backends7xnnpack8delegate15XNNWeightsCache"
    f"21set_packed_cache_pathE{_STRING}",
}
# libstdc++, bits/shared_ptr_base.h: _Sp_counted_base is its virtual methods (two destructors, then
# _M_dispose), the count of owners, the count of weak ones.
_OWNERS_AT, _DISPOSE = 8, 2


class _Option(ctypes.Structure):
    """BackendOption: a key, then a variant of bool, int and characters, and which of them it is."""

    _fields_ = (
        ("key", ctypes.c_char * _KEY_BYTES),
        ("value", ctypes.c_uint8 * _VALUE_BYTES),
        ("kind", ctypes.c_uint8),
        ("padding", ctypes.c_uint8 * 3),
    )


class _String(ctypes.Structure):
    """A std::string that points to characters elsewhere."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("size", ctypes.c_size_t),
        ("local", ctypes.c_char * 16),
    )


class _Shared(ctypes.Structure):
    """Result<std::shared_ptr<T>>: the object, its count of owners, whether there is one."""

    _fields_ = (
        ("object", ctypes.c_void_p),
        ("owners", ctypes.c_void_p),
        ("is_there", ctypes.c_uint8),
    )


class PackedWeights:
    """The file that programs loaded from now on have their packed weights in.

    A program takes them from the file if they are there, and adds them otherwise, if the file was
    not there in the beginning. One at a time in a process: the next one closes it. Load within
    `loading`.
    """

    def __init__(self, path: Path) -> None:
        """Raises InputError where this build of ExecuTorch has no such file, or has one in use."""
        self.path = path
        global _latest
        if _latest is not None:
            _latest.close()
        self._cache: _Shared | None = None
        self._runtime, self._backend = _libraries()
        empty, _keep = _string(b"")
        options = self._get_backend() + _OPTIONS_AT
        # Given back through memory of the caller; ctypes does as C++ does with 24 bytes.
        cache = self._backend["get_cache"](options, ctypes.addressof(empty))
        if not cache.is_there or not cache.object:
            raise InputError(
                "XNNPACK gives no cache of packed weights; run without a memory budget"
            )
        self._cache = cache
        _latest = self
        text, _keep = _string(os.fsencode(path))
        self._backend["set_path"](cache.object, ctypes.addressof(text))

    @contextmanager
    def loading(self) -> Iterator[None]:
        """What is loaded within has its weights in the file; afterwards other processes may too."""
        self._enable(True)
        try:
            yield
        finally:
            self._enable(False)
            self._unlock()

    def close(self) -> None:
        """Unmap the file. Raises InputError while a program that uses it is loaded."""
        if self._cache is None:
            return
        cache = self._cache
        if _owners(cache) != 1:
            raise InputError(
                "this process has a bundle loaded within a memory budget already; end that session "
                "first"
            )
        _owners(cache, -1)
        owners = ctypes.c_void_p(cache.owners)
        methods = ctypes.c_void_p.from_address(cache.owners).value or 0
        word = ctypes.sizeof(ctypes.c_void_p)
        dispose = ctypes.c_void_p.from_address(methods + _DISPOSE * word).value or 0
        # What stays is the counts themselves, some hundred bytes.
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(dispose)(owners)
        self._cache = None

    def _get_backend(self) -> int:
        found = self._runtime["get_backend"](_BACKEND)
        if not found:
            raise InputError("ExecuTorch has no XNNPACK backend here; run without a memory budget")
        return found

    def _enable(self, enabled: bool) -> None:
        option = _Option(key=_ENABLED, kind=0)
        option.value[0] = int(enabled)
        if self._runtime["set_option"](_BACKEND, ctypes.addressof(option), 1) != 0:
            raise InputError(
                "XNNPACK refuses to keep packed weights in a file; run without a memory budget"
            )

    def _unlock(self) -> None:
        """Let go of the lock that the cache takes on the file while it has it open.

        It would keep every other process from mapping the file, and only matters to one that
        writes. The descriptor stays open, so that the cache does not take it again.
        """
        for descriptor in _descriptors_of(self.path):
            fcntl.flock(descriptor, fcntl.LOCK_UN)


_latest: PackedWeights | None = None
"""What this process has open, or had."""


def _owners(cache: _Shared, change: int = 0) -> int:
    count = ctypes.c_int.from_address(cache.owners + _OWNERS_AT)
    count.value += change
    return count.value


def _libraries() -> tuple[dict[str, Any], dict[str, Any]]:
    version = importlib.metadata.version("executorch")
    reason = f"its version is {version}, expected {VERSION}"
    if version == VERSION:
        import executorch
        from executorch.extension.pybindings import _C  # noqa: F401 - loads the libraries

        folder = Path(next(iter(executorch.__path__))) / "lib"
        try:
            runtime = ctypes.CDLL(str(folder / "libexecutorch.so"))
            backend = ctypes.CDLL(str(folder / "libexecutorch_backend_xnnpack.so"))
            return _runtime_functions(runtime), _backend_functions(backend)
        except (OSError, AttributeError) as error:
            reason = str(error)
    raise InputError(
        f"this build of ExecuTorch cannot keep packed weights in a file ({reason}); run without a "
        "memory budget"
    )


def _runtime_functions(library: ctypes.CDLL) -> dict[str, Any]:
    functions = {name: getattr(library, symbol) for name, symbol in _RUNTIME_SYMBOLS.items()}
    functions["set_option"].argtypes = (ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t)
    functions["set_option"].restype = ctypes.c_uint32
    functions["get_backend"].argtypes = (ctypes.c_char_p,)
    functions["get_backend"].restype = ctypes.c_void_p
    return functions


def _backend_functions(library: ctypes.CDLL) -> dict[str, Any]:
    functions = {name: getattr(library, symbol) for name, symbol in _BACKEND_SYMBOLS.items()}
    functions["get_cache"].argtypes = (ctypes.c_void_p, ctypes.c_void_p)
    functions["get_cache"].restype = _Shared
    functions["set_path"].argtypes = (ctypes.c_void_p, ctypes.c_void_p)
    functions["set_path"].restype = None
    return functions


def _string(text: bytes) -> tuple[_String, ctypes.Array[ctypes.c_char]]:
    """The string, and its characters, which must outlive its use."""
    characters = ctypes.create_string_buffer(text)
    return _String(data=ctypes.addressof(characters), size=len(text)), characters


def _descriptors_of(path: Path) -> list[int]:
    """This process's open descriptors of a file."""
    try:
        wanted = path.stat()
    except OSError:
        return []
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            status = os.fstat(int(name))
        except OSError:  # the listing's own
            continue
        if (status.st_dev, status.st_ino) == (wanted.st_dev, wanted.st_ino):
            found.append(int(name))
    return found
