"""Where distributions come from: a model on this machine, or one that a server runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from seodang.recipe import TeacherConfig

if TYPE_CHECKING:
    from seodang.teacher.local import LocalTeacher
    from seodang.teacher.served import ServedTeacher


def open_teacher(config: TeacherConfig) -> LocalTeacher | ServedTeacher:
    """The teacher of a recipe, not loaded yet, or connected to if it is served.

    Raises ``InputError`` if its files are not here, ``WorkFailed`` if its server is not.
    """
    from seodang.teacher.local import LocalTeacher, teacher_directory

    directory = teacher_directory(config)
    if config.server is None:
        return LocalTeacher(directory, config.precision)
    from seodang.teacher.served import ServedTeacher

    assert config.model is not None
    return ServedTeacher.connect(config.server, config.model, directory)
