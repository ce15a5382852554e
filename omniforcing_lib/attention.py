"""Attention of LTX-2: project, norm over all heads, rotate, attend over what is visible, gate, project.

Source: specification 1.6.

Shapes: B batch, H heads, T queries, L keys, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from omniforcing_lib import backends
from omniforcing_lib.cache import OpenBlock, Prompt, Ring
from omniforcing_lib.fused import PLAIN, Elementwise
from omniforcing_lib.masks import AttentionMask, block_mask, take
from omniforcing_lib.rope import Rotation, rotate


def attend(q: Tensor, k: Tensor, v: Tensor, visibility: AttentionMask | None = None) -> Tensor:
    """Attend over all keys, or over the visible ones, by the backend chosen for these tensors (see `backends`).

    Shapes: q [B, H, T, D], k and v [B, H, L, D] to [B, H, T, D].
    """
    choice = backends.chosen(q)
    plain = backends.flash if choice.plain == "flash" else scaled_dot_product_attention
    if visibility is None:
        return plain(q, k, v)
    if q.shape[2] != visibility.rows or k.shape[2] != visibility.columns:
        raise ValueError(
            f"the mask is {visibility.rows} x {visibility.columns} (queries x keys), "
            f"found {q.shape[2]} queries and {k.shape[2]} keys"
        )
    rendering = visibility.rendering or choice.masked
    if rendering == "flex":
        return backends.flex(q, k, v, block_mask(visibility, q.device))
    if rendering == "dense":
        return scaled_dot_product_attention(q, k, v, attn_mask=visibility.dense.to(q.device))
    return _sliced(q, k, v, visibility, plain)


def _sliced(q: Tensor, k: Tensor, v: Tensor, visibility: AttentionMask, plain: Callable[..., Tensor]) -> Tensor:
    """Call once for each block, over its visible keys: without a dense mask the flash kernels stay usable."""
    outputs = []
    for rows, columns in visibility.by_block:
        keys, values = (take(x, columns) for x in (k, v))
        outputs.append(plain(q[:, :, rows.start : rows.stop], keys, values))
    return torch.cat(outputs, dim=2)


class Attention(nn.Module):
    """Multi-head attention with LTX-2's parameter names.

    Args:
        query_dim: width of the queries' stream.
        context_dim: width of the keys' stream.
        heads: number of heads H.
        dim_head: head dim D.
        eps: epsilon of the RMS norms.
        rope_type: `split` or `interleaved`.
        gated: whether each head has an output gate, as in LTX-2.3.
    """

    def __init__(
        self,
        query_dim: int,
        context_dim: int,
        heads: int,
        dim_head: int,
        *,
        eps: float,
        rope_type: str,
        gated: bool = False,
    ) -> None:
        super().__init__()
        inner = heads * dim_head
        self.heads, self.rope_type = heads, rope_type
        self.to_q = nn.Linear(query_dim, inner)
        self.to_k = nn.Linear(context_dim, inner)
        self.to_v = nn.Linear(context_dim, inner)
        self.q_norm = nn.RMSNorm(inner, eps=eps)
        self.k_norm = nn.RMSNorm(inner, eps=eps)
        self.to_gate_logits = nn.Linear(query_dim, heads) if gated else None
        self.to_out = nn.ModuleList([nn.Linear(inner, query_dim)])

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        rotations: tuple[Rotation, Rotation] | None = None,
        visibility: AttentionMask | None = None,
        cached: Ring | Prompt | None = None,
        blocks: tuple[OpenBlock, ...] = (),
        elementwise: Elementwise = PLAIN,
    ) -> Tensor:
        """Attend from `x` to `context` (to itself by default), and to what is `cached` for the open `blocks`.

        `elementwise` does what stands around the products, see `fused.functions`.

        Shapes: x [B, T, query_dim], context [B, L, context_dim], rotations of queries and keys, to [B, T, query_dim].
        """
        source, (by_query, by_key) = x if context is None else context, rotations or (None, None)
        # 1. On a GPU the keys of one open block are stored by the kernel that norms and rotates them.
        ring = cached if elementwise is not PLAIN and isinstance(cached, Ring) else None
        if ring is not None and self._stores_one(blocks):
            seen = self._stored(x, source, by_query, by_key, ring, blocks[0], elementwise)
            return self._out(x, attend(*seen), elementwise)
        # 2. Queries: normed over all heads together, then rotated.
        q = self._normed_heads(self.to_q(x), self.q_norm, by_query, elementwise)

        # 3. Keys and values: of this call, or with those that the cache holds; projected only if they are not held.
        def project() -> tuple[Tensor, Tensor]:
            return self.keys_values(source, by_key, elementwise)

        # 4. Without a cache all queries attend at once, with one those of each open block in turn.
        seen = cached.extend(project, blocks) if cached else [(slice(None), *project())]
        parts = [attend(q[:, :, tokens], k, v, visibility) for tokens, k, v in seen]
        return self._out(x, parts[0] if len(parts) == 1 else torch.cat(parts, dim=2), elementwise)

    def _stores_one(self, blocks: tuple[OpenBlock, ...]) -> bool:
        """Tell whether just one block is open and stored, and the norms are those that the fused function knows."""
        return len(blocks) == 1 and blocks[0].writes and type(self.q_norm) is type(self.k_norm) is nn.RMSNorm

    def keys_values(
        self, context: Tensor, rotation: Rotation | None = None, elementwise: Elementwise = PLAIN
    ) -> tuple[Tensor, Tensor]:
        """Project keys (normed and rotated) and values.

        Shapes: [B, L, context_dim] to two [B, H, L, D].
        """
        k = self._normed_heads(self.to_k(context), self.k_norm, rotation, elementwise)
        return k, self._heads(self.to_v(context))

    def _stored(
        self,
        x: Tensor,
        source: Tensor,
        by_query: Rotation | None,
        by_key: Rotation | None,
        ring: Ring,
        block: OpenBlock,
        elementwise: Elementwise,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Store keys and values of the open block; give its queries, and all that they see."""
        q, k, v = self.to_q(x), self.to_k(source), self.to_v(source)
        weights, eps, kind = (self.q_norm.weight, self.k_norm.weight), self.q_norm.eps, self.rope_type
        places = ring.open(block)
        store = (ring.keys, ring.values), places.at
        if source is x:
            q = elementwise.stored(k, v, q, weights, eps, by_key, kind, *store)
        else:
            elementwise.stored(k, v, None, weights, eps, by_key, kind, *store)
            q = elementwise.normed_heads(q, weights[0], self.heads, eps, by_query, kind)
        return q, *ring.read(places)

    def _normed_heads(self, x: Tensor, norm: nn.Module, rotation: Rotation | None, elementwise: Elementwise) -> Tensor:
        if type(norm) is nn.RMSNorm:
            return elementwise.normed_heads(x, norm.weight, self.heads, norm.eps, rotation, self.rope_type)
        # a study has put another norm in its place
        split = self._heads(norm(x))
        return split if rotation is None else rotate(split, rotation, self.rope_type)

    def pass_values(self, x: Tensor, elementwise: Elementwise = PLAIN) -> Tensor:
        """Replace attention by the value projection: the perturbation of STG (specification 1.11)."""
        return self._out(x, self._heads(self.to_v(x)), elementwise)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _out(self, x: Tensor, attended: Tensor, elementwise: Elementwise = PLAIN) -> Tensor:
        (out,) = self.to_out
        if self.to_gate_logits is not None:
            return out(elementwise.gated_heads(attended, self.to_gate_logits(x)))
        return out(attended.transpose(1, 2).flatten(2))
