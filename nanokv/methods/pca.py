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

import math

import torch

from nanokv import kernels
from nanokv.cache import Rows, Storage


class PCA(Storage):
    """Project on principal components. rank: coordinates per key; rank_v: per value, 0 for the same; n_sink: first
    entries, which are kept as they are; center: subtract the mean first."""

    def __init__(self, rank: int = 32, rank_v: int = 0, n_sink: int = 4, center: bool = True):
        for name, value, least in (("rank", rank, 1), ("rank_v", rank_v, 0), ("n_sink", n_sink, 0)):
            if value < least:
                raise ValueError(f"pca: {name} must be at least {least}, got {value}")
        self.ranks, self.n_sink, self.center = (rank, rank_v or rank), n_sink, center

    def check(self, config):
        if max(self.ranks) > config.head_dim:
            raise NotImplementedError(f"pca: rank {max(self.ranks)} is above the model's head_dim {config.head_dim}")

    @classmethod
    def exact(cls, config):
        return {"rank": config.head_dim}

    def reset(self):
        R, D, weight = self.cache.n_rows, self.cache.config.head_dim, self.cache.attn.qkv.weight
        self.first, self.old, self.new = Rows(R, least=1), Rows(R), Rows(R)  # k and v; coordinates; k and v
        for rows, width in ((self.first, 2 * D), (self.old, sum(self.ranks)), (self.new, 2 * D)):
            rows.add("x", (width,), weight.dtype, weight.device)
        self.fitted = [False] * R
        self.bases = [torch.zeros(R, D, r, device=weight.device) for r in self.ranks]
        self.means = [torch.zeros(R, 1, D, device=weight.device) for _ in self.ranks]

    def store(self, k, v, x):
        kv = torch.cat([k, v], -1).flatten(0, 1)  # (R, T, 2D)
        straight = [fit and self.cache.phase == "decode" for fit in self.fitted]  # prompts wait for their end
        for now, into in ((True, self.old), (False, self.new)):
            if rows := [r for r, at_once in enumerate(straight) if at_once == now]:
                into.append(rows, x=self._down(kv[rows], rows) if now else kv[rows])

    def pack(self):
        if self.cache.phase == "prompt" or not any(self.new.n):
            return
        least = self.n_sink + max(self.ranks)  # fewer entries span too little
        fresh = [n > least and not fit for n, fit in zip(self.new.n, self.fitted, strict=True)]
        for rows, kv in self.new.pop("x", [self.n_sink * now for now in fresh]):
            self.first.append(rows, x=kv)
        for r in [r for r, now in enumerate(fresh) if now]:
            self._fit(r)
        for rows, kv in self.new.pop("x", [n * fit for n, fit in zip(self.new.n, self.fitted, strict=True)]):
            self.old.append(rows, x=self._down(kv, rows))
        self.new.trim()

    def _fit(self, r):
        """Make the bases of one row from its exact entries."""
        for i, x in enumerate(self.new.row("x", r).double().chunk(2, -1)):
            mean = x.mean(0, keepdim=True) * self.center  # (1, D)
            cov = (x - mean).mT @ (x - mean)  # (D, D)
            cov += torch.linspace(1e-6, 0, len(cov)).to(cov).mul(cov.diagonal().mean()).diag()  # order where all is 0
            vectors = torch.linalg.eigh(cov).eigenvectors.flip(-1)  # the largest first
            self.bases[i][r], self.means[i][r] = vectors[:, : self.ranks[i]], mean
        self.fitted[r] = True

    def _down(self, kv, rows):
        """Project k and v side by side (len(rows), T, 2D) on the bases of these rows: (len(rows), T, rank + rank_v)."""
        parts = zip(kv.float().chunk(2, -1), self.bases, self.means, strict=True)
        return torch.cat([(x - mean[rows]) @ U[rows] for x, U, mean in parts], -1).to(kv.dtype)

    def read_row(self, r):
        parts = zip(self.old.row("x", r).float().split(self.ranks, -1), self.bases, self.means, strict=True)
        kv = torch.cat([x @ U[r].mT + mean[r] for x, U, mean in parts], -1)  # (n, 2D)
        new = self.new.row("x", r)
        return torch.cat([self.first.row("x", r), kv.to(new.dtype), new]).chunk(2, -1)

    def attend(self, q, pos):
        """Attend in the subspace: project queries instead of rebuilding keys, and rebuild the mixed value."""
        c, (B, H, T, D) = self.cache, q.shape
        if c.renumbers or any(self.new.n) or not self.first.equal or not self.old.equal:
            return super().attend(q, pos)
        q, (Uk, Uv), (mk, mv) = q.float().reshape(c.n_rows, -1, D) / math.sqrt(D), self.bases, self.means  # (R, G*T, D)
        (k0, v0), z = self.first["x"].float().chunk(2, -1), self.old["x"].float()
        zk, zv = z.split(self.ranks, -1)
        s = torch.cat([q @ k0.mT, (q @ Uk) @ zk.mT + q @ mk.mT], -1)  # (R, G*T, N)
        p0, p = c.masked(s, pos).softmax(-1).split([k0.shape[1], zk.shape[1]], -1)
        o = p0 @ v0 + (p @ zv) @ Uv.mT + p.sum(-1, keepdim=True) * mv
        return o.view(B, H, T, D).to(self.old.data["x"].dtype)

    def attend_triton(self, q, pos, probs):
        c, dev, first, z = self.cache, q.device, self.first, self.old.data["x"]
        if c.renumbers or probs or kernels.masking(c, q, pos) or any(self.new.n) or not any(self.old.n):
            return super().attend_triton(q, pos, probs)
        x, scale, (Uk, Uv), (mk, mv) = kernels.rows(q.float(), c.n_rows), q.shape[-1] ** -0.5, self.bases, self.means
        sinks = (*(t.contiguous() for t in first.data["x"].chunk(2, -1)), *kernels.where(first, dev))
        o, lse = kernels.launch("decode", x, *sinks, scale=scale, most=first.size, lse=True)  # (R, M, D), (R, M)
        low = (x @ Uk, *z.split(self.ranks, -1), *kernels.where(self.old, dev))
        more = {"scale": scale, "shift": (x @ mk.mT)[..., 0] * scale, "most": self.old.size}
        o_z, lse_z = kernels.launch("decode_latent", *low, **more)
        o = torch.lerp(o_z @ Uv.mT + mv, o, torch.sigmoid(lse - lse_z)[..., None])  # by their shares of the softmax
        return kernels.heads(o.to(q.dtype), q), None

    def drop(self, live):
        at = [0] * len(live)
        for rows in (self.first, self.old, self.new):
            mask = live.new_zeros(len(live), rows.size)
            for r, n in enumerate(rows.n):
                mask[r, :n], at[r] = live[r, at[r] : at[r] + n], at[r] + n
            rows.keep(mask)
        return live

    def bytes(self):
        return {"payload": self.old.used(), "residual": self.first.used() + self.new.used()}

    def constants(self):
        return [*self.bases, *self.means]
