#!/usr/bin/env python3
"""Measure how fast models train and infer: ``python benchmark.py --help`` says what against what."""

from tools.benchmark import main

if __name__ == "__main__":
    main()
