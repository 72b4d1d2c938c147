"""Progress bars: a step in which a kernel compiles does not announce ten minutes."""

import io

import pytest

from timm_qkformer import progress
from timm_qkformer.progress import Bar, Pace


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    return wait


def test_one_slow_step_does_not_count(clock):
    pace = Pace()
    for seconds in (60.0, 1.0, 30.0, 1.0):  # workers start, a step, a kernel compiles, a step
        clock(seconds)
        pace.step()
    assert pace.seconds == 1.0
    clock(4.0)
    pace.step(4)
    assert pace.seconds == 1.0


def test_nothing_is_announced_before_three_steps(clock):
    pace = Pace()
    for _ in range(3):
        assert pace.seconds is None
        clock(30.0)
        pace.step()
    assert pace.seconds is None


def test_a_bar_says_what_is_left(clock):
    text = io.StringIO()
    bar = Bar(total=44, file=text)
    for seconds in (30.0, 28.0):
        clock(seconds)
        bar.update()
    assert "<?" in str(bar)
    for _ in range(4):
        clock(1.0)
        bar.update()
    assert "<00:38" in str(bar)
    bar.close()
