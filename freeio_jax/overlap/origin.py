"""Which call of the user's started an exchange, for errors."""

from __future__ import annotations

import dataclasses
import pathlib
import traceback

_PACKAGE = str(pathlib.Path(__file__).parent.parent)


@dataclasses.dataclass(eq=False)
class Origin:
    """The call that started an exchange.

    Attributes:
      name: of the function that the user called.
      place: file, line and function of the call.
      is_done: whether ``done`` was called.
    """

    name: str
    place: str
    is_done: bool = False

    @classmethod
    def here(cls, name: str) -> Origin:
        """That of the innermost call from outside of this package."""
        frames = [frame for frame, _ in traceback.walk_stack(None)]
        outside = [f for f in frames if not f.f_code.co_filename.startswith(_PACKAGE)] or frames
        code = outside[0].f_code
        return cls(name, f"{code.co_filename}:{outside[0].f_lineno} ({code.co_name})")

    def __str__(self):
        return f"the {self.name} at {self.place}"

    __repr__ = __str__  # as programs that are printed show it

    def check_done(self) -> None:
        """Call this when the function that made the start has been traced to its end."""
        if not self.is_done:
            raise RuntimeError(
                f"freeio_jax: {self} was never done. Call done() on the Pending that it returned, "
                "in the function and loop body that started it; without it nobody waits for the "
                "exchange."
            )
