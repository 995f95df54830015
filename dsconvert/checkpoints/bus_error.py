"""Reports a mapped file that is cut short while it is read: the system ends the process by SIGBUS then.

No Python may run then: the thread stands in the middle of an instruction. So the handler is a few lines of
machine code, made by the compiler that numba brings along: it says what happened, removes the parts that
this process writes, and leaves with exit code 2.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
from functools import cache
from pathlib import Path
from typing import Any

CODE = 2
MESSAGE = (
    b"\nerror: a file was cut short while it was read (bus error). It is one of the source's or, in a proof, "
    b"the output's. Fetch or copy it again, and run the same command when nothing writes there.\n"
)
SHOW_CURSOR = b"\x1b[?25h"  # a progress bar hides it
_parts: Any = (ctypes.c_char_p * 1024)()  # the handler reads this table; a null is a free place


def remove(part: Path) -> None:
    """Have a bus error remove this file."""
    free = next((i for i, name in enumerate(_parts) if name is None), None)
    if free is not None:
        _parts[free] = os.fsencode(part.absolute())


def keep(part: Path) -> None:
    """The file is published or gone: a bus error leaves its name alone."""
    name = os.fsencode(part.absolute())
    for i, known in enumerate(_parts):
        if known == name:
            _parts[i] = None


def watch() -> None:
    """Handle bus errors from now on, where no compiler is at hand with Python's own word for them."""
    try:
        _install(os.getpid())
    except (ImportError, OSError, MemoryError, RuntimeError, AttributeError):
        faulthandler.enable(sys.__stderr__ or 2)


# Addresses are numbers here, since how LLVM writes pointers depends on its version; `load` alone takes one.
HANDLER = """
declare i64 @write(i32, i64, i64)
declare i32 @getpid()
declare i32 @unlink(i64)
declare void @_exit(i32)

define void @on_bus_error(i32 %signal) {{
start:
  %said = call i64 @write(i32 2, i64 {message}, i64 {length})
  %me = call i32 @getpid()
  %own = icmp eq i32 %me, {pid}
  br i1 %own, label %loop, label %end
loop:
  %at = phi i64 [ {first}, %start ], [ %next, %after ]
  %place = inttoptr i64 %at to {pointer}
  %name = load i64, {pointer} %place
  %there = icmp ne i64 %name, 0
  br i1 %there, label %remove, label %after
remove:
  %removed = call i32 @unlink(i64 %name)
  br label %after
after:
  %next = add i64 %at, 8
  %more = icmp ult i64 %next, {last}
  br i1 %more, label %loop, label %end
end:
  call void @_exit(i32 {code})
  ret void
}}
"""


@cache
def _install(pid: int) -> Any:
    """Compile the handler for this process and hand it to the system; returns what must stay alive.

    A process forked from this one ends in the same way and leaves the parts alone, which are not its own.
    """
    from llvmlite import binding

    text = MESSAGE + (SHOW_CURSOR if os.isatty(2) else b"")
    message = ctypes.create_string_buffer(text)
    first = ctypes.addressof(_parts)
    values = {"message": ctypes.addressof(message), "length": len(text), "pid": pid, "code": CODE}
    values |= {"first": first, "last": first + ctypes.sizeof(_parts)}
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    try:
        module = binding.parse_assembly(HANDLER.format(pointer="ptr", **values))
    except RuntimeError:  # LLVM before 15
        module = binding.parse_assembly(HANDLER.format(pointer="i64*", **values))
    machine = binding.Target.from_default_triple().create_target_machine()
    engine = binding.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    install = ctypes.CDLL(None).signal
    install.argtypes, install.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    install(signal.SIGBUS, engine.get_function_address("on_bus_error"))
    return engine, message
