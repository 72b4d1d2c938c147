"""The pages' tables of models are those of the registry."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("models_table", ROOT / "tools" / "models_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.rows()
    module.rows = lambda: found  # they take seconds
    return module


@pytest.mark.parametrize("page", ["README.md", "docs/models.md"])
def test_the_table_is_current(tool, page):
    text = (ROOT / page).read_text()
    assert tool.replaced(text, tool.PAGES[page]()) == text, "run python tools/models_table.py --write"


def test_weights_are_marked_by_where_they_come_from(tool):
    lines = tool.readme_table().splitlines()
    assert any("`qkformer_hst3_192`" in line and line.endswith("| in the package |") for line in lines)
    assert any("`spiliformer_10_768`" in line and "huggingface.co/KirinZheng/SpiLiFormer" in line for line in lines)
    assert any("`maxformer_10_384`" in line and "[bic-L/MaxFormer]" in line for line in lines)
    assert any("`qkformer_hst10_384`" in line and "links are dead" in line for line in lines)
    assert any("`tim_2_256`" in line and line.endswith("| none to download |") for line in lines)
    with pytest.raises(ValueError, match="0 blocks"):
        tool.replaced("no table", "")
