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


def check_balance(settings: BalanceSection, where: str) -> None:
    """Raise ConfigError for a method that is not known or numbers out of range."""
    if settings.method not in METHODS:
        known = did_you_mean(settings.method, list(METHODS))
        raise ConfigError(f"{where} balance.method '{settings.method}' is not known{known}.")
    if not 0 < settings.smallest <= 1 <= settings.largest < float("inf"):
        raise ConfigError(
            f"{where} balance.smallest = {settings.smallest} and balance.largest = {settings.largest} must obey "
            "0 < smallest <= 1 <= largest, since the mean of the weights is 1."
        )
    if not 0 <= settings.smoothing < 1:
        raise ConfigError(f"{where} balance.smoothing is {settings.smoothing}; it must be at least 0 and below 1.")
    if settings.every < 0 or (METHODS[settings.method] in (GradNorm, Famo) and not settings.every):
        raise ConfigError(
            f"{where} balance.every is {settings.every}; {settings.method} needs it to be at least 1 "
            '(balance.method = "uniform" does not).'
        )
    if not 0 <= settings.learning_rate < float("inf"):
        raise ConfigError(
            f"{where} balance.learning_rate is {settings.learning_rate}; it must be a number of at least 0."
        )
    if not abs(settings.alpha) < float("inf"):
        raise ConfigError(f"{where} balance.alpha is {settings.alpha}; it must be a finite number.")


def make_balancer(settings: BalanceSection, facts: BalanceFacts) -> Balancer:
    """Return the balancer of a run."""
    return METHODS[settings.method](settings=settings, facts=facts)
