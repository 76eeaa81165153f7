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


autost_base = _entry("autost_base", "AutoST-base for CIFAR, 29.6 M: nearest to the paper's count.")
autost_dvs_tiny = _entry("autost_dvs_tiny", "AutoST-tiny for event frames: 2 channels, 128x128, T=16.")
autost_in_base = _entry("autost_in_base", "AutoST-base for ImageNet, 34.4 M: nearest to the paper's count.")
autost_in_small = _entry("autost_in_small", "AutoST-small for ImageNet, 14.7 M: nearest to the paper's count.")
autost_in_tiny = _entry("autost_in_tiny", "AutoST-tiny for ImageNet, 6.0 M: nearest to the paper's count.")
autost_small = _entry("autost_small", "AutoST-small for CIFAR, 11.5 M: nearest to the paper's count.")
autost_tiny = _entry("autost_tiny", "AutoST-tiny for CIFAR, 4.2 M: nearest to the paper's count.")
mpbn_resnet18 = _entry("mpbn_resnet18", "ResNet-18 for ImageNet with membrane normalisation (MPBN).")
mpbn_resnet19 = _entry("mpbn_resnet19", "ResNet-19 with membrane normalisation (MPBN): 128-channel stem.")
mpbn_resnet20 = _entry(
    "mpbn_resnet20", "The 11 M ResNet-20 of the spiking literature with membrane normalisation (MPBN)."
)
mpbn_resnet34 = _entry("mpbn_resnet34", "ResNet-34 for ImageNet with membrane normalisation (MPBN).")
mpbn_vgg16 = _entry("mpbn_vgg16", "VGG-16 with membrane normalisation (MPBN).")
rmp_in_vgg16 = _entry("rmp_in_vgg16", "VGG-16 for ImageNet without norms and biases, for conversion from an ANN.")
rmp_resnet20 = _entry("rmp_resnet20", "ResNet-20 (11 M) without norms and biases, for conversion from an ANN.")
rmp_vgg16 = _entry("rmp_vgg16", "VGG-16 for 32x32 images without norms and biases, for conversion from an ANN.")
spikformer_2_256 = _entry("spikformer_2_256", "Spikformer-2-256 for 32x32 images.")
spikformer_2_384 = _entry("spikformer_2_384", "Spikformer-2-384 for 32x32 images.")
spikformer_4_256 = _entry("spikformer_4_256", "Spikformer-4-256 for 32x32 images.")
spikformer_4_384 = _entry("spikformer_4_384", "Spikformer-4-384 for 32x32 images.")
spikformer_5_384 = _entry("spikformer_5_384", "Spikformer-5-384 for 32x32 images.")
spikformer_8_384 = _entry("spikformer_8_384", "Spikformer-8-384 for 32x32 images.")
spikformer_8_512 = _entry("spikformer_8_512", "Spikformer-8-512 for 32x32 images.")
spikformer_dvs_2_256 = _entry("spikformer_dvs_2_256", "Spikformer-2-256 for event frames: 2 channels, 128x128, T=16.")
spikformer_in_6_256 = _entry("spikformer_in_6_256", "Spikformer-6-256 for ImageNet.")
spikformer_in_6_512 = _entry("spikformer_in_6_512", "Spikformer-6-512 for ImageNet.")
spikformer_in_8_384 = _entry("spikformer_in_8_384", "Spikformer-8-384 for ImageNet.")
spikformer_in_8_512 = _entry("spikformer_in_8_512", "Spikformer-8-512 for ImageNet.")
spikformer_in_8_768 = _entry("spikformer_in_8_768", "Spikformer-8-768 for ImageNet.")
spikformer_in_10_512 = _entry("spikformer_in_10_512", "Spikformer-10-512 for ImageNet.")
spikformer_small = _entry("spikformer_small", "Spikformer of DeiT-Small's width, depth and heads for 32x32 images.")
spikformer_tiny = _entry("spikformer_tiny", "Spikformer of DeiT-Tiny's width, depth and heads for 32x32 images.")
spiking_conv4 = _entry("spiking_conv4", "CONV-4 of the ticket papers: 4 convolutions, 3 linear layers.")
spiking_lenet = _entry("spiking_lenet", "LeNet-5's widths for 28x28 images, without norms and biases.")
spiking_mlp_340 = _entry("spiking_mlp_340", "784-340-10 of DynSNN: temporal coding, images in [0, 1].")
spiking_mlp_500 = _entry("spiking_mlp_500", "784-500-10 of DynSNN: temporal coding, images in [0, 1].")
spiking_mlp_1000 = _entry("spiking_mlp_1000", "784-1000-10 of DynSNN: rate coding, images in [0, 1].")
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
