"""`preceptor info`: what a store holds, how faithful it is, and what it lacks."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from ..errors import ConfigError, StoreError
from ..progress import plain_console
from .commit import committed
from .copies import best_completion, best_manifest
from .durable import file_sizes
from .encodings import encoding
from .layout import Layout
from .manifest import Manifest
from .pictures import Panel, draw_panels, principal_colours
from .plan import PIXELS, ROWS, PixelSpec, SpaceSpec
from .reader import Cache, Space
from .source import local_path

AT_ONCE = 8  # rows that are decoded together: some 50 bytes for every value of their tokens
_SAMPLE = 128  # rows whose codes tell the error
_PICTURED = 6
_POOL = 200  # rows that fix the colours


def info(config: Any) -> dict[str, Any]:
    """`preceptor info`: see configs/info.yaml.

    Raises:
        ConfigError: a file that could not be written.
        StoreError: there is no store, or the picture needs what is not there.
    """
    for key in ("json", "picture"):
        if config[key] is not None and not Path(config[key]).absolute().parent.is_dir():
            raise ConfigError(f"{key}={config[key]}: there is no such folder")
    if config.picture is not None and Path(config.picture).suffix.lower() != ".png":
        raise ConfigError(f"picture={config.picture}: it is written as PNG, so name a .png file")
    found = describe(config.cache)
    print_tables(found)
    try:
        if config.json is not None:
            Path(config.json).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        if config.picture is not None:
            draw(config.cache, config.picture)
            print(f"picture: {config.picture}")
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be written: {error.strerror}") from error
    return found


def describe(location: str | Path) -> dict[str, Any]:
    """All that can be said about a store, whole or not, as JSON.

    ``fidelity`` of a space is what its codes allow: the step of every code of some rows is known,
    and a rounding error is spread evenly over its step. No live teacher is asked; see
    ``preceptor verify`` for that.

    Raises:
        StoreError: there is no store.
    """
    root = _local(location)
    problem = None
    cache, valid = None, None
    try:
        opened = Cache.open(location)
        cache, valid = opened, int(opened.valid.sum())  # damage there is told as if of opening
    except StoreError as error:
        cache, problem = None, str(error)
    manifest = cache.manifest if cache is not None else _local_manifest(root, str(problem))
    plan, layout = manifest.plan, Layout(manifest.plan)
    missing = {} if cache or root is None else _missing(root, manifest)
    sizes = _sizes(root)
    spaces = {}
    for spec in plan.spaces.values():
        readable = cache or _alone(location, spec.teacher, missing)
        spaces[spec.id] = _space(sizes or {}, layout, spec, readable)
        problem = problem or spaces[spec.id].get("problem")
    return {
        "store": str(location),
        "complete": cache is not None,
        "problem": problem,
        "missing": missing,
        "writer": manifest.writer,
        "rows": plan.rows,
        "rows_valid": valid,
        "shards": plan.shards,
        "shard_rows": plan.shard_rows,
        "group_rows": plan.group_rows,
        "bytes": None if sizes is None else sum(sizes.values()),
        "samples": {key: value for key, value in plan.samples.items() if key != "shards"},
        "views": dict(plan.views),
        "teachers": {teacher.name: dict(teacher.identity) for teacher in plan.teachers},
        "spaces": spaces,
        "pixels": None if plan.pixels is None else _pixels(plan.pixels, cache, sizes),
    }


def _pixels(
    spec: PixelSpec, cache: Cache | None, files: Mapping[str, int] | None
) -> dict[str, Any]:
    """The stored pixels; bytes of a store that is not whole are those of the files there."""
    if cache is not None:
        stored: int | None = sum(cache.completions[PIXELS].sizes[PIXELS])
    else:
        stored = sum(n for name, n in (files or {}).items() if name.startswith(f"{PIXELS}/c."))
    return {**spec.as_json(), "bytes": stored}


def _local(location: str | Path) -> Path | None:
    """The directory of a store, named by itself or as file://; None of a remote one."""
    try:
        return local_path(location, "describing what is not whole")
    except StoreError:
        return None


def _local_manifest(root: Path | None, problem: str) -> Manifest:
    manifest = best_manifest(root) if root is not None and root.is_dir() else None
    if manifest is None:
        raise StoreError(problem)
    return manifest


