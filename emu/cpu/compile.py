"""Native code from the interpreted sources: Numba, with a cache that cannot be stale.

The compiled functions are copies of the same code objects in globals of their own, so that the
Python functions stay what they are. Numba checks only the file of the outermost function when it
reads its cache and knows nothing of the functions that one calls; so the cache directory is named
after a hash of every source file that takes part, Numba's version and the CPU. Where no directory
can be written the code is compiled in memory, which takes seconds.

REFAULT_CACHE_DIR, else XDG_CACHE_HOME/refault, else ~/.cache/refault is the place.

Numba is imported on the first call and not before: listing payloads must not pay for it.

Not modelled: nothing of the architecture; this is plumbing.
"""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, cast

__all__ = ["Native", "native"]


class Native:
    """The compiled code: C addresses of the callbacks, and `walk` and `walk_shadow` with the interpreted
    walks' signatures (their memory is a numpy int64 array, see `memory`)."""

    def __init__(self, callbacks: dict[str, Any], walk: Any, make_walk_shadow: Callable[[], Any]) -> None:
        self._callbacks = callbacks
        self.fill_hook = int(callbacks["fill_hook"].address)
        self.block_hook = int(callbacks["block_hook"].address)
        self.edge_hook = int(callbacks["edge_hook"].address)
        self.walk = walk
        self._make_walk_shadow = make_walk_shadow

    @functools.cached_property
    def walk_shadow(self) -> Any:
        """Compiled when the first vCPU without EPT asks: others need not wait for it."""
        return self._make_walk_shadow()

    @staticmethod
    def memory(view: memoryview) -> Any:
        """A memoryview of int64 as the array that `walk` takes."""
        import numpy

        return numpy.frombuffer(view, dtype=numpy.int64)


@functools.cache
def native() -> Native:
    """Compile, or load from the cache. The same object every time: code has no state."""
    import numba

    from emu.cpu import block_body, code_pages, env, fill_body, paging, shadow_walk, walk
    from emu.cpu import callbacks as entry
    from kvm_model.vmx import ept, exits

    inner = [ept, paging, walk, shadow_walk, code_pages, fill_body, block_body]
    cache = _cache_directory([exits, env, *inner, entry])
    # Inlined by force: LLVM would leave the walk as calls, which doubles the cost of a fill.
    scope = _copies(inner, numba.njit(forceinline=True))
    signatures = entry.signatures()
    with _numba_cache(cache):
        callbacks = {
            name: numba.cfunc(signature, cache=cache is not None)(_copy(getattr(entry, name), scope))
            for name, signature in signatures.items()
        }
        word = numba.types.int64
        compile_walk = numba.njit((word[::1], *[word] * 10), cache=cache is not None)
        outer = compile_walk(_copy(cast(FunctionType, walk.walk), scope))

    def walk_shadow() -> Any:
        with _numba_cache(cache):
            compile_shadow = numba.njit((word[::1], *[word] * 8), cache=cache is not None)
            return compile_shadow(_copy(cast(FunctionType, shadow_walk.walk_shadow), scope))

    return Native(callbacks, outer, walk_shadow)


def _copies(modules: list[ModuleType], njit: Any) -> dict[FunctionType, Any]:
    """A dispatcher for every function of `modules` (callees first). Each is compiled when first needed."""
    done: dict[FunctionType, Any] = {}
    for module in modules:
        for function in list(vars(module).values()):
            if isinstance(function, FunctionType) and function.__module__ == module.__name__:
                done[function] = njit(_copy(function, done))
    return done


def _copy(function: FunctionType, compiled: dict[FunctionType, Any]) -> FunctionType:
    """`function`, calling the compiled forms of what it calls."""
    names = function.__globals__
    scope = {
        name: compiled.get(value, value) if isinstance(value, FunctionType) else value
        for name, value in names.items()
        if name in function.__code__.co_names
    }
    scope["__name__"] = names["__name__"]
    copy = FunctionType(function.__code__, scope, function.__name__)
    copy.__qualname__ = function.__qualname__
    copy.__module__ = function.__module__
    return copy


def _cache_directory(modules: list[ModuleType]) -> Path | None:
    """A writable directory for exactly this code on this machine, or None."""
    import numba
    from llvmlite import binding

    digest = hashlib.sha256(f"{numba.__version__} {binding.get_host_cpu_name()}".encode())
    for module in modules:
        digest.update(Path(str(module.__file__)).read_bytes())
    home = os.environ.get("REFAULT_CACHE_DIR")
    if not home:
        home = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "refault")
    path = Path(home) / "walk" / digest.hexdigest()[:32]
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError:
        return None
    return path


@contextmanager
def _numba_cache(path: Path | None) -> Iterator[None]:
    """Numba takes its cache directory from a process-wide setting; ours holds only in here."""
    from numba.core import config

    saved = config.CACHE_DIR
    if path is not None:
        config.CACHE_DIR = str(path)
    try:
        yield
    finally:
        config.CACHE_DIR = saved
