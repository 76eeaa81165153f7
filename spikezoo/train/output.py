"""What a run writes and says: the line and the row of every epoch, the delivered weights, the pictures."""

from __future__ import annotations

import json
import shlex
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from timm.utils import update_summary

from spikezoo.checkpoint import atomic
from spikezoo.evaluate import environment, write_layer_rates
from spikezoo.hub import push_folder
from spikezoo.observe import failing_layers
from spikezoo.saving import save_checkpoint
from spikezoo.train.curves import LAYER_RATES, plot

if TYPE_CHECKING:
    from spikezoo.train.run import Run

__all__ = ["begin", "deliver", "say_epoch", "write_epoch", "write_json"]


def write_json(path: Path, content: Any) -> None:
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


def write_epoch(run: Run, train: dict[str, Any], results: dict[str, Any], acted: dict[str, Any], lr: float) -> None:
    """Append the epoch's row to summary.csv, and the rates of its layers to layer_rates.csv.

    Args:
        run: The run, whose epoch is done.
        train: Loss, firing rate, images a second and seconds of the training.
        results: Of the evaluation.
        acted: Columns of transforms.
        lr: Learning rate.
    """
    keys = ("top1", "top5", "loss", "firing_rate", "images_per_second")
    eval_row = OrderedDict((key, results[key]) for key in keys)
    if "ema" in results:
        eval_row.update((f"ema_{key}", results["ema"][key]) for key in keys[:4])
    eval_row.update(acted)
    update_summary(run.epoch - 1, train, eval_row, filename=run.folder / "summary.csv", lr=lr)
    write_layer_rates(run.folder / LAYER_RATES, run.epoch - 1, results["layer_firing_rates"])


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


def deliver(run: Run, results: dict[str, Any]) -> None:
    """Write the weights that the run delivers, its pictures, and say where everything is.

    Args:
        run: The run, whose epochs are done.
        results: The last evaluation.
    """
    args, model = run.args, run.ema or run.model
    for transform, _ in run.parts:
        if transform.deliver:
            model = transform.deliver(model)
    final = results.get("ema", results)
    measured = {key: final[key] for key in ("top1", "top5", "loss", "samples", "firing_rate")}
    for transform, _ in run.parts:
        if transform.report:
            measured |= transform.report(model)
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
    model.pretrained_cfg |= {"mean": run.inputs["mean"], "std": run.inputs["std"], "inputs": run.inputs}
    facts, names = run.val_loader.facts, run.val_loader.info.label_names
    seen = {key: facts[key] for key in ("crop_pct", "interpolation") if key in facts}
    model.pretrained_cfg |= seen | {"label_names": list(names) if len(names) == model.num_classes else None}
    save_checkpoint(model, run.folder, row)
    pictures = plot(run.folder, final["layer_firing_rates"])
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
