"""LACE experiment."""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor, nn
from torch.nn import functional

from hydrazero.models.encoders.base import AtomInputs, Encoder, EncoderSettings, NodeFeatures, PairGeometry, size_table
from hydrazero.models.encoders.harmonics import CARTESIAN, Constants, solid_harmonics, sphere_tables
from hydrazero.models.ops.exact import exact_matmul
from hydrazero.models.ops.pair_sums import PairFactors, Path, pair_sum

OPT = dict(kv.split("=") for kv in os.environ.get("LACE", "").split(",") if kv)
GATES = OPT.get("gates", "kinds")     # kinds | mlp
FACTORS = OPT.get("factors", "all")   # all | one | two
NORM = float(OPT.get("norm", "10"))
RADIAL = OPT.get("radial", "linear")
RES = OPT.get("res", "sum")
OUT = OPT.get("out", "sum")


def sizes_of(degree):
    return [2 * l + 1 for l in range(degree + 1)]


class Mix(nn.Module):
    """x [M, A, F] -> [M, A, G], a matrix for each degree."""

    def __init__(self, degree, features, out=None):
        super().__init__()
        self.degree = degree
        self.weight = nn.Parameter(torch.randn(degree + 1, features, out or features) / features**0.5)

    def forward(self, x):
        parts = zip(x.split(sizes_of(self.degree), 0), self.weight.unbind(0), strict=True)
        return torch.cat([p @ w for p, w in parts], 0)


class Message(nn.Module):
    def __init__(self, s: EncoderSettings, node_degree: int, first: bool):
        super().__init__()
        f, L = s.features, s.max_degree
        self.f, self.L, self.nd, self.first = f, L, node_degree, first
        B = s.radial_functions + 1
        if RADIAL == "mlp":
            self.hid = nn.Parameter(torch.randn(B, 16) * 4.0 / B**0.5)
            B = 16
        gain = 4.0 if RADIAL == "linear" else 1.7
        self.tensor_weight = nn.Parameter(torch.randn(B, (node_degree + 1) * f) * gain / B**0.5)
        self.scalar_weight = nn.Parameter(torch.randn(B, L * f) * gain / B**0.5)
        self.up = Mix(node_degree, f)
        self.scal = nn.Linear(f, L * f)
        if not first:
            self.inn = nn.Linear(f, f)

    def forward(self, x, Y, pairs):
        s = x[0]
        h = s if self.first else functional.silu(self.inn(s))
        d = self.scal(h).unflatten(-1, (self.L, self.f))
        t = self.up(x).transpose(0, 1)
        radial = pairs.radial
        if RADIAL == "mlp":
            radial = functional.silu(exact_matmul(radial, self.hid))
        out = pair_sum(PairFactors(slots=pairs.slots, radial=radial, harmonics=Y), Path(features=t, weight=self.tensor_weight), Path(features=d, weight=self.scalar_weight))
        return out.transpose(0, 1).contiguous() / NORM


class Product(nn.Module):
    def __init__(self, s: EncoderSettings, out_degree: int):
        super().__init__()
        f, L = s.features, s.max_degree
        self.order, self.od, self.f, self.width = s.correlation, out_degree, f, s.norm_width
        evaluate, expand = sphere_tables(L, s.correlation, out_degree)
        self.tables = Constants(evaluate=evaluate, expand=expand)
        n = {"all": self.order, "one": 1, "two": min(2, self.order)}[FACTORS]
        self.factors = nn.ModuleList(Mix(L, f) for _ in range(n))
        k = self.order * (out_degree + 1) * f
        if GATES == "kinds":
            self.gates = nn.Linear(f, k)
        else:
            self.g1 = nn.Linear(f * (L + 2), f)
            self.gates = nn.Linear(f, k)
            self.sc = nn.Linear(f, f)
            self.L = L
        self.out = Mix(out_degree, f)

    def forward(self, A, kinds):
        ev, ex = self.tables.get("evaluate", kinds), self.tables.get("expand", kinds)
        M, n, f = A.shape
        facs = [m(A) for m in self.factors]
        if GATES == "kinds":
            hidden = kinds
        else:
            norms = [facs[0][0]] + [torch.sqrt((q * q).sum(0) + self.width**2) for q in facs[0].split(sizes_of(self.L), 0)[1:]]
            hidden = functional.silu(self.g1(torch.cat([kinds, *norms], -1)))
        g = self.gates(hidden).view(n, self.order, self.od + 1, f).permute(1, 2, 0, 3)
        vals = [exact_matmul(ev.t(), a.reshape(M, n * f)) for a in facs]
        total, prod = None, None
        for k in range(self.order):
            v = vals[min(k, len(vals) - 1)]
            prod = v if prod is None else prod * v
            if k == 0:
                e = facs[0][: (self.od + 1) ** 2]
            else:
                e = exact_matmul(ex.t(), prod).view(-1, n, f)
            t = torch.cat([p * q.unsqueeze(0) for p, q in zip(e.split(sizes_of(self.od), 0), g[k], strict=True)], 0)
            total = t if total is None else total + t
        out = self.out(total)
        if GATES != "kinds":
            out = torch.cat([out[:1] + self.sc(hidden).unsqueeze(0), out[1:]], 0)
        return out


class LACE(Encoder):
    has_vectors = True
    sizes = size_table(features=(16, 32, 64, 128), layers=(2, 2, 2, 2), max_degree=(2, 3, 3, 3), node_degree=(1, 1, 1, 1), correlation=(2, 3, 3, 3))

    def __init__(self, settings):
        super().__init__(settings)
        f, n = settings.features, settings.layers
        nd = settings.node_degree
        degs = [0] + [nd] * (n - 1)
        self.messages = nn.ModuleList(Message(settings, d, i == 0) for i, d in enumerate(degs))
        self.products = nn.ModuleList(Product(settings, nd) for _ in degs)
        self.skips = nn.ModuleList(Mix(d, f) for d in degs)
        self.skip_gates = nn.ModuleList(nn.Linear(f, f) for _ in degs)
        self.readouts = nn.ModuleList(nn.Linear(f, f) for _ in degs)

    def forward(self, atoms: AtomInputs, pairs: PairGeometry) -> NodeFeatures:
        Y = (solid_harmonics(pairs.directions, self.settings.max_degree)[..., 1:])
        kinds = atoms.scalars
        x, scalars = kinds.unsqueeze(0), torch.zeros_like(kinds)
        for m, p, skip, gate, ro in zip(self.messages, self.products, self.skips, self.skip_gates, self.readouts, strict=True):
            kept = skip(x) * gate(kinds).unsqueeze(0)
            new = p(m(x, Y, pairs), kinds if GATES == "kinds" else x[0])
            x = torch.cat([new[: kept.shape[0]] + kept, new[kept.shape[0] :]], 0)
            if OUT == "sum":
                scalars = scalars + functional.silu(ro(x[0]))
            else:
                scalars = x[0]
        return NodeFeatures(scalars=scalars, vectors=x[1:4][list(CARTESIAN)].transpose(0, 1))
