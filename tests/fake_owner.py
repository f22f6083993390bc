"""`python -m fake_owner`: a memory owner without a model, which some seeds keep from starting."""

from pathlib import Path

import numpy as np

from semipd_jax.child import Child, run_child
from semipd_jax.errors import CheckpointError, ConfigError
from semipd_jax.messages import MemoryLayout

BAD_SEEDS = {
    13: CheckpointError("model.safetensors is damaged"),
    14: ConfigError("page_size is 7; allowed: 16"),
}
NUM_PAGES, PAGE_SIZE, MAX_MODEL_LEN = 64, 16, 128


def main(child: Child) -> None:
    config = child.spec.config
    if (error := BAD_SEEDS.get(config.model.seed)) is not None:
        raise error
    child.progress("load weights", 1, 1)
    num_rows = config.scheduler.max_num_seqs + 1
    directory = Path(child.spec.run_dir)
    pool = NUM_PAGES, PAGE_SIZE
    shapes = {"kv": pool, "prefix": pool, "tokens": (num_rows, MAX_MODEL_LEN + 1)}
    for name, shape in shapes.items():
        np.memmap(directory / name, np.int64, mode="w+", shape=shape)[:] = -1
    child.ready(
        layout=MemoryLayout(
            dtype="float32",
            vocab_size=50,
            max_model_len=MAX_MODEL_LEN,
            page_size=PAGE_SIZE,
            num_pages=NUM_PAGES,
            num_rows=num_rows,
            weight_bytes=0,
            kv_bytes=0,
            eos_token_ids=(3,),
        )
    )
    while not child.stopping.is_set():
        child.wait(1.0)


if __name__ == "__main__":
    run_child(main)
