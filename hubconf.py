"""torch.hub's entry points, one function a model: ``torch.hub.load(CHECKOUT, "mpbn_resnet20", source="local")``."""

# torch.hub checks these before it calls a function below; spikezoo itself comes from the checkout.
dependencies = ["torch", "timm", "huggingface_hub", "safetensors"]


def __dir__():
    try:  # late, and not at all where a dependency is missing: torch.hub runs this file before it names those
        import spikezoo
    except ImportError:
        return ["dependencies"]
    return ["dependencies", *(name for name in spikezoo.list_models() if not name.startswith("test_"))]


def __getattr__(name):
    if name.startswith("_") or name not in __dir__():
        raise AttributeError(f"hubconf.py has no model {name!r}: torch.hub.list names them.")
    import functools

    import timm

    import spikezoo

    # Its docstring is the row's, which torch.hub.help shows.
    return functools.update_wrapper(functools.partial(spikezoo.create_model, name), timm.model_entrypoint(name))
