"""Keep the coordinates of keys and values in the subspace in which those of the text lie.

Paper: Eigen Attention: Attention in Low-Rank Space for KV Cache Compression, arXiv 2408.05646; rotated keys and a basis
    per KV head as in the PCA baseline of MatryoshkaKV, arXiv 2410.14731
Axis: channel
Idea: The keys of one head lie close to a subspace of few dimensions, and so do its values. Take the eigenvectors of
    X^T X as a basis, U_k and U_v, and store coordinates: fewer numbers, and attention can work on them as they are,
    because q.k = (U_k^T q).(U_k^T k) for a key in the subspace.
Stores: per KV head rank coordinates of every packed key and rank_v of every packed value, in the model's dtype, or as
    the storage beside it quantises them; keys rotated unless a policy renumbers. The first n_sink and the newest
    `residual` entries exactly (4 and 64, or as that storage says). Bases (D, rank) and (D, rank_v), fp32, which are
    listed as constants: they do not grow with the text.
Bytes: N entries of which E = min(N, n_sink + residual) are exact, per KV head: payload = (N - E) * (rank + rank_v) *
    itemsize, residual = E * 2 * D * itemsize, constants = D * (rank + rank_v) * 4. Up to n_sink + least entries are all
    held exactly, without a basis.
Acts: a prompt is held exactly until its last token is in, so the first generated token sees the exact prompt. Then all
    but the exact ends is projected, and after every step the entry that leaves the newest `residual`. Bases are made
    once a row has had more than n_sink + least entries, from all but the sinks, and again when twice as many have come:
    what is stored in the old basis is rebuilt and projected on the new one.
Differs: the basis comes from the text itself, not from calibration text, so nothing must be learnt beforehand, and
    each sequence has its own; it knows keys but not queries. Sinks and newest entries stay exact, where both papers
    project everything: the sinks are outliers that many queries attend to, and nearby tokens matter most. No centring,
    as in Eigen Attention. One rank for all heads and layers.
"""

from dataclasses import dataclass

import torch

from nanokv.method import Basis, at_least


@dataclass
class PCA(Basis):
    """The subspace in which a row's own entries lie. rank: coordinates per key; rank_v: per value, 0 for the same;
    least: entries from which a basis is made, 0 for four times the rank.
    """

    rank: int = 32
    rank_v: int = 0
    least: int = 0
    learns = True
    limits = {"rank": at_least(1), "rank_v": at_least(0), "least": at_least(0)}

    def __post_init__(self):
        super().__post_init__()
        self.ranks = {"k": self.rank, "v": self.rank_v or self.rank}
        self.least = self.least or 4 * max(self.ranks.values())

    def check(self, config):
        if max(self.ranks.values()) > config.head_dim:
            raise NotImplementedError(f"pca: rank {max(self.ranks.values())} is above head_dim {config.head_dim}")

    @classmethod
    def exact(cls, config):
        return {"rank": config.head_dim}

    def fit(self, x, which, at):
        x = x.double()
        vectors = torch.linalg.eigh(x.mT @ x).eigenvectors.flip(-1)  # (D, D), the largest first
        return vectors[:, : self.ranks[which]].float().contiguous()
