"""Forward passes as Pallas kernels, behind the signatures of the engines, for whoever asks for them by name.

`implementation="auto"` never chooses one: none has been measured on an accelerator yet. They are compiled for TPU by
Mosaic and for GPU by Pallas's Triton lowering, and interpreted on a CPU, slowly, which is for tests. Backward passes
are those of the XLA forms.

Letters besides those of the package: Y sequences times heads, N chunks or blocks, C tokens in one.
"""
