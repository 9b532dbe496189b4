"""Repository issues: a change is right if the tests that it should mend pass, and others still do.

Tasks are made of a git repository's own history by ``tools/build_issue_tasks.py``; see README.md.
"""
