"""How long collectives take: an alpha-beta model of the algorithms that a site's library chooses from.

Of S bytes over p ranks, d on each of N nodes, an all-reduce takes, and a gather or scatter half of it in a ring:

    algorithm                  steps in nodes   over the network    bytes of a rank in nodes   over the network
    ring                       2 (p - N)        2 (N - 1)           2 S (p - 1)(d - 1) / p d   2 S (p - 1) / p d
    tree                       2 (d - 1)        2 log N             2 S (d - 1) / d            2 S / d
    hierarchical ring          2 (d - 1)        2 (N - 1)           2 S (d - 1) / d            2 S (N - 1) / N d
    hierarchical rabenseifner  2 (d - 1)        2 log N             2 S (d - 1) / d            2 S (N - 1) / N d

A ring goes through all ranks, node after node. A tree is a chain in each node and two binary trees over the nodes
(Sanders, Speck, Träff 2009), in which a node sends S up and S down. Both pass pieces on while others come, so that the
slower of the links counts, and the steps are those by which NCCL and RCCL choose (src/graph/tuning.cc). A hierarchical
one scatters within nodes, sums between them, a die with those of its number, and gathers within nodes, one after the
other; between nodes it takes a ring or halves and doubles (Rabenseifner; Thakur, Rabenseifner, Gropp 2005). All dies of
a node send at once, each over its share of the network. The factors by which NCCL and RCCL correct the bandwidth of
messages of middle size are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from hydrazero.launch.job.site_file import Site, WaySection
from hydrazero.shards.errors import ConfigError, did_you_mean
from hydrazero.trainer.cost.traffic import ALL_REDUCE, Message


@dataclass(frozen=True, kw_only=True)
class Links:
    """Ranks of a job and how they reach each other."""

    nodes: int
    dies: int
    """Ranks of a node."""
    node_bandwidth: float
    """Bytes/s of a die in each direction."""
    network_bandwidth: float
    ways: tuple[WaySection, ...]
    """That the library chooses from."""

    @property
    def ranks(self) -> int:
        """All of them."""
        return self.nodes * self.dies


def links_of(site: Site, ranks: int) -> Links:
    """Return the links of so many ranks, node after node filled; a part of a node if they are fewer than its dies."""
    dies = min(ranks, site.nodes.dies)
    return Links(
        nodes=-(-ranks // dies),
        dies=dies,
        node_bandwidth=site.node_link.bandwidth.value,
        network_bandwidth=site.network.bandwidth.value,
        ways=site.collectives.ways,
    )


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a rank does in a collective."""

    node_steps: int
    network_steps: int
    node_bytes: float
    """Sent over the links of the node."""
    network_bytes: float
    """Sent over the network."""
    in_turn: bool
    """Whether the node's bytes go before those of the network, not beside them."""


def ring(size: float, rounds: int, links: Links) -> Work:
    """A ring through all ranks, of which d - 1 of d links lie within nodes, or all of them on one node."""
    p, nodes, d = links.ranks, links.nodes, links.dies
    sent = rounds * size * (p - 1) / p
    inside = d - 1 if nodes > 1 else d
    return Work(
        node_steps=rounds * (p - nodes),
        network_steps=rounds * (nodes - 1),
        node_bytes=sent * inside / d,
        network_bytes=sent * (d - inside) / d,
        in_turn=False,
    )


def tree(size: float, rounds: int, links: Links) -> Work:
    """A chain in each node, a double binary tree over the nodes."""
    return Work(
        node_steps=rounds * (links.dies - 1),
        network_steps=rounds * log2(links.nodes),
        node_bytes=rounds * size * (links.dies - 1) / links.dies,
        network_bytes=rounds * size / links.dies if links.nodes > 1 else 0.0,
        in_turn=False,
    )


def hierarchical_ring(size: float, rounds: int, links: Links) -> Work:
    """Within nodes, then in a ring between them."""
    return Work(
        node_steps=rounds * (links.dies - 1),
        network_steps=rounds * (links.nodes - 1),
        node_bytes=rounds * size * (links.dies - 1) / links.dies,
        network_bytes=rounds * size / links.dies * (links.nodes - 1) / links.nodes,
        in_turn=True,
    )


def hierarchical_rabenseifner(size: float, rounds: int, links: Links) -> Work:
    """Within nodes, then by halving and doubling between them."""
    return replace(hierarchical_ring(size, rounds, links), network_steps=rounds * log2(links.nodes))


def log2(count: int) -> int:
    """Levels of a binary tree of so many nodes: the logarithm, rounded up."""
    return (count - 1).bit_length()


ALGORITHMS: dict[str, Callable[[float, int, Links], Work]] = {
    "ring": ring,
    "tree": tree,
    "hierarchical_ring": hierarchical_ring,
    "hierarchical_rabenseifner": hierarchical_rabenseifner,
}
ONLY_ALL_REDUCE = ("tree", "hierarchical_rabenseifner")


def check_ways(site: Site) -> None:
    """Raise ConfigError if a site names an algorithm that is not known, or none that gathers."""
    for way in site.collectives.ways:
        if way.algorithm not in ALGORITHMS:
            hint = did_you_mean(way.algorithm, list(ALGORITHMS))
            raise ConfigError(f"site {site.name}: collectives.ways: algorithm '{way.algorithm}' is not known{hint}.")
    if all(way.algorithm in ONLY_ALL_REDUCE for way in site.collectives.ways):
        raise ConfigError(f"site {site.name}: collectives.ways has none that gathers; add a ring.")


@dataclass(frozen=True, kw_only=True)
class Sent:
    """What a collective costs a rank."""

    node_bytes: float
    """Sent over the links of the node."""
    network_bytes: float
    """Sent over the network."""
    seconds: float
    algorithm: str
    """With the library's protocol."""


def cost(message: Message, links: Links) -> Sent:
    """Return what one collective costs, by the way that takes least; nothing on one rank."""
    if links.ranks == 1:
        return Sent(node_bytes=0.0, network_bytes=0.0, seconds=0.0, algorithm="")
    reduces = message.kind == ALL_REDUCE
    found = [_cost(message, links, way) for way in links.ways if reduces or way.algorithm not in ONLY_ALL_REDUCE]
    return min(found, key=lambda sent: sent.seconds)


def _cost(message: Message, links: Links, way: WaySection) -> Sent:
    work = ALGORITHMS[way.algorithm](message.bytes, 2 if message.kind == ALL_REDUCE else 1, links)
    latency = way.start + work.node_steps * way.node_step + work.network_steps * way.network_step
    node, network = work.node_bytes / links.node_bandwidth, work.network_bytes / links.network_bandwidth
    moving = (node + network if work.in_turn else max(node, network)) / way.bandwidth_share
    return Sent(
        node_bytes=work.node_bytes,
        network_bytes=work.network_bytes,
        seconds=latency + moving,
        algorithm=way.name,
    )
