"""Ten minutes of a GPU, turned into all the results that the course wants from one.

Start with ``__main__`` (the command) and ``plan`` (the parts and their shares of the time).
``conduct`` runs the parts one after the other in processes of their own, ``part`` is such a
process, ``gather`` collects what came of them.
"""
