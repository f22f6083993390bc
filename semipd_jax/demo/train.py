"""Trains the demo model on a CPU: `python -m semipd_jax.demo.train --minutes 75 --out DIR`.

The learning rate follows the clock, so any budget ends annealed. The model directory is usable
from the first report on.
"""

import argparse
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32, PyTree

from semipd_jax.demo import checkpoint, corpus
from semipd_jax.demo.tokenizer import train_tokenizer
from semipd_jax.demo.windows import Windows, make_windows
from semipd_jax.models.llama import LayerCache, Llama
from semipd_jax.models.module import Params, abstract_params, merge
from semipd_jax.models.registry import parse_spec
from semipd_jax.models.spec import ModelSpec

MODEL: Final[dict[str, Any]] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
"""config.json. 3.8 million parameters: 7.6 MB in bfloat16."""

_HELD_OUT_STRIDE: Final = 5
"""Reports measure every fifth held-out window, to leave the time to training."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to train.

    Attributes:
      step_tokens: tokens that a step predicts.
      window: tokens that a training window predicts, from the fraction `short_until` of the budget
        on; before, `short_window`, which costs less.
      warmup: fraction of the budget until the learning rate is at its peak.
      report_every: steps between reports; each measures the held-out loss and writes the weights.
    """

    step_tokens: int = 2048
    window: int = 512
    short_window: int = 256
    short_until: float = 0.75
    peak_learning_rate: float = 3e-3
    warmup: float = 0.02
    weight_decay: float = 0.1
    report_every: int = 200
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Report:
    """Mean loss in nats per token: of the steps since the last report, and held out."""

    step: int
    num_tokens: int
    train_loss: float
    held_out_loss: float
    params: Params


def learning_rate(recipe: Recipe, progress: float) -> float:
    """Linear warm-up, then cosine to zero. `progress` is the spent fraction of the budget."""
    if progress < recipe.warmup:
        return recipe.peak_learning_rate * progress / recipe.warmup
    annealed = (progress - recipe.warmup) / (1.0 - recipe.warmup)
    return recipe.peak_learning_rate * 0.5 * (1.0 + math.cos(math.pi * min(annealed, 1.0)))


def clock(minutes: float) -> Iterator[float]:
    """Yields the spent fraction of the budget until it is spent, then 1.0 once."""
    start = time.monotonic()
    while (progress := (time.monotonic() - start) / (60.0 * minutes)) < 1.0:
        yield progress
    yield 1.0


