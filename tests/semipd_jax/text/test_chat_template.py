import time

import pytest
from jinja2 import Template

from semipd_jax.text.chat_template import render


class Slow:
    def __len__(self) -> int:
        end_s = time.monotonic() + 1.0
        while time.monotonic() < end_s:
            pass
        return 0


def test_a_helper_of_jinja_that_hides_errors_is_stopped():
    """`is sequence` takes any Exception for a no."""
    template = Template("{% for _ in range(4) %}{% if x is sequence %}{% endif %}{% endfor %}")
    with pytest.raises(TimeoutError):
        render(template, {"x": Slow()}, max_chars=10, timeout_s=0.2)
    assert render(Template("{{ x }}"), {"x": 1}, max_chars=10, timeout_s=60.0) == "1"
