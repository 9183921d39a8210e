"""Checks of configuration fields: each error is one line with the field and its value."""

from typing import Any

from asa_jax.errors import ConfigError


def require(condition: bool, field: str, value: object, requirement: str) -> None:
    """Raises a ConfigError that names `field` and its value unless `condition` holds."""
    if not condition:
        raise ConfigError(f"config.{field} = {value!r}: must be {requirement}")


def require_choice(section: str, name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raises a ConfigError unless `value` is one of `choices`."""
    require(value in choices, f"{section}.{name}", value, f"one of {', '.join(choices)}")


def require_range(section: str, obj: Any, minimum: float, *names: str) -> None:
    """Raises a ConfigError unless each named field is at least `minimum`."""
    for name in names:
        value = getattr(obj, name)
        require(value >= minimum, f"{section}.{name}", value, f"at least {minimum}")


def require_positive(section: str, obj: Any, *names: str) -> None:
    """Raises a ConfigError unless each named field is positive."""
    for name in names:
        value = getattr(obj, name)
        require(value > 0, f"{section}.{name}", value, "positive")


def require_multiple(section: str, obj: Any, name: str, divisor: str) -> None:
    """Raises a ConfigError unless one field is a multiple of another."""
    value, by = getattr(obj, name), getattr(obj, divisor)
    require(
        value % by == 0, f"{section}.{name}", value, f"a multiple of {section}.{divisor} = {by}"
    )
