"""torch.hub's entry points: ``torch.hub.load('OWNER/spikezoo', 'mpbn_resnet20', T=2)``, one function a model."""

# torch.hub checks these before it calls a function below; spikezoo itself comes from the checkout.
dependencies = ["torch", "timm", "huggingface_hub", "safetensors"]


def _entry(_name, _doc):
    def create(pretrained=False, **kwargs):
        # Imported late: torch.hub runs this file before it looks whether the dependencies are there.
        import spikezoo

        return spikezoo.create_model(_name, pretrained=pretrained, **kwargs)

    create.__name__ = create.__qualname__ = _name
    create.__doc__ = (
        f"{_doc}\n\nArguments: pretrained, and those of spikezoo.create_model (T, num_classes, in_chans, ...)."
    )
    return create


mpbn_resnet18 = _entry("mpbn_resnet18", "ResNet-18 for ImageNet with membrane normalisation (MPBN).")
mpbn_resnet19 = _entry("mpbn_resnet19", "ResNet-19 with membrane normalisation (MPBN): 128-channel stem.")
mpbn_resnet20 = _entry(
    "mpbn_resnet20", "The 11 M ResNet-20 of the spiking literature with membrane normalisation (MPBN)."
)
mpbn_resnet34 = _entry("mpbn_resnet34", "ResNet-34 for ImageNet with membrane normalisation (MPBN).")
mpbn_vgg16 = _entry("mpbn_vgg16", "VGG-16 with membrane normalisation (MPBN).")
spiking_conv4 = _entry("spiking_conv4", "CONV-4 of the ticket papers: 4 convolutions, 3 linear layers.")
spiking_resnet18 = _entry("spiking_resnet18", "ResNet-18 for ImageNet: mpbn_resnet18 without membrane normalisation.")
spiking_resnet19 = _entry(
    "spiking_resnet19", "ResNet-19 of TET and of the ticket papers: 64-channel stem, two linear layers."
)
spiking_resnet19_wide = _entry("spiking_resnet19_wide", "ResNet-19: mpbn_resnet19 without membrane normalisation.")
spiking_resnet20 = _entry("spiking_resnet20", "ResNet-20 (11 M): mpbn_resnet20 without membrane normalisation.")
spiking_resnet34 = _entry("spiking_resnet34", "ResNet-34 for ImageNet: mpbn_resnet34 without membrane normalisation.")
spiking_vgg9 = _entry("spiking_vgg9", "VGG-9 of the ticket papers: 6 convolutions, 3 linear layers.")
spiking_vgg11 = _entry("spiking_vgg11", "VGG-11 of the ticket papers: 8 convolutions, 3 linear layers.")
spiking_vgg16 = _entry("spiking_vgg16", "VGG-16: mpbn_vgg16 without membrane normalisation.")
