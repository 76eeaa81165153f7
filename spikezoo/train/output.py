"""What a run writes and says: the line and the row of every epoch, the delivered weights, the pictures."""

from __future__ import annotations

import csv
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from spikezoo.checkpoint import atomic, read_metadata, read_table, write_metadata
from spikezoo.counting import MAC_PJ, SOP_PJ, count_loader
from spikezoo.evaluate import environment
from spikezoo.factory import SpikingModel
from spikezoo.hub import push_folder
from spikezoo.observe import failing_layers
from spikezoo.saving import save_checkpoint
from spikezoo.train.curves import LAYER_RATES, plot

if TYPE_CHECKING:
    from spikezoo.train.run import Run

__all__ = ["begin", "deliver", "look_at_rates", "say_epoch", "trim_tables", "write_epoch"]

# One row an epoch.
TABLES = ("summary.csv", LAYER_RATES)


def begin(run: Run) -> None:
    """Say what is trained on what, where.

    Args:
        run: The run.
    """
    args, model = run.args, run.model
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    run.say(
        f"{args.model}: {count:,} parameters, T={model.T}, neuron={model.neuron_config.kind}, "
        f"mpbn={model.mpbn or 'none'}; {args.dataset}: {run.train_loader.num_samples:,} training and "
        f"{run.val_loader.num_samples:,} test images; {run.device}"
        f"{f' x {args.world_size}' if args.distributed else ''}; output {run.folder}"
    )


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a CSV file of rows with all their columns; without rows none is left.

    Args:
        path: The file.
        rows: Its rows.
    """
    if not rows:
        path.unlink(missing_ok=True)
        return
    columns = dict.fromkeys(key for row in rows for key in row)
    with atomic(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


def first_rows(path: Path, epoch: int) -> list[dict[str, Any]]:
    """Rows of the first epochs of a table, counted from 1; those of an older version counted from 0.

    One that is not as the run wrote it is no reason to lose the run: it is set aside, and said.

    Args:
        path: The file.
        epoch: How many epochs are done.
    """
    try:
        rows = read_table(path)
        numbers = [int(row["epoch"]) for row in rows]
    except (ValueError, KeyError, TypeError):
        aside = path.with_name(f"{path.name}.damaged")
        path.replace(aside)
        print(
            f"{path} is not as this run wrote it: damaged, or edited. It is {aside.name} now, and the rows go on with "
            f"epoch {epoch + 1}.",
            flush=True,
        )
        return []
    shift = int(numbers[:1] == [0])
    counted = zip(rows, numbers, strict=True)
    return [{**row, "epoch": number + shift} for row, number in counted if number + shift <= epoch]


def trim_tables(folder: Path, epoch: int, facts: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Keep the rows of the first epochs alone, write down what they are, and return them.

    Args:
        folder: The run's, with its args.yaml.
        epoch: How many epochs are done.
        facts: Of the run.
    """
    try:
        read_metadata(folder)
    except ValueError as error:
        print(f"{error} Here it is written anew, and the tables are taken as they are.", flush=True)
        (folder / "metadata.json").unlink()
    tables = {name: first_rows(folder / name, epoch) for name in TABLES}
    write_metadata(folder, facts, tables)
    for name, rows in tables.items():
        write_table(folder / name, rows)
    return tables


def write_epoch(run: Run, train: dict[str, Any], results: dict[str, Any], acted: dict[str, Any], lr: float) -> None:
    """Append the epoch's row to summary.csv, and where it was evaluated the rates of its layers to layer_rates.csv.

    Args:
        run: The run, whose epoch is done.
        train: Loss, accuracy, firing rate, images a second and seconds of the training.
        results: Of the evaluation; {} where there was none.
        acted: Columns of transforms.
        lr: Mean learning rate of the epoch's batches.
    """
    keys = ("top1", "top5", "loss", "firing_rate", "images_per_second")
    measured = {key: results.get(key) for key in keys}
    if "ema" in results:
        measured |= {f"ema_{key}": results["ema"][key] for key in keys[:4]}
    row: dict[str, Any] = {"epoch": run.epoch}
    row |= {f"train_{key}": value for key, value in train.items()}
    row |= {f"eval_{key}": value for key, value in (measured | acted).items()} | {"lr": lr}
    run.tables["summary.csv"].append(row)
    if rates := results.get("layer_firing_rates"):
        run.tables[LAYER_RATES].append({"epoch": run.epoch, **rates})
    for name, rows in run.tables.items():
        write_table(run.folder / name, rows)
    write_metadata(run.folder, run.facts, run.tables)
    for log in run.logs:
        log({key: value for key, value in row.items() if value is not None}, run.epoch)


