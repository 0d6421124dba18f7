"""`preceptor VERB key=value ...`: finds the verb, checks its options, and runs it under Hydra.

Nothing heavy is imported before a verb is known to have good options, so that help and mistakes are
answered at once.
"""

from __future__ import annotations

import errno
import importlib
import os
import re
import select
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConfigError, PreceptorError, PreceptorWarning, first_line
from .options import CONFIGS, check_options, closest, config_directories, from_home, readable
from .version import __version__

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

    from omegaconf import DictConfig


@dataclass(frozen=True)
class Verb:
    """One command: what it does, the function `module:function` behind it, an example."""

    summary: str
    target: str
    example: str

    def run(self, config: DictConfig) -> object:
        """Import the function behind the verb and call it with the composed configuration."""
        module, function = self.target.split(":")
        if not module.startswith("cache"):
            # First: it imports Fabric without what that would import besides.
            importlib.import_module("preceptor.engine")
        return getattr(importlib.import_module(f"preceptor.{module}"), function)(config)


VERBS: dict[str, Verb] = {
    "extract": Verb(
        "run every teacher once over the images and write their tokens to a store",
        "extract.pipeline:extract",
        "preceptor extract data.shards='/data/in1k/train-{000000..001281}.tar' cache=/data/store",
    ),
    "info": Verb(
        "what a store holds, how faithful it is, and what it lacks",
        "cache.report:info",
        "preceptor info cache=/data/store picture=tokens.png",
    ),
    "verify": Verb(
        "read every file of a store against every checksum; with sample=N ask the teachers again",
        "extract.maintain:verify",
        "preceptor verify cache=/data/store teachers=imagenet_hub "
        "data.shards='/data/in1k/train-{000000..001281}.tar' sample=256",
    ),
    "repair": Verb(
        "extract again exactly the shards that verify named",
        "extract.maintain:repair",
        "preceptor repair cache=/data/store teachers=imagenet_hub "
        "data.shards='/data/in1k/train-{000000..001281}.tar'",
    ),
    "add": Verb(
        "add teachers, or the views' pixels, to a store without touching what is there",
        "extract.maintain:add",
        "preceptor add cache=/data/store 'teachers={dinov2_l: {source: "
        "timm:vit_large_patch14_dinov2.lvd142m, size: 224}}' "
        "data.shards='/data/in1k/train-{000000..001281}.tar'",
    ),
    "drop": Verb(
        "remove a teacher, or the pixels, from a store without touching the rest",
        "extract.maintain:drop",
        "preceptor drop cache=/data/store teacher=dinov2_l",
    ),
    "convert": Verb(
        "write a store again with another encoding",
        "cache.convert:convert",
        "preceptor convert cache=/data/store out=/data/store-compact encoding=compact",
    ),
    "train": Verb(
        "train a student from a store",
        "train.loop:train",
        "preceptor train cache=/data/store data.shards='/data/in1k/train-{000000..001281}.tar' "
        "student=resnet50 align=model_token seed=1",
    ),
    "eval": Verb(
        "what the features of students, teachers and the untrained floor are worth",
        "train.evaluation.run:evaluate",
        "preceptor eval train.cache=/data/store test.cache=/data/store-val "
        "train.shards='/data/in1k/train-{000000..001281}.tar' "
        "test.shards='/data/in1k/val-{000000..000049}.tar' "
        "students=[outputs/train/resnet50-model_token-s1]",
    ),
    "ablate": Verb(
        "train and evaluate every combination of factors over one store, and compare them",
        "train.ablate.run:ablate",
        "preceptor ablate cache=/data/store "
        "factors='{align: [regression, model_token], seed: [0, 1, 2]}' baseline=regression "
        "train='{data.shards: /data/in1k/train.tar, student: resnet50}' "
        "eval='{test.cache: /data/store-val, test.shards: /data/in1k/val.tar}' "
        "hydra/launcher=joblib",
    ),
    "export": Verb(
        "write a finished student for timm, the Hugging Face Hub, ONNX and torch.export",
        "train.export.run:export",
        "preceptor export run=outputs/train/resnet50-model_token-s1 formats=[timm,onnx]",
    ),
}


