"""Where a study lives: a journal file or SQLite on one machine, PostgreSQL for many; what survives an outage."""

import logging
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from filelock import FileLock
from optuna.exceptions import ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial
from sqlalchemy import Connection, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.pool import NullPool

logger = logging.getLogger(__name__)

STORAGE_VARIABLE = "ELM_STUDY_STORAGE"
"""Environment variable with the storage's address: a password in it reaches no file, notebook or process list."""

HEARTBEAT = 30
"""Seconds between the signs of life of a running trial in a database; after three without one it counts as lost."""

_PATIENCE = 600  # seconds that a database may be away
_PAUSE = 1.0  # between two attempts
_ADVISORY = 0x656C6D << 32  # our range of PostgreSQL's advisory locks


def open_storage(address: str, heartbeat: int = HEARTBEAT) -> BaseStorage:
    """A journal file (a path, or `journal:///path`), or a database by its SQLAlchemy URL.

    `heartbeat`: seconds between signs of life in a database. Raises ValueError for an address that is neither, or
    whose driver is missing, without its password.
    """
    if path := journal_path(address):
        path.parent.mkdir(parents=True, exist_ok=True)
        return JournalStorage(JournalFileBackend(str(path)))
    connect = {"timeout": 60} if address.startswith("sqlite") else {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # the heartbeat is, since Optuna 2.9
            return PatientStorage(
                address,
                # No connection is held between calls: a server has a hundred, and workers and notebooks are more.
                engine_kwargs={"poolclass": NullPool, "connect_args": connect},
                heartbeat_interval=heartbeat,
                grace_period=3 * heartbeat,
            )
    except ImportError as error:
        raise ValueError(
            f"no driver for {without_password(address)}; for PostgreSQL: pip install -e '.[postgres]' "
            "and an address postgresql+psycopg://..."
        ) from error


def journal_path(address: str) -> Path | None:
    """The journal file that `address` means, None for a database; ValueError for what is neither."""
    if address.startswith("journal:///"):
        return Path(address.removeprefix("journal:///"))
    if "://" not in address:
        return Path(address)
    try:
        make_url(address)
    except ArgumentError as error:
        raise ValueError("the storage is no path and no database URL; expected sqlite:///... for example") from error
    return None


def without_password(address: str) -> str:
    """`address` fit to be shown."""
    return address if journal_path(address) else make_url(address).render_as_string(hide_password=True)


@contextmanager
def turn(storage: BaseStorage, folder: Path) -> Iterator[None]:
    """Only one worker of a study at a time counts, re-queues and asks; the lock of a killed one is free at once.

    On PostgreSQL workers may be anywhere, so the database keeps the lock; elsewhere a file in the study's `folder`.
    Raises DBAPIError where the database was away meanwhile: the lock is gone with the connection that held it.
    """
    if isinstance(storage, PatientStorage) and storage.engine.dialect.name == "postgresql":
        key = _ADVISORY + zlib.crc32(folder.name.encode())
        with storage.engine.begin() as connection:
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": key})
            storage.lock = connection
            try:
                yield
            finally:
                storage.lock = None
    else:
        with FileLock(folder / "turn.lock"):
            yield


def _patient(method: Callable[..., Any]) -> Callable[..., Any]:
    """`method`, tried again while the database is away."""

    @wraps(method)
    def call(self: RDBStorage, *args: Any, **kwargs: Any) -> Any:
        give_up = time.monotonic() + _PATIENCE
        while True:
            try:
                return method(self, *args, **kwargs)
            except (StorageInternalError, DBAPIError) as error:
                cause = error if isinstance(error, DBAPIError) else error.__cause__
                if not isinstance(cause, DBAPIError) or not _is_outage(cause) or time.monotonic() > give_up:
                    raise
                logger.warning("the study's database does not answer (%s); trying again", type(cause.orig).__name__)
                time.sleep(_PAUSE)

    return call


def _is_outage(error: DBAPIError) -> bool:
    return error.connection_invalidated or type(error).__name__ in ("OperationalError", "InterfaceError")


class PatientStorage(RDBStorage):
    """Optuna's database storage, whose calls wait out a restart of the server.

    A new trial is the one thing not asked for twice: the first attempt may have come through. Nor is it asked for in a
    turn that has passed to another worker while the server was away.
    """

    lock: Connection | None = None
    """Holds the lock of `turn`."""

    def _create_new_trial(self, *args: Any, **kwargs: Any) -> FrozenTrial:
        if self.lock is not None:
            self.lock.execute(text("SELECT 1"))  # DBAPIError where it is gone
        return super()._create_new_trial(*args, **kwargs)

    def set_trial_state_values(self, trial_id: int, *args: Any, **kwargs: Any) -> bool:
        """As Optuna's; an end that was written before the answer got lost is not an error."""
        try:
            return self._set_state(trial_id, *args, **kwargs)
        except UpdateFinishedTrialError:
            if self.get_trial(trial_id).state != kwargs.get("state", args[0] if args else None):
                raise
            return True

    _set_state = _patient(RDBStorage.set_trial_state_values)


for _name in (
    "get_trial", "get_all_trials", "_get_trials", "_get_best_trial_id", "get_study_id_from_name",
    "get_study_name_from_id", "get_study_directions", "get_study_user_attrs", "get_study_system_attrs",
    "get_all_studies", "get_trial_id_from_study_id_trial_number", "set_study_user_attr", "set_study_system_attr",
    "_set_trial_param", "set_trial_intermediate_value", "set_trial_user_attr", "set_trial_system_attr",
    "record_heartbeat", "_get_stale_trial_ids",
):  # fmt: skip
    setattr(PatientStorage, _name, _patient(getattr(RDBStorage, _name)))
