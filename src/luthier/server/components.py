"""Parts of the server that all APIs share. Each API extends the class with further parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sqlalchemy.orm import Session

from luthier.inference.pool import ModelPool
from luthier.limits import AccountQuotas
from luthier.server.identifiers import ModelIds
from luthier.server.jobs.forecast import QueuePlace
from luthier.server.live.capture import Capture
from luthier.server.settings import Settings
from luthier.server.stores.locations import Locations
from luthier.server.tables.arns import Arns
from luthier.server.tables.custom_models import CustomModel
from luthier.server.tables.database import Database


@dataclass(frozen=True, kw_only=True)
class Components:
    """Parts of the server for all APIs."""

    database: Database
    arns: Arns
    locations: Locations
    """Data of jobs by address."""
    pool: ModelPool
    """Models in memory."""
    quotas: Callable[[str], AccountQuotas]
    """Returns the quotas of an account."""
    delete_model: Callable[[CustomModel], None]
    """Deletes a model and the model's files. Raises :class:`~luthier.errors.WrongState` if the model is
    in use."""
    capture: Capture
    """Captured requests."""
    wake: Callable[[], None] = lambda: None
    """Notifies the scheduler of new work."""
    queue_places: Callable[[Session], Mapping[str, QueuePlace]] = lambda session: {}
    """Returns positions and expected starts of waiting jobs, by id."""
    account: str = Settings.account
    """First account, whose administrators operate the server."""
    hold_out: bool = True
    """True if jobs without validation data hold out rows."""

    @property
    def models(self) -> ModelIds:
        """Models by name."""
        return ModelIds(self.database, self.arns)
