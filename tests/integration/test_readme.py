"""The README's code runs, as it stands there."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.support.scripts import run_python

README = Path(__file__).parents[2] / "README.md"
BLOCKS = re.findall(r"<!-- runs as a test -->\n```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)


def test_the_readme_has_code():
    """The pattern that finds the blocks still finds them."""
    assert len(BLOCKS) >= 3
    assert README.read_text("utf-8").count("```python") == len(BLOCKS)


@pytest.mark.redis
@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_code_runs(block, shared_redis, namespace):
    """Each block runs in a fresh interpreter against a real Redis, and leaves nothing behind but its values."""
    code = block.replace("redis://localhost/0", shared_redis.url)
    env = {**os.environ, "LIB_REDIS_URL": shared_redis.url, "LIB_CACHE_NAMESPACE": namespace}
    run_python(code, env=env, timeout=30)
