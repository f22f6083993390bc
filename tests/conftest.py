import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported, here and in children

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
