"""Whole runs of train.py that are killed, filled up, damaged; and that end as if nothing had been."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TRIES = int(os.environ.get("TWEETDORA_SOAK", "2"))  # `make soak` says more


@pytest.fixture(scope="module")
def sharp_dir(make_model, tokenizer, tmp_path_factory) -> str:
    """A tiny model whose answers an adapter can move."""
    folder = tmp_path_factory.mktemp("sharp") / "tiny-sharp"
    make_model(initializer_range=0.4).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_run_that_is_killed_over_and_over_ends_bit_for_bit_as_one_that_was_not(sharp_dir, data_dir, tmp_path):
    """kill -9 at seeded random moments of loading, steps, validation and saves; see soak.py."""
    words = [str(ROOT / "tests/soak.py"), sharp_dir, data_dir, str(tmp_path / "soak"), "--tries", str(TRIES)]
    done = subprocess.run(
        [sys.executable, *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120 + 60 * TRIES,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-3000:]
    assert f"{TRIES} of {TRIES} runs equal after " in done.stdout
