"""`make gpu` without a device, and the report that it writes where there is one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import run_gpu

ROOT = Path(__file__).resolve().parents[1]
JUNIT = """<testsuites><testsuite name="pytest">
<testcase classname="c" name="test_one[a]" time="1.25" />
<testcase classname="c" name="test_two" time="0.5"><failure message="assert 1 == 2">many
lines
E   assert 1 == 2</failure></testcase>
<testcase classname="c" name="test_three" time="0"><skipped message="golden cases are not here">x</skipped></testcase>
</testsuite></testsuites>"""


@pytest.mark.parametrize("arguments", [[], ["--check"]])
def test_without_a_device_it_says_so_before_it_needs_any_package(arguments):
    """-S: nothing that was installed can be imported."""
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-S", "-E", ROOT / "tests/run_gpu.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=hidden)
    assert (done.returncode, done.stdout, done.stderr.strip()) == (2, "", run_gpu.NO_DEVICE)


def test_the_report_has_results_failures_and_tables(tmp_path):
    (tmp_path / "results.xml").write_text(JUNIT)
    results = run_gpu.read_results(tmp_path / "results.xml", "test_x", 1)
    results += run_gpu.read_results(tmp_path / "not-there.xml", "test_dead", -11)
    report = {
        "environment": run_gpu.environment("cpu"),
        "tests": results,
        "benchmark": {"text": "LIF 1.5 ms", "label": "a trial"},
    }
    run_gpu.write(report, tmp_path)
    content = json.loads((tmp_path / "gpu-report.json").read_text())
    assert [test["outcome"] for test in content["tests"]] == ["passed", "failed", "skipped", "crashed"]
    assert content["tests"][0] == {"test": "test_x::test_one[a]", "outcome": "passed", "seconds": 1.25}
    assert content["environment"]["versions"]["torch"]
    text = (tmp_path / "gpu-report.md").read_text()
    assert content["text"] == text
    for part in (
        "1 crashed, 1 failed, 1 passed, 1 skipped",
        "E   assert 1 == 2",
        "the process ended with status -11",
        "skipped: golden cases are not here",
        "LIF 1.5 ms",
        "TRIAL OF THE SCRIPT",
    ):
        assert part in text
    run_gpu.write(report | {"benchmark": {"failed": "it broke"}}, tmp_path)
    assert "it broke" in (tmp_path / "gpu-report.md").read_text()
