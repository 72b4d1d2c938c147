"""The Triton code that Inductor would run on a CUDA device, without the device.

`generate` traces a kernel on the CPU as torch.compile does, moves the graph's tensors to a fake CUDA device of a given
compute capability and lets Inductor generate its code. `Generated.ptx` hands that to Triton's compiler, which needs no
driver either; `Generated.interpret` runs it, wrapper and kernels, in Triton's interpreter, in a process of its own
(this file as a script).
"""

import ast
import contextlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import torch
from torch import Tensor

CUDA = torch.device("cuda", 0)

KERNEL_IMPORTS = """
import triton
import triton.language as tl
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.triton_helpers import libdevice, math as tl_math

"""


@dataclass
class Kernel:
    """One Triton kernel of the generated source."""

    name: str
    source: str  # imports, decorators, function

    @property
    def loads(self) -> list[str]:
        """What is loaded: the pointer expressions, in order."""
        return re.findall(r"tl\.load\((.+?), (?:xmask|r0_mask|None)", self.source)

    @property
    def stores(self) -> list[str]:
        return re.findall(r"tl\.store\((.+?), tmp", self.source)

    @property
    def meta(self) -> tuple[dict[str, str], dict]:
        """Inductor's signature and what it says about alignment."""
        function = next(n for n in ast.parse(self.source).body if isinstance(n, ast.FunctionDef))
        call = next(d for d in function.decorator_list if isinstance(d, ast.Call))
        meta = next(k.value for k in call.keywords if k.arg == "triton_meta")
        fields = {key.value: value for key, value in zip(meta.keys, meta.values, strict=True)}
        return ast.literal_eval(fields["signature"]), ast.literal_eval(fields["configs"])[0]

    def module(self, folder: Path) -> ModuleType:
        """The kernel with Triton's decorator alone, without Inductor's launcher."""
        path = folder / f"{self.name}.py"
        path.write_text(KERNEL_IMPORTS + self.source[self.source.index("@triton.jit") :])
        spec = importlib.util.spec_from_file_location(self.name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def ptx(self, capability: int, folder: Path, block: int = 1024) -> str:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        signature, attrs = self.meta
        function = getattr(self.module(folder), self.name)
        source = ASTSource(function, signature, constexprs={"XBLOCK": block}, attrs=attrs)
        options = {"num_warps": 4, "enable_fp_fusion": "'enable_fp_fusion': True" in self.source}
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]


