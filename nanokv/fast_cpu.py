"""The same model and the same attention, quicker on a CPU. Nothing here says anything new: tests hold it to the lesson.

`speed_up(model)` swaps the classes of a model's modules, in place, as a quantiser would; weights keep their names and
values. `attend` takes over from `Storage.attend` where the backend is "auto".
"""

import math
import time
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanokv.method import Dense, Storage
from nanokv.methods.kivi import KIVI
from nanokv.model import MLP, Attention, RMSNorm, RoPE
from nanokv.packed import Packed

SHORT = 2048  # inputs: a product with a row this short is over before the processor has begun to read ahead
AVX = "AVX" in torch.backends.cpu.get_cpu_capability()  # where this was measured


def speed_up(model: nn.Module) -> nn.Module:
    """Swap the classes of a model's modules, in place; return the model."""
    for module in model.modules():
        if type(module) is RMSNorm:
            module.__class__ = FastNorm
            module.tiny = torch.tensor(module.eps, dtype=torch.float32)
        elif type(module) is Attention:
            module.__class__ = FastAttention
            fuse(module, "qkv", module.q_proj, module.k_proj, module.v_proj)
        elif type(module) is MLP:
            module.__class__ = FastMLP
            fuse(module, "gate_up", module.gate_proj, module.up_proj)
    for name in ("o_proj", "down_proj", "lm_head"):
        for module in [m for n, m in model.named_modules() if n.rpartition(".")[2] == name]:
            module.__class__ = FastLinear
            module.columns = arrange(module.weight)
    model.rope.__class__ = FastRoPE
    return model


def fuse(owner: nn.Module, name: str, *parts: nn.Linear) -> None:
    """Give `owner` one matrix for several that read the same vector; theirs become views of its rows."""
    whole = FastLinear(1, 1, bias=parts[0].bias is not None, device="meta")
    for kind in ("weight", "bias") if parts[0].bias is not None else ("weight",):
        tensors = [getattr(part, kind).data for part in parts]
        setattr(whole, kind, nn.Parameter(torch.cat(tensors), requires_grad=False))
    whole.columns = arrange(whole.weight)
    for kind in ("weight", "bias") if parts[0].bias is not None else ("weight",):
        rows = getattr(whole, kind).data.split([len(getattr(part, kind)) for part in parts])
        for part, tensor in zip(parts, rows, strict=True):
            getattr(part, kind).data = tensor
    vars(owner)[name] = whole.forward  # not a module of the model, whose parameters its parts are
    vars(owner)[f"{name}_weights"] = whole.weight, whole.bias


def arrange(weight: nn.Parameter) -> bool:
    """Lay a matrix (n_out, n_in) out by columns if a CPU reads it faster so; shape and values stay."""
    columns = AVX and weight.shape[1] < SHORT and weight.dtype in (torch.bfloat16, torch.float32, torch.float64)
    if columns:
        weight.data = weight.data.t().contiguous().t()
    return columns


class FastLinear(nn.Linear):
    """x W^T + b. A product with one row is bound by reading W."""

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight, self.bias, self.columns)


def product(x: Tensor, weight: Tensor, bias: Tensor | None, columns: bool) -> Tensor:
    """Return x (..., n_in) W^T + b for W (n_out, n_in), which may lie by columns."""
    rows = x.numel() // x.shape[-1]
    by_hand = rows == 1 if x.element_size() == 2 else columns and 1 < rows < 4
    if not by_hand or torch.is_grad_enabled() and weight.requires_grad:
        return F.linear(x, weight, bias)
    if rows > 1:  # still quicker row by row
        y = torch.bmm(x.reshape(rows, 1, -1), weight.t().expand(rows, -1, -1))
    elif columns and x.dtype is torch.bfloat16:
        y = _sum_columns(weight, x.view(-1))
    else:
        y = torch.mv(weight, x.view(-1))
    y = y.view(*x.shape[:-1], -1)
    return y if bias is None else y + bias


