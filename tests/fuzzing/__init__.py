"""Damaged and invented files for every reader of the package, and what comes of each.

    python -m tests.fuzzing                          names of the readers
    python -m tests.fuzzing gguf --cases 10000       many cases, and what came of them
    python -m tests.fuzzing gguf 1234                one case again, with its traceback
    python -m tests.fuzzing gguf 1234 --keep FOLDER  the same, and its files stay in FOLDER

Case i of a reader is always the same: files that the package wrote itself, of which one or two are
damaged by a generator that is seeded with the reader's name and i. Values that are made up come
from Hypothesis; its `fuzz_one_input` makes an example a function of bytes, which the generator
draws. The loop is our own and not that of Hypothesis or Atheris: a case that kills its process,
never ends or takes all memory has to be named and survived, and both run their cases in the process
that would die.
"""