@dataclass
class Generated:
    """Inductor's output: a Python module whose `call` launches Triton kernels."""

    source: str
    order: list[int | None]  # for each argument of `call`, which operand it is; None: an open size

    @property
    def kernels(self) -> list[Kernel]:
        found = re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)'''", self.source, flags=re.DOTALL)
        return [Kernel(name, source) for name, source in found]

    @property
    def launches(self) -> list[str]:
        """Names of the kernels that one call launches."""
        return re.findall(r"^\s+(triton_\w+)\.run\(", self.source, flags=re.MULTILINE)

    @property
    def other_calls(self) -> list[str]:
        """Anything else that one call would run on the device."""
        body = self.source[self.source.index("def call(") :]
        return re.findall(r"^ +(?:\w+ = )?(?:extern_kernels|aten|torch\.ops)\.\S+", body, flags=re.MULTILINE)

    def interpret(self, operands: list[Tensor], *sizes: int) -> list[Tensor]:
        """Run the module on these operands, given in the order of the traced function, and open sizes."""
        left = iter(sizes)
        arguments = [next(left) if i is None else operands[i] for i in self.order]
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "generated.py").write_text(self.source)
            torch.save(arguments, Path(folder, "arguments.pt"))
            subprocess.run(
                [sys.executable, __file__, folder],
                check=True,
                timeout=300,
                env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
            )
            return torch.load(Path(folder, "results.pt"), weights_only=True)


def generate(function, operands: list[Tensor], capability: int, options: dict, on_device: list[bool]) -> Generated:
    """Inductor's code for `function(*operands)` on a CUDA device of this compute capability (90: sm_90).

    Args:
        function: What to compile; a fresh function object, see `kernel.kernel_body`.
        operands: CPU tensors that stand for the device's.
        capability: Compute capability of the device that is not there.
        options: Inductor's configuration.
        on_device: Which operands are on the device; the others stay on the CPU.
    """
    import torch._inductor.config
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.debug import DebugContext
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    found = SimpleNamespace(source=None, order=None)

    def lower(traced: torch.fx.GraphModule, fakes: list) -> object:
        def run(*arguments):  # sees the operands in the graph's order
            found.order = [
                next(i for i, o in enumerate(operands) if o is a) if isinstance(a, Tensor) else None for a in arguments
            ]
            found.source = on_fake_cuda(traced, fakes, found.order)
            return traced.forward(*arguments)

        return run

    def on_fake_cuda(traced: torch.fx.GraphModule, fakes: list, order: list[int | None]) -> str:
        graph = torch.fx.Graph()
        graph.output(graph.graph_copy(traced.graph, {}))
        moved = torch.fx.GraphModule(traced, graph)
        mode = torch._guards.detect_fake_mode(fakes)
        with fake_cuda(capability), torch._inductor.config.patch(options):
            inputs = list(fakes)
            for index, operand in enumerate(order):
                if operand is not None and on_device[operand]:
                    fake = fakes[index]
                    with mode:
                        inputs[index] = torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype, device=CUDA)
            for node in graph.nodes:
                if "device" in node.kwargs:
                    node.update_kwarg("device", CUDA)
            FakeTensorProp(moved, mode).propagate_dont_convert_inputs(*inputs)
            with V.set_fake_mode(mode), V.set_debug_handler(DebugContext()):
                lowering = GraphLowering(moved, example_inputs=inputs, shape_env=mode.shape_env, is_inference=True)
                with V.set_graph_handler(lowering):
                    lowering.run(*inputs)
                    code = lowering.codegen()[0]
        return getattr(code, "value", code)

    backend = aot_autograd(fw_compiler=lower, inference_compiler=lower, decompositions=select_decomp_table())
    with torch.no_grad():
        torch.compile(function, backend=backend, fullgraph=True)(*operands)
    return Generated(found.source, found.order)


@contextlib.contextmanager
def fake_cuda(capability: int):
    """What Inductor's code generation asks a device and its driver."""
    from torch._inductor.runtime.hints import DeviceProperties
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    major, minor = divmod(capability, 10)
    properties = DeviceProperties(
        type="cuda",
        index=0,
        multi_processor_count=132 if capability == 90 else 108,
        cc=capability,
        major=major,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        warp_size=32,
    )
    fake_driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_current_device=lambda: 0,
        utils=SimpleNamespace(get_device_properties=lambda _: {"max_shared_mem": 160 * 1024}),
    )
    with contextlib.ExitStack() as patches:
        for patch in (
            mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
            mock.patch.object(torch.cuda, "get_device_capability", return_value=(major, minor)),
            mock.patch.object(torch.cuda, "current_device", return_value=0),
            mock.patch.object(DeviceProperties, "create", return_value=properties),
            mock.patch.object(driver, "_active", fake_driver),
            mock.patch("torch._inductor.scheduler.has_triton", return_value=True),
        ):
            patches.enter_context(patch)
        yield


class InterpretedKernel:
    """Stands in for Inductor's launcher of one kernel."""

    def __init__(self, kernel: Kernel, folder: Path) -> None:
        self.function = getattr(kernel.module(folder), kernel.name)
        self.names = [name for name, kind in kernel.meta[0].items() if kind != "constexpr"]
        self.block = 8 if "R0_BLOCK" in kernel.source else 256  # the last block is not full

    def run(self, *args, stream: object) -> None:
        rows = dict(zip(self.names, args, strict=True))["xnumel"]
        self.function[(-(-rows // self.block),)](*args, XBLOCK=self.block)


def interpret(folder: Path) -> None:
    from torch._inductor.async_compile import AsyncCompile

    def empty(shape, strides, dtype):  # nan: what is not stored, shows
        return torch.empty_strided(shape, strides, dtype=dtype).fill_(torch.nan if dtype.is_floating_point else 99)

    torch._C._dynamo.guards._empty_strided_cuda = empty
    torch._C._cuda_getCurrentRawStream = lambda _: None
    torch.cuda._DeviceGuard = lambda _: contextlib.nullcontext()
    torch.cuda.set_device = lambda _: None
    AsyncCompile.triton = lambda _self, name, source, **_: InterpretedKernel(Kernel(name, source), folder)
    AsyncCompile.wait = lambda *_: None

    spec = importlib.util.spec_from_file_location("generated", folder / "generated.py")
    assert spec is not None
    assert spec.loader is not None
    generated = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generated)
    results = generated.call(torch.load(folder / "arguments.pt", weights_only=True))
    torch.save([result.clone() for result in results if result is not None], folder / "results.pt")


if __name__ == "__main__":
    interpret(Path(sys.argv[1]))
