"""The duration of collective operations, by an alpha-beta model of the algorithms that a site's library chooses from.

An all-reduce of S bytes over p ranks, d on each of N nodes, takes the following; a gather or a scatter takes half as
much in a ring:

    algorithm                  steps in nodes   between nodes       bytes of a rank in nodes   between nodes
    ring                       2 (p - N)        2 (N - 1)           2 S (p - 1)(d - 1) / p d   2 S (p - 1) / p d
    tree                       2 (d - 1)        2 log N             2 S (d - 1) / d            2 S / d
    hierarchical ring          2 (d - 1)        2 (N - 1)           2 S (d - 1) / d            2 S (N - 1) / N d
    hierarchical rabenseifner  2 (d - 1)        2 log N             2 S (d - 1) / d            2 S (N - 1) / N d

A ring goes through all ranks, node after node. A tree is a chain in each node and two binary trees over the nodes
(Sanders, Speck, Träff 2009); a node sends S towards the root and S away from it. Both are pipelined, so the slower of
the two kinds of links determines the time; the numbers of steps are those by which NCCL and RCCL choose
(src/graph/tuning.cc). The hierarchical algorithms have three phases, one after the other: a scatter within each node,
sums between nodes, each device with the devices of its position, and a gather within each node. Between nodes they use
a ring, or recursive halving and doubling (Rabenseifner; Thakur, Rabenseifner, Gropp 2005). All devices of a node send
at the same time, each with its share of the network. The factors by which NCCL and RCCL correct the bandwidth of
messages of medium size are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from hydrazero.launch.job.site_file import AlgorithmSection, Site
from hydrazero.shards.errors import ConfigError, did_you_mean
from hydrazero.trainer.cost.traffic import ALL_REDUCE, Message


@dataclass(frozen=True, kw_only=True)
class Links:
    """The ranks of a job and the links between them."""

    nodes: int
    ranks_per_node: int
    node_bandwidth: float
    """Bandwidth of a device to the others of its node, in each direction, in bytes/s."""
    network_bandwidth: float
    """Bandwidth of a device to other nodes, in each direction, in bytes/s."""
    algorithms: tuple[AlgorithmSection, ...]
    """Algorithms that the library chooses from."""

    @property
    def ranks(self) -> int:
        """Number of ranks of the job."""
        return self.nodes * self.ranks_per_node


def links_of(site: Site, ranks: int) -> Links:
    """Return the links between a number of ranks, which fill one node after the other."""
    per_node = min(ranks, site.nodes.dies)
    return Links(
        nodes=-(-ranks // per_node),
        ranks_per_node=per_node,
        node_bandwidth=site.node_link.bandwidth.value,
        network_bandwidth=site.network.bandwidth.value,
        algorithms=site.collectives.ways,
    )


@dataclass(frozen=True, kw_only=True)
class Work:
    """The steps and bytes of one rank in a collective operation."""

    node_steps: int
    """Number of steps within nodes."""
    network_steps: int
    """Number of steps between nodes."""
    node_bytes: float
    """Bytes sent over the links of the node."""
    network_bytes: float
    """Bytes sent over the network."""
    in_turn: bool
    """Whether the bytes within the node and those over the network are sent one after the other, not concurrently."""


def ring(size: float, rounds: int, links: Links) -> Work:
    """Return the work of a ring through all ranks; d - 1 of d links are within nodes, or all of them on one node."""
    p, nodes, d = links.ranks, links.nodes, links.ranks_per_node
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
    """Return the work of a chain in each node and a double binary tree over the nodes."""
    return Work(
        node_steps=rounds * (links.ranks_per_node - 1),
        network_steps=rounds * log2(links.nodes),
        node_bytes=rounds * size * (links.ranks_per_node - 1) / links.ranks_per_node,
        network_bytes=rounds * size / links.ranks_per_node if links.nodes > 1 else 0.0,
        in_turn=False,
    )


def hierarchical_ring(size: float, rounds: int, links: Links) -> Work:
    """Return the work of an operation within nodes and then in a ring between them."""
    return Work(
        node_steps=rounds * (links.ranks_per_node - 1),
        network_steps=rounds * (links.nodes - 1),
        node_bytes=rounds * size * (links.ranks_per_node - 1) / links.ranks_per_node,
        network_bytes=rounds * size / links.ranks_per_node * (links.nodes - 1) / links.nodes,
        in_turn=True,
    )


def hierarchical_rabenseifner(size: float, rounds: int, links: Links) -> Work:
    """Return the work of an operation within nodes and then by halving and doubling between them."""
    return replace(hierarchical_ring(size, rounds, links), network_steps=rounds * log2(links.nodes))


def log2(count: int) -> int:
    """Return the number of levels of a binary tree over `count` nodes: the logarithm, rounded up."""
    return (count - 1).bit_length()


ALGORITHMS: dict[str, Callable[[float, int, Links], Work]] = {
    "ring": ring,
    "tree": tree,
    "hierarchical_ring": hierarchical_ring,
    "hierarchical_rabenseifner": hierarchical_rabenseifner,
}
ONLY_ALL_REDUCE = ("tree", "hierarchical_rabenseifner")
"""Algorithms with which libraries do only all-reduces."""


def check_algorithms(site: Site) -> None:
    """Raise ConfigError if a site names an unknown algorithm, or only algorithms that cannot gather."""
    for section in site.collectives.ways:
        if section.algorithm not in ALGORITHMS:
            hint = did_you_mean(section.algorithm, list(ALGORITHMS))
            raise ConfigError(
                f"site {site.name}: collectives.ways: algorithm '{section.algorithm}' is not known{hint}."
            )
    if all(section.algorithm in ONLY_ALL_REDUCE for section in site.collectives.ways):
        raise ConfigError(f"site {site.name}: collectives.ways has no algorithm that can gather; add a ring.")


@dataclass(frozen=True, kw_only=True)
class CollectiveCost:
    """What one collective operation costs a rank."""

    node_bytes: float
    """Bytes sent over the links of the node."""
    network_bytes: float
    """Bytes sent over the network."""
    seconds: float
    algorithm: str
    """Algorithm and protocol of the library; empty if there is only one rank."""


def cost(message: Message, links: Links) -> CollectiveCost:
    """Return what one collective operation costs with the fastest algorithm; nothing on one rank."""
    if links.ranks == 1:
        return CollectiveCost(node_bytes=0.0, network_bytes=0.0, seconds=0.0, algorithm="")
    reduces = message.kind == ALL_REDUCE
    costs = [
        _cost(message, links, section)
        for section in links.algorithms
        if reduces or section.algorithm not in ONLY_ALL_REDUCE
    ]
    return min(costs, key=lambda each: each.seconds)


def _cost(message: Message, links: Links, section: AlgorithmSection) -> CollectiveCost:
    work = ALGORITHMS[section.algorithm](message.bytes, 2 if message.kind == ALL_REDUCE else 1, links)
    latency = section.start + work.node_steps * section.node_step + work.network_steps * section.network_step
    node, network = work.node_bytes / links.node_bandwidth, work.network_bytes / links.network_bandwidth
    moving = (node + network if work.in_turn else max(node, network)) / section.bandwidth_share
    return CollectiveCost(
        node_bytes=work.node_bytes,
        network_bytes=work.network_bytes,
        seconds=latency + moving,
        algorithm=section.name,
    )
