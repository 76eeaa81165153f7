"""How well metrics predict accuracy (table 1 of the AutoST paper): a sample of nets, trained and ranked.

python -m tools.correlation --config configs/autost/correlation_small.yaml --data-dir DATA --output ranks
"""

from __future__ import annotations

import functools
import json
import math
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import Tensor
from tqdm import tqdm

from spikezoo.checkpoint import atomic
from spikezoo.checks import nearest, number, whole
from spikezoo.data import create_loader, dataset_info
from spikezoo.evaluate import environment, evaluate, write_rows
from spikezoo.flags import Parser, add_flags, leave
from spikezoo.search.evolution import RANDOM_DRAWS, random_net
from spikezoo.search.exhaustive import cover, keeping
from spikezoo.search.metrics import METRICS, batch_of, find_metric, score
from spikezoo.search.report import aligned, figure_of
from spikezoo.search.space import Constraints, Net, Setting, Space, cost, read_space, window


@dataclass(frozen=True)
class CorrelationConfig:
    """The experiment of table 1; the defaults are the paper's scale.

    Attributes:
        space: A name of :data:`SPACES`, a YAML file, or a mapping.
        nets: How many random nets to train.
        parameters: Window ``LO:HI`` that they must keep to, or None.
        T: Time steps.
        dataset: Dataset to train and test on.
        subset: Training images, classes balanced; None takes all.
        test_subset: Test images; None takes all.
        epochs: Epochs of every training, AdamW with a cosine schedule.
        batch_size: Images of a batch.
        lr: Largest learning rate.
        weight_decay: On weights, not on norms and biases.
        warmup_epochs: Epochs of linear warm-up.
        smoothing: Label smoothing.
        amp: bfloat16 autocast in training and testing; the metrics are computed in float32.
        channels_last: Memory format of images and weights.
        compile: Compile every net: worth it for long trainings only.
        metrics: Names of :data:`METRICS`.
        model_arguments: Further arguments of ``create_model`` for all nets.
        bootstrap: Resamples of the confidence intervals.
        seed: Of the choice of nets, the weights, the order of images and the bootstrap.
    """

    space: Any = "small"
    nets: int = 100
    parameters: str | None = None
    T: int = 4
    dataset: str = "cifar10"
    subset: int | None = None
    test_subset: int | None = None
    epochs: int = 100
    batch_size: int = 128
    lr: float = 5e-4
    weight_decay: float = 0.06
    warmup_epochs: float = 5
    smoothing: float = 0.1
    amp: bool = True
    channels_last: bool = True
    compile: bool = False
    metrics: Sequence[str] = tuple(METRICS)
    model_arguments: Mapping[str, Any] = field(default_factory=dict)
    bootstrap: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"nets": 3, "epochs": 1, "batch_size": 1, "bootstrap": 1, "subset": 1, "test_subset": 1, "T": 1}
        least |= {"lr": 0, "weight_decay": 0, "warmup_epochs": 0, "smoothing": 0, "seed": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if value is None and name in ("subset", "test_subset"):
                continue
            real = name in ("lr", "weight_decay", "warmup_epochs", "smoothing")
            if real:
                number(name, value, low, expected=f"a number of at least {low}")
            else:
                whole(name, value, low, expected=f"an integer of at least {low}")
        if isinstance(self.metrics, str) or not self.metrics:
            raise ValueError(f"metrics={self.metrics!r}: expected a list of {', '.join(METRICS)}.")
        for name in self.metrics:
            find_metric(name)

    @classmethod
    def read(cls, path: str | Path) -> CorrelationConfig:
        """Read a YAML file whose keys are the attributes.

        Raises:
            ValueError: An unknown key or a value that makes no sense.
            FileNotFoundError: No such file.
        """
        content = read_space(path)
        known = [item.name for item in fields(cls)]
        for key in content:
            if key not in known:
                raise ValueError(f"Unknown key {key!r} in {path}. {nearest(key, known)}")
        for key in ("lr", "weight_decay"):
            if isinstance(content.get(key), str):
                content[key] = float(content[key])  # YAML takes 5e-4 for text
        return cls(**content)


def sample(space: Space, count: int, setting: Setting, constraints: Constraints, seed: int) -> list[Net]:
    """Different random nets that keep the constraints, drawn as the evolution draws them."""
    rng = random.Random(seed)
    possible = sum(item.nets or 0 for item in keeping(cover(space, "parameters", setting), space, constraints))
    if possible < count:
        raise ValueError(
            f"The space {space.name!r} has {possible:,} nets inside the window, and {count} are asked for."
        )
    nets: dict[Net, None] = {}
    for _ in range(max(RANDOM_DRAWS, 100 * count)):
        net = random_net(space, rng)
        if constraints.allow(cost(net, setting)):
            nets[net] = None
        if len(nets) == count:
            return list(nets)
    raise ValueError(
        f"Random nets of the space {space.name!r} hardly hit the window: {len(nets)} of the {count} that are asked for "
        f"were found, of {possible:,} that there are. Widen it."
    )


def _train(
    config: CorrelationConfig, setting: Setting, net: Net, device: torch.device, data_dir: str | None, download: bool
) -> dict[str, Any]:
    """Train one net; accuracy and loss on the test images."""
    started = time.perf_counter()
    torch.manual_seed(config.seed)
    model = setting.create(net, **config.model_arguments)
    layout = torch.channels_last if config.channels_last else torch.preserve_format
    model.to(device=device, memory_format=layout)  # type: ignore[call-overload]
    load = functools.partial(
        create_loader,
        config.dataset,
        data_dir=data_dir,
        download=download,
        batch_size=config.batch_size,
        device=device,
        seed=config.seed,
        channels_last=config.channels_last,
    )
    loader = load("train", train=True, subset=config.subset)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=config.lr, weight_decay=config.weight_decay)
    steps, warm = config.epochs * len(loader), config.warmup_epochs * len(loader)

    def rate(step: int) -> float:
        if step < warm:
            return (step + 1) / (warm + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    autocast: Callable[[], Any] = (
        functools.partial(torch.autocast, device.type, torch.bfloat16) if config.amp else nullcontext
    )
    run: Callable[[Tensor], Tensor] = torch.compile(model) if config.compile else model
    losses: list[float] = []
    for epoch in range(config.epochs):
        loader.set_epoch(epoch)
        total = torch.zeros((), device=device)
        for images, labels in loader:
            with autocast():
                logits = run(images)
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=config.smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach()
        losses.append(float(total) / len(loader))
    result = evaluate(model, load("test", subset=config.test_subset), device=device, autocast=autocast)
    kept = {name: result[name] for name in ("top1", "top5", "loss", "firing_rate", "samples")}
    return {**kept, "train_losses": losses, "train_seconds": round(time.perf_counter() - started, 2)}


def _measure(config: CorrelationConfig, setting: Setting, net: Net, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """All metrics of one net, and how long each took."""
    values: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    for name in config.metrics:
        started = time.perf_counter()
        values[name] = score(
            net, name, setting, images=images, labels=labels, seed=config.seed, **config.model_arguments
        )
        seconds[name] = round(time.perf_counter() - started, 4)
    return {**values, "metric_seconds": seconds}


def _write_json(path: Path, content: Any) -> None:
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _claim(folder: Path, config: CorrelationConfig, space: Space) -> None:
    """Make the folder this experiment's, or raise where it is another's."""
    path = folder / "experiment.json"
    ours = json.loads(json.dumps({**asdict(config), "space": asdict(space)}))
    if path.is_file():
        theirs = json.loads(path.read_text(encoding="utf-8"))
        changed = sorted(key for key in ours if ours[key] != theirs.get(key))
        if changed:
            told = ", ".join(f"{key} is {ours[key]!r} and was {theirs.get(key)!r}" for key in changed)
            raise ValueError(f"{folder} holds another experiment: {told}. Use another --output.")
        return
    _write_json(path, ours)


def correlate(
    config: CorrelationConfig,
    folder: str | Path,
    *,
    data_dir: str | None = None,
    download: bool = True,
    rank: int | None = None,
    world_size: int | None = None,
    device: str | None = None,
    progress: bool = False,
) -> list[dict[str, Any]] | None:
    """Train a random sample of nets and see how well every metric ranks them.

    Every net leaves one JSON file in the folder, so an interrupted experiment goes on with the next net. Processes
    share the nets out among them by their number, and need nothing of each other but the folder: under torchrun, on
    one machine or on several with a common folder, each takes every world_size-th net. Whichever ends last writes
    the summary: nets.csv, correlation.csv and correlation.png.

    Args:
        config: The experiment.
        folder: Where the results go.
        data_dir: Folder of the dataset.
        download: Whether data that are not there may be downloaded.
        rank: Number of this process; None asks torchrun's environment.
        world_size: Number of processes; likewise.
        device: Where to train; None takes a GPU where there is one, by torchrun's local rank.
        progress: Show a progress bar.

    Returns:
        The correlations, a row a metric, or None while other processes still train.

    Raises:
        ValueError: A folder of another experiment, or a config that makes no sense.
        FileNotFoundError: The data are not there.
    """
    folder = Path(folder)
    rank = int(os.environ.get("RANK", 0)) if rank is None else rank
    world_size = int(os.environ.get("WORLD_SIZE", 1)) if world_size is None else world_size
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank}, world_size={world_size}: expected a rank from 0 to below world_size.")
    if device is None:
        gpus = torch.cuda.device_count()
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % gpus}" if gpus else "cpu"
    place = torch.device(device)
    space = Space.of(config.space)
    info = dataset_info(config.dataset, data_dir)
    setting = Setting(config.T, info.num_classes, info.img_size, info.in_chans)
    constraints = Constraints(parameters=window(config.parameters) if config.parameters else None)
    nets = sample(space, config.nets, setting, constraints, config.seed)
    folder.mkdir(parents=True, exist_ok=True)
    _claim(folder, config, space)
    files = [folder / f"net_{index:03d}.json" for index in range(len(nets))]
    mine = [index for index in range(rank, len(nets), world_size) if not files[index].is_file()]
    if mine:
        facts = environment()  # of the code that runs, whatever becomes of the checkout meanwhile
        images, labels = batch_of(
            config.dataset, config.metrics, setting, config.seed, data_dir=data_dir, download=download, device=place
        )
    for index in tqdm(mine, desc="nets", disable=not progress, leave=False):
        net = nets[index]
        row = {**net._asdict(), **cost(net, setting)._asdict(), **_measure(config, setting, net, images, labels)}
        row |= _train(config, setting, net, place, data_dir, download)
        _write_json(files[index], {"index": index, **row, "environment": facts})
    if not all(path.is_file() for path in files):
        return None
    return _summarise(config, [json.loads(path.read_text(encoding="utf-8")) for path in files], folder)


