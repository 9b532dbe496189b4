"""Changes as models write them are applied strictly."""

import pytest

from megatron_k2.gym.issues.patch import PatchError, apply_diff, changes_of, diff_of

FILES = {"a.py": "one\ntwo\nthree\nfour\n", "b.py": "x = 1\nx = 2"}


def test_a_diff_of_anything_is_applied_back() -> None:
    after: dict[str, str | None] = {
        "a.py": "zero\none\ntwo\n3\nfour\nfive\n",
        "b.py": "x = 1\nx = 3",
        "new/c.py": "c\n",
    }
    assert apply_diff(diff_of(FILES, after), FILES) == after
    gone: dict[str, str | None] = {"a.py": None}
    assert apply_diff(diff_of(FILES, gone), FILES) == gone


def test_wrong_line_numbers_do_not_matter_but_wrong_lines_do() -> None:
    diff = "--- a/a.py\n+++ b/a.py\n@@ -90,2 +90,2 @@ def f\n two\n-three\n+3\n"
    assert apply_diff(diff, FILES) == {"a.py": "one\ntwo\n3\nfour\n"}
    with pytest.raises(PatchError, match="not there"):
        apply_diff(diff.replace("two", "too"), FILES)
    with pytest.raises(PatchError, match=r"c.py is not there"):
        apply_diff(diff.replace("a.py", "c.py"), FILES)


def test_fenced_diffs_and_blocks_are_found_in_prose() -> None:
    diff = "--- a/a.py\n+++ b/a.py\n@@ -2 +2 @@\n-two\n+2\n"
    assert (
        changes_of(f"Do this:\n```diff\n{diff}```\nDone.", FILES)["a.py"] == "one\n2\nthree\nfour\n"
    )
    blocks = (
        "First `a.py`\n\na.py\n<<<<<<< SEARCH\ntwo\n=======\n2\n>>>>>>> REPLACE\n"
        "**a.py**\n```python\n<<<<<<< SEARCH\none\n=======\n1\n>>>>>>> REPLACE\n```\n"
        "d/n.py\n<<<<<<< SEARCH\n=======\nn\n>>>>>>> REPLACE"
    )
    assert changes_of(blocks, FILES) == {"a.py": "1\n2\nthree\nfour\n", "d/n.py": "n\n"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nothing", "no search/replace block"),
        ("a.py\n<<<<<<< SEARCH\nfive\n=======\n5\n>>>>>>> REPLACE", "0 times"),
        ("b.py\n<<<<<<< SEARCH\nx = \n=======\n5\n>>>>>>> REPLACE", "times"),
        ("a.py\n<<<<<<< SEARCH\n=======\n5\n>>>>>>> REPLACE", "there already"),
        ("../a.py\n<<<<<<< SEARCH\n=======\n5\n>>>>>>> REPLACE", "not of the repository"),
        ("--- a/.git/config\n+++ b/.git/config\n@@ -1 +1 @@\n-a\n+b\n", "not of the repository"),
    ],
)
def test_what_does_not_fit_is_refused(text: str, words: str) -> None:
    with pytest.raises(PatchError, match=words):
        changes_of(text, FILES)
