"""How long collectives take: an alpha-beta model of rings and trees over the links within nodes and between them.

The formulas are those by which NCCL, and RCCL after it, choose an algorithm (NCCL, src/graph/tuning.cc). A ring takes a
step for each rank, over the network once for each node; a double binary tree (Sanders, Speck, Träff 2009), which only
an all-reduce can take, as many as the logarithm of the nodes. Both keep the bandwidth: of S bytes over n ranks each
sends 2 S (n - 1) / n in an all-reduce, half of it in a gather or scatter (Thakur, Rabenseifner, Gropp 2005). All dies
of a node send at once, each over its share of the network.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hydrazero.launch.site_file import Site
from hydrazero.launch.traffic import ALL_REDUCE, Message


@dataclass(frozen=True, kw_only=True)
class Links:
    """Ranks of a job and how they reach each other."""

    nodes: int
    dies: int
    """Ranks of a node."""
    node_latency: float
    """s."""
    node_bandwidth: float
    """Bytes/s of a die in each direction."""
    network_latency: float
    network_bandwidth: float

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
        node_latency=site.node_link.latency.value,
        node_bandwidth=site.node_link.bandwidth.value,
        network_latency=site.network.latency.value,
        network_bandwidth=site.network.bandwidth.value,
    )


@dataclass(frozen=True, kw_only=True)
class Sent:
    """What a collective costs a rank."""

    node_bytes: float
    """Sent over the links of the node."""
    network_bytes: float
    """Sent over the network."""
    seconds: float
    algorithm: str
    """'ring' or 'tree'."""


def cost(message: Message, links: Links) -> Sent:
    """Return what one collective costs; only an all-reduce can be a tree."""
    ways = ("ring", "tree") if message.kind == ALL_REDUCE else ("ring",)
    found = [_cost(message, links, way) for way in ways]
    return min(found, key=lambda sent: sent.seconds)


def _cost(message: Message, links: Links, way: str) -> Sent:
    rounds = 2 if message.kind == ALL_REDUCE else 1
    # Each die takes its part of the message around; between nodes go the parts of the dies side by side.
    node = rounds * message.bytes * (links.dies - 1) / links.dies
    network = rounds * message.bytes / links.dies * (links.nodes - 1) / links.nodes
    if way == "ring":
        steps = links.ranks - links.nodes, links.nodes if links.nodes > 1 else 0
    else:
        steps = links.dies - 1, math.ceil(math.log2(links.nodes))
    latency = rounds * (steps[0] * links.node_latency + steps[1] * links.network_latency)
    seconds = latency + node / links.node_bandwidth + network / links.network_bandwidth
    return Sent(node_bytes=node, network_bytes=network, seconds=seconds, algorithm=way)