def _interval(statistic: Callable[[Any, Any], float], x: Any, y: Any, draws: int, seed: int) -> tuple[float, float]:
    """95 % percentile bootstrap interval over the nets."""
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(draws):
        chosen = rng.integers(0, len(x), len(x))
        if len(set(x[chosen])) > 1 and len(set(y[chosen])) > 1:  # no rank correlation of a constant
            values.append(statistic(x[chosen], y[chosen]))
    return (float(np.percentile(values, 2.5)), float(np.percentile(values, 97.5))) if values else (math.nan, math.nan)


def correlations(
    rows: Sequence[Mapping[str, Any]], metrics: Sequence[str], draws: int, seed: int
) -> list[dict[str, Any]]:
    """Kendall's tau-b and Spearman's rho of every metric with ``top1``, with bootstrap intervals.

    Args:
        rows: A row a net, with ``top1`` and the metrics.
        metrics: Names of metrics.
        draws: Resamples of the bootstrap.
        seed: Of the resamples.

    Returns:
        A row a metric; nan where all nets have the same value.
    """
    from scipy import stats

    def kendall(x: Any, y: Any) -> float:
        return float(stats.kendalltau(x, y).statistic)

    def spearman(x: Any, y: Any) -> float:
        return float(stats.spearmanr(x, y).statistic)

    accuracy = np.array([row["top1"] for row in rows], dtype=float)
    found = []
    for name in metrics:
        values = np.array([row[name] for row in rows], dtype=float)
        line: dict[str, Any] = {"metric": name, "nets": len(rows), "higher_is_better": METRICS[name].higher_is_better}
        for title, statistic in (("kendall", kendall), ("spearman", spearman)):
            constant = len(set(values)) == 1 or len(set(accuracy)) == 1
            low, high = (math.nan, math.nan) if constant else _interval(statistic, values, accuracy, draws, seed)
            line |= {title: math.nan if constant else statistic(values, accuracy)}
            line |= {f"{title}_low": low, f"{title}_high": high}
        found.append(line)
    return found


