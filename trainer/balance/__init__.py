"""Ways of weighting the tasks' losses against each other, by name; a new one is one file and one line here."""

from __future__ import annotations

from hydrazero.shards.errors import ConfigError, did_you_mean
from hydrazero.trainer.balance.base import BalanceFacts, Balancer, BalanceSection, Seen
from hydrazero.trainer.balance.famo import Famo
from hydrazero.trainer.balance.fixed import Static, Uniform
from hydrazero.trainer.balance.gradnorm import GradNorm
from hydrazero.trainer.balance.uncertainty import Uncertainty

METHODS: dict[str, type[Balancer]] = {
    "uniform": Uniform,
    "static": Static,
    "uncertainty": Uncertainty,
    "famo": Famo,
    "gradnorm": GradNorm,
}

__all__ = ["METHODS", "BalanceFacts", "BalanceSection", "Balancer", "Seen", "check_balance", "make_balancer"]


def check_balance(settings: BalanceSection) -> None:
    """Raise ConfigError for an unknown method, or for a method that needs measurements which are turned off."""
    if settings.method not in METHODS:
        raise ConfigError(
            f"balance.method '{settings.method}' is not known{did_you_mean(settings.method, list(METHODS))}."
        )
    if METHODS[settings.method] in (GradNorm, Famo) and not settings.every:
        raise ConfigError(
            f"balance.every is {settings.every}; {settings.method} needs it to be at least 1 "
            '(balance.method = "uniform" does not).'
        )


def make_balancer(settings: BalanceSection, facts: BalanceFacts) -> Balancer:
    """Return the balancer of a run."""
    return METHODS[settings.method](settings=settings, facts=facts)
