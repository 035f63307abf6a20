"""The page of several runs. Never touches JAX."""

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from outside_in.reports import page_charts
from outside_in.reports.charts import over_steps
from outside_in.reports.page import Page, table
from outside_in.reports.page_charts import DOTS, MAIN, THIN
from outside_in.reports.series import Series
from outside_in.storage.records import Records
from outside_in.storage.text import counted

APART = "Loss of runs that are not comparable with most: other data, objective or vocabulary"


class ComparedRun(NamedTuple):
    name: str
    records: Records
    config: dict[str, Any]  # all keys of its two files
    is_comparable: bool  # with most of the others


def comparison_page(
    title: str, runs: Sequence[ComparedRun], tables: dict[str, tuple[list[str], list[Any]]], x: str
) -> Page:
    """Return the page of several runs. `tables` have columns and rows, and are left out without rows."""

    def lines(series_of: Callable[[Records], Series]) -> list[dict[str, Any]]:
        all_series = [series_of(run.records) for run in runs]
        return [page_charts.line(runs[i].name, s, run=i, color=i) for i, s in enumerate(all_series)]

    groups = [[i for i, run in enumerate(runs) if run.is_comparable is is_in] for is_in in (True, False)]
    losses = [[line for i in group for line in _loss_lines(i, runs[i])] for group in groups]
    titled = zip(("Loss", APART), losses)
    return Page(
        title=title,
        status=counted(len(runs), "run"),
        x=x,
        runs=[run.name for run in runs],
        clocks=[page_charts.clock(run.records) for run in runs],
        charts=[
            *(page_charts.loss_chart(lines, title=title) for title, lines in titled if lines),
            page_charts.norm_chart(
                lines(lambda records: page_charts.smoothed(over_steps(records, "gradient_norm"))[0])
            ),
            page_charts.learning_rate_chart(lines(lambda records: over_steps(records, "learning_rate"))),
            page_charts.speed_chart(lines(lambda records: page_charts.speed(records)[0])),
        ],
        tables=[*(table(name, *content) for name, content in tables.items() if content[1]), *_differences(runs)],
    )


def _loss_lines(index: int, run: ComparedRun) -> list[dict[str, Any]]:
    """Return the validation loss, and the smoothed training loss behind it."""
    validation, (training, _) = (
        over_steps(run.records, "val_loss"),
        page_charts.smoothed(over_steps(run.records, "loss")),
    )
    has_validation = bool(len(validation.x))
    smooth = page_charts.line(
        f"{run.name}, training",
        training,
        THIN if has_validation else MAIN,
        run=index,
        color=index,
        hover=not has_validation,
    )
    return [smooth, page_charts.line(run.name, validation, DOTS, run=index, color=index)]


def _differences(runs: Sequence[ComparedRun]) -> list[dict[str, Any]]:
    """Return a table of the keys that are not the same in all runs; none if there are none."""
    values = {key: [json.dumps(run.config[key], default=dict) for run in runs] for key in runs[0].config}
    rows: list[list[Any]] = [[key, *of_runs] for key, of_runs in values.items() if len(set(of_runs)) > 1]
    return [table("What differs", ["key", *(run.name for run in runs)], rows)] if rows else []
