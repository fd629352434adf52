"""Rollouts by the script's own sampler, with its decoding step captured in a CUDA graph.

    python tools/graph_rollout.py train --model Qwen/Qwen2.5-VL-3B-Instruct --data ladder.parquet

takes the options of `observe_r1.py train`. A decoding step of a 3B launches some 1,570 kernels, 22
to 32 ms of Python however few rows there are; a graph launches them at once. It reads and writes
the same memory each time: the inputs of a step are copied to where the graph expects them, a tensor
says where the new keys and values go, and attention looks at a fixed number of slots, of which the
mask hides the empty ones. A graph is captured anew every 256 tokens and when rows leave.

What of it has run where: the same step launched kernel by kernel (eagerly), on a CPU, where it
writes the same tokens as without this file. Captured in a graph it has run nowhere yet; on a card
`pytest tests/test_engines.py` compares the two. With several processes the step runs eagerly.
"""

import math
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import observe_r1

GRAPHS = torch.cuda.is_available() and observe_r1.WORLD == 1
WINDOW = 256  # attention looks at a multiple of so many slots, or at all


class GraphLayer(observe_r1.FixedLayer):
    """A layer of the cache that asks its decoder where to write and how much to show."""

    def __init__(self, layer, decoder):
        super().__init__(layer.buffer, decoder)
        self.decoder = decoder

    def update(self, keys, values, *args, **kwargs):
        both = torch.stack((keys, values), 1).to(self.buffer.dtype)  # [N,2,heads,1,size]
        self.buffer.index_copy_(3, self.decoder.place, both)
        return self.buffer[..., : self.decoder.window, :].unbind(1)


class GraphDecoder:
    """Stands in for the forward pass of a language model while the script samples."""

    def __init__(self, forward):
        self.forward = forward

    def __call__(self, **inputs):
        cache, mask = inputs.pop("cache"), inputs.pop("attention_mask")
        if inputs["inputs_embeds"].shape[1] > 1:  # a prompt
            return self.forward(**inputs, attention_mask=mask, cache=cache)
        mask = mask["full_attention"]  # [N,1,1,n]: n slots are filled, with this token's
        n, new = mask.shape[-1], not isinstance(cache.layers[0], GraphLayer)
        if new:
            cache.layers = [GraphLayer(layer, self) for layer in cache.layers]
        if new or n > self.window or len(mask) < len(self.mask):
            self.window = min(WINDOW * math.ceil(n / WINDOW), cache.layers[0].buffer.shape[3])
            self.inputs = {name: values.clone() for name, values in inputs.items()}
            self.mask = mask.new_full((len(mask), 1, 1, self.window), -math.inf)
            self.place = torch.empty(1, dtype=torch.long, device=mask.device)
            self.set(inputs, mask)
            self.run = self.captured(cache)
        self.set(inputs, mask)
        self.run()
        return self.output

    def set(self, inputs, mask):
        """Copy what a step needs to where the graph expects it."""
        for name, values in inputs.items():
            self.inputs[name].copy_(values)
        self.mask[..., : mask.shape[-1]] = mask
        self.place.fill_(mask.shape[-1] - 1)

    def captured(self, cache):
        """The step as a function: one launch with a graph, else all of them."""

        def step():  # done twice, it changes nothing
            mask = {"full_attention": self.mask}
            self.output = self.forward(**self.inputs, attention_mask=mask, cache=cache)

        if not GRAPHS:
            return step
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            step()  # what libraries do only the first time cannot be captured
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay


def graph_rollout(model, processor, problems, config):
    """Sample G responses for each problem, as `observe_r1.rollout` does."""
    decoder = model.model.language_model
    decoder.forward = GraphDecoder(decoder.forward)
    try:
        return observe_r1.rollout(model, processor, problems, config)
    finally:
        del decoder.forward


def main():
    """The script's own, with this sampler; `ladder` and `eval` would not use it."""
    observe_r1.COMMANDS = {"train": partial(observe_r1.train, rollout=graph_rollout)}
    observe_r1.main()


if __name__ == "__main__":
    main()
