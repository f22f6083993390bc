"""transformers' own generation on the same checkpoint, as a process that answers on pipes.

`Baseline` is the side that asks; `python -m benchmarks.transformers_baseline MODEL` answers with one
JSON line for each line it gets. It is a process of its own, idle while others are measured.

Continuous batching on a CPU attends with one call for all requests, over a mask of (queries of the
step) × (tokens of all requests), so a large token budget makes prefill quadratic in the number of
requests and a small one makes many steps. The budget is therefore chosen on this machine, by trying
`BUDGETS` on a workload like the measured one. What else could be set: paged SDPA (paged eager took
three times as long), pages of 64 tokens (16 and 256 made no difference), a pool just large enough.
Asynchronous batching and the block-table path are refused on a CPU.
"""
