"""Plans on disk: `save` writes what a plan needs to run elsewhere, `load` makes a plan of it without the user's code.

`archive.py` is the folder with its manifest and checksums, `graphs.py` the graphs as bytes, `problems.py` what stands
for the user's problems, `write.py` and `read.py` the two ends. `export.py` writes a hypergradient for C++ instead.
"""
