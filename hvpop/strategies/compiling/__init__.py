"""Compiling a product, in the order of use.

`tracing` writes it down as a graph of operations, `simplifying` walks that graph once with the
`rules` (and `views`, `convolutions`) of what can be left open as `sums`, `splitting` parts what
depends on v from what does not, `buffers` saves calls and memory, and `program` holds the result.
"""
