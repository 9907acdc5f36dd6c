"""Teachers as the command line names them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, get_args

from seodang.artifact import Source
from seodang.errors import InputError
from seodang.packages import find_fetched
from seodang.recipe import Precision, TeacherConfig
from seodang.teacher import open_teacher
from seodang.teacher.local import teacher_source

if TYPE_CHECKING:
    from seodang.teacher.local import LocalTeacher
    from seodang.teacher.served import ServedTeacher


def teacher_config(name: str) -> TeacherConfig:
    """The configuration of a teacher named by a directory or as ``package:NAME``.

    Raises ``InputError`` if it is neither.
    """
    if name.startswith("package:"):
        pin = find_fetched(name.removeprefix("package:"))
        return TeacherConfig(package=pin.package, version=pin.version, sha256=pin.sha256)
    if not Path(name).is_dir():
        raise InputError(f"teacher {name}: no such directory (a package is named package:NAME)")
    return TeacherConfig(path=str(Path(name).resolve()))


def named_teacher(
    name: str, model: str | None, tokenizer: Path | None, precision: str = "float32"
) -> tuple[LocalTeacher | ServedTeacher, Source]:
    """The teacher, and how it appears among the sources of what is made from it.

    ``name`` is a directory, ``package:NAME``, or the address of a server, which runs ``model``
    and whose tokenizer lies in ``tokenizer``; ``precision`` is for the others. Raises
    ``InputError`` for a wrong combination.
    """
    if precision not in get_args(Precision):
        raise InputError(f"--precision {precision}: choose one of {', '.join(get_args(Precision))}")
    if not name.startswith(("http://", "https://")):
        for option, value in (("--model", model), ("--tokenizer", tokenizer)):
            if value is not None:
                raise InputError(f"{option} belongs to a server, and {name} is none")
        config = teacher_config(name).model_copy(update={"precision": precision})
        return open_teacher(config), teacher_source(config)
    if precision != "float32":
        raise InputError("--precision: a server computes as it was started; leave this out")
    if model is None:
        raise InputError(f"teacher {name}: name the model that this server runs with --model")
    from seodang.teacher.served import ServedTeacher

    served = ServedTeacher.connect(name, model, tokenizer)
    return served, Source(name=Path(model).name, license="not stated")
