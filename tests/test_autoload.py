"""The plugin: models appear whenever timm does, and nothing ever breaks. Each case is a fresh interpreter."""

import os
import subprocess
import sys
import textwrap
import warnings
from importlib.metadata import entry_points

import pytest
import timm

COUNT = "print(len(timm.list_models('*qkformer*')))"
MODELS = str(len(timm.list_models("*qkformer*")))


def run(code, *, check=True, **env):
    """Run `code` in a fresh interpreter away from the checkout; return its output and its error output."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        env={**os.environ, **env},
    )
    assert not check or result.returncode == 0, result.stderr
    return result.stdout.strip(), result.stderr


@pytest.mark.parametrize(
    "imports",
    [
        "import timm",
        "import torch, timm",
        "import timm_qkformer, timm",
        *(
            pytest.param(order, marks=pytest.mark.slow)
            for order in (
                "from timm.models import create_model; import timm",
                "import timm.layers, timm",
                "import timm_qkformer.layers, timm",
                "import timm, timm_qkformer, timm_qkformer.models",
            )
        ),
    ],
)
def test_every_import_order_registers_once_and_silently(imports):
    out, err = run(f"import warnings; warnings.simplefilter('error', UserWarning)\n{imports}\n{COUNT}")
    assert out == MODELS
    assert "qkformer" not in err
    assert "Warning" not in err


def test_nothing_is_imported_without_timm():
    out, _ = run(
        """
        import sys, torch
        print(sorted(m for m in sys.modules if m.split(".")[0] in ("timm", "timm_qkformer", "spikingjelly")))
        """
    )
    assert out == "[]"


def test_spikingjelly_is_not_needed_to_run_a_model():
    out, _ = run(
        """
        import sys, timm, torch
        timm.create_model("test_qkformer")(torch.randn(1, 3, 32, 32)).sum().backward()
        print("spikingjelly" in sys.modules)
        """
    )
    assert out == "False"


@pytest.mark.parametrize("variable", ["TIMM_QKFORMER_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD"])
def test_can_be_turned_off(variable):
    out, _ = run(f"import timm\n{COUNT}\nimport timm_qkformer\n{COUNT}", **{variable: "0"})
    assert out.split() == ["0", MODELS]


@pytest.fixture
def plugin(monkeypatch):
    import timm_qkformer_autoload as plugin

    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if type(f).__name__ != "_TimmFinder"])
    monkeypatch.setitem(sys.modules, "timm.models", sys.modules["timm.models"])
    del sys.modules["timm.models"]
    return plugin


def is_on(plugin):
    plugin.autoload()
    return any(isinstance(finder, plugin._TimmFinder) for finder in sys.meta_path)


@pytest.mark.parametrize(
    ("setting", "on"),
    [("off", False), ("False", False), ("no", False), (" 0 ", False), ("1", True), ("yes", True), ("", True)],
)
def test_every_spelling_of_off_turns_it_off(setting, on, plugin, monkeypatch, recwarn):
    monkeypatch.setenv("TIMM_QKFORMER_AUTOLOAD", setting)
    assert is_on(plugin) is on
    assert not recwarn


def test_an_unknown_setting_is_said(plugin, monkeypatch):
    monkeypatch.setenv("TIMM_QKFORMER_AUTOLOAD", "perhaps")
    with pytest.warns(RuntimeWarning, match="TIMM_QKFORMER_AUTOLOAD='perhaps' is neither on"):
        assert is_on(plugin)


def test_nothing_is_raised_where_warnings_are_errors(plugin, monkeypatch, capsys):
    class Frozen(list):
        def insert(self, *args):
            raise RuntimeError("no finders, please")

    monkeypatch.setattr(sys, "meta_path", Frozen(sys.meta_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plugin.autoload()
    assert "no finders, please" in capsys.readouterr().err


def test_a_timm_that_is_too_old_is_named(tmp_path):
    """As a script that runs inside a checkout finds it."""
    layers = tmp_path / "timm" / "layers"
    layers.mkdir(parents=True)
    (tmp_path / "timm" / "__init__.py").write_text("__version__ = '0.9.0'\nfrom . import models\n")
    (tmp_path / "timm" / "models.py").write_text("is_model = lambda name: False\n")
    (layers / "__init__.py").write_text("")
    _, err = run("import torch, timm", PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    assert f"This timm is 0.9.0 in {tmp_path / 'timm'}; needed is timm>=1.0.31" in err


def test_the_loader_is_as_it_was_after_the_work():
    out, _ = run("import timm\nprint('exec_module' in vars(timm.models.__loader__))")
    assert out == "False"


@pytest.mark.parametrize(
    "dropped",
    ["timm", pytest.param(("timm", "timm_qkformer", "timm_qkformer_autoload"), marks=pytest.mark.slow)],
)
def test_a_timm_that_is_imported_again_has_the_models(dropped):
    names = (dropped,) if isinstance(dropped, str) else dropped
    out, err = run(
        f"""
        import sys, timm
        first = timm
        for name in list(sys.modules):
            if name.split(".")[0] in {names}:
                del sys.modules[name]
        import timm, torch
        assert timm is not first
        timm.create_model("test_qkformer")(torch.randn(1, 3, 32, 32))
        {COUNT}
        """
    )
    assert out == MODELS
    assert "Warning" not in err


THREADS = """
    import sys, threading, torch
    barrier, found = threading.Barrier(8), []

    def work(i):
        barrier.wait()
        if i % 2:
            import timm
        else:
            import timm_qkformer
            import timm
        found.append(timm.is_model("test_qkformer"))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    sys.setswitchinterval(1e-5)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(sum(found), len(found))
