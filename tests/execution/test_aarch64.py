"""Kernels on 64-bit Arm, cross-compiled and run by an emulator: the same bits as on this machine.

Needs `apt install g++-aarch64-linux-gnu qemu-user`; any other emulator of user programs will do that is called so.
"""

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from timm_qkformer.execution import compiler, libraries, native
from timm_qkformer.execution.events import EventWeights
from timm_qkformer.neurons import NeuronSpec

CROSS = shutil.which("aarch64-linux-gnu-g++")
EMULATOR = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
PACKAGE = Path(native.__file__).parents[1]
LEVEL = next(level for level in libraries.LEVELS if level.machine == "aarch64")
OLDEST = "cortex-a53"  # no instruction beyond armv8-a

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CROSS is None, reason="no aarch64-linux-gnu-g++ here"),
    pytest.mark.skipif(EMULATOR is None, reason="no qemu-aarch64 here"),
]

T, THREADS = 3, 2
SPECS = (
    NeuronSpec(leak=0.5, threshold=1.0),
    NeuronSpec(leak=0.3, threshold=0.7, soft_reset=True, decay_input=False),
    NeuronSpec(leak=0.25, threshold=0.9, levels="ternary"),
)


class Call(NamedTuple):
    """A function and what it is called with.

    Operands are buffers, which are compared afterwards, lists of them, constant bytes, numbers and, last, threads.
    `first`: the buffer from which on they are compared.
    """

    function: str
    operands: Sequence[Any]
    first: int = 0


def neurons(*specs: NeuronSpec) -> bytes:
    return bytes(native.neuron_operand(*specs))


def currents(*shape: int, dtype: torch.dtype) -> Tensor:
    """Some of them exactly at a threshold, some no numbers."""
    x = torch.randn(shape, dtype=torch.float64) * 1.5
    flat = x.view(-1)
    flat[::7], flat[3::31] = 1.0, 2.0
    for i, value in enumerate((float("nan"), float("inf"), -float("inf"), 1e-40)):
        flat[5 + i :: 97] = value
    return x.to(dtype)


def spikes(*shape: int, dtype: torch.dtype = torch.uint8, most: int = 1) -> Tensor:
    return (torch.randint(1, most + 1, shape) * (torch.rand(shape) < 0.4)).to(dtype)


def typed() -> list[tuple[str, torch.dtype, torch.dtype, torch.dtype]]:
    suffixes = [types.partition(",")[0] for types in libraries.TYPES]
    found = [(suffix, *(getattr(torch, name) for name in suffix.split("_"))) for suffix in suffixes]
    return [(*each, torch.float64 if each[1] == torch.float64 else torch.float32) for each in found]


def calls_of_neurons() -> list[Call]:
    calls = []
    for suffix, currents_in, spikes_in, membrane in typed():
        for spec in SPECS:
            if spec.levels == "ternary" and spikes_in == torch.uint8:
                continue
            M = 301
            x, sums, out = currents(T, M, dtype=currents_in), spikes(T, M, dtype=spikes_in, most=3), spikes(T, M)
            v = torch.randn(M, dtype=membrane)
            steps = (x, M, sums, M, out.to(spikes_in), M, T, M)
            calls.append(Call(f"fire_{suffix}", (*steps, neurons(spec), v, torch.zeros_like(v), THREADS)))
            B, H, W, C = 2, 5, 6, 19
            x, v = currents(T, B, H, W, C, dtype=currents_in), torch.randn(B, 3, 3, C, dtype=membrane)
            out = torch.zeros(T, B, 3, 3, C, dtype=spikes_in)
            sizes = (x, x[0].numel(), out, T, B, H, W, C)
            calls.append(Call(f"pool_fire_{suffix}", (*sizes, neurons(spec), v, torch.zeros_like(v), THREADS)))
    return calls


