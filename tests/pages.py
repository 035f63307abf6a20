"""What the tests of pages share: records, and the run that they are of."""

from helpers import tiny_model_config, tiny_train_config

from outside_in.reports.run_page import RunInProgress
from outside_in.storage import metrics
from outside_in.storage.records import Records
from outside_in.storage.run_directory import RunDirectory

HOSTILE = "</script><script>window.broken = 1</script><!-- & \u2028 ' \" {{DATA}}"


def record(step, loss=3.0, norm=1.0, **more):
    common = dict.fromkeys(metrics.NUMBERS | metrics.NULLABLE, 0.0)
    rejected = {"rejected": norm is None, "clipped": bool(norm and norm > 3.5), "rejected_updates": 0}
    numbers = {"loss": loss, "gradient_norm": norm, "tokens_seen": 128 * step, "seconds": 0.5, "learning_rate": 1e-3}
    return common | rejected | {"global_step": step} | numbers | more


def in_progress(path, records, **more):
    run = RunDirectory(path)
    configs = {"model_config": tiny_model_config(), "config": tiny_train_config()}
    records = records if isinstance(records, Records) else Records(records)
    return RunInProgress(run=run, **configs, records=records, total_steps=100, **more)
