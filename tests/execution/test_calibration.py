"""What a machine was measured to do faster: fits, files, environment, saved runs, two processes."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch

from timm_qkformer import execution
from timm_qkformer.execution import calibration, convolution, execution_policy
from timm_qkformer.execution.calibration import BreakEven, Timed
from timm_qkformer.execution.packing import counts, pack

TYPICAL = BreakEven(0.7, 7.0)


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """A process that has measured nothing, and the file that it writes to."""
    monkeypatch.setattr(calibration, "_known", {})
    path = tmp_path / "calibration.json"
    monkeypatch.setenv(calibration.ENVIRONMENT_VARIABLE, str(path))
    return path


def wait(seconds):
    return lambda: time.sleep(seconds)


def product(additions, crossing):
    """Events take 40 ms a unit of density; dense products as long as events at this density."""
    return Timed(additions, [wait(0.04 * density) for density in calibration.DENSITIES], wait(0.04 * crossing))


def refuse():
    raise AssertionError("measured again")


def test_a_fit_finds_where_times_cross():
    even = calibration.fit([product(100, 0.2), product(1000, 0.38)])
    assert even.most == pytest.approx(0.4, abs=0.05)
    assert even.overhead == pytest.approx(20, abs=6)
    assert even.holds(0.1, 100)
    assert not even.holds(0.3, 100)
    assert even.holds(0.3, 1000)


def test_events_that_never_or_always_win():
    slow = Timed(10, [wait(0.004), wait(0.008)], wait(0.0))
    fast = Timed(10, [wait(0.0), wait(0.0)], wait(0.008))
    assert not calibration.fit([slow, slow]).holds(0.05, 10)
    assert calibration.fit([fast, fast]).holds(1.0, 10)


def test_measured_once_then_read(measured, monkeypatch):
    first = calibration.break_even("a", TYPICAL, lambda: [product(100, 0.2), product(1000, 0.3)])
    assert calibration.break_even("a", TYPICAL, refuse) == first
    monkeypatch.setattr(calibration, "_known", {})  # another process
    assert calibration.break_even("a", TYPICAL, refuse) == first
    assert list(calibration.known()) == [f"a, {torch.get_num_threads()} threads"]


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"a, 1 threads": {"most": "x", "overhead": 0}}', '{"a, 1 threads": {"most": NaN}}', "null"],
)
def test_a_damaged_file_is_as_if_not_there(measured, content):
    measured.write_text(content)
    assert calibration.known() == {}
    found = calibration.break_even("a", TYPICAL, lambda: [product(100, 0.2), product(1000, 0.2)])
    assert BreakEven(**json.loads(measured.read_text())[f"a, {torch.get_num_threads()} threads"]) == found


def test_a_file_that_cannot_be_written_serves_this_process(monkeypatch, tmp_path):
    monkeypatch.setattr(calibration, "_known", {})
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(calibration.ENVIRONMENT_VARIABLE, str(tmp_path / "file" / "below"))
    found = calibration.break_even("a", TYPICAL, lambda: [product(100, 0.2), product(1000, 0.2)])
    assert calibration.break_even("a", TYPICAL, refuse) == found


def test_off_measures_nothing_and_takes_what_a_run_brought_along(monkeypatch):
    monkeypatch.setattr(calibration, "_known", {})
    monkeypatch.setenv(calibration.ENVIRONMENT_VARIABLE, "off")
    assert calibration.break_even("a", TYPICAL, refuse) == TYPICAL
    state = [{"work": 0, "calibration": f"a, {torch.get_num_threads()} threads", "most": 0.1, "overhead": 3.0}]
    execution.load_state_dict(state)
    assert calibration.break_even("a", TYPICAL, refuse) == BreakEven(0.1, 3.0)
    assert [entry for entry in execution.state_dict() if "calibration" in entry] == state


@pytest.mark.parametrize("most", [float("nan"), float("inf"), -1.0, None, "0.5"])
def test_a_saved_run_with_impossible_numbers_is_passed_over(most, monkeypatch):
    monkeypatch.setattr(calibration, "_known", {})
    execution.load_state_dict([{"work": 0, "calibration": "a, 1 threads", "most": most, "overhead": 0.0}])
    assert calibration.state_dict() == {}


@pytest.mark.usefixtures("event_kernels")
@pytest.mark.parametrize("most", [0.0, 1.0])
def test_training_chooses_by_it(most, measured, monkeypatch):
    x = (torch.rand(2, 64, 6, 6) < 0.2).float().contiguous(memory_format=torch.channels_last)
    conv = convolution._Conv([1, 1], [1, 1], [1, 1], 1)
    threads = torch.get_num_threads()
    kinds = [f"training float32, {what}, 3x3, {threads} threads" for what in ("products", "gradients")]
    monkeypatch.setattr(calibration, "_known", dict.fromkeys(kinds, BreakEven(most)))
    with execution_policy(kernels="always"):
        chosen = convolution._choose(x, pack(x, counts(1)), torch.zeros(64, 64, 3, 3), [1, 1], conv)
    assert chosen == (most > 0, most > 0)
    assert not measured.exists()


@pytest.mark.usefixtures("event_kernels")
def test_training_measures_what_it_runs(measured, monkeypatch):
    small = {1: (((2, 16, 4, 4), 16), ((2, 32, 4, 4), 16)), 3: (((2, 16, 4, 4), 16), ((2, 32, 4, 4), 16))}
    monkeypatch.setattr(convolution, "_TIMED", small)
    for side in (1, 3):
        for gradient in (False, True):
            even = convolution._break_even(torch.float32, side, gradient)
            assert even.most >= 0.0
    assert len(json.loads(measured.read_text())) == 4


SCRIPT = """
import time
from timm_qkformer.execution.calibration import BreakEven, Timed, break_even
def timed():
    print("measured", flush=True)
    time.sleep(1)
    return [Timed(1, [lambda: time.sleep(0.001)] * 2, lambda: None)] * 2
break_even("a", BreakEven(0.5), timed)
"""


@pytest.mark.slow  # starts two processes
def test_of_two_processes_one_measures(tmp_path):
    environment = {**os.environ, calibration.ENVIRONMENT_VARIABLE: str(tmp_path / "calibration.json")}
    runs = [subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, env=environment) for _ in "ab"]
    assert sorted(run.communicate()[0] for run in runs) == [b"", b"measured\n"]