def train(
    spec: ModelSpec,
    recipe: Recipe,
    training: Windows,
    held_out: Int32[np.ndarray, "W window"],
    budget: Iterable[float],
) -> Iterator[Report]:
    """One step for each progress that `budget` yields; a report now and then, and at the end.

    `progress` is the spent fraction of the budget. Equal arguments give equal weights.
    """
    optimizer = _optimizer(recipe)
    loss = loss_function(spec)
    step, evaluate = _step_function(loss, optimizer), jax.jit(loss)
    params = _initial_params(spec, recipe.seed)
    optimizer_state = optimizer.init(params)
    short, long = (
        training.shuffled(recipe.step_tokens // window, window, recipe.seed)
        for window in (recipe.short_window, recipe.window)
    )
    losses: list[Array] = []
    count = 0

    def report() -> Report:
        train_loss = float(np.mean(jax.device_get(losses)))
        held_out_loss = float(np.mean([evaluate(params, row[None]) for row in held_out]))
        losses.clear()
        return Report(count, count * recipe.step_tokens, train_loss, held_out_loss, params)

    for progress in budget:
        tokens = next(short if progress < recipe.short_until else long)
        rate = np.float32(learning_rate(recipe, progress))
        params, optimizer_state, value = step(params, optimizer_state, tokens, rate)
        losses.append(value)
        count += 1
        if count % recipe.report_every == 0:
            yield report()
    if losses:
        yield report()


def _initial_params(spec: ModelSpec, seed: int) -> Params:
    model = Llama(spec.config, dtype=jnp.float32, rngs=nnx.Rngs(seed))
    return nnx.to_pure_dict(nnx.state(model))


type Loss = Callable[[Params, Int32[Array, "B window"]], Float32[Array, ""]]


def loss_function(spec: ModelSpec) -> Loss:
    """Mean cross entropy of every token but the first of each window."""
    graphdef, _ = abstract_params(spec, jnp.float32)

    def loss(params: Params, tokens: Int32[Array, "B window"]) -> Float32[Array, ""]:
        model: Llama = merge(graphdef, params)
        rows, length = tokens.shape[0], tokens.shape[1] - 1
        positions = jnp.tile(jnp.arange(length, dtype=jnp.int32), rows)
        caches: list[LayerCache] = [{}] * spec.num_layers
        inputs, labels = tokens[:, :-1].reshape(-1), tokens[:, 1:].reshape(-1)
        hidden, _ = model(inputs, positions, caches, _causal_attend(length))
        logits = model.logits(hidden)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return loss


def _causal_attend(length: int) -> Callable[..., tuple[Float[Array, "T N H"], LayerCache]]:
    """The flat token axis holds sequences of `length`; each attends to its own past."""

    def attend(
        queries: Float[Array, "T N H"],
        keys: Float[Array, "T K H"],
        values: Float[Array, "T K H"],
        cache: LayerCache,
        window: int | None,
    ) -> tuple[Float[Array, "T N H"], LayerCache]:
        q, k, v = (x.reshape(-1, length, *x.shape[1:]) for x in (queries, keys, values))
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        return attended.reshape(queries.shape), cache

    return attend


def _optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """AdamW without its learning rate; norms do not decay."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=0.98),
        optax.add_decayed_weights(
            recipe.weight_decay, mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params)
        ),
    )


type Step = Callable[..., tuple[Params, PyTree, Float32[Array, ""]]]


def _step_function(loss: Loss, optimizer: optax.GradientTransformation) -> Step:
    @jax.jit
    def step(
        params: Params, state: PyTree, tokens: Int32[Array, "B window"], rate: Float32[Array, ""]
    ) -> tuple[Params, PyTree, Float32[Array, ""]]:
        value, gradients = jax.value_and_grad(loss)(params, tokens)
        directions, state = optimizer.update(gradients, state, params)
        params = jax.tree.map(lambda p, d: p - rate * d, params, directions)
        return params, state, value

    return step


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--minutes", type=float, default=75.0, help="wall-clock budget")
    parser.add_argument("--out", type=Path, required=True, help="model directory to write")
    arguments = parser.parse_args(argv)
    if arguments.minutes <= 0:
        parser.error(f"--minutes is {arguments.minutes:g}; allowed: above 0")
    logging.basicConfig(format="%(asctime)s %(message)s")
    _log.setLevel(logging.INFO)

    recipe, spec = Recipe(), parse_spec(MODEL)
    documents = list(corpus.documents())
    texts = [document for document in documents if not document.is_held_out]
    tokenizer = train_tokenizer((document.text for document in texts), MODEL["vocab_size"])
    training = make_windows(tokenizer, texts)
    unseen = make_windows(tokenizer, (d for d in documents if d.is_held_out))
    checkpoint.write_metadata(arguments.out, MODEL, tokenizer)
    _log.info(
        "%d documents, %d training tokens, %d held-out tokens",
        len(documents),
        len(training.stream),
        len(unseen.stream),
    )
    held_out = unseen.at(unseen.tiles(recipe.window)[::_HELD_OUT_STRIDE], recipe.window)
    for report in train(spec, recipe, training, held_out, clock(arguments.minutes)):
        checkpoint.write_weights(arguments.out, spec, report.params)
        _log.info(
            "step %d, %d tokens: loss %.4f, held out %.4f",
            report.step,
            report.num_tokens,
            report.train_loss,
            report.held_out_loss,
        )


if __name__ == "__main__":
    main()
