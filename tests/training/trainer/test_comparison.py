"""The comparison of attentions and families, and the ranking of sampled networks, at a tiny size."""

import dataclasses
import json
import math
import os
import subprocess
import sys
import time

import pytest
import timm
from tiny_runs import SRC, make_images

from timm_qkformer.cli import main
from timm_qkformer.reproduction import comparison
from timm_qkformer.reproduction.comparison import (
    GROUPS,
    RECIPES,
    Entry,
    comparison_section,
    parameters,
    run_comparison,
    shipped_rows,
)
from timm_qkformer.search import SPACES
from timm_qkformer.search.ranking import kendall_tau, tau_interval
from timm_qkformer.search.spaces import Gene, Space

OPTIONS = ("--num-classes", "3", "--epochs", "1", "--warmup-epochs", "0", "--batch-size", "12", "--workers", "0")
TINY = {"embed_dims": [8, 16, 32], "depths": [1, 0, 1], "num_heads": 4, "patch_embed": "imagenet"}
ENTRIES = {
    "attention": (Entry("qkta", "qkformer_hst4_384", {**TINY, "attn": "qkta"}),),
    "family": (Entry("TIM", "test_tim", {"embed_dim": 16, "depth": 1}),),
}


def test_what_is_compared():
    assert all(1.15e6 < parameters(entry) < 1.3e6 for entry in GROUPS["family"])
    families = {timm.models.model_entrypoint(entry.model).__module__ for entry in GROUPS["family"]}
    assert len(families) == 10
    assert {"qkta", "ssa", "sdsa", "a2os2a", "experts", "tim"} < {entry.name for entry in GROUPS["attention"]}
    assert parameters(GROUPS["attention"][0], in_chans=2) < parameters(GROUPS["attention"][0])


def test_trained_measured_and_written_down(data, tmp_path, monkeypatch):
    args = ("cifar10", data, tmp_path, tuple(ENTRIES), (0,), OPTIONS, ENTRIES)
    rows = run_comparison(*args)
    assert [row.variant for row in rows] == ["qkta", "TIM"]
    for row in rows:
        assert 0 <= row.top1 <= 100
        assert row.epochs == 1
        assert all(value > 0 for value in (row.params, row.energy_mj, row.latency_ms, row.core_seconds))
        assert "time_steps=2" in row.command
    monkeypatch.setattr(comparison, "_train_and_measure", None)  # nothing is done twice
    assert run_comparison(*args) == rows
    other = (*OPTIONS, "--epochs", "2")
    with pytest.raises(
        ValueError, match=r"comparison\.json has another training of qkta, `.* --epochs 1 .*another fol"
    ):
        run_comparison("cifar10", data, tmp_path, tuple(ENTRIES), (0,), other, ENTRIES)
    again = [dataclasses.replace(row, seed=1, top1=row.top1 + 2) for row in rows[:1]]
    text = "\n".join(comparison_section([*rows, *again], ENTRIES))
    assert f"{rows[0].top1 + 1:.2f} ± 1.41" in text
    assert "not measured" not in text
    text = "\n".join(comparison_section(rows[:1], {"attention": (*ENTRIES["attention"], *ENTRIES["family"])}))
    (line,) = (line for line in text.splitlines() if line.startswith("| TIM"))
    assert "not measured" in line
    assert "nmnist" not in text
    with pytest.raises(ValueError, match="jobs=0 must be at least 1"):
        run_comparison("cifar10", data, tmp_path, jobs=0)
    with pytest.raises(ValueError, match="data_set='svhn' is unknown"):
        run_comparison("svhn", data, tmp_path)
    with pytest.raises(ValueError, match="seeds: -1 must be from 0"):
        run_comparison("cifar10", data, tmp_path, seeds=(0, -1))
    with pytest.raises(FileNotFoundError, match=r"elsewhere' is no folder: .* the data of cifar10"):
        run_comparison("cifar10", tmp_path / "elsewhere", tmp_path, jobs=2)
    with pytest.raises(ValueError, match="'heads' is unknown"):
        run_comparison("cifar10", data, tmp_path, ("heads",))


def test_time_that_an_interruption_hides_is_not_stated(data, tmp_path):
    args = ("cifar10", data, tmp_path, ("family",), (0,), OPTIONS, ENTRIES)
    (row,) = run_comparison(*args)
    (tmp_path / "comparison.json").unlink()  # as if killed before it was written
    (again,) = run_comparison(*args)
    assert math.isnan(again.core_seconds)
    assert again.top1 == row.top1
    text = "\n".join(comparison_section([again, dataclasses.replace(row, seed=1)], ENTRIES))
    assert f"| {row.core_seconds:.0f} |" in text
    assert "nan" not in "\n".join(comparison_section([again], ENTRIES))


