"""What notebooks show of results: short, and escaped."""

import torch

from timm_qkformer.analysis import energy, firing_rates
from timm_qkformer.analysis.attention import record_attention
from timm_qkformer.analysis.notebook import html_table
from tiny import images, tiny


def test_tables_are_short_and_escaped():
    table = html_table("<b>", ("a", "b"), [("<script>", i) for i in range(40)])
    assert "<script>" not in table
    assert "<b>" not in table
    assert table.count("<tr>") == 14
    assert "and 28 more" in table


@torch.no_grad()
def test_results_have_tables_and_one_line():
    model, x = tiny("test_qkformer"), images(1)
    for result in (firing_rates(model, x), energy(model, x), record_attention(model, x)[0]):
        assert "\n" not in repr(result)
        assert len(repr(result)) < 200
        table = result._repr_html_()
        assert table.startswith("<table>")
        assert len(table) < 4000
