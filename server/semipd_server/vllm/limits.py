"""Bounds of repeated fields of this contract; what is not named here is not supported."""

from typing import Final

from semipd_jax.request import (
    MAX_CHOICE_TEXTS,
    MAX_LOGIT_BIAS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
)
from semipd_server.limits import MODEL_LENGTH

_MAX_ABORTS: Final = 1024
_MAX_SECTIONS: Final = 16

MAX_ENTRIES: Final = {
    "vllm.grpc.engine.TokenizedInput.input_ids": MODEL_LENGTH,
    "vllm.grpc.engine.SamplingParams.stop": MAX_STOP_STRINGS,
    "vllm.grpc.engine.SamplingParams.stop_token_ids": MAX_STOP_TOKEN_IDS,
    "vllm.grpc.engine.SamplingParams.logit_bias": MAX_LOGIT_BIAS,
    "vllm.grpc.engine.ChoiceConstraint.choices": MAX_CHOICE_TEXTS,
    "vllm.grpc.engine.AbortRequest.request_ids": _MAX_ABORTS,
    "vllm.grpc.engine.GetLoadsRequest.include": _MAX_SECTIONS,
}
"""Full name of a repeated field of a request → most entries."""
