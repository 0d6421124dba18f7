"""preceptor ablate: runs of every combination of factors over one cache, and one table."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ...cache import Cache
from ...cache.convert import convert_store
from ...cache.encodings import encoding
from ...engine import refuse_several
from ...errors import ConfigError, PreceptorError, TrainingError, first_line
from ...options import compose_options, plain
from ..checkpoint import KEPT, flat, write_json
from ..claim import holder
from ..evaluation.run import prepare as check_evaluation
from ..evaluation.run import warn_of_views
from ..evaluation.words import language_spaces, text_tower
from ..evaluation.zeroshot import ZeroShot
from .check import Rehearsal, refuse
from .figure import draw
from .job import EVAL, LOG, RESULT, TRAIN, enter, launched, raise_for, read_failure, read_result
from .plan import ENCODING, OWN, SEED, PlannedRun, Variant, baseline_of, option, plan_runs
from .stopping import PoolStop, forget_stop
from .table import Outcome, check_score, compare, print_table, write_tables

SUMMARY, PLAN = "summary.json", "plan.json"


def ablate(config: DictConfig) -> dict[str, Any] | None:
    """Do the runs that `config` (configs/ablate.yaml) describes, and compare them.

    Returns:
        What ``summary.json`` holds; None in a job of a launcher.

    Raises:
        ConfigError, DataError, StoreError: an input cannot be used; nothing has been run.
        TrainingError: some runs failed; the table holds the others.
    """
    refuse_several("ablate")
    out = Path(config.out).absolute()
    if config.job is not None:
        launched(out, str(config.job))
        return None
    started = time.time()
    runs = _validated(config)
    variants = list({run.variant.name: run.variant for run in runs}.values())
    baselines = baseline_of(variants, config.baseline)
    try:
        _prepare(config, out, runs)
    except OSError as error:
        raise ConfigError(f"out={out} cannot be written to: {error.strerror or error}") from error
    names = [run.name for run in runs]
    todo = [name for name in names if not (out / "runs" / name / RESULT).exists()]
    if len(todo) < len(names):
        print(f"{out}: {len(names) - len(todo)} of {len(names)} runs are finished already")
    for name in list(todo):
        if other := holder(out / "runs" / name):
            print(f"{name} is being done by {other}, and left to it")
            todo.remove(name)
    write_json(out / PLAN, {"runs": names, "todo": todo, "started": started})
    trouble = _launch(todo, out / "runs") if todo else None

    failures = {name: reason for name in names if (reason := _why_not(out, name, trouble))}
    outcomes = [_outcome(out, run) for run in runs if run.name not in failures]
    result: dict[str, Any] = {
        "runs": len(runs),
        "failures": failures,
        "seconds": time.time() - started,
        "level": float(config.level),
        "rows": [],
    }
    if outcomes:
        rows = compare(outcomes, baselines, level=config.level, score=config.score)
        result["rows"] = [row.as_json() for row in rows]
        write_tables(out, rows)
        draw(out / "figure.png", rows, outcomes)
        print_table(rows)
    write_json(out / SUMMARY, result)
    print(f"{out / SUMMARY}: {len(outcomes)} of {len(runs)} runs, {result['seconds']:.0f} s")
    if failures:
        told = "; ".join(f"{name}: {reason}" for name, reason in failures.items())
        raise TrainingError(f"{len(failures)} of {len(runs)} runs failed ({told})")
    return result


def _validated(config: DictConfig) -> list[PlannedRun]:
    if not config.factors:
        raise ConfigError(
            "factors names none: say what differs, such as "
            "factors='{align: [regression, model_token], seed: [0, 1, 2]}'"
        )
    for key in ("train", "eval"):
        if config[key] is not None and not OmegaConf.is_dict(config[key]):
            raise ConfigError(f"{key}={config[key]}: expected options, such as {{workers: 0}}")
    for key in sorted(OWN.keys() & plain(config.train or {}).keys()):
        raise ConfigError(f"train.{key}: leave it out, {OWN[key]}")
    if config.weights not in KEPT:
        raise ConfigError(f"weights={config.weights}: valid are {', '.join(KEPT)}")
    if not 0 < config.level < 1:
        raise ConfigError(f"level={config.level}: a coverage between 0 and 1")
    return plan_runs(plain(config.factors))


def _prepare(config: DictConfig, out: Path, runs: Sequence[PlannedRun]) -> None:
    """Write what every run is, after everything that can be checked was checked of all of them."""
    directories = _directories()
    base, judged = plain(config.train or {}), plain(config.eval or {})
    variants = list({run.variant.name: run.variant for run in runs}.values())
    stores = _stores(config, out, variants)
    composed: dict[str, DictConfig] = {}
    refused: dict[str, str] = {}
    rehearsal = Rehearsal()
    for variant in variants:
        options = {"cache": config.cache, **base, **variant.options}
        coded = options.pop(ENCODING, None)
        if coded is not None:
            options["cache"] = str(stores[str(coded)])
        try:
            training = composed[variant.name] = _composed("train", options, directories)
            rehearsal.try_out(training, training.cache if coded is None else config.cache)
        except PreceptorError as error:
            refused[variant.name] = str(error)
        except Exception as error:  # a bug's or a library's, which fails that run and no other
            print(f"warning: {variant.name}: {first_line(error)}", file=sys.stderr, flush=True)
    refuse(refused, len(variants))
    for name, training in composed.items():
        _check_weights(name, training, config.weights)
    evaluation = _evaluation(config, composed[variants[0].name], judged, directories)
    suite, train, test, truths = check_evaluation(evaluation)
    asked = suite.protocols.get("zeroshot")
    embeddings: Iterable[str] = ()
    if isinstance(asked, ZeroShot):
        embeddings = language_spaces(test.cache).values()
        for teacher in embeddings:  # rather now than after the first training
            text_tower(asked, test.cache, teacher)
    if config.score is not None:
        tasks = [truth.name for truth in truths]
        check_score(str(config.score), list(suite.protocols), tasks, embeddings)
    described = []
    for run in runs:
        folder = out / "runs" / run.name
        ours = OmegaConf.merge(composed[run.variant.name], {"out": str(folder / "train")})
        if run.seed is not None:
            ours = OmegaConf.merge(ours, {SEED: run.seed})
        theirs = OmegaConf.merge(
            evaluation,
            {
                "out": str(folder / "eval"),
                "students": [str(folder / "train" / KEPT[config.weights])],
            },
        )
        described += [(folder / TRAIN, ours), (folder / EVAL, theirs)]
    for path, what in described:
        _same(path, what)
    for name, store in stores.items():
        if store != Path(config.cache):
            store.parent.mkdir(parents=True, exist_ok=True)
            convert_store(config.cache, store, name, progress=True)
    for path, what in described:
        path.parent.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(what, path, resolve=True)
    warn_of_views(train, test)  # once, where each run says so in its log alone


def _evaluation(
    config: DictConfig,
    training: DictConfig,
    judged: Mapping[str, Any],
    directories: Sequence[str],
) -> DictConfig:
    """The evaluation that all runs share, of the first variant's images where it names none."""
    options = {"train.cache": config.cache}
    if (shards := plain(training.data)["shards"]) is not None:
        options["train.shards"] = shards
    elif "train.shards" not in flat(judged):
        raise ConfigError(
            "train.shards is required of the evaluation, as the training names no images "
            "(data.shards=null): say eval={train.shards: ...}"
        )
    options |= {"with_teachers": False, "with_floor": False, "features": None}
    options |= {"zeroshot.kept": str(Path(config.out).absolute() / "words"), **judged}
    try:
        return _composed("eval", options, directories)
    except ConfigError as error:
        raise ConfigError(f"preceptor eval would not take these options: {error}") from None


