"""Finds an app: `shop:app`, `shop.py` or `shop.py:app` becomes the `App` that is defined there."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import click
import msgspec

from pavane.app import App
from pavane.cli.exits import BadTarget
from pavane.errors import PavaneError
from pavane.event import is_event_type


class Place(msgspec.Struct, frozen=True):
    """Where the module of a target is: its dotted name, the folder to import it from, its file."""

    module: str
    folder: Path
    file: Path | None
    attribute: str


def find_app(target: str) -> App:
    """Import the module of `target` and return its app; raise BadTarget.

    The app then also knows the event classes that the module names, and no service does.
    """
    place = locate(target)
    module = imported(place, target)
    app = _named(module, place, target) if place.attribute else _only(module, place, target)
    for value in vars(module).values():
        if is_event_type(value):
            app.registry.events.setdefault(value.event_type, value)
    return app


def _only(module: ModuleType, place: Place, target: str) -> App:
    found = {id(v): (n, v) for n, v in vars(module).items() if isinstance(v, App)}
    if not found:
        raise BadTarget(
            f"{target} defines no App. Add `app = App({place.module!r}, services=[…])` to it."
        )
    if len(found) > 1:
        listed = ", ".join(f"{target}:{name}" for name, _ in found.values())
        raise BadTarget(f"{target} defines several apps; say which one: {listed}.")
    return next(iter(found.values()))[1]


def locate(target: str) -> Place:
    """Say where the module of a target is, without importing it; raise BadTarget."""
    name, _, attribute = target.partition(":")
    if name.endswith(".py") or os.sep in name:
        return _file_place(name, attribute)
    if not name or not all(part.isidentifier() for part in name.split(".")):
        raise BadTarget(f"{target!r} is no app. Write shop:app, shop.py or shop.py:app.")
    return Place(name, Path.cwd(), None, attribute)


def _file_place(name: str, attribute: str) -> Place:
    file = Path(name).absolute()
    if not file.is_file():
        close = get_close_matches(file.name, [p.name for p in file.parent.glob("*.py")], 1)
        hint = f" Did you mean {Path(name).with_name(close[0])}?" if close else ""
        what = "is a directory" if file.is_dir() else "does not exist"
        raise BadTarget(f"{name} {what}.{hint}")
    if not file.stem.isidentifier():
        raise BadTarget(f"{name} cannot be imported: its name must be a Python identifier.")
    parts, folder = [file.stem], file.parent
    while (folder / "__init__.py").exists():  # the file belongs to a package
        parts.insert(0, folder.name)
        folder = folder.parent
    return Place(".".join(parts), folder, file, attribute)


def imported(place: Place, target: str) -> ModuleType:
    """Import the module of a target, telling users where their code fails; raise BadTarget."""
    folder = str(place.folder)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(place.module)
    except PavaneError:
        _show_trace(place)
        raise
    except ModuleNotFoundError as error:
        if error.name is None or not f"{place.module}.".startswith(f"{error.name}."):
            _refuse(error, place, target)
        raise BadTarget(
            f"No module is called {error.name!r}. TARGET is a module or file and perhaps an "
            f"attribute, such as shop:app or path/to/shop.py."
        ) from None
    except Exception as error:
        _refuse(error, place, target)
    if place.file is not None and not _is_at(module, place.file):
        raise BadTarget(
            f"{target} cannot be imported, because another module is called {place.module!r} "
            f"({getattr(module, '__file__', None) or 'built in'}). Rename the file."
        )
    return module


def _is_at(module: ModuleType, file: Path) -> bool:
    return module.__file__ is not None and Path(module.__file__).resolve() == file.resolve()


def _refuse(error: Exception, place: Place, target: str) -> NoReturn:
    _show_trace(place)
    text = str(error).strip()
    if isinstance(error, SyntaxError):
        click.echo("".join(traceback.format_exception_only(error)[:-1]).rstrip("\n"), err=True)
    raise BadTarget(
        f"{target} cannot be imported: {type(error).__name__}{': ' if text else ''}{text}"
    ) from None


def _show_trace(place: Place) -> None:
    """Print the user's part of the current exception's traceback, which says where to look."""
    error = sys.exception()
    if error is None:
        return
    frames = traceback.extract_tb(error.__traceback__)
    inside = [f for f in frames if "importlib" not in f.filename and f.filename != __file__]
    ours = str(Path(__file__).parents[1])
    inside = [frame for frame in inside if not frame.filename.startswith(ours)] or inside[-1:]
    if inside:
        click.echo("".join(traceback.format_list(inside)).rstrip("\n"), err=True)


def _named(module: ModuleType, place: Place, target: str) -> App:
    found: Any = getattr(module, place.attribute, None)
    if isinstance(found, App):
        return found
    apps = [name for name, value in vars(module).items() if isinstance(value, App)]
    known = f" Apps there: {', '.join(apps)}." if apps else ""
    if found is None:
        raise BadTarget(f"{target}: module {place.module} has no {place.attribute!r}.{known}")
    raise BadTarget(f"{target} is a {type(found).__name__}, no App.{known}")
