"""tools/bench/tokenize.py has the name of a library module, and must not take its place."""

import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parents[4] / "tools" / "bench"


def test_benches_still_import_the_librarys_tokenize() -> None:
    code = (
        "import tokenize, inspect; print(inspect.getsource(tokenize.open)[:8], tokenize.TokenInfo)"
    )
    run = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path.insert(0, {str(BENCH)!r}); {code}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert run.stdout.startswith("def open") and "TokenInfo" in run.stdout
