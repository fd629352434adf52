"""Rollouts by vLLM instead of the script's own sampling: train with a faster engine.

    pip install vllm
    python tools/vllm_rollout.py --model Qwen/Qwen2.5-VL-3B-Instruct --data ladder.parquet

takes the options of `observe_r1.py train`. This program has never run with vLLM: it is written
after the sources of vLLM 0.33 and of TRL's use of it, and tested against a stand-in of the calls it
makes. It is for one GPU and one process, which the engine shares with training. The engine holds a
copy of the weights of its own, and each rollout writes the learned ones into it anew. Adapters and
several processes are refused, because neither has been thought through.
"""

import functools
import os
import sys
from pathlib import Path

import torch
from qwen_vl_utils import process_vision_info
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import observe_r1

GPU_SHARE = 0.3  # of the memory, for the engine's weights and cache
MOST_PICTURES = 8  # in a prompt


@functools.cache
def start_engine(model, min_pixels, max_pixels):
    """The engine, started once, with the weights of a folder or hub id."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # so that its weights are within reach
    try:
        import vllm
    except ImportError as error:
        raise ValueError("tools/vllm_rollout.py needs vllm: pip install vllm") from error
    return vllm.LLM(
        model,
        gpu_memory_utilization=GPU_SHARE,
        limit_mm_per_prompt={"image": MOST_PICTURES},
        mm_processor_kwargs={"min_pixels": min_pixels, "max_pixels": max_pixels},
        # What is cached of a prompt or a picture is old after a step: all weights learn.
        enable_prefix_caching=False,
        mm_processor_cache_gb=0,
    )


def engine_request(problem, processor, config):
    """What the engine is given for a problem: the prompt's text and its resized pictures.

    The text has one token for each picture; the engine makes room for the others itself.
    """
    pictures = [observe_r1.eight_bit(picture) for picture in problem["images"]]
    chat = observe_r1.chat_messages({**problem, "images": pictures}, config)
    text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    resized, _ = process_vision_info([chat])
    return {"prompt": text, "multi_modal_data": {"image": resized} if resized else {}}


def vllm_rollout(model, processor, problems, config):
    """Sample G responses for each problem, as `observe_r1.rollout` does, and return Rollouts.

    ValueError with adapters, with several processes, or for a problem with too many pictures.
    """
    import vllm

    if config.lora_rank:
        raise ValueError("--lora_rank: the engine cannot be given adapters")
    if observe_r1.WORLD > 1:
        raise ValueError("the engine works in one process alone, not under torchrun")
    for problem in problems:
        if len(problem["images"]) > MOST_PICTURES:
            raise ValueError(f"problem {problem['id']!r} has more than {MOST_PICTURES} pictures")
    engine = start_engine(config.model, config.min_pixels, config.max_pixels)
    engine.apply_model(lambda copy: copy.load_weights(model.named_parameters()))

    eos = model.generation_config.eos_token_id
    stop = {processor.tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
    settings = [
        vllm.SamplingParams(
            n=config.num_generations,
            temperature=config.temperature,
            top_p=1.0,
            top_k=0,
            max_tokens=config.max_new_tokens,
            stop_token_ids=sorted(stop),
            logit_bias=dict.fromkeys(observe_r1.vision_tokens(model), -100),
            seed=int(torch.randint(2**31, ())),  # follows from the step, as in the script
        )
        for _ in problems
    ]
    requests = [engine_request(problem, processor, config) for problem in problems]
    outputs = engine.generate(requests, settings, use_tqdm=False)

    responses = [
        torch.tensor(response.token_ids, device=model.device)
        for output in outputs
        for response in output.outputs
    ]
    B, G = len(problems), config.num_generations
    mask = pad_sequence([torch.ones_like(ids) for ids in responses], batch_first=True)
    groups = [responses[b * G : (b + 1) * G] for b in range(B)]
    return observe_r1.Rollouts(
        prompt=observe_r1.encode_prompts(problems, processor, config),
        response_ids=pad_sequence(responses, batch_first=True).view(B, G, -1),
        mask=mask.view(B, G, -1),
        texts=[processor.batch_decode(group, skip_special_tokens=True) for group in groups],
    )


def main():
    """Train with the engine; a mistake that a user can mend ends in one line."""
    try:
        _, config = observe_r1.parse_arguments(["train", *sys.argv[1:]])
        start_engine(config.model, config.min_pixels, config.max_pixels)
        observe_r1.train(config, vllm_rollout)
    except (ValueError, OSError) as error:
        raise SystemExit(f"vllm_rollout: {error}") from error


if __name__ == "__main__":
    main()
