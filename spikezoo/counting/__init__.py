"""Counters: MACs, synaptic operations, energy and firing rates of one forward pass, operation by operation.

A dispatch mode sees every tensor operation of a forward pass, whatever module or function started it, and looks it up
in a table: a rule, free by convention, or neither, and then the result says so. Two columns stand side by side.

*exact*: one event through one non-zero weight is one synaptic operation (SOP). Borders, stride, dilation, groups and
pruned weights are exact; an integer value k is k events; signed spikes count by magnitude. Pooling, and averaging, of
spikes is an operation per spike and window; a layer behind an average of n spikes is charged for each of the n, so
that its exact column may exceed the paper's, which sees the averaged rate. Analog input is MACs: the dense number
less the weights that are zero, or the same number of additions, counted as SOPs, where the weights are -c, 0, +c.
Every value of an analog frame takes part, zeros too, be they black pixels or the padding at the border: there are no
events to wait for. Counters of products that are not zero, such as NeuroBench's, leave them out: of a 3x3 convolution
of 32x32 pixels that is 4 %.

*paper*: firing rate of the layer's input x T x dense MACs, analog input (the stem) as MACs once, no credit for zero
weights, pooling free. Sign activations, of which none is ever silent, are MACs there, as the ticket papers charge them.
Of an attention product, the rate is that of the operand that is binary.

Whether a tensor holds spikes is followed from where they are made (a comparison, a sign), not guessed from values:
averaging over n makes multiples of 1/n of them, so the classifier on the mean over T steps and h x w positions counts
each spike that arrived once, and its paper column has the rate of that mean x T x MACs. Only the model's input, and
what an operation without a rule puts out, is judged by its values; ``inputs='analog'`` overrules that for the input.
The sum of a spike and a pooled spike counts in multiples of the smaller, and windows of unequal size are analog.

Biases, element-wise operations and norms are free, as in the papers; ``neuron_ops`` and ``norm_ops`` add them.
"""

from __future__ import annotations

from spikezoo.counting.results import Count, CountSummary, FiringRate, ModuleCount, align
from spikezoo.counting.run import MAC_PJ, SOP_PJ, count, count_loader

__all__ = [
    "MAC_PJ",
    "SOP_PJ",
    "Count",
    "CountSummary",
    "FiringRate",
    "ModuleCount",
    "align",
    "count",
    "count_loader",
]
