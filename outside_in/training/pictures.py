"""Draws a run's charts and its page. Nothing that fails here ends training."""

import contextlib
from collections.abc import Iterator

from outside_in.reports import charts, page
from outside_in.reports.flops import mfu
from outside_in.reports.run_page import RunInProgress, run_page
from outside_in.runtime import processes
from outside_in.runtime.devices import device_kind
from outside_in.runtime.log import log
from outside_in.storage.records import Records
from outside_in.training.state import TrainState

MAX_ERROR = 500  # characters


def draw_charts(state: TrainState, records: Records) -> None:
    run, config, title = state.run, state.config, state.run.path.name
    charts.draw_loss(
        run.loss_chart,
        records,
        interval=config.checkpoint_interval,
        title=title,
        reference_losses=state.reference_losses,
        bytes_per_token=state.bytes_per_token,
    )
    charts.draw_learning_rate(run.learning_rate_chart, records, title=title)
    charts.draw_gradient_norm(run.gradient_norm_chart, records, clipping_max_norm=config.clipping_max_norm, title=title)


def write_page(state: TrainState, records: Records, ending: str | None = None) -> None:
    """Write the run's page. Without an `ending` the run is on, and the page reloads itself."""
    share = mfu(1 / state.mesh.devices.size, state.model_config, device_kind(), state.config.precision)
    this = RunInProgress(
        run=state.run,
        model_config=state.model_config,
        config=state.config,
        records=records,
        total_steps=state.total_steps,
        versions=state.snapshot["versions"],
        events=state.events,
        reference_losses=state.reference_losses,
        bytes_per_token=state.bytes_per_token,
        mfu_of_one=share,
    )
    page.write(state.run.report, run_page(this, ending))


@contextlib.contextmanager
def page_of(state: TrainState) -> Iterator[None]:
    """Write the run's page as the block begins, and how the run has ended as it ends."""
    _write_if_possible(state)
    try:
        yield
    except Exception as error:
        _write_if_possible(state, f"failed ({' '.join(str(error).split())[:MAX_ERROR]})")
        raise
    is_finished = state.global_step == state.total_steps and not state.needs_validation
    _write_if_possible(state, "finished" if is_finished else "stopped")


def _write_if_possible(state: TrainState, ending: str | None = None) -> None:
    if not processes.is_main_process():
        return
    try:
        write_page(state, state.records, ending)
    except Exception as error:
        log.warning(f"{state.run.report} cannot be written ({error})")
