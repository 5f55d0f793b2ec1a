# SPDX-License-Identifier: Apache-2.0
"""There and back between ranks, beside one of slots: torchrun --nproc-per-node 2 bench/bench_expert_parallel.py

Of the peers every slot is a row that goes to the rank of its expert and comes back, one with torch alone, one over the
kernels of `moe`. The experts of all do nothing, and do it to rows that lie by expert. Contenders take turns; a row is
the median time of the slowest rank in each round, and the bytes that a rank hands to the collectives for others.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
import torch.distributed as dist
from ranks import begin_rank, seconds
from torch import Tensor

from fmkernels import expert_parallel, moe

NUM_EXPERTS = 64
PEER = "slots, with moe"


def with_torch(x: Tensor, topk_weights: Tensor, topk_idx: Tensor) -> Tensor:
    """A stable sort of the slots, and what torch has for the rest."""
    experts, order = topk_idx.flatten().sort(stable=True)
    rows, ids, splits = slots_there(x.index_select(0, order // topk_idx.shape[1]), experts)
    by_expert = ids.sort(stable=True).indices
    y = rows.index_select(0, by_expert)  # here the experts would be
    y = slots_back(torch.empty_like(y).index_copy_(0, by_expert, y), splits)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    return (y.index_select(0, back).view(*topk_idx.shape, -1) * topk_weights.unsqueeze(-1).to(x.dtype)).sum(1)


def with_moe(x: Tensor, topk_weights: Tensor, topk_idx: Tensor) -> Tensor:
    """The same over the kernels of `fmkernels.moe`: only what travels is another."""
    mapping = moe.build_mapping(topk_idx, NUM_EXPERTS)
    experts = topk_idx.flatten().new_empty(topk_idx.numel())
    experts[mapping.token_topk_to_pos.flatten()] = topk_idx.flatten()
    rows, ids, splits = slots_there(moe.permute(x, mapping), experts)
    local = moe.build_mapping(ids[:, None], NUM_EXPERTS)
    y = moe.permute(rows, local)  # here the experts would be
    return moe.combine(slots_back(moe.combine(y, local, None), splits), mapping, topk_weights)


def slots_there(rows: Tensor, experts: Tensor) -> tuple[Tensor, Tensor, tuple[list[int], list[int]]]:
    num_ranks = dist.get_world_size()
    sent = torch.bincount(experts // (NUM_EXPERTS // num_ranks), minlength=num_ranks)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)
    sent, received = torch.stack((sent, received)).tolist()
    there, ids = rows.new_empty(sum(received), rows.shape[1]), experts.new_empty(sum(received))
    dist.all_to_all_single(there, rows, received, sent)
    dist.all_to_all_single(ids, experts, received, sent)
    return there, ids, (sent, received)


def slots_back(rows: Tensor, splits: tuple[list[int], list[int]]) -> Tensor:
    y = rows.new_empty(sum(splits[0]), rows.shape[1])
    dist.all_to_all_single(y, rows, *splits)
    return y


def ours(x: Tensor, topk_weights: Tensor, topk_idx: Tensor, **options: object) -> Tensor:
    recv_x, _, handle = expert_parallel.dispatch(x, topk_idx, NUM_EXPERTS, **options)
    return expert_parallel.combine(moe.permute(recv_x, handle.mapping), handle, topk_weights)


def bytes_sent(function: Callable[[], object]) -> int:
    """What this rank hands to the collectives for others."""
    total, original = 0, dist.all_to_all_single

    def counting(output, input, output_splits=None, input_splits=None, group=None, async_op=False):
        nonlocal total
        rank, num_ranks = dist.get_rank(), dist.get_world_size()
        own = input.shape[0] // num_ranks if input_splits is None else input_splits[rank]
        total += (input.shape[0] - own) * (input.nbytes // max(input.shape[0], 1))
        return original(output, input, output_splits, input_splits, group=group, async_op=async_op)

    dist.all_to_all_single = counting
    try:
        function()
    finally:
        dist.all_to_all_single = original
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1024, help="of a rank")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=21)
    options = parser.parse_args()
    rank = begin_rank()
    generator = torch.Generator().manual_seed(rank)
    for dtype in (torch.float32, torch.bfloat16):
        for num_topk in (2, 8):
            x = torch.randn(options.tokens, options.hidden, generator=generator).to(dtype)
            idx = torch.rand(options.tokens, NUM_EXPERTS, generator=generator).topk(num_topk).indices.int()
            weights = torch.rand(options.tokens, num_topk, generator=generator)
            contenders = {
                "slots, with torch": lambda a=(x, weights, idx): with_torch(*a),
                PEER: lambda a=(x, weights, idx): with_moe(*a),
                "dispatch, combine": lambda a=(x, weights, idx): ours(*a),
                "payload int8": lambda a=(x, weights, idx): ours(*a, payload="int8"),
                "max_tokens": lambda a=(x, weights, idx): ours(*a, max_tokens=options.tokens),
            }
            result = contenders["dispatch, combine"]()
            assert torch.equal(result, contenders[PEER]())
            if dtype == torch.float32:  # in bfloat16 the sums of torch are less exact than assert_close takes
                torch.testing.assert_close(result, contenders["slots, with torch"]())
            times = {name: [] for name in contenders}
            for _ in range(options.rounds):
                for name, function in contenders.items():
                    times[name].append(seconds(function))
            sent = {name: bytes_sent(function) for name, function in contenders.items()}
            if rank == 0:
                print(f"{options.tokens} x {options.hidden} {dtype}, top {num_topk}")
                for name, list_of in times.items():
                    ratios = sorted(a / b for a, b in zip(times[PEER], list_of, strict=True))
                    quartiles = f"{ratios[len(ratios) // 4]:.2f}-{ratios[-1 - len(ratios) // 4]:.2f}"
                    took, mebibytes = statistics.median(list_of) * 1e3, sent[name] / 2**20
                    against = f"x peer {statistics.median(ratios):.2f} ({quartiles})"
                    print(f"  {name:20} {took:7.1f} ms   {mebibytes:6.1f} MiB sent   {against}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
