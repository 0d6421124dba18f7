"""Looking after a store where teachers or images are needed: verify, repair, add, drop."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from ..cache import Cache, SampleIndex, StoreWriter, TeacherRecord, ViewPolicy
from ..cache.copies import stray_units
from ..cache.documents import difference, only
from ..cache.durable import file_sizes
from ..cache.manifest import read_manifest
from ..cache.mend import Repaired, mend_files, repair_store
from ..cache.plan import PIXELS, ROWS, StorePlan
from ..cache.samples import list_samples
from ..cache.source import local_path
from ..cache.verify import verify_store
from ..cache.verify_report import VerifyReport, fresh_report, report_path
from ..engine import gathered, launch, refuse_several
from ..errors import ConfigError, DataError, StoreError, counted
from . import live
from .calibration import calibrate, check_calibration
from .images import stored_pixels
from .pipeline import (
    PATIENCE,
    keep_summary,
    load_teachers,
    teacher_record,
    teachers_precision,
)
from .runner import TeacherRunner
from .turns import await_calibration, one_first

_SHOWN = 20


def verify(config: DictConfig) -> dict[str, Any]:
    """Check every checksum of a store, and on request its teachers; see configs/verify.yaml.

    Raises:
        StoreError: something is wrong; the report beside the store has all of it.
    """
    refuse_several("verify", config.engine)
    if (config.sample or 0) < 0:
        raise ConfigError(f"sample={config.sample}: how many rows to compare, 0 or more")
    report = verify_store(config.cache, threads=int(config.threads or 0), progress=True)
    found: dict[str, Any] = {}
    if config.sample:
        if not report.whole:
            print("the live teachers are not asked: the store must be whole first")
        else:
            found = report.live = compare_live(config)
            live.show(found)
    kept = _kept(report)
    if not report.whole:
        raise StoreError(_damage(report, kept))
    if found.get("pixels", {}).get("other_rows"):
        raise StoreError(
            f"{config.cache}: the stored pixels of rows {found['pixels']['other_rows'][:8]} are "
            f"not those of the images; {kept}"
        )
    far = [name for name, space in found.get("spaces", {}).items() if not space["agrees"]]
    if far:
        raise StoreError(
            f"{config.cache}: {', '.join(far)} of the live teachers differ from the store by more "
            f"than its encoding explains; {kept}"
        )
    rate = report.bytes / max(report.seconds, 1e-9) / 2**20
    print(
        f"{config.cache}: whole; {report.files:,} shard files, {report.bytes / 2**20:,.1f} MiB, "
        f"{rate:,.0f} MiB/s; {kept}"
    )
    return report.as_json()


def repair(config: DictConfig) -> dict[str, Any]:
    """Mend what verify found, extracting only the shards it named; see configs/repair.yaml.

    Raises:
        ConfigError, DataError, TeacherError: the images or teachers are not those of the store.
        StoreError: both copies of a small file are damaged.
    """
    started = time.monotonic()
    refuse_several("repair", config.engine)
    root = local_path(config.cache, "repairing")
    report = fresh_report(root)
    if report is None:
        report = verify_store(root, threads=int(config.threads or 0), progress=True)
        _kept(report)
    if report.whole:
        print(f"{root}: whole, nothing to repair")
        return {"store": str(root), "restored": [], "extracted": [], "different": []}
    restored, writer = mend_files(root)
    if lacking := writer.uncalibrated:
        raise writer.lacks_calibration(lacking[0])
    waiting = [(unit, shard) for shard, units in writer.pending() for unit in units]
    todo = sorted({*report.shards, *waiting})
    units = {unit for unit, _ in todo} & set(writer.plan.units)
    runner = _runner(config, writer.plan, sorted(units - {ROWS, PIXELS})) if units else None
    done = repair_store(root, report.shards, runner.fill if runner else None)
    done = Repaired((*restored, *done.restored), done.extracted, done.different)
    Cache.open(root)
    report_path(root).unlink(missing_ok=True)
    summary = {
        "store": str(root),
        "restored": list(done.restored),
        "extracted": [list(one) for one in done.extracted],
        "different": [list(one) for one in done.different],
        "seconds": time.monotonic() - started,
    }
    keep_summary(root, "repair", summary)
    print(
        f"{root}: {counted(len(done.restored), 'small file')} restored, "
        f"{counted(len(done.extracted), 'shard')} extracted again, "
        f"{len(done.extracted) - len(done.different)} of them to the same bytes"
    )
    if report.strays:
        print(_dropping(report))
    if done.different:
        print(
            f"{_listed(done.different)}: other bytes than before (another device, precision, batch "
            "size or library); the tokens are sound, the statistics are those of the first ones"
        )
    return summary


def add(config: DictConfig) -> dict[str, Any]:
    """Run more teachers over the rows of a store, or store pixels; see configs/add.yaml.

    Raises:
        ConfigError, DataError, TeacherError: as ``extract``.
        StoreError: the store is not whole, or has another teacher of that name or other pixels.
    """
    started = time.monotonic()
    root = local_path(config.cache, "adding to it")
    writer = StoreWriter.open(root)
    asked = teachers_precision(config.engine)
    fabric = launch(config.engine, exact=asked, patience=PATIENCE)
    first = fabric.global_rank == 0  # it changes what the store is made of, alone
    pixels = stored_pixels(config.pixels)
    chosen = config.teachers if config.teachers or pixels is None else OmegaConf.create({})
    teachers = load_teachers(chosen) if chosen or pixels is None else []
    records = [
        teacher_record(teacher, options, asked)
        for teacher, options in zip(teachers, chosen.values(), strict=True)
    ]
    names = [record.name for record in records] + ([] if pixels is None else [PIXELS])
    present = {teacher.name: teacher for teacher in writer.plan.teachers}
    _refuse_pending(writer, names)
    new = [space for record in records if record.name not in present for space in record.spaces]
    check_calibration(config.calibration, records, new)
    with one_first(fabric, "lists the images"):
        index, policy = _images(config, writer.plan, quiet=not first)
    for record in records:
        there = present.get(record.name)
        if there is None:
            if first:
                writer.add(record)
        elif found := difference(there.as_json(), record.formed_as(there).as_json()):
            raise StoreError(
                f"{root} has another teacher {record.name} already: {found}; give this one "
                "another name, or drop that one first"
            )
    if pixels is not None and writer.plan.pixels is None:
        if first:
            writer.add_pixels(pixels)
    elif pixels is not None and writer.plan.pixels != pixels:
        found = difference(writer.plan.pixels_json(), {PIXELS: pixels.as_json()})
        raise StoreError(
            f"{root} has other pixels already: {found}; drop them first with `preceptor drop "
            f"cache={root} teacher={PIXELS}`"
        )
    runner = TeacherRunner(fabric, teachers, index, policy, _options(config))
    if first:
        calibrate(writer, runner, config)
    await_calibration(fabric)
    writer = StoreWriter.open(root)
    lacking = {unit for _, units in writer.pending() for unit in units} if first else set()
    runner.fill(writer)
    extracted = sum(gathered(fabric, runner.rows_extracted))
    if not first:
        return {}
    writer.finish()
    cache = Cache.open(root)
    summary = {
        "store": str(root),
        "added": names,
        "rows_extracted": extracted,
        "spaces": {
            name: list(space.shape)
            for name, space in cache.spaces.items()
            if space.spec.teacher in names
        },
        "seconds": time.monotonic() - started,
    }
    keep_summary(root, "add", summary)
    done = [name for name in names if name in lacking]
    before = [name for name in names if name not in lacking]
    told = ((done, "added"), (before, "there already"))
    parts = ", ".join(f"{', '.join(part)} {what}" for part, what in told if part)
    print(f"{root}: {parts}, {extracted:,} rows extracted in {summary['seconds']:.0f} s")
    return summary


def drop(config: DictConfig) -> dict[str, Any]:
    """Remove a teacher, or the pixels, from a store; see configs/drop.yaml.

    Raises:
        StoreError: there is no such teacher, or it is the only one.
    """
    root, name = local_path(config.cache, "dropping from it"), str(config.teacher)
    writer = StoreWriter.open(root)
    before = sum(file_sizes(root).values())
    stray = name in stray_units(root, writer.manifest)
    if not stray and writer.plan.spaces_of(name) and len(writer.plan.teachers) == 1:
        raise StoreError(
            f"{name} is the only teacher of {root}: delete the directory to be rid of it"
        )
    writer.drop(name)
    freed = before - sum(file_sizes(root).values())
    print(f"{root}: {name} dropped, {freed / 2**20:,.1f} MiB freed")
    return {"store": str(root), "dropped": name, "bytes_freed": freed}


# -- live teachers ---------------------------------------------------------------------------------


def compare_live(config: DictConfig) -> dict[str, Any]:
    """Run teachers on a random sample of a store's rows: see ``live.compare``.

    Raises:
        ConfigError: no teachers are given.
    """
    cache = Cache.open(config.cache)
    names = [str(name) for name in config.teachers or {}]
    if not names:
        raise ConfigError("sample=N needs the teachers to compare with: give teachers=...")
    runner = _runner(config, cache.plan, names, strict=False)
    valid = np.flatnonzero(cache.valid)
    chosen = np.random.default_rng([int(config.seed), 0x11FE]).permutation(valid)
    return live.compare(cache, runner, np.sort(chosen[: int(config.sample)]).tolist())


# -- the parts of an extraction, as the manifest has them ------------------------------------------


def _runner(
    config: DictConfig, plan: StorePlan, names: Sequence[str], *, strict: bool = True
) -> TeacherRunner:
    """What extracted the store: the images, views and teachers, compared with the manifest.

    Args:
        strict: refuse a teacher whose identity differs at all; otherwise only other spaces.
    """
    if strict and (theirs := sorted({*names} & {*plan.converted})):
        raise StoreError(
            f"the codes of {', '.join(theirs)} in {config.cache} were converted from another "
            f"store: run `preceptor verify cache={config.cache}`, then that `preceptor convert` "
            "again, which does what verify named"
        )
    lacking = [name for name in names if name not in (config.teachers or {})]
    if lacking:
        raise ConfigError(
            f"the teachers {', '.join(lacking)} of {config.cache} are needed: give teachers=... as "
            "preceptor extract was given them"
        )
    index, policy = _images(config, plan)
    chosen = OmegaConf.create({name: config.teachers[name] for name in names})
    teachers = load_teachers(chosen) if names else []
    precisions = {str(plan.teacher(name).identity.get("precision", "32-true")) for name in names}
    asked = "auto" if config.engine.precision == "auto" else teachers_precision(config.engine)
    if strict and len(precisions) > 1:
        raise ConfigError(
            f"the teachers {', '.join(names)} were run in {' and '.join(sorted(precisions))}: "
            "repair them one at a time with teachers=..."
        )
    exact = min(precisions, default="32-true") if asked == "auto" else asked
    for teacher in teachers:
        stored = plan.teacher(teacher.name)
        ours = teacher_record(teacher, chosen[teacher.name], exact)
        _refuse_other_teacher(str(config.cache), stored, ours, strict)
    fabric = launch(config.engine, exact=exact)
    return TeacherRunner(fabric, teachers, index, policy, _options(config))


def _refuse_other_teacher(
    store: str, stored: TeacherRecord, ours: TeacherRecord, strict: bool
) -> None:
    theirs, mine = stored.as_json(), ours.as_json()
    for record in (theirs, mine):  # the encoding is the store's affair, not the teacher's
        record["spaces"] = [
            {**space, "encoding": None, "predicted": None, "step": None}
            for space in record["spaces"]
        ]
        if not strict:
            record["identity"] = {}
    if found := difference(theirs, mine):
        raise StoreError(
            f"teacher {stored.name} is not the one that {store} was made with: {found}; give the "
            "same source, weights, size, spaces and library versions"
        )


def _images(
    config: DictConfig, plan: StorePlan, *, quiet: bool = False
) -> tuple[SampleIndex, ViewPolicy]:
    if config.data.shards is None:
        raise ConfigError(
            f"the images that {config.cache} was made from are needed: give data.shards=..."
        )
    shards = config.data.shards
    index = list_samples(shards if isinstance(shards, str) else list(shards), quiet=quiet)
    order = plan.samples.get("order")
    if isinstance(order, dict) and order.get("kind") == "hashed":
        index = index.permuted(int(order["seed"]))
    if found := difference(dict(plan.samples), index.describe()):
        raise DataError(
            f"data.shards={shards} are not the images that {config.cache} was made from: {found}"
        )
    try:
        only(plan.views, ViewPolicy.__dataclass_fields__)
    except ValueError as error:
        raise StoreError(
            f"the views of {config.cache} are not of a policy that this release has ({error}): use "
            "the program that made it"
        ) from None
    return index, ViewPolicy(**plan.views)


def _options(config: DictConfig) -> DictConfig:
    """What TeacherRunner reads; a row that was invalid before must be so again, not stop."""
    return OmegaConf.create(
        {
            "batch_size": config.batch_size,
            "workers": config.workers,
            "data": {"max_pixels": config.data.max_pixels},
            "on_corrupt": "skip",
        }
    )


def _refuse_pending(writer: StoreWriter, names: Sequence[str]) -> None:
    others = {unit for _, units in writer.pending() for unit in units} - set(names)
    if others:
        raise StoreError(
            f"{writer.path} lacks shards of {', '.join(sorted(others))}: before adding to it, run "
            f"the {writer.plan.begun_by(others)} that began it again, or `preceptor repair`"
        )


# -- texts -----------------------------------------------------------------------------------------


def _damage(report: VerifyReport, kept: str) -> str:
    lacking = Counter(p.unit for p in report.problems if p.pending and p.shard is not None)
    rest = [str(p) for p in report.problems if not p.pending or p.shard is None]
    more = len(rest) - _SHOWN
    shown = [*rest[:_SHOWN], *([f"{more} more"] if more > 0 else [])]
    shown += [f"{counted(n, 'shard')} of {unit} not extracted yet" for unit, n in lacking.items()]
    told = f"{report.store} is not whole: {'; '.join(shown)}. {kept[0].upper()}{kept[1:]}; "
    steps = []
    if report.damaged:
        steps.append(f"run `preceptor repair cache={report.store} data.shards=... teachers=...`")
    elif report.unfinished:
        plan = read_manifest(local_path(report.store, "verifying")).plan
        steps.append(
            "what there is of it is sound: finish it with the "
            f"{plan.begun_by(report.unfinished)} that began it, and the options of that time"
        )
    if report.strays:
        steps.append(_dropping(report))
    return told + "; then ".join(steps)


def _dropping(report: VerifyReport) -> str:
    commands = (f"`preceptor drop cache={report.store} teacher={name}`" for name in report.strays)
    return f"remove what is no part of it with {' and '.join(commands)}"


def _listed(shards: Sequence[tuple[str, int]]) -> str:
    text = ", ".join(f"shard {shard} of {unit}" for unit, shard in shards[:_SHOWN])
    return text + (", ..." if len(shards) > _SHOWN else "")


def _kept(report: VerifyReport) -> str:
    """Write a report beside the store; where it is, or why it is not: a store may be read-only."""
    try:
        return f"the report is {report.save()}"
    except StoreError as error:
        return f"the report was not kept: {error}"
