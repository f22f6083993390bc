"""Parts of the GPU check."""
