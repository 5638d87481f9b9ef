"""One reader for each family of architectures: a ConfigView in, a ModelShape out.

A family module has `READERS`, a dict from `model_type` to a function `(ConfigView) -> ModelShape`; `registry`
says which module knows which type, so that reading one config imports one module.
"""
