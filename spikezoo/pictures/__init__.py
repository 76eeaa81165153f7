"""Pictures of what a model sees, does and costs."""

from __future__ import annotations

from spikezoo.pictures.costs import draw_energies, draw_operations, draw_zoo, pareto_front, place_labels
from spikezoo.pictures.curves import (
    draw_accuracy,
    draw_layer_rates,
    draw_measure,
    draw_rates,
    draw_thresholds,
    draw_training,
)
from spikezoo.pictures.figure import check_picture, event_pixels, plain_ticks, to_pixels
from spikezoo.pictures.maps import activation_maps, caption, draw_activations, draw_events, draw_patches
from spikezoo.pictures.spikes import answer_of, draw_potentials, draw_raster, potentials, spikes_over_time

__all__ = [
    "activation_maps",
    "answer_of",
    "caption",
    "check_picture",
    "draw_accuracy",
    "draw_activations",
    "draw_energies",
    "draw_events",
    "draw_layer_rates",
    "draw_measure",
    "draw_operations",
    "draw_patches",
    "draw_potentials",
    "draw_raster",
    "draw_rates",
    "draw_thresholds",
    "draw_training",
    "draw_zoo",
    "event_pixels",
    "pareto_front",
    "place_labels",
    "plain_ticks",
    "potentials",
    "spikes_over_time",
    "to_pixels",
]