_GO_ON = ("extract", "repair", "add", "convert", "ablate", "eval")
"""Verbs that keep what an interrupted call has done; of train the run says how it goes on."""
_OF_FILES = {
    errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.EROFS, errno.ENOSPC, errno.EDQUOT,
    errno.EIO, errno.ESTALE, errno.EMFILE,
}  # fmt: skip
"""Errors of a named file that are the machine's or its user's to mend."""
_UNHEARD = 128 + 13
"""Exit status, as of SIGPIPE, where whoever read the output has seen enough before its end."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit status."""
    with warnings.catch_warnings():
        warnings.showwarning = _tell_warning(warnings.showwarning)
        return _main(argv)


def _main(argv: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        _say(_overview())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"preceptor {__version__}")
        return 0
    name, options = arguments[0], arguments[1:]
    try:
        if name not in VERBS:
            raise ConfigError(
                f"there is no command {name!r}{closest(name, VERBS)}; the commands are "
                f"{', '.join(VERBS)} (preceptor --help)"
            )
        options = readable(options)
        if any(option in ("-h", "--help") for option in options):
            _say(_help(name, options))
            return 0
        check_options(name, options)
        _run_under_hydra(name, options)
    except PreceptorError as error:
        print(f"preceptor {name}: {error}", file=sys.stderr)
        return _failed(1)
    except KeyboardInterrupt:
        more = "; the same command goes on from there" if name in _GO_ON else ""
        print(f"preceptor {name}: interrupted{more}", file=sys.stderr)
        return _failed(130)
    except Exception as error:
        _hear_of_no_more_decoders()
        if isinstance(error, BrokenPipeError) and _unheard():
            return _failed(_UNHEARD)
        _tell_of_a_bug(name, error)
        return _failed(1)
    return 0


def _tell_of_a_bug(name: str, error: Exception) -> None:
    """What is known of an error that is not meant for people, or its traceback."""
    engine = sys.modules.get(f"{__package__}.engine")
    if engine is not None and engine.others_ended(error):
        print(
            f"preceptor {name}: another process of this run has ended or cannot be reached, "
            f"and what it said tells why ({first_line(error)})",
            file=sys.stderr,
        )
    elif engine is not None and (sentence := engine.lost_decoder(error)):
        print(f"preceptor {name}: {sentence}", file=sys.stderr)
    else:
        traceback.print_exception(error)


def _hear_of_no_more_decoders() -> None:
    """torch raises for a decoder's death wherever this process is, its exit included."""
    if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _failed(status: int) -> int:
    """The exit status, for those that nothing holds; see `engine.abandon`."""
    if (engine := sys.modules.get(f"{__package__}.engine")) is not None:
        engine.abandon(status)
    return status


def _run_under_hydra(name: str, options: Sequence[str]) -> None:
    import hydra
    from hydra.errors import HydraException

    failure: list[PreceptorError] = []
    begun = False

    def job(config: DictConfig) -> object:
        nonlocal begun
        begun = True
        try:
            return VERBS[name].run(from_home(config))
        except PreceptorError as error:
            # Hydra prints a traceback for whatever leaves a job; a told error is not a bug.
            failure.append(error)
            raise SystemExit(1) from None
        except Exception as error:
            if isinstance(error, BrokenPipeError) and _unheard():
                raise SystemExit(_UNHEARD) from None
            if (told := _of_the_machine(error)) is None:
                raise
            told.__cause__ = error
            failure.append(told)
            raise SystemExit(1) from None

    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    run = hydra.main(version_base="1.3", config_path=f"pkg://{CONFIGS}", config_name=name)(job)
    before = sys.argv
    sys.argv = [f"preceptor {name}", *options]
    try:
        run()
    except SystemExit:
        if failure:
            raise failure[0] from failure[0].__cause__
        raise
    except (HydraException, OSError) as error:
        if begun:
            raise
        # Before any job: of options that begin with hydra, and of the folder of a sweep.
        raise ConfigError(first_line(error)) from None
    finally:
        sys.argv = before


def _of_the_machine(error: Exception) -> PreceptorError | None:
    """What to tell of an error that is no bug: a file that may not be used, or memory's end."""
    if isinstance(error, OSError) and error.filename is not None and error.errno in _OF_FILES:
        return PreceptorError(f"{error.filename}: {error.strerror}")
    engine = sys.modules.get(f"{__package__}.engine")
    if engine is not None and engine.out_of_memory(error):
        return PreceptorError(
            f"there is not enough memory ({first_line(error)}): lower batch_size, where the "
            "command has it, or free what other programs hold"
        )
    return None


