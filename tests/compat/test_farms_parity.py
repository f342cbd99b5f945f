"""The drop-in function against the published arithmetic, over a zoo of random layers."""

from __future__ import annotations

import pytest

from tests.support.parity import RULES, Parity, compare, table, zoo

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rows() -> list[Parity]:
    return [row for group in zoo() for row in compare(group)]


def test_the_zoo_is_large_and_mixed(rows: list[Parity]) -> None:
    assert len(rows) >= 200
    for rule in RULES:
        for kind in ("linear", "conv2d"):
            assert sum((row.rule, row.kind) == (rule, kind) for row in rows) >= 30
    # Were most layers unstable, the tests below would say nothing.
    assert sum(row.stable for row in rows) > 0.9 * len(rows)


def test_eigenvalues_are_the_published_ones(rows: list[Parity]) -> None:
    assert max(row.evals for row in rows) <= 1


def test_alpha_under_the_median_rule(rows: list[Parity]) -> None:
    worst = max((row for row in rows if row.rule == "xmin_mid"), key=lambda row: row.alpha)
    assert worst.alpha <= 1e-3, worst


@pytest.mark.parametrize("rule", ["xmin_peak", None])
def test_alpha_under_the_rules_that_scan(rows: list[Parity], rule: str | None) -> None:
    chosen = [row for row in rows if row.rule == rule]
    stable = [row for row in chosen if row.stable]
    worst = max(stable, key=lambda row: row.alpha)
    assert worst.alpha <= 1e-3, worst
    # The least D does not jump, whichever tail has it.
    furthest = max(chosen, key=lambda row: row.D)
    assert furthest.D <= 1e-3, furthest


def test_the_other_columns(rows: list[Parity]) -> None:
    for row in rows:
        assert max(row.others.values()) <= 1e-4, row


def test_the_table_has_a_line_for_every_kind_and_rule(rows: list[Parity]) -> None:
    lines = table(rows).splitlines()
    assert len(lines) == 2 + 2 * len(RULES)
    assert sum(int(line.split("|")[3]) for line in lines[2:]) == len(rows)
