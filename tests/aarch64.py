"""Kernels' IR as AArch64 code: its assembly, and a run of it under an emulator.

A run needs `qemu-aarch64-static` (or `qemu-aarch64`) and `aarch64-linux-gnu-as` and `-ld`: Debian's
qemu-user-static and binutils-aarch64-linux-gnu. The program is kernels and a `_start` of a few
system calls; it reads its memory from standard input, calls, and writes it back: no libc.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import llvmlite.binding as llvm
import llvmlite.ir as ir

TRIPLE, FEATURES = "aarch64-unknown-linux-gnu", "+neon,+dotprod,+fullfp16"
QEMU = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
ASSEMBLER, LINKER = (shutil.which(f"aarch64-linux-gnu-{name}") for name in ("as", "ld"))
_I64 = ir.IntType(64)
Call = tuple[str, Sequence[int]]  # a function, and its arguments: places in memory are >= MEMORY
MEMORY = 1 << 40  # stands for the first byte of memory in a call's arguments


def assembly(module: ir.Module) -> str:
    """The module, optimised for `FEATURES`."""
    module.triple = TRIPLE
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    machine = llvm.Target.from_triple(TRIPLE).create_target_machine(features=FEATURES, opt=3)
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    passes = llvm.create_pass_builder(machine, options)
    passes.getModulePassManager().run(parsed, passes)
    return str(machine.emit_assembly(parsed))


def emulated(module: ir.Module, calls: Sequence[Call], memory: bytes, folder: Path) -> bytes:
    """`memory` after these calls of functions of `module`."""
    assert QEMU and ASSEMBLER and LINKER
    add_calls(module, calls)
    source, parts, program = (folder / name for name in ("kernels.s", "kernels.o", "kernels"))
    source.write_text(assembly(module) + _START.format(size=len(memory)))
    subprocess.run([ASSEMBLER, "-march=armv8.2-a+dotprod+fp16", "-o", parts, source], check=True)
    subprocess.run([LINKER, "-o", program, parts], check=True)
    command = [QEMU, "-cpu", "max", str(program)]
    done = subprocess.run(command, input=memory, capture_output=True, timeout=120, check=True)
    assert len(done.stdout) == len(memory)
    return done.stdout


def add_calls(module: ir.Module, calls: Sequence[Call]) -> None:
    """A function `calls` of the memory's address."""
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [_I64]), "calls")
    b = ir.IRBuilder(function.append_basic_block())
    for name, arguments in calls:
        given = [
            b.add(function.args[0], _I64(value - MEMORY)) if value >= MEMORY else _I64(value)
            for value in arguments
        ]
        b.call(module.globals[name], given)
    b.ret_void()


# read and write until all is moved: x8 is the system call, 63, 64 and, to exit, 93.
_START = """
        .text
        .globl _start
_start: adrp x19, memory
        add x19, x19, :lo12:memory
        ldr x20, =memory + {size}
        mov x21, x19
1:      sub x2, x20, x21
        mov x0, 0
        mov x1, x21
        mov x8, 63
        svc 0
        cmp x0, 0
        b.le 3f
        add x21, x21, x0
        cmp x21, x20
        b.lo 1b
        mov x0, x19
        bl calls
        mov x21, x19
2:      sub x2, x20, x21
        mov x0, 1
        mov x1, x21
        mov x8, 64
        svc 0
        cmp x0, 0
        b.le 3f
        add x21, x21, x0
        cmp x21, x20
        b.lo 2b
        mov x0, 0
        mov x8, 93
        svc 0
3:      mov x0, 1
        mov x8, 93
        svc 0
        .bss
        .balign 64
memory: .skip {size}
"""
