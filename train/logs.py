"""Where a run's scalars go, through Lightning's loggers."""

from __future__ import annotations

import csv
import json
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from lightning_fabric.loggers import CSVLogger, Logger, TensorBoardLogger
from omegaconf import DictConfig

from ..errors import ConfigError, TrainingError
from .checkpoint import write_json

LOGS = "logs"
"""The folder of a run's local logs."""


@dataclass(frozen=True)
class Destination:
    """What a logger needs to begin a run or to go on with it.

    Attributes:
        out: the run's folder.
        project: project or experiment that the run belongs to.
        config: of the run, as plain containers.
        first: step that the run goes on from; 0 where it is new.
        run: identity of the run with services that keep many; the same after it was interrupted.
    """

    out: Path
    project: str
    config: Mapping[str, Any]
    first: int
    run: str


def _tensorboard(to: Destination) -> Logger:
    # Whatever an interrupted run logged after its checkpoint is hidden, since it comes again.
    return TensorBoardLogger(to.out, name=LOGS, version="", purge_step=to.first + 1)


def _csv(to: Destination) -> Logger:
    path = to.out / LOGS / "csv" / "metrics.csv"
    before = to.out / LOGS / "metrics.before.csv"
    if path.exists() and not before.exists():
        path.rename(before)  # the logger begins a new file, with these rows first
    rows = _sound_rows(before) if before.exists() else []
    path.unlink(missing_ok=True)
    logger = _CSV(to.out, name=f"{LOGS}/csv", version="", flush_logs_every_n_steps=1)
    for step, scalars in rows:
        if step <= to.first:
            logger.log_metrics({**scalars}, step)
    before.unlink(missing_ok=True)
    return logger


def _sound_rows(path: Path) -> list[tuple[int, dict[str, float]]]:
    """(step, scalars) of the rows of a log; of one that was cut short those that are whole."""
    with path.open(newline="", encoding="utf-8") as file:
        lines = file.readlines()
    found = []
    for row in csv.DictReader(line for line in lines if line.endswith("\n")):
        try:
            scalars = {name: float(text) for name, text in row.items() if text and name != "step"}
            found.append((int(row["step"]), scalars))
        except (ValueError, TypeError, KeyError):
            continue
    return found


class _CSV(CSVLogger):
    """Lightning's, in the folder itself rather than in one for each version."""

    @property
    def log_dir(self) -> str:
        return os.path.join(self._root_dir, self.name)


def _wandb(to: Destination) -> Logger:
    from pytorch_lightning.loggers import WandbLogger

    return WandbLogger(
        name=to.out.name,
        save_dir=to.out / LOGS,
        id=to.run,
        resume="allow",
        project=to.project,
        config=dict(to.config),
    )


def _mlflow(to: Destination) -> Logger:
    from pytorch_lightning.loggers import MLFlowLogger

    kept = to.out / LOGS / "mlflow.json"
    known = json.loads(kept.read_text(encoding="utf-8"))["run"] if kept.exists() else None
    logger = MLFlowLogger(
        experiment_name=to.project,
        run_name=to.out.name,
        tracking_uri=os.environ.get("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db"),
        run_id=known,
    )
    if known is None:
        logger.log_hyperparams(dict(to.config))
        write_json(kept, {"run": logger.run_id})
    return logger


LOGGERS: dict[str, Callable[[Destination], Logger]] = {
    "tensorboard": _tensorboard,
    "csv": _csv,
    "wandb": _wandb,
    "mlflow": _mlflow,
}
EXTRAS = {"wandb": ("wandb", "pytorch_lightning"), "mlflow": ("mlflow", "pytorch_lightning")}
"""Packages that a logger needs beside those that are always there."""


class Logs:
    """All loggers that ``log.to`` names, on one process; nothing on the others. A context manager.

    Args:
        log: the ``log`` configuration group: ``to`` (keys of `LOGGERS`) and ``project``.
        out: the run's folder.
        config: of the whole run, as plain containers, for services that keep it.
        first: step that the run goes on from; at 0 local logs of an earlier run are removed.
        active: whether this process is the one that logs.

    Raises:
        TrainingError: the folder cannot be written.
    """

    def __init__(
        self, log: DictConfig, out: Path, config: Mapping[str, Any], *, first: int, active: bool
    ) -> None:
        self._loggers: dict[str, Logger] = {}
        if not active:
            return
        folder = out / LOGS
        try:
            if not first:
                shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
            known = folder / "run.json"
            if not known.exists():
                write_json(known, {"run": secrets.token_hex(8)})
            run = str(json.loads(known.read_text(encoding="utf-8"))["run"])
            to = Destination(out, str(log.project), config, first, run)
            self._loggers = {str(name): LOGGERS[name](to) for name in log.to}
        except OSError as error:
            raise TrainingError(
                f"logs cannot be written to {folder}: {error.strerror or error}"
            ) from error

    def __enter__(self) -> Logs:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        status = "success" if kind is None else "failed" if kind is not SystemExit else "aborted"

        def end(logger: Logger) -> None:
            logger.finalize(status)
            # Weights & Biases would give its open run to the next one of this process.
            getattr(getattr(logger, "experiment", None), "finish", lambda: None)()

        self._each(end)

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        """Log scalars by name at a step: the number of steps that are done."""
        self._each(lambda logger: logger.log_metrics(dict(scalars), step))

    def flush(self) -> None:
        """Write what is held back, so that a killed run has the logs of its checkpoint."""
        self._each(lambda logger: logger.save())

    def _each(self, use: Callable[[Logger], None]) -> None:
        """Use every logger. One that cannot write, on a full disk, is told and logs no more: that
        is no reason to lose a run."""
        for name, logger in list(self._loggers.items()):
            try:
                use(logger)
            except Exception as error:
                cause = error if isinstance(error, OSError) else error.__cause__
                if not isinstance(cause, OSError):  # which Lightning's TensorBoard logger wraps
                    raise
                del self._loggers[name]
                print(
                    f"warning: the log {name} ends here: {cause.strerror or cause}; "
                    "training goes on",
                    file=sys.stderr,
                    flush=True,
                )


def check_loggers(names: Sequence[str]) -> None:
    """Raises ConfigError where a name is no logger's, or a logger's package is not installed."""
    if isinstance(names, str):
        raise ConfigError(f"log.to={names}: write a list, log.to=[{names}]")
    for name in names:
        if name not in LOGGERS:
            raise ConfigError(f"log.to={list(names)}: valid are {', '.join(LOGGERS)}")
        missing = [package for package in EXTRAS.get(name, ()) if find_spec(package) is None]
        if missing:
            raise ConfigError(
                f"log.to names {name}, which needs {' and '.join(missing)}: "
                f"pip install 'preceptor[{name}]'"
            )
