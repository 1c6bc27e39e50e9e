"""Keep the coordinates of keys and values in the subspace in which the prompt's lie.

Paper: Eigen Attention: Attention in Low-Rank Space for KV Cache Compression, arXiv 2408.05646; rotated keys, a basis
    per KV head and centring as in the PCA baseline of MatryoshkaKV, arXiv 2410.14731
Axis: channel
Idea: The keys of one head lie close to a subspace of few dimensions, and so do its values. Take the eigenvectors of
    their covariance as a basis, U_k and U_v, and store coordinates: fewer numbers, and attention can work on them as
    they are, because q.k = (U_k^T q).(U_k^T k) for a key in the subspace.
Stores: per KV head (N, rank + rank_v) coordinates in the model's dtype, keys rotated unless a policy renumbers; the
    first n_sink entries exactly; bases (D, rank) and (D, rank_v) and the two means (D,), fp32, which are listed as
    constants: they are made once and do not grow with the text.
Bytes: payload = (N - n_sink) * (rank + rank_v) * itemsize and residual = n_sink * 2 * D * itemsize per KV head. Up to
    n_sink + max(rank, rank_v) entries are all held exactly. Constants: D * (rank + rank_v + 2) * 4 bytes per KV head.
Acts: a prompt is held exactly until its last token is in, so the first generated token sees the exact prompt. Then it
    is projected, and so is every later token, before it is attended to. The basis of the first prompt is kept.
Differs: the basis comes from the prompt itself, not from calibration text, so nothing must be learnt beforehand, and
    each sequence has its own; it knows keys but not queries. The first n_sink entries are outliers that many queries
    attend to: they have no say in the basis and are not projected. Directions in which nothing lies are taken in the
    order of channels. One rank for all heads and layers.
"""

from dataclasses import dataclass

import torch

from nanokv.method import Basis, at_least


@dataclass
class PCA(Basis):
    """The subspace in which a row's own entries lie. rank: coordinates per key; rank_v: per value, 0 for the same;
    least: entries a row must have before its basis is made, 0 for 4 * rank.
    """

    rank: int = 32
    rank_v: int = 0
    least: int = 0
    learns = True
    limits = {"rank": at_least(1), "rank_v": at_least(0), "least": at_least(0)}

    def __post_init__(self):
        super().__post_init__()
        self.ranks, self.least = {"k": self.rank, "v": self.rank_v or self.rank}, self.least or 4 * self.rank

    def check(self, config):
        if max(self.ranks.values()) > config.head_dim:
            raise NotImplementedError(f"pca: rank {max(self.ranks.values())} is above head_dim {config.head_dim}")

    def fit(self, x, which, at):
        x = x.double()
        vectors = torch.linalg.eigh(x.mT @ x).eigenvectors.flip(-1)  # the largest first
        return vectors[:, : self.ranks[which]].float().contiguous()
