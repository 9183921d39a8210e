"""Dense float64 definitions of the operations in NumPy, written independently of them.

Masks come from loops over documents, blocks and tokens, softmax from exponentials without a shift.
"""

from collections.abc import Callable

import numpy as np

from pallas_kernels.cases import Case, make_segment_ids

Pullback = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, ...]]


def documents_of(case: Case) -> np.ndarray:
    segment_ids = make_segment_ids(case)
    if segment_ids is None:
        return np.ones((case.batch, case.num_tokens), int)
    return np.asarray(segment_ids)


def window_mask(case: Case) -> np.ndarray:
    documents = documents_of(case)
    mask = np.zeros((case.batch, 1, case.num_tokens, case.num_tokens), bool)
    for b, t in np.argwhere(documents > 0):
        for s in range(max(0, t - case.window_size + 1), t + 1):
            mask[b, 0, t, s] = documents[b, s] == documents[b, t]
    return mask


def compressed_mask(case: Case) -> np.ndarray:
    documents = documents_of(case)
    starts = range(0, case.num_tokens - case.compression_block_size + 1, case.compression_stride)
    mask = np.zeros((case.batch, 1, case.num_tokens, len(starts)), bool)
    for b, t in np.argwhere(documents > 0):
        for block, start in enumerate(starts):
            tokens = np.arange(start, start + case.compression_block_size)
            of_document = (documents[b, tokens] == documents[b, t]).all()
            mask[b, 0, t, block] = of_document and tokens[-1] <= t
    return mask


def selected_mask(case: Case, block_indices: np.ndarray) -> np.ndarray:
    documents = documents_of(case)
    mask = np.zeros((case.batch, case.num_kv_heads, case.num_tokens, case.num_tokens), bool)
    for b, t in np.argwhere(documents > 0):
        for k in range(case.num_kv_heads):
            listed = set(block_indices[b, t // case.queries_per_selection, k].tolist())
            for s in range(t + 1):
                same = documents[b, s] == documents[b, t]
                mask[b, k, t, s] = same and s // case.block_size in listed
    return mask


def attention(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, mask: np.ndarray
) -> tuple[np.ndarray, np.ndarray, Pullback]:
    """Softmax attention under a mask [B, 1 or K, T, S]; 0 and -inf where nothing is visible.

    Returns output [B, T, N, h], lse [B, T, N] and the function from their cotangents to the
    gradients of query, key and value.
    """
    heads, group = key.shape[2], query.shape[2] // key.shape[2]
    scale = query.shape[-1] ** -0.5
    mask = np.broadcast_to(mask, (len(mask), heads, *mask.shape[2:])).repeat(group, axis=1)
    repeated_key, repeated_value = key.repeat(group, axis=2), value.repeat(group, axis=2)
    exponentials = np.exp(scale * np.einsum("btnh,bsnh->bnts", query, repeated_key)) * mask
    total = exponentials.sum(-1)
    weights = exponentials / np.where(total > 0, total, 1)[..., None]
    output = np.einsum("bnts,bsnh->btnh", weights, repeated_value)
    with np.errstate(divide="ignore"):
        lse = np.log(total).swapaxes(1, 2)

    def sum_group(gradient: np.ndarray) -> np.ndarray:
        return gradient.reshape(*gradient.shape[:2], heads, group, gradient.shape[3]).sum(3)

    def pullback(doutput: np.ndarray, dlse: np.ndarray) -> tuple[np.ndarray, ...]:
        dweights = np.einsum("btnh,bsnh->bnts", doutput, repeated_value)
        dweights = dweights - (weights * dweights).sum(-1, keepdims=True)
        dscores = scale * weights * (dweights + dlse.swapaxes(1, 2)[..., None])
        return (
            np.einsum("bnts,bsnh->btnh", dscores, repeated_key),
            sum_group(np.einsum("bnts,btnh->bsnh", dscores, query)),
            sum_group(np.einsum("bnts,btnh->bsnh", weights, doutput)),
        )

    return output, lse, pullback


def importance_of(case: Case, probabilities: np.ndarray) -> np.ndarray:
    """Importance of selection blocks [blocks] from attention [C], by counting shared tokens."""
    num_blocks = -(-case.num_tokens // case.block_size)
    importance = np.zeros(num_blocks)
    for j in range(num_blocks):
        block = set(range(j * case.block_size, (j + 1) * case.block_size))
        for c, probability in enumerate(probabilities):
            start = c * case.compression_stride
            shared = block & set(range(start, start + case.compression_block_size))
            importance[j] += probability * len(shared) / case.compression_stride
    return importance


def selection(case: Case, query: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Block lists [B, M, K, L] from query [B, T, N, H] and compressed key [B, C, K, H]."""
    documents, mask = documents_of(case), compressed_mask(case)
    num_groups = -(-case.num_tokens // case.queries_per_selection)
    group = case.num_heads // case.num_kv_heads
    shape = (case.batch, num_groups, case.num_kv_heads, case.num_selected_blocks)
    lists = np.full(shape, -1)
    for b, m, k in np.ndindex(shape[:3]):
        t = m * case.queries_per_selection
        if documents[b, t] == 0:
            continue
        heads = query[b, t, k * group : (k + 1) * group]
        exponentials = np.exp(heads @ key[b, :, k].T / np.sqrt(query.shape[-1])) * mask[b, 0, t]
        total = exponentials.sum(-1, keepdims=True)
        probabilities = exponentials / np.where(total > 0, total, 1)
        importance = importance_of(case, probabilities.sum(0))
        first = int(np.argmax(documents[b] == documents[b, t])) // case.block_size
        own = t // case.block_size
        forced = [block for block in (own, own - 1, first) if block >= first]
        rest = sorted(range(first, own + 1), key=lambda block: (-importance[block], block))
        chosen = list(dict.fromkeys(forced + rest))[: case.num_selected_blocks]
        lists[b, m, k, : len(chosen)] = sorted(chosen)
    return lists
