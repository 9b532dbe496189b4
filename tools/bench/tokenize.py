"""The bench of tokenization.py.

A file of this name hides the standard library's module ``tokenize`` from every bench of the folder
(``inspect`` imports it), so that anyone who imports it gets the real one from here.
"""

import sys

if __name__ == "__main__":
    from tokenization import main

    main()
else:
    import importlib.util
    import sysconfig

    spec = importlib.util.spec_from_file_location(
        __name__, f"{sysconfig.get_path('stdlib')}/tokenize.py"
    )
    assert spec is not None and spec.loader is not None
    sys.modules[__name__] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[__name__])