"""


@pytest.mark.parametrize("trial", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 12))])
def test_imports_in_eight_threads(trial):
    out, err = run(THREADS)
    assert out == "8 8"
    assert "Warning" not in err


def test_autoload_imports_nothing_heavy_and_is_fast():
    out, _ = run(
        """
        import sys, time
        import importlib.metadata  # torch has it already
        start = time.perf_counter()
        import timm_qkformer_autoload
        timm_qkformer_autoload.autoload()
        print(time.perf_counter() - start, "torch" in sys.modules, "timm" in sys.modules)
        """
    )
    seconds, torch, timm = out.split()
    assert (torch, timm) == ("False", "False")
    # Typically 0.3 ms; the bound leaves room for a loaded machine's disk.
    assert float(seconds) < 0.5


def test_an_error_becomes_one_warning_that_names_the_cause():
    out, err = run(
        """
        import sys
        class Broken:
            def find_spec(self, name, path=None, target=None):
                if name == "timm_qkformer":
                    raise OSError("disk on fire")
        sys.meta_path.insert(0, Broken())
        import torch, timm
        print(len(timm.list_models("*qkformer*")), timm.create_model("test_resnet") is not None)
        """
    )
    assert out == "0 True"
    assert err.count("RuntimeWarning") == 1
    assert "timm-qkformer could not register its models" in err
    assert "OSError: disk on fire" in err


def test_autoload_itself_never_raises():
    _, err = run(
        """
        import sys, timm_qkformer_autoload as plugin
        class Frozen(list):
            def insert(self, *args):
                raise RuntimeError("no finders, please")
        sys.meta_path = Frozen(sys.meta_path)
        plugin.autoload()
        """
    )
    assert "RuntimeError: no finders, please" in err


def test_a_failing_timm_fails_as_without_us():
    out, err = run(
        """
        import sys, torch
        sys.modules["timm.layers"] = None
        try:
            import timm
        except ImportError as error:
            print("ImportError")
        """
    )
    assert out == "ImportError"
    assert "qkformer" not in err


@pytest.mark.slow
def test_spawned_dataloader_workers_know_the_models(tmp_path):
    script = tmp_path / "workers.py"
    script.write_text(
        textwrap.dedent(
            """
            import timm
            from torch.utils.data import DataLoader, Dataset

            class Names(Dataset):
                def __len__(self):
                    return 2

                def __getitem__(self, i):
                    import timm
                    return len(timm.list_models("*qkformer*"))

            if __name__ == "__main__":
                loader = DataLoader(Names(), num_workers=1, multiprocessing_context="spawn")
                print([int(n) for n in loader])
            """
        )
    )
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == f"[{MODELS}, {MODELS}]"


@pytest.mark.slow
def test_torchrun_workers_know_the_models(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text("import timm\nprint('models', len(timm.list_models('*qkformer*')))\n")
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.count(f"models {MODELS}") == 2


def test_entry_points():
    backends = {e.name: e.value for e in entry_points(group="torch.backends")}
    assert backends["timm_qkformer"] == "timm_qkformer_autoload:autoload"
    for entry in entry_points(group="timm.models"):
        entry.load()
    assert "qkformer" in {e.name for e in entry_points(group="timm.models")}