def _check_weights(name: str, training: DictConfig, weights: str) -> None:
    """Refuse weights that a variant would not keep."""
    if weights == "ema" and not training.recipe.ema:
        raise ConfigError(
            f"weights=ema: {name} keeps no average; say train={{recipe.ema: 0.999}}, or another "
            "decay"
        )
    if weights == "best" and training.keep.best is None:
        raise ConfigError(
            f"weights=best: {name} keeps no best weights; say train={{keep.best: loss}} or knn"
        )


def _composed(verb: str, options: Mapping[str, Any], directories: Sequence[str]) -> DictConfig:
    typed = [option(key, value) for key, value in options.items()]
    flags = [part for directory in directories for part in ("--config-dir", directory)]
    try:
        return compose_options(verb, [*flags, *typed])
    except ConfigError as error:
        told = re.sub(r"say ([\w.]+)=\.\.\.", rf"say {verb}={{\1: ...}}", str(error))
        raise ConfigError(told) from None


def _same(path: Path, ours: Any) -> None:
    """Refuse to mix runs of other options under one name."""
    if not path.exists():
        return
    stored, wanted = flat(plain(OmegaConf.load(path))), flat(plain(ours))
    differing = [
        f"{key} ({stored.get(key, 'absent')} there, {wanted.get(key, 'absent')} here)"
        for key in sorted({*stored, *wanted})
        if stored.get(key) != wanted.get(key) and key != "workers"
    ]
    if differing:
        raise ConfigError(
            f"{path.parent} is a run of other options: {', '.join(differing[:3])}"
            f"{f' and {len(differing) - 3} more' if len(differing) > 3 else ''}; use the same, or "
            "another out=..."
        )


