"""Methods that weight the losses of the tasks against each other, by name.

A built-in method is one file here and one line in `BALANCERS`; another package adds one as an entry point in the group
'hydrazero.balancers'. The checks of a method's settings stand with the method.
"""

from __future__ import annotations

from hydrazero.shards.plugins import Registry
from hydrazero.trainer.balance.base import BalanceFacts, Balancer, BalanceSection, Observation

BALANCERS: Registry[type[Balancer]] = Registry(
    kind="balance.method",
    group="hydrazero.balancers",
    builtin={
        "uniform": "hydrazero.trainer.balance.fixed:Uniform",
        "static": "hydrazero.trainer.balance.fixed:Static",
        "uncertainty": "hydrazero.trainer.balance.uncertainty:Uncertainty",
        "famo": "hydrazero.trainer.balance.famo:Famo",
        "gradnorm": "hydrazero.trainer.balance.gradnorm:GradNorm",
    },
    base=Balancer,
)

__all__ = ["BALANCERS", "BalanceFacts", "BalanceSection", "Balancer", "Observation", "check_balance", "make_balancer"]


def check_balance(settings: BalanceSection) -> None:
    """Raise ConfigError for an unknown method, or for settings with which the method cannot work."""
    BALANCERS.get(settings.method).check(settings)


def make_balancer(settings: BalanceSection, facts: BalanceFacts) -> Balancer:
    """Return the balancer of a run; raises ConfigError for an unknown method."""
    return BALANCERS.get(settings.method)(settings=settings, facts=facts)
