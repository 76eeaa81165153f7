"""What a run writes and says: the line and the row of every epoch, the delivered weights, the pictures."""

from __future__ import annotations

import csv
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from spikezoo.checkpoint import atomic
from spikezoo.counting import MAC_PJ, SOP_PJ, count_loader
from spikezoo.evaluate import environment, write_layer_rates
from spikezoo.factory import SpikingModel
from spikezoo.hub import push_folder
from spikezoo.observe import failing_layers
from spikezoo.saving import save_checkpoint
from spikezoo.train.curves import LAYER_RATES, plot

if TYPE_CHECKING:
    from spikezoo.train.run import Run

__all__ = ["begin", "deliver", "look_at_rates", "say_epoch", "trim_rows", "write_epoch", "write_json"]


def write_json(path: Path, content: object) -> None:
    """Write JSON under a temporary name, then rename."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


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


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file, none where there is none.

    Args:
        path: The file.
    """
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a CSV file of rows with all their columns.

    Args:
        path: The file.
        rows: At least one.
    """
    columns = dict.fromkeys(key for row in rows for key in row)
    with atomic(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


def trim_rows(folder: Path, epoch: int) -> None:
    """Keep the rows of the first epochs alone; those of an older version, which counted from 0, are counted from 1.

    Args:
        folder: The run's.
        epoch: How many epochs are done.
    """
    for name in ("summary.csv", LAYER_RATES):
        rows: list[dict[str, Any]] = list(read_rows(folder / name))
        if not rows:
            continue
        shift = int(rows[0]["epoch"]) == 0
        kept = [{**row, "epoch": int(row["epoch"]) + shift} for row in rows]
        kept = [row for row in kept if row["epoch"] <= epoch]
        if kept:
            write_rows(folder / name, kept)
        else:
            (folder / name).unlink()


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
    write_rows(run.folder / "summary.csv", [*read_rows(run.folder / "summary.csv"), row])
    write_layer_rates(run.folder / LAYER_RATES, run.epoch, results.get("layer_firing_rates") or {})
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
