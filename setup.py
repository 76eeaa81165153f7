"""What pyproject.toml cannot say: configs/ is a folder of the package, too, so that its files are found by name."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["spikezoo*"]), "spikezoo.configs"],
    package_dir={"spikezoo.configs": "configs"},
)