def _missing(root: Path, manifest: Manifest) -> dict[str, Any]:
    """By unit: the shards without a commit record, and whether the unit is finished."""
    found = {}
    for unit in manifest.plan.units:
        shards = sorted(set(range(manifest.plan.shards)) - committed(root, unit))
        finished = best_completion(root, manifest, unit) is not None
        if shards or not finished:
            found[unit] = {"shards": shards, "finished": finished}
    return found


def _alone(location: str | Path, teacher: str, missing: Mapping[str, Any]) -> Cache | None:
    if ROWS in missing or teacher in missing:
        return None
    try:
        cache = Cache.open(location, teachers=[teacher])
        return cache if len(cache.valid) else None  # damage of the rows is met here
    except StoreError:
        return None


def _space(
    files: Mapping[str, int], layout: Layout, spec: SpaceSpec, cache: Cache | None
) -> dict[str, Any]:
    if cache is not None:
        sizes = cache.completions[spec.teacher].sizes
        stored: int | None = sum(sum(sizes[a.path]) for a in layout.space_arrays(spec).values())
    else:
        paths = tuple(f"{array.path}/c." for array in layout.space_arrays(spec).values())
        stored = sum(size for name, size in files.items() if name.startswith(paths))
    found: dict[str, Any] = {
        **spec.as_json(),
        "shape": [layout.plan.rows, spec.tokens, spec.dim],
        "levels": spec.how.levels,
        "bytes": stored,
    }
    if cache is not None and stored is not None:
        rows = int(cache.valid.sum())
        found["bytes_vs_fp16"] = stored / max(1, rows * spec.tokens * spec.dim * 2)
        found["calibration_rows"] = cache.manifest.calibrations[spec.id].rows
        found["statistics_exact"] = cache.completions[spec.teacher].exact
        try:
            found["fidelity"] = fidelity(cache[spec.id], _rows(cache, _SAMPLE))
        except StoreError as error:
            found["problem"] = str(error)
    return found


def _rows(cache: Cache, count: int) -> np.ndarray:
    """Valid rows, spread evenly."""
    valid = np.flatnonzero(cache.valid)
    places = np.linspace(0, len(valid) - 1, min(count, len(valid))).round().astype(np.int64)
    return valid[places] if len(valid) else valid


def fidelity(space: Space, rows: Sequence[int] | np.ndarray) -> dict[str, float] | None:
    """The error to expect of some rows' decoded tokens, from the step of each of their codes, and
    of those that they had before the store was converted.

    Returns:
        ``relative_error``: |error| / |tokens| over all, in the teacher's units;
        ``relative_error_standardised``: the same in units of the calibrated s;
        ``p1_cosine``: 1st percentile over tokens of the cosine between token and decoded token.
    """
    if not len(rows):
        return None
    sums, std = torch.zeros(4, dtype=torch.float64), space.std.double()
    cosines = []
    for first in range(0, len(rows), AT_ONCE):
        tokens = space.read(rows[first : first + AT_ONCE])
        z = tokens.standardised()
        # An error spread evenly over [-b, b] has the mean square b^2 / 3; those of the encodings
        # that a converted store had before are independent of each other.
        chain = [*space.earlier, space.spec.encoding]  # codes of one encoding go over as they are
        earlier = [before for before, after in itertools.pairwise(chain) if before != after]
        hows = (*map(encoding, earlier), space.spec.how)
        bounds = [how.bound(z).expand(z.shape).double() for how in hows]
        square = torch.stack(bounds).square().sum(0) / 3
        # a zero of a rectified dimension, which is centred on zero, was stored as it was
        square = torch.where((z == 0) & (space.mean == 0), 0.0, square)
        x = space.decode(tokens).double()
        error, power = (square * std**2).sum(-1), (x**2).sum(-1)
        sums += torch.stack([error.sum(), power.sum(), square.sum(), (z.double() ** 2).sum()])
        cosines.append((1 + error / power.clamp_min(1e-300)).rsqrt().flatten())
    error, power, z_error, z_power = sums
    return {
        # Where all tokens are alike z is zero, and where all are zero so is x: nothing can be lost.
        "relative_error": relative(error, power) if power > 0 else 0.0,
        "relative_error_standardised": relative(z_error, z_power) if z_power > 0 else 0.0,
        "p1_cosine": first_percentile(torch.cat(cosines)),
        "rows": len(rows),
    }


