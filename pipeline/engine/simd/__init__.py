"""C code for the vector instructions of x86 CPUs: attention, and the operations between products and attention.

Compiled once per machine, when an engine first needs it. Behind the interfaces of attention/ and kernels/.
"""
