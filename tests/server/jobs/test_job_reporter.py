"""Events of a job from the reports of its run."""

from __future__ import annotations

from typing import Any

from luthier.engine.metrics import without_rows
from luthier.server.jobs.job_reporter import JobReporter
from luthier.server.tables.jobs import Job


def events(*lines: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return messages and data of the events for ``lines`` of the metrics."""
    reporter = JobReporter(Job(id="j", details={}), str)
    for line in lines:
        reporter.metrics(line, 10)
    return [(event["message"], event["data"]) for event in reporter.drain().events]


def test_validation_scores_are_reported_next_to_training_scores() -> None:
    train = {"event": "train", "step": 2, "loss": 0.5, "accuracy": 0.75, "measure": "loss"}
    held = {"event": "validation", "step": 2, "loss": 0.25, "accuracy": 1.0, "measure": "loss"}
    (first, trained), (second, measured) = events(train, held)
    assert first == "Step 2/10: train loss 0.5000" and trained["accuracy"] == 0.75
    assert second == "Step 2/10: validation loss 0.2500" and measured["valid_accuracy"] == 1.0
    assert "accuracy" not in measured and (trained | measured)["accuracy"] == 0.75


def test_reward_is_reported_as_reward() -> None:
    held = {"event": "validation", "step": 2, "loss": -0.2, "reward": 0.2, "measure": "reward"}
    ((message, data),) = events(held)
    assert message == "Step 2/10: validation reward 0.2000"
    assert data["valid_loss"] == -0.2 and data["reward"] == 0.2


def test_settings_of_each_stage_stay() -> None:
    reporter = JobReporter(Job(id="j", details={}), str)
    reporter.settings([("training.epochs", 3, "few rows"), ("precision", "float32", "the CPU")])
    reporter.settings([("objective.threshold", 1.5, "set by 40 rows")])
    chosen = {"training.epochs": 3, "precision": "float32", "objective.threshold": 1.5}
    details = reporter.drain().details
    assert details["chosen"] == chosen
    assert details["reasons"] == {
        "training.epochs": "few rows", "precision": "the CPU", "objective.threshold": "set by 40 rows",
    }  # fmt: skip


def test_refit_start_is_stored_without_event() -> None:
    reporter = JobReporter(Job(id="j", details={}), str)
    reporter.metrics(without_rows({"event": "refit", "step": 8, "row_count": 1200}), 20)
    pending = reporter.drain()
    assert pending.details == {"refit": {"step": 8, "rows": 1200}} and not pending.events


def test_replies_of_the_first_and_the_last_measurements_stay() -> None:
    reporter = JobReporter(Job(id="j", details={}), str)
    for step in [0, 10, 20, 30, 40, 50, 60, 40]:  # a resumed run repeats steps
        reporter.replies(step, [{"prompt": "a", "wanted": "b", "reply": str(step)}])
    kept = reporter.drain().details["replies"]
    assert [each["step"] for each in kept] == [0, 20, 30, 40]
    for step in range(50, 100, 10):
        reporter.replies(step, [{"prompt": "a", "wanted": "b", "reply": str(step)}])
    kept = reporter.drain().details["replies"]
    assert [each["step"] for each in kept] == [0, 50, 60, 70, 80, 90]