# -- texts -----------------------------------------------------------------------------------------


def _say(text: str) -> None:
    """Print a text; whoever reads it may have seen enough before its end, as head has."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _unheard()


def _unheard() -> bool:
    """Whether nobody reads the output any more; from then on it goes nowhere."""
    found = False
    for stream in (sys.stdout, sys.stderr):
        try:
            number = stream.fileno()
        except OSError:  # no file, as in a notebook
            continue
        poll = select.poll()
        poll.register(number, 0)
        if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
            found = True
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)  # Python flushes once more when it ends
            os.close(nowhere)
    return found


def _tell_warning(others: Callable[..., None]) -> Callable[..., None]:
    """Shows the package's own warnings as all it says, and those of libraries as they were."""

    def show(message: Warning | str, category: type[Warning], *rest: Any) -> None:
        if issubclass(category, PreceptorWarning):
            print(f"warning: {message}", file=sys.stderr)
        else:
            others(message, category, *rest)

    return show


def _overview() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {name.ljust(width)}  {verb.summary}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            "preceptor: cache many vision teachers once; train students many times.",
            "",
            "usage: preceptor COMMAND key=value ... [-m] [--config-dir DIR]",
            "",
            *lines,
            "",
            "preceptor COMMAND --help shows every option, with group=choice those of that choice;",
            "-m runs a sweep (seed=0,1,2).",
            "",
            f"example: {VERBS['train'].example}",
        ]
    )


def _help(name: str, given: Sequence[str] = ()) -> str:
    """All options of a command; those of each group as the given ``group=choice`` has them."""
    package = resources.files(CONFIGS)
    roots = [package, *map(Path, config_directories(given))]
    text = (package / f"{name}.yaml").read_text(encoding="utf-8")
    groups = []
    for folder in sorted(package.iterdir(), key=lambda entry: entry.name):
        if folder.is_dir() and f"- {folder.name}:" in text:
            there = [root / folder.name for root in roots if (root / folder.name).is_dir()]
            files = {file.name for place in there for file in place.iterdir()}
            choices = sorted(file[:-5] for file in files if file.endswith(".yaml"))
            groups.append(f"  {folder.name}={' | '.join(choices)}")
    options = text.split("\nhydra:")[0].rstrip()
    return "\n".join(
        [
            f"preceptor {name}: {VERBS[name].summary}",
            "",
            f"example: {VERBS[name].example}",
            "",
            *(["choices (files under configs/ and --config-dir):", *groups, ""] if groups else []),
            "options and their defaults, written key=value or key.subkey=value:",
            "",
            *(f"  {line}" for line in options.splitlines()),
            *_group_options(text, given, roots),
        ]
    )


def _group_options(text: str, given: Sequence[str], roots: Sequence[Traversable]) -> list[str]:
    """The options of every group that a verb's configuration begins with, group by group."""
    told = dict(option.split("=", 1) for option in given if "=" in option)
    lines = []
    for group, default in re.findall(r"^  - (\w+): (?!null)(\w+)$", text, re.MULTILINE):
        parts = _lineage(group, told.get(group, default), roots)
        for number, (choice, content) in enumerate(parts):
            over = f", over those of {parts[number - 1][0]}" if number else ""
            lines += ["", f"{group}.KEY=..., as {group}={choice} has them{over}:", ""]
            lines += [f"  {line}" for line in content.splitlines()]
    return lines


def _lineage(group: str, choice: str, roots: Sequence[Traversable]) -> list[tuple[str, str]]:
    """A choice of a group, after the choices that it builds on."""
    files = [root / group / f"{choice}.yaml" for root in roots]
    text = next((file.read_text(encoding="utf-8") for file in files if file.is_file()), None)
    if text is None:
        return []
    found = re.search(r"^defaults:\n((?:  - \w+\n)+)\n?", text, re.MULTILINE)
    if found is None:
        return [(choice, text)]
    bases = [base for base in re.findall(r"- (\w+)", found[1]) if base != "_self_"]
    own = text.replace(found[0], "")
    return [*(part for base in bases for part in _lineage(group, base, roots)), (choice, own)]


if __name__ == "__main__":
    sys.exit(main())
