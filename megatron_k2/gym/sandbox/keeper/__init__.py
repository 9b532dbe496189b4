"""The process between us and a program: namespaces, limits, watching, and the end of it all.

One keeper a run, started by ``sandbox.local`` with an empty environment. Standard library only
(and sandlock): it must start in milliseconds.
"""
