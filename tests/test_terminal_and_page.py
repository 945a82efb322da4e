"""How wide a table is printed."""

from funcscope.study import listing


def test_the_width_of_the_terminal_is_that_of_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "47")
    assert listing.terminal_width() == 47
