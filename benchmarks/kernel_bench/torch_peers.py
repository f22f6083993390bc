"""What torch has, as contenders: SDPA on gathered keys and values, and FlashInfer on the pages.

Everything runs from CUDA graphs, as ours does. Arrays pass by DLPack, without a copy; gathering
the keys and values is not timed.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.kernel_bench.ours import NUM_CALLS, Entry, Setting
from benchmarks.kernel_bench.timing import Contender


def sdpa(setting: Setting, backend: str) -> Entry:
    """torch.nn.functional.scaled_dot_product_attention with the backend of that name.

    Rows must be alike: a padded batch would measure the padding. In decode the query heads of a
    group are the queries of one kv head, which saves it from reading the keys once per query head.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.bias import causal_lower_right

    case = setting.case
    if case.options or len(set(case.context_lens)) > 1:
        raise NotImplementedError("rows of equal length without options only")
    rows, context = len(case.context_lens), case.context_lens[0]
    q, _, _, *_, table, _ = map(torch.from_dlpack, setting.inputs)
    heads, kv_heads = case.heads.num_heads, case.heads.kv_heads
    dense = [[_gather(torch.from_dlpack(x), table, context) for x in p] for p in setting.pools]
    options: dict[str, Any] = {}
    if setting.op == "paged_decode_attention":
        q = q.reshape(rows, kv_heads, heads // kv_heads, -1)
    else:
        if len(set(case.q_lens)) > 1:
            raise NotImplementedError("chunks of equal length only")
        tokens = case.q_lens[0]
        q = q.reshape(rows, tokens, heads, -1).transpose(1, 2)
        mask = causal_lower_right(tokens, context)
        options = {"is_causal": True} if tokens == context else {"attn_mask": mask}
        options["enable_gqa"] = heads != kv_heads

    def attend(q: Any, k: Any, v: Any) -> Any:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)

    def output() -> Any:
        out = attend(q, *dense[0])
        if setting.op == "paged_prefill_attention":
            out = out.transpose(1, 2)
        return _as_numpy(out.reshape(setting.inputs[0].shape))

    return Entry(_graphed(attend, q, dense, NUM_CALLS[setting.op]), output)


def flashinfer(setting: Setting) -> Entry:
    """FlashInfer's paged decode or prefill on the same pages ("HND")."""
    import flashinfer  # pyright: ignore[reportMissingImports]
    import torch

    case, heads = setting.case, setting.case.heads
    q = torch.from_dlpack(setting.inputs[0])
    pools = [tuple(map(torch.from_dlpack, pool)) for pool in setting.pools]
    table, lens = (np.asarray(x) for x in setting.inputs[-2:])
    counts = -(-lens // heads.page_size)
    indptr = _int32(np.concatenate([[0], np.cumsum(counts)]))
    pages = _int32(np.concatenate([row[:n] for row, n in zip(table, counts, strict=True)]))
    last = _int32(lens - (counts - 1) * heads.page_size)
    workspace = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")
    sizes = heads.num_heads, heads.kv_heads, heads.head_dim, heads.page_size
    options = {
        "window_left": case.options.get("window", 0) - 1,
        "logits_soft_cap": case.options.get("soft_cap"),
        "q_data_type": q.dtype,
        "kv_data_type": q.dtype,
    }
    if setting.op == "paged_decode_attention":
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "HND", use_tensor_cores=heads.num_heads >= 4 * heads.kv_heads
        )
        wrapper.plan(indptr, pages, last, *sizes, **options)
    else:
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
        starts = _int32(np.asarray(setting.inputs[3]))
        wrapper.plan(starts, indptr, pages, last, *sizes, causal=True, **options)

    def attend(q: Any, k: Any, v: Any) -> Any:
        return wrapper.run(q, (k, v))

    return Entry(
        _graphed(attend, q, pools, NUM_CALLS[setting.op]),
        lambda: _as_numpy(attend(q, *pools[0])),
    )


def _gather(pages: Any, table: Any, context: int) -> Any:
    """[rows, kv heads, context, head_dim], contiguous."""
    rows = table.shape[0]
    _, kv_heads, _, head_dim = pages.shape
    tokens = pages[table.long()].permute(0, 2, 1, 3, 4).reshape(rows, kv_heads, -1, head_dim)
    return tokens[:, :, :context].contiguous()


def _graphed(call: Callable[..., Any], q: Any, pools: list[Any], num_calls: int) -> Contender:
    """A CUDA graph of calls on the pools in turns, each on the result of the one before."""
    import torch

    def program() -> None:
        out = q
        for i in range(num_calls):
            out = call(out, *pools[i % len(pools)])

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        program()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        program()

    def run(num_starts: int) -> None:
        for _ in range(num_starts):
            graph.replay()
        torch.cuda.synchronize()

    return Contender(run, num_calls)


def _int32(values: Any) -> Any:
    import torch

    return torch.tensor(np.asarray(values, np.int32), device="cuda")


def _as_numpy(tensor: Any) -> np.ndarray:
    return tensor.float().cpu().numpy()