def look_at_rates(run: Run, results: dict[str, Any]) -> None:
    """With --stop-when-dead, end a run of which a layer is dead or saturated.

    Args:
        run: The run, whose epoch is done.
        results: Of the evaluation; {} where there was none.

    Raises:
        SystemExit: Asked for, and there is one.
    """
    failing = failing_layers(results.get("layer_firing_rates") or {})
    if failing and run.args.stop_when_dead:
        told = ", ".join(f"{name} is {what}" for name, what in failing.items())
        raise SystemExit(
            f"Stopped after epoch {run.epoch}: {told}. A lower threshold, another initialisation or a smaller --lr may "
            f"help. Saved: {run.folder / 'last.safetensors'}"
        )


def say_epoch(run: Run, train: dict[str, Any], results: dict[str, Any]) -> None:
    """Say what the epoch brought.

    Args:
        run: The run, whose epoch is done.
        train: As in :func:`write_epoch`.
        results: Of the evaluation; {} where there was none.
    """
    line = f"epoch {run.epoch}/{run.epochs}: train loss {train['loss']:.4f}, "
    if results:
        best, rate = results.get("ema", results), results["firing_rate"]
        line += f"test loss {results['loss']:.4f}, top-1 {results['top1']:.2f} %"
        line += f" (averaged weights {best['top1']:.2f} %)" if run.ema else ""
        line += (f", firing rate {rate:.3f}" if rate is not None else "") + ", "
    run.say(line + f"{train['images_per_second']:.0f} images/s, {train['seconds']:.0f} s")
    if results and (failing := failing_layers(results["layer_firing_rates"])):
        run.say(f"  say nothing: {', '.join(f'{name} is {what}' for name, what in failing.items())}")


def counted(run: Run, model: SpikingModel) -> dict[str, float]:
    """Operations (G) and energies (mJ) of an image, in the papers' convention and exact, as tables print them.

    Args:
        run: The run.
        model: What it delivers.
    """
    inputs = "auto" if model.takes_events else "analog"  # pixels are no spikes, whatever their values
    mean = count_loader(model, run.val_loader, run.args.count, inputs=inputs, norm_ops=run.args.norm_ops).mean
    multiplications = (mean.energy_paper_mj * 1e9 - mean.sops_paper * SOP_PJ) / MAC_PJ
    operations = {"ops_g": (multiplications + mean.sops_paper) / 1e9, "sops_exact_g": mean.sops_exact / 1e9}
    return operations | {"energy_paper_mj": mean.energy_paper_mj, "energy_exact_mj": mean.energy_exact_mj}


def deliver(run: Run, results: dict[str, Any]) -> None:
    """Write the weights that the run delivers, its pictures, and say where everything is.

    Args:
        run: The run, whose epochs are done.
        results: The last evaluation.
    """
    args, model = run.args, run.ema or run.model
    for transform, _ in run.parts:
        if transform.deliver:
            model = cast(SpikingModel, transform.deliver(model))
    final = results.get("ema", results)
    measured = {key: final[key] for key in ("top1", "top5", "loss", "samples", "firing_rate")}
    for transform, _ in run.parts:
        if transform.report:
            measured |= transform.report(model)
    if args.count:
        measured |= counted(run, model)
    row = {
        "dataset": args.dataset,
        "split": run.val_split,
        **run.val_loader.facts,
        **measured,
        "epochs": run.epochs,
        "updates": run.length.total,
        **({"progressive": dict(run.length.sizes)} if args.progressive else {}),
        "T": run.model.T,
        "precision": args.amp_dtype if run.amp else "float32",
        "train_command": args.command,
        "seed": args.seed,
        **environment(),
    }
    model.inputs = run.inputs
    facts, names = run.val_loader.facts, run.val_loader.info.label_names
    seen = {key: facts[key] for key in ("crop_pct", "interpolation") if key in facts}
    model.pretrained_cfg |= seen | {"label_names": list(names) if len(names) == model.num_classes else None}
    save_checkpoint(model, run.folder, row)
    pictures = plot(run.folder, final["layer_firing_rates"])
    for log in run.logs:
        log({f"final_{key}": value for key, value in measured.items() if value is not None}, run.epochs)
    rate = final["firing_rate"]
    run.say(f"\nTest accuracy   {final['top1']:.2f} % (last epoch{', averaged weights' if run.ema else ''})")
    if rate is not None:
        run.say(f"Firing rate     {rate:.3f} spikes per neuron and time step, T={run.model.T}")
    run.say(f"Checkpoint      {run.folder / 'model.safetensors'}")
    if pictures:
        run.say(f"Pictures        {', '.join(map(str, pictures))}")
    data = f" --data-dir {shlex.quote(args.data_dir)}" if args.data_dir else ""
    if args.push_to_hub:
        run.say(f"Published       {push_folder(run.folder, args.push_to_hub)}")
    validate = args.command.split(" ")
    door = "python validate.py" if validate[:2] == ["python", "train.py"] else "spikezoo validate"
    run.say(f"Validate it     {door} --checkpoint {shlex.quote(str(run.folder))}{data}")
