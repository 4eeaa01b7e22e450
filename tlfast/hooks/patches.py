"""What stands in other libraries' modules and classes in place of their own: for whom, and the way back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

Patch = tuple[Any, str, Any]  # a class or a Python module, a name in it, what is to stand there


class Patches:
    """Names of classes and Python modules that are replaced while anybody wants it, for every object or for some.

    Nothing is written into an object: what is copied, pickled or compared inside is the object as it was, and users
    who leave in another order than they came undo nothing of each other.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._everywhere = 0
        self._only: dict[int, int] = {}  # the ids of single objects, and how many want them
        self._users = 0
        self._done: list[tuple[Any, str, Any, Any]] = []  # with what stood there itself before, or _NOTHING

    def everywhere(self) -> bool:
        """Whether somebody wants it for every object."""
        return self._everywhere > 0

    def wanted(self) -> bool:
        """Whether somebody wants it for any object."""
        return self._everywhere > 0 or bool(self._only)

    def concern(self, owner: object) -> bool:
        """Whether it is wanted for this object."""
        return self._everywhere > 0 or id(owner) in self._only

    def enter(self, make: Callable[[], Iterable[Patch]], only: Iterable[object] | None = None) -> None:
        """One more wants it, for these objects or, under None, for every one; whoever enters keeps them alive."""
        with self._lock:
            if self._users == 0:
                self._replace(make())
            self._users += 1
            if only is None:
                self._everywhere += 1
            for owner in only or ():
                self._only[id(owner)] = self._only.get(id(owner), 0) + 1
            self.changed()

    def also(self, patches: Iterable[Patch]) -> None:
        """Replace these, too, while anybody is here: of a module that has been imported since."""
        with self._lock:
            if self._users:
                self._replace(patches)

    def _replace(self, patches: Iterable[Patch]) -> None:
        for cls, name, new in patches:
            self._done.append((cls, name, vars(cls).get(name, _NOTHING), new))
            setattr(cls, name, new)

    def leave(self, only: Iterable[object] | None = None) -> None:
        """One fewer; after the last all is as it was."""
        self._leave(None if only is None else [id(owner) for owner in only])

    def leave_by_id(self, owner_id: int) -> None:
        """One fewer, which wanted it for one object that is gone by now."""
        self._leave([owner_id])

    def changed(self) -> None:
        """Called when somebody has come or gone."""

    def _leave(self, only: list[int] | None) -> None:
        with self._lock:
            if only is None:
                self._everywhere -= 1
            for owner_id in only or ():
                self._only[owner_id] -= 1
                if not self._only[owner_id]:
                    del self._only[owner_id]
            self.changed()
            self._users -= 1
            while not self._users and self._done:
                cls, name, before, new = self._done.pop()
                if vars(cls).get(name) is not new:
                    continue  # somebody stands on it by now: alone it does what stood there before
                if before is _NOTHING:
                    delattr(cls, name)
                else:
                    setattr(cls, name, before)


_NOTHING = object()