def _summarise(config: CorrelationConfig, nets: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    write_rows(folder / "nets.csv", nets)
    rows = correlations(nets, config.metrics, config.bootstrap, config.seed)
    write_rows(folder / "correlation.csv", rows)
    columns = 4
    figure = figure_of(3.1 * columns, 2.9 * math.ceil(len(rows) / columns))
    if figure is not None:
        axes = figure.subplots(math.ceil(len(rows) / columns), columns, squeeze=False).flatten()
        for axis, row in zip(axes, rows, strict=False):
            values = [net[row["metric"]] for net in nets]
            axis.scatter(values, [net["top1"] for net in nets], s=12, color="#1f6f8b")
            if min(values) > 0 and max(values) > 1000 * min(values):
                axis.set_xscale("log")
            axis.set_title(f"{row['metric']}\ntau {row['kendall']:.2f}, rho {row['spearman']:.2f}", fontsize=9)
            axis.grid(alpha=0.3)
        for axis in axes[len(rows) :]:
            axis.set_axis_off()
        for axis in axes[::columns]:
            axis.set_ylabel("test accuracy (%)")
        with atomic(folder / "correlation.png") as temporary:
            figure.savefig(temporary, dpi=130, format="png")
    return rows


def correlation_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The correlations as text."""
    lines = [["metric", "better", "Kendall", "95 %", "Spearman", "95 %", "nets"]]
    for row in rows:
        line = [row["metric"], "higher" if row["higher_is_better"] else "lower"]
        for name in ("kendall", "spearman"):
            line += [f"{row[name]:+.2f}", f"{row[f'{name}_low']:+.2f} to {row[f'{name}_high']:+.2f}"]
        lines.append([*line, str(row["nets"])])
    return aligned(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment of a config, or its share of it."""
    parser = Parser("python -m tools.correlation", __doc__)
    parser.add_argument("--config", required=True, metavar="FILE", help="see configs/autost/correlation_small.yaml")
    add_flags(parser, "data-dir", "dataset-download")
    parser.add_argument("--output", required=True, metavar="DIR", help="one file a net; run again to go on")
    add_flags(parser, "device")
    args = parser.parse_args(argv)
    rows = correlate(
        CorrelationConfig.read(args.config),
        args.output,
        data_dir=args.data_dir,
        download=args.dataset_download,
        device=args.device,
        progress=True,
    )
    print(correlation_table(rows) if rows else f"Other processes still train; see {args.output}.")
    return 0


if __name__ == "__main__":
    leave(main)
