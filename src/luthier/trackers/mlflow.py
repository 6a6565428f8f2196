"""MLflow runs in the store ``MLFLOW_TRACKING_URI``, by default ``mlflow.db``.

Source: https://mlflow.org/docs/latest/api_reference/python_api/mlflow.client.html. MLflow's
environment variables also set the experiment and the credentials.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping

from luthier.trackers import Status, TrackedRun, Tracker

# By default MLflow waits minutes for an unreachable server, and training would wait too.
for _name, _value in (("REQUEST_MAX_RETRIES", "2"), ("REQUEST_TIMEOUT", "20")):
    os.environ.setdefault(f"MLFLOW_HTTP_{_name}", _value)

from mlflow.entities import Metric, Param  # noqa: E402 - MLflow reads the variables above
from mlflow.tracking import MlflowClient  # noqa: E402

MOST_PARAMETERS = 100
"""Maximum number of parameters in a request of MLflow's API."""
LONGEST_VALUE = 6000
"""Maximum length of a parameter value in MLflow's stores, in characters."""
SECONDS_BETWEEN_REQUESTS = 5.0
_STATUS: Mapping[Status, str] = {
    "finished": "FINISHED",
    "failed": "FAILED",
    "interrupted": "KILLED",
}


class MlflowTracker(Tracker):
    """A run in an MLflow store. Metrics are sent every few seconds and at the end."""

    def __init__(self, run: TrackedRun) -> None:
        self._client = MlflowClient()
        self._metrics: list[Metric] = []
        self._sent_at = time.monotonic()
        self._id = run.stored_id("mlflow", lambda: self._create(run))
        self._client.update_run(self._id, "RUNNING")

    def _create(self, run: TrackedRun) -> str:
        """Create a run with parameters, and return the run's id."""
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "luthier")
        found = self._client.get_experiment_by_name(name)
        experiment = self._client.create_experiment(name) if found is None else found.experiment_id
        created = self._client.create_run(experiment, run_name=run.model_id).info.run_id
        parameters = [Param(k, str(v)[:LONGEST_VALUE]) for k, v in run.settings.items()]
        for start in range(0, len(parameters), MOST_PARAMETERS):
            self._client.log_batch(created, params=parameters[start : start + MOST_PARAMETERS])
        return str(created)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See :class:`Tracker`."""
        now = int(time.time() * 1000)
        self._metrics += [Metric(name, value, now, step) for name, value in values.items()]
        if time.monotonic() - self._sent_at >= SECONDS_BETWEEN_REQUESTS or len(self._metrics) > 800:
            self._send()

    def _send(self) -> None:
        metrics, self._metrics = self._metrics, []
        self._sent_at = time.monotonic()
        if metrics:
            self._client.log_batch(self._id, metrics=metrics)

    def end(self, status: Status) -> None:
        """See :class:`Tracker`."""
        self._send()
        self._client.set_terminated(self._id, _STATUS[status])
