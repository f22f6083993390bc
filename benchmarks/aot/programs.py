"""The programs that are compiled without a GPU: each kernel case, and the engine's whole steps."""

import functools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import jax
import jax.numpy as jnp

import kernels_pallas
from benchmarks.aot.gates import Pool
from kernels_pallas.kv_write import cases as kv_write_cases
from kernels_pallas.paged_decode_attention import cases as decode_cases
from kernels_pallas.paged_prefill_attention import cases as prefill_cases
from kernels_pallas.rope_kv_write import cases as rope_kv_write_cases
from semipd_jax.models import module
from semipd_jax.models.registry import parse_spec
from semipd_jax.models.spec import ModelSpec
from semipd_jax.request import MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS
from semipd_jax.runtime.buckets import Bucket, Kind, MixedBucket, StepBucket
from semipd_jax.runtime.compile import compile_step
from semipd_jax.runtime.described_gpu import DescribedGpu
from semipd_jax.runtime.state import SharedState

CASES: Final[dict[str, Any]] = {
    "paged_decode_attention": decode_cases,
    "paged_prefill_attention": prefill_cases,
    "kv_write": kv_write_cases,
    "rope_kv_write": rope_kv_write_cases,
}
"""Op → module of its cases."""

_DONATED: Final = {"kv_write": (0, 1), "rope_kv_write": (3, 4)}
"""Arguments that an op updates in place."""

LLAMA_8B: Final = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
"""config.json of Llama 3.1 8B."""

_PAGE_SIZE: Final = 64
_NUM_PAGES: Final = 6000  # 47 GiB in 32 layers
_NUM_ROWS: Final = 257
_MAX_LEN: Final = 32768
_BIAS_WIDTH: Final = MAX_LOGIT_BIAS + MAX_STOP_TOKEN_IDS + 3
_MASK_WIDTH: Final = 128256 // 32

_PREFILL: Final = Bucket(2048, 64, _MAX_LEN // _PAGE_SIZE + 1, _BIAS_WIDTH, _MASK_WIDTH)
_DECODE: Final = Bucket(64, 64, _MAX_LEN // _PAGE_SIZE + 1, _BIAS_WIDTH, _MASK_WIDTH)

BUCKETS: Final[dict[Kind, StepBucket]] = {
    "prefill": _PREFILL,
    "decode": _DECODE,
    "mixed": MixedBucket(decode=_DECODE, prefill=_PREFILL),
}


@dataclass(frozen=True, slots=True)
class Program:
    """What `child` compiles."""

    compile: Callable[[DescribedGpu], jax.stages.Compiled]


def kernel(op: str, implementation: str, case_name: str) -> Program:
    """One op on one of its GPU cases."""
    return kernel_of(op, implementation, find_case(op, case_name))


def kernel_of(op: str, implementation: str, *cases: Any) -> Program:
    """One op on one case, or on several in one program."""
    calls = [
        functools.partial(
            getattr(kernels_pallas, op),
            implementation=implementation,
            **getattr(case, "options", {}),
        )
        for case in cases
    ]
    if len(cases) == 1:
        donated = _DONATED.get(op, ())
        return Program(lambda gpu: gpu.compile(*calls, *cases[0].specs, donate_argnums=donated))

    def call_all(*inputs: Any) -> list[Any]:
        return [call(*args) for call, args in zip(calls, inputs, strict=True)]

    return Program(lambda gpu: gpu.compile(call_all, *(case.specs for case in cases)))


def implementations(op: str) -> Mapping[str, Callable[..., Any]]:
    """The op's table."""
    return sys.modules[f"kernels_pallas.{op}"].IMPLEMENTATIONS


def find_case(op: str, name: str) -> Any:
    return next(case for case in CASES[op].GPU_BENCHMARKS if case.name == name)


def step(kind: Kind, num_layers: int = 32) -> Program:
    """The engine's step of Llama 3.1 8B, sampling included, as a worker compiles it."""
    spec = llama(num_layers)

    def compile_for(gpu: DescribedGpu) -> jax.stages.Compiled:
        graphdef, params = module.abstract_params(spec, jnp.bfloat16)
        arguments = gpu.place(params), gpu.place(state(spec))
        with gpu.tracing():
            return compile_step(kind, graphdef, *arguments, BUCKETS[kind], "cuda")

    return Program(compile_for)


def llama(num_layers: int) -> ModelSpec:
    return parse_spec(LLAMA_8B | {"num_hidden_layers": num_layers})


def state(spec: ModelSpec) -> SharedState:
    """Abstract, of a pool that fits beside the weights of 8B parameters on a GPU of 80 GB."""
    layer: dict[str, Any] = {
        array.name: jax.ShapeDtypeStruct((_NUM_PAGES, *array.page_shape), jnp.bfloat16)
        for array in spec.kv_layout(_PAGE_SIZE)
    }
    tokens: Any = jax.ShapeDtypeStruct((_NUM_ROWS, _MAX_LEN + 1), jnp.int32)
    return SharedState(layers=[dict(layer) for _ in range(spec.num_layers)], tokens=tokens)


def pool_of(shared: SharedState) -> Pool:
    layer = [a.size * a.dtype.itemsize for a in shared.layers[0].values()]
    return Pool(
        total=sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(shared)),
        layer=sum(layer),
        smallest=min(layer),
    )