def _stores(config: DictConfig, out: Path, variants: Sequence[Variant]) -> dict[str, Path]:
    """Where the store of every encoding is, or is to be, that a factor names.

    Raises:
        StoreError: there is no such encoding.
    """
    wanted = dict.fromkeys(str(v.options[ENCODING]) for v in variants if ENCODING in v.options)
    found = {}
    for name in wanted:
        cache, _ = Cache.open(config.cache), encoding(name)
        there = all(cache[space].encoding == name for space in cache.spaces)
        found[name] = Path(config.cache) if there else out / "stores" / name
    return found


def _launch(names: Sequence[str], folder: Path) -> str | None:
    """Give every run to Hydra's launcher, as a sweep over ``job``.

    Args:
        folder: of the runs' folders.

    Returns:
        What broke the launcher itself; the runs that it left undone can be done by another call.

    Raises:
        KeyboardInterrupt, SystemExit: this process was asked to stop, and the runs have ended.
    """
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig
    from joblib import effective_n_jobs

    hydra, own = GlobalHydra.instance().hydra, HydraConfig.get()
    if hydra is None or own.job.config_name is None:
        raise RuntimeError("an ablation runs under Hydra")
    sweep = f"job=choice({','.join(map(repr, names))})"
    overrides = [*own.overrides.hydra, *own.overrides.task]
    launcher = str(own.launcher.get("_target_"))
    stop = PoolStop(folder) if "joblib" in launcher else None
    submits = "submitit" in launcher
    trouble = None
    forget_stop(folder)
    if submits:
        print(
            f"{len(names)} job(s) are submitted and waited for; what each does is in "
            f"{folder}/NAME/{LOG}",
            flush=True,
        )
    try:
        if stop is not None:
            # A process that never had a run would heed the signals that `PoolStop` handles.
            most = min(effective_n_jobs(own.launcher.n_jobs), len(names))
            overrides.append(f"hydra.launcher.n_jobs={most}")
        with stop or nullcontext():
            hydra.multirun(
                config_name=own.job.config_name,
                task_function=enter,
                overrides=[*overrides, sweep],
                with_log_configuration=False,
            )
    except KeyboardInterrupt:
        if submits:
            print(
                "what was submitted stays in the queue: squeue lists it, scancel ends it (begun "
                "runs are saved), and the same command collects what it leaves",
                file=sys.stderr,
            )
        raise
    except Exception as error:  # a launcher's own failures are of any kind
        trouble = f"{type(error).__name__}: {first_line(error)}"
    if stop is not None:
        raise_for(stop.asked)
    return trouble


def _why_not(out: Path, name: str, trouble: str | None) -> str | None:
    folder = out / "runs" / name
    if (folder / RESULT).exists():
        return None
    if other := holder(folder):
        return f"is being done by {other}"
    return read_failure(folder) or f"was not begun{f', {trouble}' if trouble else ''}"


def _outcome(out: Path, run: PlannedRun) -> Outcome:
    result = read_result(out / "runs" / run.name)
    trained = result["train"]
    return Outcome(
        variant=run.variant,
        seed=int(trained["seed"]),
        seconds=float(trained["seconds"]),
        parameters=dict(trained["parameters"]),
        scores=result["scores"],
        resampled=result["resampled"],
    )


def _directories() -> list[str]:
    """Folders of configuration groups that the command was given."""
    from hydra.core.hydra_config import HydraConfig

    sources = HydraConfig.get().runtime.config_sources
    return [source.path for source in sources if source.schema == "file"]
