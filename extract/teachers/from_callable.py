"""``call:module:function``: a teacher that a function of the user's makes."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from ...errors import TeacherError, closest
from .base import Preprocessing, SpaceShape, Teacher, named


def load(
    name: str,
    source: str,
    size: int | tuple[int, int] | None = None,
    spaces: Mapping[str, Mapping[str, Any] | None] | None = None,
    checkpoint: str | None = None,
) -> Teacher:
    """Calls ``function(name=..., size=..., spaces=..., checkpoint=...)`` with what is set.

    The function is the user's own code, named in the user's own configuration; it returns a
    ``Teacher``. ``name`` is given if the function has a parameter for it.

    Raises:
        TeacherError: there is no such module or function, it cannot take an option, it fails, or
            it returns no teacher.
    """
    _, _, target = source.partition(":")
    module_name, _, function_name = target.partition(":")
    if not (module_name and function_name.isidentifier()):
        raise TeacherError(f"teacher {name}: {source!r} is not of the form call:module:function")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise TeacherError(
            f"teacher {name}: module {module_name} cannot be imported ({error}); "
            "is it installed or on PYTHONPATH?"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        public = [known for known, value in vars(module).items() if inspect.isfunction(value)]
        raise TeacherError(
            f"teacher {name}: module {module_name} has no function {function_name}"
            + closest(function_name, public)
        )
    options: dict[str, Any] = {"size": size, "spaces": spaces, "checkpoint": checkpoint}
    options = {key: value for key, value in options.items() if value is not None}
    with named(name, doing=f"looking at {target}"):
        parameters = inspect.signature(function).parameters
    if "name" in parameters:
        options["name"] = name
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    unknown = [] if takes_any else [key for key in options if key not in parameters]
    if unknown:
        raise TeacherError(
            f"teacher {name}: {target} takes no {', '.join(unknown)}; "
            f"it takes {', '.join(parameters) or 'nothing'}"
        )
    with named(name, doing=target):
        teacher = function(**options)
    if not isinstance(teacher, Teacher):
        raise TeacherError(
            f"teacher {name}: {target} returned {type(teacher).__name__}, not a Teacher"
        )
    with named(name, doing=f"the teacher that {target} returned"):
        shapes = list(teacher.spaces)
        known = isinstance(teacher.preprocessing, Preprocessing)
    if not known or not shapes or not all(isinstance(shape, SpaceShape) for shape in shapes):
        raise TeacherError(
            f"teacher {name}: {target} returned one whose `preprocessing` is no Preprocessing, or "
            "whose `spaces` are no SpaceShapes"
        )
    teacher.name, teacher.own_code = name, True
    return teacher
