"""The gallery: static pages of trained nets, of which the small ones run in the browser, spike by spike."""

from spikezoo.gallery.pages import build as build

__all__ = ["build"]
