"""Short tables for notebooks: what `_repr_html_` of this room's results shows."""

from collections.abc import Iterable, Sequence
from html import escape

ROWS = 12  # of a table; the rest is counted


def html_table(title: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table of the first rows, with a line for those left out. Everything is escaped."""
    all_rows = [[escape(str(cell)) for cell in row] for row in rows]
    body = "".join(f"<tr><td>{'</td><td>'.join(row)}</td></tr>" for row in all_rows[:ROWS])
    left_out = len(all_rows) - ROWS
    if left_out > 0:
        body += f'<tr><td colspan="{len(header)}">and {left_out} more</td></tr>'
    head = "</th><th>".join(map(escape, header))
    return f"<table><caption>{escape(title)}</caption><tr><th>{head}</th></tr>{body}</table>"
