"""What docs/method.md says in its tables is what the results hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def tables(text: str) -> list[list[list[str]]]:
    """The cells of every table, header first."""
    found: list[list[list[str]]] = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        elif found[-1]:
            found.append([])
    return [[table[0], *table[2:]] for table in found if table]


def interval(values: list[float] | None) -> str:
    return "–" if values is None else "[{:+.2f}, {:+.2f}]".format(*values)


def row(summary: dict[str, Any], name: str, kind: str) -> list[str]:
    """What stands behind a variant's name, or a teacher's."""
    if kind == "teacher" and name in summary["teachers"]:
        mean, own, rival = summary["teachers"][name], ["–"] * 4, f"teacher {name}"
    else:
        mean, rival = summary["means"][name], name
        own = [
            str(len(summary["seeds"][name])),
            f"{summary['validation'][name]:.2f}",
            *(f"{summary[readout][name]:.2f}" for readout in ("shared", "pooled")),
        ]
    against = summary["against"].get(rival)
    difference = ["–", "–", "–"]
    if against is not None:
        difference = [
            f"{against['mean']:+.2f}",
            interval(against["over_seeds"]),
            interval(against["over_tasks"]),
        ]
    return [kind, own[0], own[1], f"{mean:.2f}", *own[2:], *difference]


@pytest.mark.parametrize(
    ("header", "file"),
    [
        ("CNN", "method.json"),
        ("ViT", "method.json"),
        ("CNN, seeds from 5", "method_second.json"),
        ("ViT, seeds 5 to 7", "method_second.json"),
    ],
)
def test_the_comparison_s_table_is_the_result_s(header: str, file: str) -> None:
    summary = json.loads((RESULTS / file).read_text())["summary"][header[:3].lower()]
    all_tables = tables((ROOT / "docs" / "method.md").read_text())
    [table] = [table for table in all_tables if table[0][:3] == [header, "what", "seeds"]]
    told = {cells[0].strip("*`"): cells[1:] for cells in table[1:]}
    assert set(summary["means"]) <= set(told)
    for name, cells in told.items():
        assert cells == row(summary, name, cells[0]), name
        assert cells[0] in ("teacher", summary["kinds"].get(name))


def test_teachers_figures_by_task_are_the_result_s() -> None:
    teachers = json.loads((RESULTS / "method.json").read_text())["by_task"]["teachers"]
    all_tables = tables((ROOT / "docs" / "method.md").read_text())
    [table] = [table for table in all_tables if table[0][:2] == ["teacher", "garments"]]
    assert {cells[0] for cells in table[1:]} == set(teachers)
    for name, *cells in table[1:]:
        figures = dict(zip(table[0][1:-1], cells, strict=False))
        assert {task: f"{value:.1f}" for task, value in teachers[name].items()} == {
            task: cell.strip("*") for task, cell in figures.items()
        }


def test_the_readme_s_differences_are_the_result_s() -> None:
    summary = json.loads((RESULTS / "method.json").read_text())["summary"]
    readme = (ROOT / "README.md").read_text()
    for of_student in summary.values():
        rivals = [of_student["best_rival"], of_student["against"]["regression"]]
        for rival in [*rivals, of_student["against"]["regression_same_cost"]]:
            assert f"{rival['mean']:+.2f} {interval(rival['over_seeds'])}" in readme
        assert f"`{of_student['best_rival']['name']}`" in readme
    again = json.loads((RESULTS / "method_second.json").read_text())["summary"]["vit"]
    assert again["best_rival"]["name"] == "masked"
    for rival in (again["best_rival"], again["against"]["regression"]):
        assert f"{rival['mean']:+.2f} {interval(rival['over_seeds'])}" in readme
