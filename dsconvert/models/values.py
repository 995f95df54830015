"""Typed values out of a config.json, which a stranger may have written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsconvert.errors import CheckpointError

LIMIT = 1 << 31
UNSET = "Set it to null if the model was trained without it"
COMPARE = "Compare this file with the one that the model's authors published"


@dataclass(frozen=True)
class Values:
    """Typed access to a config; errors name key and file, `defaults` stand for absent keys."""

    raw: dict[str, Any]
    where: object
    defaults: Mapping[str, Any]

    def over(self, more: dict[str, Any]) -> Values:
        """The config with these keys in place of its own."""
        return Values({**self.raw, **more}, self.where, self.defaults)

    def wrong(self, key: str, why: str, hint: str = COMPARE) -> CheckpointError:
        return CheckpointError(f"{key!r} cannot be used", where=self.where, why=f"{key} {why}", hint=hint)

    def stated(self, key: str) -> Any:
        """What the config says, where it is silent the default; null stays None, as transformers takes it."""
        return self.raw.get(key, self.defaults.get(key))

    def value(self, key: str, default: Any = None) -> Any:
        value = self.raw.get(key)
        if value is None:
            value = self.defaults.get(key) if default is None else default
        if value is None:
            raise self.wrong(key, "is missing and has no default")
        return value

    def size(self, key: str, default: int | None = None, limit: int = LIMIT) -> int:
        value = self.value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < limit:
            raise self.wrong(key, f"is {str(value)[:40]!r}, should be a positive whole number below {limit}")
        return value

    def whole(self, key: str) -> int:
        """As `size`, or 0; null is 0."""
        return 0 if self.stated(key) in (None, 0) else self.size(key)

    def number(self, key: str, default: float | None = None) -> float:
        value = self.value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            raise self.wrong(key, f"is {str(value)[:40]!r}, should be a positive number")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.value(key, None)
        if not isinstance(value, bool):
            raise self.wrong(key, f"is {str(value)[:40]!r}, should be true or false")
        return value
