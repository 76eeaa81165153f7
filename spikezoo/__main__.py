"""Command line of the library: ``python -m spikezoo``.

    count          what a model costs, layer by layer
    patches        a picture of the patches that MultiSp keeps
    activations    a picture of the activation maps of several checkpoints
    export         write a model as ONNX or NIR
    push           publish a checkpoint on the Hugging Face Hub
    search         find AutoST architectures
    correlation    train a sample of them and see how well the metrics rank them

Example:
    python -m spikezoo count mpbn_resnet20
    python -m spikezoo count test_spiking_vgg --dataset none --images 4 --json
    python -m spikezoo count --checkpoint output/quickstart --plot bars.png
    python -m spikezoo patches --checkpoint output/multisp --plot patches.png
    python -m spikezoo activations --checkpoint output/ann output/bnn output/ticket --plot maps.png
    python -m spikezoo export --checkpoint output/quickstart --output quickstart.onnx
    python -m spikezoo push output/quickstart ORG/NAME --dry-run card
    python -m spikezoo search --space tiny --params 4.0e6:4.22e6 --output found
    python -m spikezoo correlation --config configs/autost/correlation_small.yaml --data-dir DATA --output ranks
"""
# ruff: noqa: T201

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from spikezoo import pictures, search
from spikezoo.checkpoint import read_config
from spikezoo.counters import MAC_PJ, SOP_PJ, count_loader, plot
from spikezoo.data import create_loader, dataset_info
from spikezoo.evaluation import input_statistics, open_model
from spikezoo.export import check_suffix, export
from spikezoo.hub import push_folder
from spikezoo.transforms import apply
from spikezoo.transforms.multisp import PatchSelection, kept_patches


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data-dir", metavar="DIR", help="folder of the dataset")
    parser.add_argument("--dataset-download", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--seed", type=int, default=42, help="of random weights and noise")


def _loader(args: argparse.Namespace, dataset: str, model: Any, images: int) -> Any:
    """Batches of a dataset's images as a model takes them."""
    return create_loader(
        dataset,
        args.split,
        data_dir=args.data_dir,
        download=args.dataset_download,
        batch_size=images,
        img_size=model.img_size[0],
        in_chans=model.in_chans,
        num_workers=0,
        **input_statistics(model),
    )


def _open(
    args: argparse.Namespace, name: str | None, checkpoint: str | None, given: dict[str, Any], dataset: str | None
) -> tuple[str, Any, str, str]:
    """Name, model, dataset and where the weights come from, of a name or a checkpoint."""
    name = name or (read_config(checkpoint).get("architecture") if checkpoint else None)
    if not name:
        raise ValueError(
            "Which model? Give its name, such as spikformer_tiny, or a --checkpoint with a config.json that names it."
        )
    return name, *open_model(
        name, given, checkpoint=checkpoint, dataset=dataset, data_dir=args.data_dir, seed=args.seed
    )


def _add_count(commands: Any) -> None:
    parser = commands.add_parser("count", help="MACs, synaptic operations, energy and firing rates of a model")
    parser.add_argument("name", nargs="?", help="model, see spikezoo.list_models() (default: the checkpoint's)")
    parser.add_argument("--checkpoint", metavar="FILE_OR_DIR", help="weights, or a folder that train.py wrote")
    parser.add_argument("--T", type=int, help="time steps")
    parser.add_argument("--neuron", help="lif, if, plif, relu (the ANN twin) or sign")
    parser.add_argument("--mpbn", help="channel, element or none")
    parser.add_argument(
        "--dataset", help="(default: the checkpoint's, else what fits the model's input; none is random noise)"
    )
    _add_data(parser)
    parser.add_argument("--images", type=int, default=32, help="average over so many images (default: %(default)s)")
    parser.add_argument(
        "-b", "--batch-size", type=int, default=1, help="images counted at once; the spread is between such batches"
    )
    parser.add_argument("--mac-pj", type=float, default=MAC_PJ, help="picojoule a MAC (default: %(default)s)")
    parser.add_argument("--sop-pj", type=float, default=SOP_PJ, help="picojoule a SOP (default: %(default)s)")
    parser.add_argument("--pj-per-byte", type=float, help="also the energy of memory traffic")
    parser.add_argument("--norm-ops", type=int, default=0, help="operations per element of a norm (default: none)")
    parser.add_argument("--neuron-ops", action="store_true", help="also a MAC per neuron and step")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--plot", metavar="FILE", help="draw where the operations are")
    parser.set_defaults(run=_count)


def _count(args: argparse.Namespace) -> int:
    if args.images < 1 or args.batch_size < 1:
        raise ValueError(f"images={args.images}, batch-size={args.batch_size}: expected integers >= 1.")
    given = {key: getattr(args, key) for key in ("T", "neuron", "mpbn") if getattr(args, key) is not None}
    name, model, dataset, weights = _open(args, args.name, args.checkpoint, given, args.dataset)
    try:
        model.to(args.device)
    except (RuntimeError, AssertionError) as error:  # AssertionError where torch has no CUDA in it
        raise ValueError(f"--device {args.device}: {error} Use --device cpu.") from error
    loader: Iterable[Any]
    if dataset == "none":
        noise = torch.randn if model.encoding == "direct" else torch.rand
        loader = [noise(args.images, model.in_chans, *model.img_size)]
    else:
        loader = _loader(args, dataset, model, min(args.images, 64))
    summary = count_loader(
        model,
        loader,
        args.images,
        piece=args.batch_size,
        mac_pj=args.mac_pj,
        sop_pj=args.sop_pj,
        pj_per_byte=args.pj_per_byte,
        norm_ops=args.norm_ops,
        neuron_ops=args.neuron_ops,
        inputs="analog",  # pixels are no spikes, even where they happen to be whole numbers
    )
    source = "random noise" if dataset == "none" else f"{dataset}/{args.split}"
    if args.plot:
        plot(summary.mean, args.plot, f"{name}: operations per image ({source}, weights {weights})")
    if args.json:
        std = {key: None if math.isnan(value) else value for key, value in summary.std.items()}  # JSON has no nan
        facts = {"model": name, "data": source, "weights": weights, "piece": summary.piece, "std": std}
        print(json.dumps({**facts, "count": summary.mean.to_dict()}, indent=2))
        return 0
    said = f"random weights (seed {args.seed})" if weights == "random" else f"weights {weights}"
    print(f"{name}, {said}, {summary.images} images of {source}\n")
    print(summary.mean.table())
    between = "images" if summary.piece == 1 else f"batches of {summary.piece} images"
    spread = ", ".join(f"{key} {value:.4g}" for key, value in summary.std.items())
    print(f"\nStandard deviation between {between}: {spread}")
    return 0


def _add_patches(commands: Any) -> None:
    parser = commands.add_parser("patches", help="draw which patches of real images MultiSp keeps")
    parser.add_argument("name", nargs="?", help="a Spikformer or AutoST model (default: the checkpoint's)")
    parser.add_argument("--checkpoint", metavar="FILE_OR_DIR", help="weights, or a folder that train.py wrote")
    parser.add_argument(
        "--patch-ratio", type=float, help="fraction of the patches removed, for a model that keeps all (default: 0.3)"
    )
    parser.add_argument("--dataset", help="(default: the checkpoint's, else what fits the model's input)")
    _add_data(parser)
    parser.add_argument("--images", type=int, default=8, help="the first so many (default: %(default)s)")
    parser.add_argument("--plot", metavar="FILE", required=True, help="picture to write: .png, .pdf or .svg")
    parser.set_defaults(run=_patches)


def _patches(args: argparse.Namespace) -> int:
    pictures.check_picture(args.plot)
    if args.images < 1:
        raise ValueError(f"images={args.images}: expected an integer >= 1.")
    name, model, dataset, weights = _open(args, args.name, args.checkpoint, {}, args.dataset)
    selects = any(isinstance(module, PatchSelection) for module in model.modules())
    if args.patch_ratio is not None or not selects:
        ratio = 0.3 if args.patch_ratio is None else args.patch_ratio
        model = apply(model, "multisp", pep_sparsity=0, binary_pep=False, patch_ratio=ratio)
    loader = _loader(args, dataset, model, args.images)
    images = next(iter(loader))[0]
    pixels = pictures.to_pixels(images, loader.info.mean, loader.info.std)
    made = pictures.caption(model).replace("\n", ", ") + (", random weights" if weights == "random" else "")
    title = f"{made}; {dataset}/{args.split}"
    mask = kept_patches(model.eval(), images)
    pictures.draw_patches(pixels, mask, args.plot, title)
    kept, total = int(mask[0].sum()), mask[0].numel()
    print(f"{name} keeps {kept} of {total} patches. Wrote {args.plot}")
    if mask.flatten(1)[:, :kept].all() and kept < total:
        print(
            "It keeps the first patches of every image, since all of them are equally strong: an embedding that is not "
            "trained puts out no spikes in evaluation mode."
        )
    return 0


def _add_activations(commands: Any) -> None:
    parser = commands.add_parser("activations", help="draw the activation maps of checkpoints side by side")
    parser.add_argument(
        "--checkpoint", metavar="FILE_OR_DIR", nargs="+", required=True, help="folders that train.py wrote"
    )
    parser.add_argument("--layer", help="such as stages.0.0 (default: of each the neuron in the middle)")
    parser.add_argument("--dataset", help="(default: the first checkpoint's)")
    _add_data(parser)
    parser.add_argument("--image", type=int, default=0, help="number of the image in the split (default: %(default)s)")
    parser.add_argument("--channels", type=int, default=4, help="single channels to draw (default: %(default)s)")
    parser.add_argument("--plot", metavar="FILE", required=True, help="picture to write: .png, .pdf or .svg")
    parser.set_defaults(run=_activations)


def _activations(args: argparse.Namespace) -> int:
    pictures.check_picture(args.plot)
    if args.image < 0 or args.channels < 0:
        raise ValueError(f"image={args.image}, channels={args.channels}: expected integers >= 0.")
    columns = []
    pixels: Any = None
    dataset = args.dataset
    for checkpoint in args.checkpoint:
        _, model, dataset, _ = _open(args, None, checkpoint, {}, dataset)
        loader = _loader(args, dataset, model, 1)
        if args.image >= len(loader):
            raise ValueError(f"image={args.image}: {dataset}/{args.split} has images 0 to {len(loader) - 1}.")
        image = next(iter(loader.iterate(args.image)))[0]
        layer, maps = pictures.activation_maps(model, image[0], args.layer)
        columns.append((f"{pictures.caption(model)}\n{layer}", maps))
        pixels = pictures.to_pixels(image, loader.info.mean, loader.info.std)[0]
    title = f"Activations (mean over time), image {args.image} of {dataset}/{args.split}"
    pictures.draw_activations(columns, pixels, args.plot, args.channels, title)
    print(f"Wrote {args.plot}")
    return 0


def _add_export(commands: Any) -> None:
    parser = commands.add_parser("export", help="write a model as ONNX (any) or NIR (convolutional ones)")
    parser.add_argument("name", nargs="?", help="model, see spikezoo.list_models() (default: the checkpoint's)")
    parser.add_argument("--checkpoint", metavar="FILE_OR_DIR", help="weights, or a folder that train.py wrote")
    parser.add_argument("--T", type=int, help="time steps")
    parser.add_argument(
        "--dataset",
        help="whose images ONNX is checked on (default: the checkpoint's, else what fits the model's input; none is "
        "random noise)",
    )
    _add_data(parser)
    parser.add_argument("--images", type=int, default=8, help="the first so many (default: %(default)s)")
    parser.add_argument("--fixed-batch", action="store_true", help="ONNX for batches of --images only")
    parser.add_argument("--output", metavar="FILE", required=True, help="file to write: .onnx or .nir")
    parser.set_defaults(run=_export)


def _export(args: argparse.Namespace) -> int:
    suffix = check_suffix(args.output)
    if args.images < 1:
        raise ValueError(f"images={args.images}: expected an integer >= 1.")
    given = {"T": args.T} if args.T is not None else {}
    name, model, dataset, weights = _open(args, args.name, args.checkpoint, given, args.dataset)
    if dataset == "none":
        images = torch.randn(args.images, model.in_chans, *model.img_size)
    else:
        images = next(iter(_loader(args, dataset, model, args.images)))[0]
    path = export(model.eval(), args.output, images, not args.fixed_batch)
    said = f"random weights (seed {args.seed})" if weights == "random" else f"weights {weights}"
    source = "noise" if dataset == "none" else f"{dataset}/{args.split}"
    checked = f", checked on {len(images)} images of {source}" if suffix == ".onnx" else ""
    print(f"{name}, {said}. Wrote {path}{checked}.")
    return 0


def _add_push(commands: Any) -> None:
    parser = commands.add_parser("push", help="publish a checkpoint on the Hugging Face Hub, with a model card")
    parser.add_argument(
        "checkpoint", metavar="DIR_OR_CHECKPOINT", help="a folder that train.py wrote, or a file in one"
    )
    parser.add_argument("repository", metavar="ORG/NAME", help="made if it is not there")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", metavar="BRANCH", help="made if it is not there (default: the main one)")
    parser.add_argument("--license", default="apache-2.0", help="of the weights (default: %(default)s)")
    parser.add_argument("--dry-run", metavar="DIR", help="write the files to this new folder and push nothing")
    parser.set_defaults(run=_push)


def _push(args: argparse.Namespace) -> int:
    where = push_folder(
        args.checkpoint,
        args.repository,
        private=args.private,
        revision=args.revision,
        license=args.license,
        dry_run=args.dry_run,
    )
    print(f"Wrote {where}, pushed nothing." if args.dry_run else where)
    return 0


def _add_search(commands: Any) -> None:
    parser = commands.add_parser("search", help="find AutoST architectures: exactly, or by the paper's evolution")
    parser.add_argument("--space", default="tiny", help="tiny, small, base, or a YAML file (default: %(default)s)")
    parser.add_argument("--params", metavar="LO:HI", help="window of trainable parameters, for instance 4.0e6:4.22e6")
    parser.add_argument("--macs", metavar="LO:HI", help="window of the MACs of all time steps")
    parser.add_argument("--latency", type=float, metavar="MS", help="largest time of an image, measured on the best")
    parser.add_argument("--metric", default="flops", help=f"{', '.join(search.METRICS)} (default: %(default)s)")
    parser.add_argument(
        "--method", choices=("exact", "evolution"), help="(default: exact for metrics of the architecture alone)"
    )
    parser.add_argument("--T", type=int, default=4, help="time steps (default: %(default)s)")
    parser.add_argument(
        "--dataset", default="none", help="sets the three below; metrics that read a network see it (default: noise)"
    )
    for flag in ("--num-classes", "--img-size", "--in-chans"):
        parser.add_argument(flag, type=int, help="(default: the dataset's, without one CIFAR-10's)")
    parser.add_argument("--data-dir", metavar="DIR", help="folder of the dataset")
    parser.add_argument("--top", type=int, default=10, help="how many nets to show (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", metavar="DIR", help="write search.csv, best.yaml and search.png there")
    parser.set_defaults(run=_search)

    parser = commands.add_parser("correlation", help="train a sample of nets and see how well the metrics rank them")
    parser.add_argument("--config", required=True, metavar="FILE", help="see configs/autost/correlation_small.yaml")
    parser.add_argument("--data-dir", metavar="DIR", help="folder of the dataset")
    parser.add_argument("--dataset-download", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--output", required=True, metavar="DIR", help="one file a net; run again to go on")
    parser.add_argument("--device", help="(default: a GPU where there is one)")
    parser.set_defaults(run=_correlation)


def _search(args: argparse.Namespace) -> int:
    space = search.Space.of(args.space)
    dataset = None if args.dataset == "none" else args.dataset
    info = dataset_info(dataset or "cifar10", args.data_dir)
    shape = {key: getattr(args, key) for key in ("num_classes", "img_size", "in_chans")}
    shape = {key: getattr(info, key) if value is None else value for key, value in shape.items()}
    setting = search.Setting(args.T, **shape)
    constraints = search.Constraints(
        parameters=search.window(args.params) if args.params else None,
        flops=search.window(args.macs) if args.macs else None,
        latency_ms=args.latency,
    )
    method = args.method or ("evolution" if args.metric in search.MEASURED else "exact")
    if method == "exact":
        result = search.exact(space, args.metric, setting, constraints, top=args.top)
        print(f"Space {space.name}: all {space.size:,} nets covered in {result.seconds:.2f} s, exact")
    else:
        images = None
        if dataset and args.metric in search.MEASURED:
            images = search.images_of(dataset, args.metric, setting, args.seed, data_dir=args.data_dir)
        log = f"{args.output}/evolution.jsonl" if args.output else None
        result = search.evolve(
            space,
            args.metric,
            setting,
            constraints,
            settings=search.Evolution(seed=args.seed),
            images=images,
            top=args.top,
            log=log,
            progress=True,
        )
        print(f"Space {space.name}: {result.looked_at:,} of {space.size:,} nets in {result.seconds:.2f} s, evolution")
    print(f"\n{search.table(result, args.metric)}")
    if args.latency:
        print("\nLatency was measured on these only: a quicker net of the space may have been passed over.")
    if args.output:
        paths = search.write(
            result,
            args.output,
            space=space,
            metric=args.metric,
            setting=setting,
            constraints=constraints,
            dataset=dataset,
            command=args.command,
        )
        print(f"\nWritten: {', '.join(map(str, paths))}")
    return 0


def _correlation(args: argparse.Namespace) -> int:
    rows = search.correlate(
        search.CorrelationConfig.read(args.config),
        args.output,
        data_dir=args.data_dir,
        download=args.dataset_download,
        device=args.device,
        progress=True,
    )
    print(search.correlation_table(rows) if rows else f"Other processes still train; see {args.output}.")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns 0, or 2 where the arguments make no sense."""
    parser = argparse.ArgumentParser(
        prog="python -m spikezoo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_count(commands)
    _add_patches(commands)
    _add_activations(commands)
    _add_export(commands)
    _add_push(commands)
    _add_search(commands)
    args = parser.parse_args(argv)
    args.command = shlex.join(["python", "-m", "spikezoo", *(sys.argv[1:] if argv is None else argv)])
    try:
        result: int = args.run(args)
    except (ValueError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return result


if __name__ == "__main__":
    sys.exit(main())
