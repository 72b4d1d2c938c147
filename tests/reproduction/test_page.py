"""The page holds what was measured and what was published, and says which is which."""

import re

import pytest
import timm
import torch
from PIL import Image

pytest.importorskip("matplotlib")

from timm_qkformer.analysis import firing_rates
from timm_qkformer.analysis.hooks import recalibrated_norms
from timm_qkformer.reproduction import Run, Subject, write_page


def rows(page, heading):
    """Cells of the rows of a section's first table, by its first cell."""
    section = page.split(f"## {heading}")[1].split("\n## ")[0]
    table = section.split("\n\n")[1].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table]
    return {row[0]: row[1:] for row in cells[2:]}


@pytest.fixture(scope="module")
def subject():
    model = timm.create_model("test_qkformer").eval()
    x = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return Subject(model, "test_qkformer, random weights (seed 0)", True, x, "3 noisy pictures")


RUNS = [
    Run("ablation_time_steps", "T=1", seed, top1, 7, 90.0, "timm-qkformer train one.yaml")
    for seed, top1 in ((0, 60.0), (1, 61.0), (2, 62.0))
] + [Run("cifar10", "small", 0, 87.5, 30, 6000.0, "timm-qkformer train cpu_cifar10.yaml")]


@pytest.fixture(scope="module")
def page(subject, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    written = write_page(folder / "new", subject, "timm-qkformer reproduce --quick", quick=True, runs=RUNS)
    assert sorted(p.name for p in (folder / "new").iterdir()) == sorted(p.name for p in written)
    text = written[0].read_text()
    for picture in written[1:]:
        assert f"({picture.name})" in text
        with Image.open(picture) as opened:
            assert opened.width > 400
    return text


def test_head_says_where_numbers_come_from(page):
    head = page.split("\n## ")[0]
    assert "timm-qkformer reproduce --quick" in head
    assert "With --quick" in head
    assert f"torch {torch.__version__.split('+')[0]}" in head
    assert re.search(r"on 20\d\d-\d\d-\d\d", head)


def test_complexity(page):
    table = rows(page, "Table 1: complexity")
    assert table["QKTA"] == ["O(D)†", "N^1.00 D^1.00", "4,096", "O(N)†", "N^1.00 D^0.00", "64"]
    assert table["SSA as (Q K^T) V"][4].startswith("N^2.00 D^")


def test_parameters(page):
    table = rows(page, "Table 2: parameters")
    assert table["`qkformer_hst10_768`"] == ["64.96", "64.96", "64,962,760"]
    assert table["`qkformer_hst4_384`, num_classes=100"] == ["6.74†", "6.74", "6,740,884"]
    assert table["`maxformer_10_384`"][0] == "-"
    assert not any("test_" in name for name in table)


def test_parameters_with_other_attention_are_the_published_ones(page):
    section = page.split("last:\n\n")[1].split("\n\n")[0].splitlines()[2:]
    assert len(section) == 6
    for line in section:
        _, cifar, ours, events, ours_events = (cell.strip() for cell in line.strip("| ").split(" | "))
        assert cifar == f"{ours}†"
        assert events == f"{ours_events}†"


def test_runs_beside_the_published(page):
    table = rows(page, "Table 5: time steps")
    assert table["T = 1"] == ["78.51†", "61.00 ± 1.00 (3 seeds)"]
    assert table["T = 2"] == ["80.08†", "not measured"]
    assert "7 epochs, 2 min a run, seeds 0, 1, 2: `timm-qkformer train one.yaml`" in page
    assert rows(page, "Table 9: neurons")["LIF"] == ["81.15†", "not measured"]
    assert rows(page, "Trained models")["cifar10"] == ["small", "87.50 (1 seed)"]


def test_firing_rates(page, subject):
    table = rows(page, "Table 7: firing rates")
    with recalibrated_norms(subject.model, [subject.x]):
        measured = firing_rates(subject.model, subject.x).by_stage()
    assert table["Q"] == ["0.0432†", "0.0231†", *(f"{measured['Q'][stage]:.4f}" for stage in (1, 2, 3))]
    assert table["A_t"] == ["0.3477†", "0.2655†", f"{measured['A_t'][1]:.4f}", "-", "-"]
    assert table["A_c"][:2] == ["-", "-"]
    assert page.count("**The weights are random**") == 2


def test_memory(page):
    table = rows(page, "Table 8 and Fig. 4: memory of attention")
    assert list(table) == ["10", "20", "30"]
    assert table["30"] == ["0.89†", "0.88", "2.86", "3.97†", "3.97"]


def test_without_results_the_page_says_so(subject, tmp_path):
    text = write_page(tmp_path, subject, "c", quick=True, runs=[])[0].read_text()
    assert text.count("no results of such runs are in this package") == 6
    assert "No results of other training runs" in text
    with pytest.raises(FileExistsError, match=r"paper\.md"):
        write_page(tmp_path, subject, "c", quick=True, runs=[])


def test_trained_weights_are_not_called_random(tmp_path, subject):
    trained = Subject(subject.model, "a trained model", False, subject.x, "3 noisy pictures")
    text = write_page(tmp_path, trained, "c", quick=True, runs=[])[0].read_text()
    assert "random" not in text