def _sum_columns(weight: Tensor, x: Tensor) -> Tensor:
    """Return weight (n_out, n_in), which lies by columns, times x (n_in,) in bf16: (n_out,).

    The quickest sum of columns in PyTorch is that of embeddings: weighted, in fp32, a bag of them for each thread. What
    the threads found is rounded to bf16 before it is added up, as PyTorch does by default in long sums on GPUs.
    """
    index, start = _bags(weight.shape[1], torch.get_num_threads())
    return torch._embedding_bag_forward_only(weight.t(), index, start, False, 0, False, x)[0].sum(0)


@lru_cache(maxsize=16)
def _bags(n: int, parts: int) -> tuple[Tensor, Tensor]:
    return torch.arange(n, device="cpu"), torch.arange(parts, device="cpu") * n // parts


class FastNorm(RMSNorm):
    """RMSNorm by the vector's length: five operations instead of seven."""

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.element_size() > 2 else x.float()
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        y = wide * torch.addcmul(self.tiny, length, length, value=1 / x.shape[-1]).rsqrt_()
        return (y if wide is x else y.to(x.dtype)) * self.weight


class FastRoPE(RoPE):
    """RoPE that looks the angles of the same positions up once for all layers: of the queries', and of all entries'."""

    last = ((None, None, None),) * 2

    def __call__(self, x: Tensor, pos: Tensor) -> Tensor:
        both = next((both for key, dtype, both in self.last if key is pos and dtype is x.dtype), None)
        if both is None:
            at = pos[:, None] if pos.dim() == 2 else pos  # (B, 1 or Hkv, T)
            cos, sin = self.cos[at].to(x.dtype), self.sin[at].to(x.dtype)  # (B, 1 or Hkv, T, D)
            sin[..., : sin.shape[-1] // 2].neg_()
            both = cos, sin
            self.last = (pos, x.dtype, both), self.last[0]
        cos, sin = both
        if 1 < cos.shape[1] < x.shape[1]:
            cos, sin = (t.repeat_interleave(x.shape[1] // t.shape[1], 1) for t in both)
        return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, -1), sin)


class FastAttention(Attention):
    """Attention with one product for queries, keys and values."""

    def forward(self, x: Tensor, pos: Tensor, cache) -> Tensor:
        B, T, _ = x.shape
        n = self.q_proj.out_features // self.head_dim, *[self.k_proj.out_features // self.head_dim] * 2
        heads = self.qkv(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        q, k, v = heads.split_with_sizes(n, 1)  # (B, H or Hkv, T, D)
        q, k = self.q_norm(q), self.k_norm(k)
        pos = cache.append(k, v, x, pos)
        o = cache.attend(self.rope(q, pos), pos)
        cache.compress(q, pos)
        return self.o_proj(o.transpose(1, 2).reshape(B, T, -1))


class FastMLP(MLP):
    """SwiGLU with one product for gate and up."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down_proj(F.silu(gate).mul_(up))


# Attention, in place of the method that a storage's class has; None: the lesson's way is as quick


def attend(storage: Storage, q: Tensor, pos: Tensor, cache) -> Tensor | None:
    """Do what storage.attend(q, pos, cache) does, or return None."""
    way, T = type(storage).attend, q.shape[2]
    if way is Packed.attend and not storage.basis:
        if type(storage).encode is KIVI.encode and cache.phase in ("decode", "draft") and not cache.raw:
            return on_codes(storage, q, pos, cache)
        way = Storage.attend
    if way is not Storage.attend:
        return None
    if cache.plain:
        return past_and_present(q, *cache.read()) if 1 < T < cache.N else None
    if T == 1 and cache.lengths_say_all and not cache.raw and type(storage).read is Dense.read:
        return ragged(q, storage.kv)
    return None


def past_and_present(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend causally from the newest entries' queries: to all older entries, and to each other, without any mask.

    q is (B, H, T, D), k and v are (B, Hkv, N, D). A later part of a long prompt is read about 1.3 times as fast.
    """
    (B, H, T, D), (_, Hkv, N, _) = q.shape, k.shape
    past, lse_past = _with_lse(q.reshape(B, Hkv, -1, D), k[:, :, : N - T], v[:, :, : N - T])
    k, v = k[:, :, N - T :], v[:, :, N - T :]
    heads = [_with_lse(q[:, g :: H // Hkv], k, v, is_causal=True) for g in range(H // Hkv)]
    present, lse = (torch.stack(part, 2).view(B, H, T, -1) for part in zip(*heads, strict=True))
    share = torch.sigmoid(lse_past.reshape(B, H, T, 1) - lse)  # of the past in the softmax's denominator, at least fp32
    return torch.lerp(present.to(share.dtype), past.reshape(B, H, T, -1).to(share.dtype), share).to(q.dtype)


# also returns the log of the denominator; takes values as wide as keys only
_with_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def ragged(q: Tensor, rows) -> Tensor:
    """Attend from q (B, H, 1, D) to rows of unequal length, one by one, so that none is padded to the longest."""
    groups = q.reshape(len(rows.n), 1, 1, -1, q.shape[-1])  # (R, 1, 1, G, D)
    out = []
    for r, group in enumerate(groups):
        k, v = rows.row("k", r)[None, None], rows.row("v", r)[None, None]
        out.append(F.scaled_dot_product_attention(group, k, v))
    return torch.cat(out).view(*q.shape)


def on_codes(storage: KIVI, q: Tensor, pos: Tensor, cache) -> Tensor | None:
    """Attend to quantised entries without rebuilding them: scales are multiplied into queries and probabilities."""
    old = storage.old
    parts = [rows for kind in (storage.first, old, storage.new) for rows in kind.values()]
    planes, groups = 8 // storage.width["v"], cache.config.head_dim // storage.group
    whole = planes % groups == 0 or groups % planes == 0  # no plane holds parts of two groups
    if not whole or not all(rows.equal for rows in parts) or any(8 % bits for bits in storage.width.values()):
        return None
    (B, H, T, D), R = q.shape, cache.n_rows
    x = q.float().reshape(R, -1, D) / math.sqrt(D)  # (R, G*T, D)
    scores = [x @ storage.first["k"]["x"].float().mT] if any(storage.first["k"].n) else []
    scores += [dot(x, old["k"], storage.width["k"])] if any(old["k"].n) else []
    s = torch.cat([*scores, x @ storage.new["k"]["x"].float().mT], -1)  # (R, G*T, N)
    if not cache.plain or T > 1:
        mask = cache.additive_mask(pos)
        s = (s.view(B, -1, H * B // R, T, s.shape[-1]) + mask[:, :, None]).view_as(s)
    p = s.softmax(-1)
    first, packed = max(storage.first["v"].n), max(old["v"].n)
    o = p[..., first + packed :] @ storage.new["v"]["x"].float()
    o = o + p[..., :first] @ storage.first["v"]["x"].float() if first else o
    o = o + mix(p[..., first : first + packed], old["v"], storage.width["v"]) if packed else o
    return o.view(B, H, T, D).to(q.dtype)


def dot(x: Tensor, old, bits: int) -> Tensor:
    """Return x (R, M, D) times quantised keys, g tokens to a slot: (R, M, S * g)."""
    scale, low = old["scale"].float(), old["low"].float()  # (R, S, D)
    code = old["code"].unflatten(-1, (-1, x.shape[-1]))  # (R, S, g * bits / 8, D)
    masks, shift = _masks(bits)
    codes = (code.unsqueeze(2) & masks[:, None, None]).float()  # (R, S, planes, tokens, D)
    s = (x[:, None] * scale[:, :, None]) @ codes.flatten(2, 3).mT  # (R, S, M, g)
    s = torch.addcmul((low @ x.mT)[..., None], s, shift.repeat_interleave(code.shape[2]))
    return s.transpose(1, 2).flatten(2)


def mix(p: Tensor, old, bits: int) -> Tensor:
    """Return p (R, M, N) times quantised values, a token to a slot: (R, M, D)."""
    low = old["low"][:, :, 0].float()  # (R, N, C), of C groups of channels
    scale = old["scale"][:, :, 0].mT.to(torch.float32, memory_format=torch.contiguous_format)  # (R, C, N)
    weighted = p[:, None] * scale[:, :, None]  # (R, C, M, N)
    masks, shift = _masks(bits)
    C, parts = scale.shape[1], []
    for j, (mask, factor) in enumerate(zip(masks, shift, strict=True)):
        codes = (old["code"] & mask).float()  # (R, N, D * bits / 8): of one plane, which may span several groups
        first, last = j * C // len(masks), -(-(j + 1) * C // len(masks))
        spans = zip(weighted[:, first:last].unbind(1), codes.chunk(last - first, -1), strict=True)
        parts += [w @ c * factor for w, c in spans]
    return torch.cat(parts, -1) + (p @ low).repeat_interleave(old["code"].shape[-1] * len(masks) // C, -1)


@lru_cache(maxsize=8)
def _masks(bits: int) -> tuple[Tensor, Tensor]:
    """Return which bits of a byte each of its codes takes, and by what it is too large there, inverted: (8 / bits,)."""
    at = torch.arange(0, 8, bits)
    return ((2**bits - 1) << at).to(torch.uint8), torch.exp2(-at.float())


def paid(q: Tensor, k: Tensor, reduce: str, block: int = 128) -> Tensor:
    """Return what the newest entries' queries q (B, H, T, D) pay each entry, see attention.paid: (B, Hkv, N).

    Of each block of queries no key is looked at that comes after all of them, and one head's probabilities, which fit
    a core's second cache, are added up before the next one's are computed.
    """
    (B, H, T, D), (_, Hkv, N, _) = q.shape, k.shape
    G = H // Hkv
    q, k = (q.float() / math.sqrt(D)).reshape(B * Hkv, G, T, D), k.float().flatten(0, 1)
    later = torch.full((min(T, block),) * 2, -torch.inf).triu_(1)  # of a block's own entries
    out = q.new_zeros(B * Hkv, N)
    for r in range(B * Hkv):
        for i in range(0, T, block):
            j = min(i + block, T)
            n = N - T + j
            shares = []
            for g in range(G):
                s = q[r, g, i:j] @ k[r, :n].mT  # (block, n)
                s[:, n - (j - i) :] += later[: j - i, : j - i]
                p = torch.softmax(s, -1, out=s)
                shares.append(p if reduce == "max" else p.new_ones(1, j - i) @ p)
            out[r, :n] += torch.stack(shares).amax(0).sum(0) if reduce == "max" else sum(shares)[0]
    return (out / G if reduce == "mean" else out).view(B, Hkv, N)


# One step of `full`, compiled as a whole


class compiled:
    """The model, whose steps over a `full` cache of up to `most` tokens run as one compiled program. Call it likewise.

    Room for all tokens is taken at once, since shapes must not change. The first step compiles, which takes about half
    a minute. NotImplementedError says what is not covered.
    """

    def __init__(self, model: nn.Module, cache, most: int):
        c = model.config
        for ok, why in (
            (not cache.policies and not cache.bases and type(cache.storage).attend is Dense.attend, "the method full"),
            (isinstance(cache.storage, Dense), "the method full"),
            (model.embed_tokens.weight.is_cpu, "a CPU"),
            (not any(c.windows), "models without sliding windows"),
            (most <= c.context, f"texts within the model's context of {c.context} tokens"),
        ):
            if not ok:
                raise NotImplementedError(f"--compile is made for {why} only")
        self.model, self.config, self.most = model, c, most
        self.rope, self.layers, self.embed_tokens = model.rope, model.layers, model.embed_tokens
        self.told = None  # told, once, how many seconds it took to compile
        self.step = torch.compile(self._step, dynamic=False, fullgraph=True, options={"cpp_wrapper": True})

    def __call__(self, ids: Tensor, cache, phase: str | None = None, last: bool = False) -> Tensor:
        """Do what model(ids, cache, phase, last) does."""
        steps = ids.shape[1] == 1 and phase in (None, "decode") and any(cache.next_position) and int(ids.min()) >= 0
        if not steps:
            return self.model(ids, cache, phase, last)
        if max(cache.next_position) >= self.most or len(set(cache.next_position)) > 1:
            raise NotImplementedError(f"compiled steps are for {self.most} tokens, sequences of one length")
        pos = cache.begin(self.model, ids, phase)
        for layer in cache.layers:
            rows = layer.storage.kv
            if rows.cap[0] + rows.start[0] < self.most:
                rows.reserve(self.most)
        kv = [
            [layer.storage.kv.data[n].unflatten(0, (cache.B, layer.config.n_kv_heads, -1)) for layer in cache.layers]
            for n in "kv"
        ]
        cos, sin = self.rope.cos[pos[0]], self.rope.sin[pos[0]]  # (1, D)
        c = self.config
        widths = c.hidden, c.ffn, c.n_heads * c.head_dim
        bags = {n: _bags(n, torch.get_num_threads()) for n in widths}
        start = time.perf_counter()
        logits = self.step(ids, pos[0], cos, sin, *kv, bags)
        if self.told:
            self.told(time.perf_counter() - start)
            self.told = None
        for layer in cache.layers:
            layer.storage.kv.grown(1)
            layer.grown(pos)
        cache.end()
        return logits

    def _step(self, ids, pos, cos, sin, keys, values, bags):
        model, c = self.model, self.config
        x = model.embed_tokens(ids)  # (B, 1, E)
        see = torch.arange(keys[0].shape[2]) <= pos  # (room,)
        mask = torch.zeros(see.shape, dtype=x.dtype).masked_fill(~see, -torch.inf)
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)

        def line(x, weight, bias=None):
            if weight.dtype is not torch.bfloat16 or weight.stride(0) != 1 or x.shape[0] > 1:
                return F.linear(x, weight, bias)
            y = torch._embedding_bag_forward_only(weight.t(), *bags[weight.shape[1]], False, 0, False, x.flatten())[0]
            y = y.sum(0).view(1, 1, -1)
            return y if bias is None else y + bias

        def rotate(t):
            a, b = t.chunk(2, -1)
            return t * cos + torch.cat([-b, a], -1) * sin

        for block, k_all, v_all in zip(model.layers, keys, values, strict=True):
            a = block.self_attn
            h = RMSNorm.forward(block.input_layernorm, x)
            heads = line(h, *a.qkv_weights).unflatten(-1, (-1, c.head_dim)).transpose(1, 2)  # (B, H + 2 * Hkv, 1, D)
            q, k, v = heads.split([c.n_heads, c.n_kv_heads, c.n_kv_heads], 1)
            if c.qk_norm:
                q, k = RMSNorm.forward(a.q_norm, q), RMSNorm.forward(a.k_norm, k)
            k_all.index_copy_(2, pos, rotate(k))
            v_all.index_copy_(2, pos, v)
            q = rotate(q).unflatten(1, (c.n_kv_heads, -1)).squeeze(3)  # (B, Hkv, G, D)
            o = F.scaled_dot_product_attention(q, k_all, v_all, attn_mask=mask.view(1, 1, 1, -1))
            x = x + line(o.flatten(1)[:, None], a.o_proj.weight, a.o_proj.bias)
            h = RMSNorm.forward(block.post_attention_layernorm, x)
            gate, up = line(h, *block.mlp.gate_up_weights).chunk(2, -1)
            x = x + line(F.silu(gate) * up, block.mlp.down_proj.weight)
        return line(RMSNorm.forward(model.norm, x), model.lm_head.weight)