def calls_of_operators() -> list[Call]:
    calls = []
    B, N, C, heads = 2, 10, 36, 3
    inner = {
        "self_attention": (3, C // heads, N),
        "token_attention": (2, 1, N),
        "channel_attention": (2, C // heads, 1),
    }
    for suffix, currents_in, spikes_in, membrane in typed():
        for name, (inputs, *of_head) in inner.items():
            x, out = currents(T, B, N, inputs * C, dtype=currents_in), torch.zeros(T, B, N, C, dtype=spikes_in)
            before = [torch.randn(B, N, C, dtype=membrane) for _ in range(inputs)]
            before.append(torch.randn(B, heads, *of_head, dtype=membrane))
            specs = (*(*SPECS[:2], SPECS[0])[-inputs:], NeuronSpec(leak=0.5, threshold=0.5))
            after = [torch.zeros_like(v) for v in before]
            operands = (x, out, T, B, N, C, heads, 0.125, neurons(*specs), before, after, THREADS)
            calls.append(Call(f"{name}_{suffix}", operands))
    return calls


def calls_of_events() -> list[Call]:
    calls = []
    B, H, W, C = 2, 6, 5, 24
    for name, dtype in (("float32", torch.float32), ("int8", torch.int8)):
        for outputs, side, stride, most in ((64, 3, 2, 1), (32, 1, 1, 3), (48, 3, 1, 129)):
            x = spikes(T * B, H, W, C, most=most)
            weight = torch.randn(outputs, C, side, side)
            scale = torch.rand(outputs) / 40 if dtype == torch.int8 else None
            weight = (weight * 40).clamp(-127, 127).to(dtype) if dtype == torch.int8 else weight
            tiles = EventWeights(weight, torch.randn(outputs), scale, stride)
            size = (H - 1) // stride + 1, (W - 1) // stride + 1, outputs
            shape = (x, tiles.tiles, tiles.bias, tiles.scale, T * B, H, W, C, outputs, side, stride, tiles.width)
            out = torch.zeros(T * B, *size)
            calls.append(Call(f"convolve_{name}", (*shape, 1, out, None, THREADS)))
            calls.append(Call(f"convolve_{name}", (*shape, T, None, out.bfloat16(), THREADS)))
            sums, v = spikes(T, B, *size, most=3), torch.randn(B, *size)
            fired, step = torch.zeros_like(sums), sums[0].numel()
            target = (sums, step, fired, step, v, torch.zeros_like(v), THREADS)
            calls.append(Call(f"convolve_fire_{name}", (*shape, T, neurons(SPECS[1]), *target)))
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        for outputs, side, width in ((64, 3, 64), (32, 1, 32), (48, 3, 16)):
            grad = torch.randn(T * B, H, W, outputs).to(dtype)
            out = torch.zeros(2, outputs // width, side**2, C, width)
            sizes = (T * B, H, W, C, outputs, side, width, 2)
            operands = (spikes(T * B, H, W, C, most=2), grad, *sizes, out, THREADS)
            calls.append(Call(f"weight_gradient_{name}", operands))
    return calls


def calls_of_packing() -> list[Call]:
    calls = []
    n = 10_001
    for name in ("float32", "bfloat16"):
        for bits, low, high in ((1, 0, 1), (2, -1, 1), (4, 0, 9), (8, 0, 200)):
            size = -(-n * bits // 8)
            x = torch.randint(low, high + 1, (n,)).to(getattr(torch, name))
            data = torch.zeros(size, dtype=torch.uint8)
            for misfit in (None, 0.5, float("nan"), float("inf"), 2.0**31, -(2.0**31)):
                y = x.clone()
                if misfit is not None:
                    y[n // 2] = misfit
                total = torch.zeros((), dtype=torch.int64)
                first = 0 if misfit is None else 2  # what is packed of misfits is thrown away
                calls.append(Call(f"pack_{name}", (y, n, data, bits, size, low, high, total, THREADS), first))
            packed = torch.randint(0, 256, (size,), dtype=torch.uint8)
            for to in (name, "uint8"):
                out = torch.zeros(n, dtype=getattr(torch, to))
                calls.append(Call(f"unpack_{to}", (packed, bits, size, low, out, n, THREADS)))
    return calls


def buffers(call: Call) -> list[Tensor]:
    """In the order in which both sides number them."""
    found: list[Tensor] = []
    for operand in call.operands:
        found += [operand] if isinstance(operand, Tensor) else operand if isinstance(operand, list) else []
    return found


def run_here(call: Call, function: Any) -> list[Tensor]:
    """What the call leaves in its buffers."""
    copies: list[Tensor] = []

    def pointer(tensor: Tensor) -> int:
        copies.append(tensor.clone().contiguous())
        return copies[-1].data_ptr()

    types, values = [], []
    for operand in call.operands:
        kind: Any = ctypes.c_void_p
        if isinstance(operand, Tensor):
            operand = pointer(operand)
        elif isinstance(operand, list):
            operand = (ctypes.c_void_p * len(operand))(*map(pointer, operand))
        elif isinstance(operand, int | float):
            kind = ctypes.c_int64 if isinstance(operand, int) else ctypes.c_double
        types.append(kind)
        values.append(operand)
    function.argtypes, function.restype = [*types[:-1], ctypes.c_int], None
    function(*values)
    return copies


DRIVER = """
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

using Int = std::int64_t;
struct Buffer {
    std::string name;
    std::vector<char> bytes;
    explicit Buffer(const char* file) : name(file) {
        std::FILE* f = std::fopen(file, "rb");
        if (f == nullptr) std::abort();
        for (int c; (c = std::fgetc(f)) != EOF;) bytes.push_back(static_cast<char>(c));
        std::fclose(f);
    }
    ~Buffer() {
        std::FILE* f = std::fopen((name + ".out").c_str(), "wb");
        std::fwrite(bytes.data(), 1, bytes.size(), f);
        std::fclose(f);
    }
};
"""


def driver(calls: Sequence[Call], folder: Path) -> str:
    """A program that makes the calls; their buffers are put into the folder, numbered, where it reads them."""
    declared, body = {}, []
    for i, call in enumerate(calls):
        number, lines, words, types = 0, [], [], []

        def buffer(content: bytes) -> str:
            nonlocal number
            (folder / f"{i}.{number}").write_bytes(content)  # noqa: B023, called within this round
            lines.append(f'Buffer b{number}("{i}.{number}");')  # noqa: B023
            number += 1
            return f"b{number - 1}.bytes.data()"

        for place, operand in enumerate(call.operands):
            kind = "void*"
            if operand is None:
                word = "nullptr"
            elif isinstance(operand, Tensor):
                word = buffer(raw(operand))
            elif isinstance(operand, list):
                word = f"p{place}"
                lines.append(f"void* p{place}[] = {{{', '.join([buffer(raw(each)) for each in operand])}}};")
            elif isinstance(operand, bytes):
                lines.append(f"alignas(16) unsigned char c{place}[] = {{{', '.join(map(str, operand))}}};")
                word = f"c{place}"
            else:
                kind, word = ("Int" if isinstance(operand, int) else "double"), repr(operand)
            words.append(word)
            types.append(kind)
        declared[call.function] = f'extern "C" void {call.function}({", ".join([*types[:-1], "int"])});'
        body.append("{\n" + "\n".join(lines) + f"\n{call.function}({', '.join(words)});\n}}")
    return "\n".join((DRIVER, *declared.values(), "int main() {", *body, "}"))


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def emulate(calls: Sequence[Call], folder: Path) -> list[list[Tensor]]:
    """What the calls leave in their buffers on the other machine."""
    texts = {source.file: source.whole() for source in libraries.sources(PACKAGE)}
    texts["driver.cpp"] = driver(calls, folder)
    for file, text in texts.items():
        (folder / file).write_text(text)
        flags = (*libraries.FLAGS, *LEVEL.flags) if file != "driver.cpp" else ("-O0",)
        subprocess.run([CROSS, *flags, "-c", file], cwd=folder, check=True)
    objects = [f"{Path(file).stem}.o" for file in texts]
    subprocess.run([CROSS, "-static", "-fopenmp", *objects, "-o", "calls"], cwd=folder, check=True)
    subprocess.run([EMULATOR, "-cpu", OLDEST, "./calls"], cwd=folder, check=True, timeout=300)
    return [
        [
            torch.frombuffer(bytearray((folder / f"{i}.{k}.out").read_bytes()), dtype=tensor.dtype).view(tensor.shape)
            for k, tensor in enumerate(buffers(call))
        ]
        for i, call in enumerate(calls)
    ]


def test_every_kernel_gives_the_same_bits(tmp_path, event_kernels):
    calls = [*calls_of_neurons(), *calls_of_operators(), *calls_of_events(), *calls_of_packing()]
    here = [compiler.load(source.whole(), source.file) for source in libraries.sources(PACKAGE)]
    exported = {
        call.function: next(getattr(lib, call.function) for lib in here if hasattr(lib, call.function))
        for call in calls
    }
    other = emulate(calls, tmp_path)
    changed = 0
    for call, theirs in zip(calls, other, strict=True):
        ours = run_here(call, exported[call.function])
        changed += any(raw(before) != raw(after) for before, after in zip(buffers(call), ours, strict=True))
        for a, b in list(zip(ours, theirs, strict=True))[call.first :]:
            assert same_bits(a, b), call.function
    assert changed > 0.9 * len(calls)  # who leaves nothing behind compares nothing


def same_bits(a: Tensor, b: Tensor) -> bool:
    """But for the bits of what is no number, which processors make differently."""
    if not a.is_floating_point():
        return torch.equal(a, b)
    numbers = a == a
    kept = (a.where(numbers, 0), b.where(numbers, 0))
    return torch.equal(numbers, b == b) and raw(kept[0]) == raw(kept[1])