def relative(error: torch.Tensor, power: torch.Tensor) -> float:
    """Root of squared error over squared size; of an error where there should be nothing, 1."""
    return float((error / power if power > 0 else (error > 0).double()).sqrt())


def first_percentile(values: torch.Tensor) -> float:
    """The 1st percentile of a vector; of the first 2^24, for torch takes no more."""
    return float(torch.quantile(values[: 1 << 24], 0.01))


def _sizes(root: Path | None) -> dict[str, int] | None:
    """Length of every file of a local store, by path within it."""
    if root is None or not root.is_dir():
        return None
    return file_sizes(root)


def print_tables(found: Mapping[str, Any]) -> None:
    """What ``describe`` found, for people."""
    console = plain_console(132)
    state = "complete" if found["complete"] else "NOT COMPLETE"
    if found["complete"] and found["problem"]:
        state = "complete, but DAMAGED"
    size = "" if found["bytes"] is None else f", {found['bytes'] / 2**20:,.1f} MiB"
    valid = found["rows_valid"]
    invalid = "" if valid in (None, found["rows"]) else f" ({found['rows'] - valid} without tokens)"
    console.print(
        f"{found['store']}: {state}; {found['rows']:,} rows{invalid} in {found['shards']} shards "
        f"of {found['shard_rows']}, groups of {found['group_rows']}{size}",
        highlight=False,
        soft_wrap=True,
    )
    table = Table()
    columns = ("space", "tokens", "dim", "encoding", "MiB", "of fp16", "error", "p1 cosine")
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number in (0, 3) else "right")
    for name, space in found["spaces"].items():
        grid = space["grid"]
        told = space.get("fidelity")
        table.add_row(
            name,
            f"{space['tokens']}" + (f" ({grid[0]}x{grid[1]})" if grid else ""),
            str(space["dim"]),
            space["encoding"],
            f"{(space['bytes'] or 0) / 2**20:,.2f}",
            f"{space['bytes_vs_fp16']:.3f}" if "bytes_vs_fp16" in space else "–",
            f"{100 * told['relative_error']:.3f} %" if told else "–",
            f"{told['p1_cosine']:.5f}" if told else "–",
        )
    console.print(table)
    if pixels := found["pixels"]:
        print(
            "pixels: {} x {}, {}, {:,.2f} MiB".format(
                *pixels["size"], pixels["interpolation"], (pixels["bytes"] or 0) / 2**20
            )
        )
    print("error and cosine: expected from the codes' steps, relative to the tokens")
    for unit, state in found["missing"].items():
        shards = state["shards"]
        listed = ", ".join(map(str, shards[:12])) + (", ..." if len(shards) > 12 else "")
        print(
            f"{unit}: {len(shards)} of {found['shards']} shards missing ({listed})"
            if shards
            else f"{unit}: not finished"
        )
    if found["problem"]:
        print(found["problem"])


def draw(location: str | Path, picture: str | Path) -> None:
    """Write a PNG: a row an image, a column a space with a grid, in PCA colours.

    Raises:
        StoreError: the store is not whole, no row has tokens, or no space has a grid of at least 3
            dimensions.
    """
    cache = Cache.open(location)
    rows = _rows(cache, _POOL)
    if not len(rows):
        raise StoreError(f"{location} has no row with tokens that could be drawn")
    shown = _rows(cache, _PICTURED)
    order = np.concatenate([shown, rows[~np.isin(rows, shown)]])
    panels = []
    for name, space in cache.spaces.items():
        if space.grid is None or space.spec.dim < 3:
            continue
        z = space.read(order).standardised().numpy()
        title = f"{name}\n{space.grid[0]}x{space.grid[1]}, {space.encoding}"
        panels.append(Panel(title, principal_colours(z, space.grid)[: len(shown)]))
    if not panels:
        raise StoreError(
            f"{location} has no space with a grid of tokens of 3 dimensions or more that could be "
            "drawn: leave out picture=..."
        )
    draw_panels(picture, panels, {i: cache.keys[int(row)] for i, row in enumerate(shown)})