PARENT = """
import multiprocessing, os, sys, time
from timm_qkformer.reproduction.comparison import _begin_worker

def work():
    _begin_worker()
    print(os.getpid(), flush=True)
    time.sleep(600)

if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=work).start()
    time.sleep(60)
"""


def test_workers_end_with_the_process_that_began_them(tmp_path):
    (tmp_path / "parent.py").write_text(PARENT)
    environment = {**os.environ, "PYTHONPATH": str(SRC)}
    with subprocess.Popen([sys.executable, tmp_path / "parent.py"], stdout=subprocess.PIPE, env=environment) as parent:
        os.kill(int(parent.stdout.readline()), 0)
        parent.kill()
        killed = time.monotonic()
        parent.stdout.read()  # ends when the worker, who writes there, too, is gone
    assert time.monotonic() - killed < 300  # and not after its long sleep


@pytest.mark.slow
def test_two_at_once_are_the_same_as_one_by_one(data, tmp_path):
    runs = [
        run_comparison("cifar10", data, tmp_path / str(jobs), tuple(ENTRIES), (0,), OPTIONS, ENTRIES, jobs)
        for jobs in (1, 2)
    ]
    ours, theirs = ({row.variant: (row.top1, row.params, row.firing_rate) for row in rows} for rows in runs)
    assert ours == theirs
    assert all(row.latency_ms > 0 for row in runs[1])


def test_rows_that_ship_are_of_the_entries():
    rows = shipped_rows()
    assert len({row.key for row in rows}) == len(rows) > 0
    names = {f"comparison_{group}_{data}": {e.name for e in GROUPS[group]} for group in GROUPS for data in RECIPES}
    assert all(row.variant in names[row.experiment] for row in rows)
    assert not any(math.isnan(row.latency_ms) for row in rows)
    sizes = {entry.name: parameters(entry) for entry in GROUPS["family"]}
    assert all(row.params == sizes[row.variant] for row in rows if row.experiment == "comparison_family_cifar10")


def test_kendalls_tau():
    assert kendall_tau([1, 2, 3, 4], [10, 20, 30, 40]) == 1
    assert kendall_tau([1, 2, 3, 4], [4, 3, 2, 1]) == -1
    assert kendall_tau([1, 2, 3], [1, 3, 2]) == pytest.approx(1 / 3)
    assert kendall_tau([1, 1, 2], [1, 2, 3]) == pytest.approx(2 / math.sqrt(2 * 3))
    assert kendall_tau([1, 1], [1, 2]) == 0
    low, high = tau_interval(0.5, 10)
    assert (low, high) == pytest.approx((0.0202, 0.7909), abs=2e-3)
    assert tau_interval(1.0, 10)[1] <= 1
    with pytest.raises(ValueError, match="5 networks"):
        tau_interval(0.5, 4)
    with pytest.raises(ValueError, match="3 and 2 values"):
        kendall_tau([1, 2, 3], [1, 2])


def test_sampled_networks_are_trained_and_ranked(tmp_path, monkeypatch, capsys):
    data = make_images(tmp_path / "data", train=22, test=2)
    genes = {"depth": Gene((1,), 0.4), "embed_dim": Gene((8, 16), 0.4)}
    tiny = Space("test_autost", genes, lambda g: {**g, "num_heads": 4, "mlp_ratio": 1}, "cpu_ablation", (1e3, 1e5))
    monkeypatch.setitem(SPACES, "tiny", tiny)
    argv = ["search", "--space", "tiny", "--rank", "2", "--epochs", "1", "--data-dir", str(data), "--num-classes", "3"]
    argv += ["--image-size", "16", "--batch", "4", "--time-steps", "2", "--output", str(tmp_path)]
    assert main(argv) == 0
    table = capsys.readouterr().out
    assert "Kendall's tau of spikes and top-1:" in table
    kept = json.loads((tmp_path / "ranking.json").read_text())["networks"]
    assert len(kept) == 2
    assert kept[0]["params"] != kept[1]["params"]
    assert "model_ema: false" in (tmp_path / "network_01.yaml").read_text()
    assert main(argv) == 0
    assert capsys.readouterr().out.splitlines()[-5:] == table.splitlines()[-5:]  # from what is kept
    assert main([*argv, "--seed", "3"]) == 2
    assert "of a ranking with other settings" in capsys.readouterr().err
    assert main([*argv[:-2], "--epochs", "0", "--output", str(tmp_path)]) == 2
