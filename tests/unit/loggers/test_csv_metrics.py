"""metrics.csv is a function of what was logged, not of the order or of how often."""

from qdm_lightning.loggers.csv_metrics import CSVMetrics


def test_the_order_makes_no_difference_and_a_resumed_run_changes_nothing(tmp_path):
    whole, again = CSVMetrics(tmp_path / "whole.csv"), CSVMetrics(tmp_path / "again.csv")
    logged = [({"teacher/train/loss": 0.5}, 0), ({"train/loss": 0.1}, 1), ({"sampled/fd": 4.0}, 2), ({"train/loss": 0.3}, 2)]
    for metrics, step in logged:
        whole.log_metrics(metrics, step)
    whole.save()
    for metrics, step in reversed(logged):
        again.log_metrics(metrics, step)
    saved = again.copy_of_rows(of_teacher=False)
    again.log_metrics({"train/loss": 9.0}, 3)  # lost at a kill
    again.save()
    resumed = CSVMetrics(tmp_path / "again.csv", goes_on=True)
    before = (tmp_path / "again.csv").read_bytes()
    resumed.go_back(False, 2, saved)
    resumed.save()
    assert (tmp_path / "again.csv").read_bytes() == before  # nothing was logged yet
    resumed.log_metrics({"train/loss": 0.3}, 2)
    resumed.finalize("finished")
    assert (tmp_path / "whole.csv").read_text() == (
        "step,sampled/fd,teacher/train/loss,train/loss\n0,,0.5,\n1,,,0.1\n2,4.0,,0.3\n"
    )
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_without_the_rows_of_the_checkpoint_those_of_later_steps_are_dropped(tmp_path):
    """A checkpoint of an older version has none."""
    logger = CSVMetrics(tmp_path / "metrics.csv")
    for step in range(4):
        logger.log_metrics({"train/loss": float(step)}, step)
        logger.log_metrics({"teacher/train/loss": float(step)}, step + 10)
    logger.go_back(False, 2)
    assert [row["step"] for row in logger.copy_of_rows(False)] == [0, 1]
    assert len(logger.copy_of_rows(True)) == 4
