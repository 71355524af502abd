"""One Python file as a source of strategies."""

from __future__ import annotations

import itertools
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from kvmesh.strategy import Strategy

PREFIX = "kvmesh_strategy_file"


class Loader:
    """Gives each version of each file a module of its own, so that two never share anything."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)

    def load(self, path: Path, source: bytes) -> Loaded:
        """Runs `source`. Raises whatever it raises, TypeError when it defines no strategy."""
        module = ModuleType(f"{PREFIX}_{next(self._numbers)}_{path.stem}")
        module.__file__ = str(path)
        sys.modules[module.__name__] = module
        loaded = Loaded(module.__name__)
        try:
            exec(compile(source, str(path), "exec"), module.__dict__)
            for value in vars(module).values():
                # Not those that it imports.
                if isinstance(value, Strategy) and value.module == module.__name__:
                    loaded.strategies[value.name] = value
            if not loaded.strategies:
                raise TypeError("it defines no strategy")
        except BaseException:
            loaded.drop()
            raise
        return loaded


@dataclass
class Loaded:
    """The strategies of one version of a file."""

    module: str
    strategies: dict[str, Strategy] = field(default_factory=dict)

    def drop(self) -> None:
        """Python forgets the module; strategies that still run go on."""
        sys.modules.pop(self.module, None)


def complaint(error: BaseException, path: Path) -> str:
    """What went wrong in a strategy's file, on one line, with the line number if there is one."""
    line = ""
    if isinstance(error, SyntaxError):
        line = f" (line {error.lineno})" if error.lineno else ""
        return f"{type(error).__name__}: {error.msg}{line}"
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename == str(path):
            line = f" (line {frame.lineno})"
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}{line}" if text else f"{type(error).__name__}{line}"
