"""Results of training runs: read with care, put together by variant."""

import json

import pytest

from timm_qkformer.reproduction.results import Run, canonical_variant, read_runs, summarize


def run(variant="T=1", seed=0, top1=70.0, experiment="ablation_time_steps", epochs=5):
    return Run(experiment, variant, seed, top1, epochs, 60.0, "timm-qkformer train x.yaml")


def test_runs_of_a_folder(tmp_path):
    entry = vars(run())
    (tmp_path / "b.json").write_text(json.dumps([dict(entry, seed=1), dict(entry, top1=71)]))
    (tmp_path / "a.json").write_text(json.dumps([dict(entry, seed=2, extra="ignored")]))
    (tmp_path / "notes.txt").write_text("no JSON")
    assert [r.seed for r in read_runs(tmp_path)] == [2, 1, 0]
    assert read_runs(tmp_path / "missing") == []


def test_runs_that_ship_can_be_read():
    for r in read_runs():
        assert 0 < r.top1 <= 100


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "bad.json is not JSON"),
        ("{}", "bad.json must be a list of runs, it is a dict"),
        ("[1]", "bad.json, entry 0 must be a run, it is 1"),
        ('[{"experiment": "e", "variant": "v", "seed": true}]', "entry 0 has seed=True, which must be a number"),
        ('[{"experiment": "e"}]', "entry 0 has variant=None, which must be a text"),
    ],
)
def test_results_that_are_none(tmp_path, text, message):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_runs(tmp_path)


def test_mean_and_spread():
    runs = [run(seed=0, top1=70.0), run(seed=1, top1=74.0), run("T=2", top1=80.0), run(experiment="cifar10")]
    one, two = summarize(runs, "ablation_time_steps")
    assert str(one) == "72.00 ± 2.83 (2 seeds)"
    assert str(two) == "80.00 (1 seed)"


@pytest.mark.parametrize("other", [run(seed=0), run(seed=1, epochs=6)])
def test_runs_that_must_not_be_put_together(other):
    with pytest.raises(ValueError, match="ablation_time_steps, T = 1"):
        summarize([run(), other], "ablation_time_steps")


@pytest.mark.parametrize(
    ("experiment", "variant", "spelling"),
    [
        ("ablation_time_steps", "t4", "T = 4"),
        ("ablation_attention", "qkta,qkta,ssa", "QKTA + SSA"),
        ("ablation_attention", "QKCA+SSA", "QKCA + SSA"),
        ("ablation_attention", "ssa", "SSA"),
        ("ablation_neuron", "neuron=plif", "PLIF"),
        ("ablation_neuron", "IF", "IF"),
        ("cifar10", "T=4, small", "T=4, small"),
    ],
)
def test_variants_in_the_papers_spelling(experiment, variant, spelling):
    assert canonical_variant(experiment, variant) == spelling
